"""Files of the released HAKES program: parameters, and vectors without header.

`findex.bin` holds the base parameters and `uindex.bin` the learned ones, in
one layout, little endian:

  int32 number of transforms, here 1; int32 d_out, d_in; float32 A, b
  int32 d; uint64 vectors in the index; uint8 metric; int32 lists; float32
    centroids
  int32 d, m, bits; float32 codewords, (m, 2 ** bits, d / m)

Data files (`train.bin`, `neighbors.bin`) are rows of numbers and nothing else.

Reference: arXiv 2505.12524.
"""

import pathlib
import struct

import numpy as np
from flax import struct as flax_struct

from vqjax.codecs.hakes import HakesSide, check_metric, check_side
from vqjax.core import check_range
from vqjax.data import files, formats, rows

RAW_SUFFIX = ".bin"
_METRIC_OF_BYTE = {0: "l2", 1: "ip"}
_BYTE_OF_METRIC = {name: byte for byte, name in _METRIC_OF_BYTE.items()}
_MAX_SIZE = 1 << 24  # Of any dimension; more is a foreign file.


@flax_struct.dataclass
class HakesFile:
  """One side of the parameters, and what the file says of the index."""

  side: HakesSide  # Of numpy arrays, float32.
  metric: str = flax_struct.field(pytree_node=False)
  num_vectors: int = flax_struct.field(pytree_node=False, default=0)


class _Reader:
  """Takes numbers off the front of a file that it has read."""

  def __init__(self, path: pathlib.Path):
    self._path, self._bytes, self._at = path, path.read_bytes(), 0

  def take(self, kind: str, what: str):
    """Returns one number of the `struct` kind."""
    return struct.unpack("<" + kind, self._cut(struct.calcsize(kind), what))[0]

  def size(self, what: str, low: int = 1) -> int:
    """Returns an int32 that can be a size."""
    value = self.take("i", what)
    if not low <= value <= _MAX_SIZE:
      self.fail(f"expected {what} of {low} to {_MAX_SIZE}, got {value}")
    return value

  def floats(self, shape: tuple[int, ...], what: str) -> np.ndarray:
    """Returns an array of finite float32."""
    num_bytes = 4 * int(np.prod(shape, dtype=np.int64))
    x = np.frombuffer(self._cut(num_bytes, what), "<f4").reshape(shape)
    if not np.isfinite(x).all():
      self.fail(f"the {what} must be finite, got NaN or Inf")
    return x.astype(np.float32)

  def end(self) -> None:
    """Raises ValueError unless all was taken."""
    if self._at != len(self._bytes):
      self.fail(f"expected {self._at} bytes, got {len(self._bytes)}")

  def fail(self, reason: str):
    """Raises ValueError that names the file."""
    raise ValueError(
      f"{self._path} is no findex.bin or uindex.bin of HAKES, or is damaged: "
      f"{reason}."
    )

  def _cut(self, size: int, what: str) -> bytes:
    part = self._bytes[self._at : self._at + size]
    if len(part) < size:
      self.fail(
        f"the {what} end at byte {self._at + size}, but the file has "
        f"{len(self._bytes)}"
      )
    self._at += size
    return part


def load(path) -> HakesFile:
  """Reads a `findex.bin` or `uindex.bin`.

  Raises:
    ValueError: The file is truncated, damaged or something else.
  """
  path = files.user_path(path)
  if not path.is_file():
    raise FileNotFoundError(f"There is no file {path}; check the name.")
  reader = _Reader(path)
  count = reader.take("i", "number of transforms")
  if count != 1:
    reader.fail(f"expected 1 transform at its start, got {count}")
  e, d = (reader.size(what) for what in ("a reduced dimension", "a dimension"))
  reduction_ED = reader.floats((e, d), "reduction")
  bias_E = reader.floats((e,), "bias")
  _expect(reader, "dimension of the centroids", e)
  num_vectors = reader.take("Q", "number of vectors")
  metric = reader.take("B", "metric")
  if metric not in _METRIC_OF_BYTE:
    reader.fail(f"the metric must be 0 (l2) or 1 (ip), got {metric}")
  centroids_LE = reader.floats((reader.size("a number of lists"), e), "lists")
  _expect(reader, "dimension of the codes", e)
  m, num_bits = reader.size("a number of codes"), reader.size("a size in bits")
  if e % m or num_bits > 16:
    reader.fail(f"{m} codes of {num_bits} bits do not fit {e} dimensions")
  books_MKS = reader.floats((m, 1 << num_bits, e // m), "codebooks")
  reader.end()
  side = HakesSide(reduction_ED, bias_E, books_MKS, centroids_LE)
  return HakesFile(side, _METRIC_OF_BYTE[metric], num_vectors)


def _expect(reader, what: str, want: int) -> None:
  got = reader.take("i", what)
  if got != want:
    reader.fail(f"the {what} must be the reduced one, {want}, got {got}")


def save(parameters: HakesFile, path, *, overwrite: bool = False) -> None:
  """Writes a `findex.bin` or `uindex.bin`, whole or not at all."""
  side = parameters.side
  check_side(side)
  check_metric(parameters.metric)
  check_range("num_vectors", parameters.num_vectors, 0, 2**64 - 1)
  e, d = side.reduction_ED.shape
  m, k, _ = side.codebooks_MKS.shape
  if k < 2 or k & (k - 1):
    raise ValueError(
      "The file stores log2 of the number of codewords, which must be a power "
      f"of two, got {k}."
    )
  raw = lambda x: np.ascontiguousarray(x, "<f4").tobytes()
  metric, num_lists = _BYTE_OF_METRIC[parameters.metric], len(side.centroids_LE)
  parts = [
    struct.pack("<3i", 1, e, d),
    raw(side.reduction_ED),
    raw(side.bias_E),
    struct.pack("<iQBi", e, parameters.num_vectors, metric, num_lists),
    raw(side.centroids_LE),
    struct.pack("<3i", e, m, k.bit_length() - 1),
    raw(side.codebooks_MKS),
  ]
  with files.atomic_output(path, overwrite) as temporary:
    pathlib.Path(temporary).write_bytes(b"".join(parts))


def open_rows(
  path, dim: int | None = None, dtype="<f4", *, max_vectors: int | None = None
):
  """Opens vectors or ids as `[N, dim]`, memory-mapped.

  Files that end in .bin have no header: `dim` numbers of `dtype` make a row.
  Others are opened by `formats.open_vectors`.
  """
  path = files.user_path(path)
  if path.suffix.lower() != RAW_SUFFIX:
    return formats.open_vectors(path, max_vectors=max_vectors)
  if not path.is_file():
    raise FileNotFoundError(f"There is no file {path}; check the name.")
  if not dim:
    raise ValueError(
      f"{path} has no header; say how many numbers make a row of it."
    )
  size, row_bytes = path.stat().st_size, dim * np.dtype(dtype).itemsize
  if not size or size % row_bytes:
    raise ValueError(
      f"{path} must hold rows of {dim} {np.dtype(dtype)}, {row_bytes} bytes "
      f"each, got {size} bytes."
    )
  vectors = np.memmap(path, dtype, "r", shape=(size // row_bytes, dim))
  return rows.mapped(vectors, str(path))[:max_vectors]
