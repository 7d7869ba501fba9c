r"""Turns a file of vectors into codes.

  python -m experiments.encode --codec=runs/qinco2_s --data=base.bvecs \
      --output=codes.npy
  python -m experiments.encode --codec=runs/qinco2_s --data=base.bvecs \
      --output=codes.bin --raw

Codes are int32 `[N, M]` in a .npy file; for an IVF model the list number comes
first. --raw packs every code into the bits it needs, rows padded to whole
bytes, without a header: exactly N*M bytes for 8-bit codes. Nothing in such a
file tells which codec and --num_steps made it: decode it with the same.
"""

import jax
import numpy as np
from absl import logging

from experiments import common
from vqjax.codecs import packing
from vqjax.data import batches, datasets, formats

OPTIONS = {
  "codec": common.CODEC_OPTION,
  "data": common.DATA_OPTIONS["data"],
  "num_vectors": common.Option(int, None, "Only the first so many vectors."),
  **common.SEARCH_OPTIONS,
  "output": common.Option(str, None, "File to write."),
  "raw": common.Option(bool, False, "Write packed bytes without a header."),
  "overwrite": common.Option(bool, False, "Replace an existing output."),
}


def run(config, workdir=None) -> dict:
  """Writes the codes; returns what was written."""
  del workdir
  common.require(config, "codec", "data", "output")
  if config.output.endswith(".npy") == config.raw:
    raise ValueError(
      f"--output must end in .npy, and in anything else with --raw; got "
      f"{config.output}."
    )
  formats.check_output(config.output, overwrite=config.overwrite)
  codec = common.open_codec(config.codec)
  dataset = common.resolve_data(codec, config, base=config.data)
  x_ND = datasets.open_split(dataset, "base", max_vectors=config.num_vectors)
  knobs = common.search_knobs(codec, config)
  encode_fn, block_size = common.make_encode_fn(codec, knobs, config.num_steps)
  sizes = codec.module.codebook_sizes(codec.tables)
  seconds, first = (
    {},
    batches.read_rows(x_ND, range(min(block_size, len(x_ND)))),
  )
  jax.block_until_ready(encode_fn(first))  # Compiles, and refuses bad sizes.
  with (
    common.progress(len(x_ND), "encode") as done,
    common.timed(seconds, "encode"),
  ):
    blocks = (
      codes_NM
      for _, codes_NM in batches.map_blocks(
        encode_fn, x_ND, block_size=block_size, progress=done
      )
    )
    _write(config, blocks, sizes)
  num_codes = _num_codes(codec, config.num_steps)
  is_cut = config.raw and config.num_steps  # Bytes do not tell how many steps.
  logging.info(
    "%d vectors in %.1f s, %.1f us each: %d codes per vector in %s\nNext:\n"
    "  python -m experiments.decode --codec=%s --codes=%s%s --output=x.npy",
    len(x_ND),
    seconds["encode"],
    seconds["encode"] / len(x_ND) * 1e6,
    num_codes,
    config.output,
    config.codec,
    config.output,
    f" --num_steps={config.num_steps}" if is_cut else "",
  )
  return {"output": config.output, "shape": (len(x_ND), num_codes)}


def _num_codes(codec, num_steps) -> int:
  num_codes = len(codec.module.codebook_sizes(codec.tables))
  if num_steps is None:
    return num_codes
  return num_steps + getattr(codec.tables, "is_ivf", False)


def _write(config, blocks, sizes) -> None:
  if not config.raw:
    formats.write_vectors(
      config.output, blocks, dtype=np.int32, overwrite=config.overwrite
    )
    return
  with (
    formats.atomic_output(config.output, config.overwrite) as path,
    open(path, "wb") as file,
  ):
    for codes_NM in blocks:
      packed = packing.pack(codes_NM, sizes[: codes_NM.shape[1]])
      file.write(packed.tobytes())


if __name__ == "__main__":
  common.main(run, OPTIONS, __doc__)
