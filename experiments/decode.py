r"""Turns codes back into vectors.

  python -m experiments.decode --codec=runs/qinco2_s --codes=codes.npy \
      --output=decoded.fvecs

Codes are a .npy file of integers `[N, M]`, or the packed bytes of
`experiments.encode --raw` (any other suffix). Fewer columns than the codec has
are a code of lower rate.
"""

import os

import numpy as np
from absl import logging

from experiments import common
from vqjax.codecs import packing
from vqjax.core import check_range
from vqjax.data import formats

OPTIONS = {
  "codec": common.CODEC_OPTION,
  "codes": common.Option(str, None, "Codes: .npy, or packed bytes."),
  "num_steps": common.SEARCH_OPTIONS["num_steps"],
  "output": common.Option(
    str, None, "File to write: .npy, .fvecs, .fbin, ... float32."
  ),
  "overwrite": common.Option(bool, False, "Replace an existing output."),
}
_BLOCK = 16384


def run(config, workdir=None) -> dict:
  """Writes the decoded vectors; returns what was written."""
  del workdir
  common.require(config, "codec", "codes", "output")
  formats.check_output(config.output, overwrite=config.overwrite)
  codec = common.open_codec(config.codec)
  sizes = codec.module.codebook_sizes(codec.tables)
  if config.num_steps is not None:
    is_ivf = getattr(codec.tables, "is_ivf", False)
    check_range("num_steps", config.num_steps, 1, len(sizes) - is_ivf)
    sizes = sizes[: config.num_steps + is_ivf]
  is_packed = not config.codes.endswith(".npy")
  open_fn = _open_packed if is_packed else _open_codes
  codes_NM, sizes = open_fn(config.codes, sizes, config.num_steps)
  decode_fn = common.make_decode_fn(codec)
  num, seconds = len(codes_NM), {}
  block_size = min(_BLOCK, num)

  def decoded(done):
    for start in range(0, num, block_size):
      block_NM = np.asarray(codes_NM[start : start + block_size])
      if is_packed:
        block_NM = packing.unpack(block_NM, sizes)
      _check_ids(block_NM, sizes, start)
      missing = block_size - len(block_NM)
      padded_NM = np.pad(block_NM.astype(np.int32), ((0, missing), (0, 0)))
      yield np.asarray(decode_fn(padded_NM))[: len(block_NM)]
      done(start + len(block_NM), num)

  with common.progress(num, "decode") as done, common.timed(seconds, "decode"):
    formats.write_vectors(
      config.output, decoded(done), dtype=np.float32, overwrite=config.overwrite
    )
  logging.info(
    "%d vectors in %.1f s: %s", num, seconds["decode"], config.output
  )
  return {"output": config.output, "num_vectors": num}


def _open_codes(path: str, sizes, num_steps):
  """Codes `[N, <= M]` of a .npy file, and the sizes of their codebooks."""
  codes_NM = formats.open_vectors(path)
  if codes_NM.dtype.kind not in "iu":
    raise TypeError(f"{path} must hold integer codes, got {codes_NM.dtype}.")
  if num_steps is not None:
    codes_NM = codes_NM[:, : len(sizes)]
  if codes_NM.shape[1] > len(sizes):
    raise ValueError(
      f"{path} has {codes_NM.shape[1]} codes per vector, but the codec "
      f"decodes at most {len(sizes)}."
    )
  return codes_NM, sizes[: codes_NM.shape[1]]


def _open_packed(path: str, sizes, num_steps):
  """Packed codes `[N, bytes]` uint8, and the sizes of their codebooks."""
  del num_steps
  if os.path.isdir(path):
    raise ValueError(f"{path} is a folder; name a file of codes in it.")
  row_bytes, total = packing.num_bytes(sizes), os.path.getsize(path)
  if not total or total % row_bytes:
    raise ValueError(
      f"{path} has {total} bytes, which is no multiple of the {row_bytes} "
      f"bytes of {len(sizes)} packed codes: it is of another codec, of fewer "
      "steps (--num_steps), or cut."
    )
  shape = (total // row_bytes, row_bytes)
  return np.memmap(path, np.uint8, "r", shape=shape), sizes


def _check_ids(codes_NM, sizes, start: int) -> None:
  """Raises ValueError where a code is not an id of its codebook."""
  bad = (codes_NM < 0) | (codes_NM >= np.array(sizes))
  if bad.any():
    row, column = np.argwhere(bad)[0]
    raise ValueError(
      f"Code {codes_NM[row, column]} in row {start + row}, column {column} "
      f"must lie between 0 and {sizes[column] - 1}: the codes are of another "
      "codec, or damaged."
    )


if __name__ == "__main__":
  common.main(run, OPTIONS, __doc__)
