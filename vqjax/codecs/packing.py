"""Codes to packed bytes and back.

Every code takes the bits its codebook needs, lowest bit first, and a row is
padded to whole bytes: M bytes for M codebooks of 256 codewords.
"""

from collections.abc import Sequence

import numpy as np


def num_bytes(sizes: Sequence[int]) -> int:
  """Returns the bytes of one packed code over codebooks of these sizes."""
  return -(-sum(_bits(sizes)) // 8)


def pack(codes_NM: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
  """Packs int32 codes into uint8 `[N, num_bytes(sizes)]`."""
  codes_NM = np.asarray(codes_NM)
  if all(bits == 8 for bits in _bits(sizes)):
    return codes_NM.astype(np.uint8)
  columns = [
    codes_NM[:, m, None] >> np.arange(bits) & 1
    for m, bits in enumerate(_bits(sizes))
  ]
  bits = np.concatenate(columns, axis=1).astype(np.uint8)
  return np.packbits(bits, axis=1, bitorder="little")


def unpack(packed: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
  """Unpacks uint8 rows into int32 codes `[N, M]`.

  Raises:
    ValueError: The rows have not `num_bytes(sizes)` bytes.
  """
  packed = np.asarray(packed)
  if packed.ndim != 2 or packed.shape[1] != num_bytes(sizes):
    raise ValueError(
      f"packed codes must have {num_bytes(sizes)} bytes per row, got shape "
      f"{packed.shape}."
    )
  if all(bits == 8 for bits in _bits(sizes)):
    return packed.astype(np.int32)
  bits = np.unpackbits(packed, axis=1, bitorder="little").astype(np.int32)
  starts = np.cumsum([0, *_bits(sizes)])
  columns = [
    bits[:, start:stop] @ (1 << np.arange(stop - start))
    for start, stop in zip(starts[:-1], starts[1:], strict=True)
  ]
  return np.stack(columns, axis=1).astype(np.int32)


def _bits(sizes: Sequence[int]) -> list[int]:
  return [max(int(size - 1).bit_length(), 1) for size in sizes]
