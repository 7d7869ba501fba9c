r"""Turns codes back into vectors.

  vqjax decode --codec=runs/qinco2_s --codes=codes.npy --output=decoded.fvecs

Codes are a folder of shards, a .npy or .parquet file of integers `[N, M]`, the
codes.npz of the program released with QINCo2 with its parts beside it, or the
packed bytes of encode --raw (any other suffix). Codes whose description
(manifest.json, codes.npy.json) names another codec are refused. Fewer columns
than the codec has positions are a code of a lower rate.
"""

import functools
import os

import numpy as np
from absl import logging

from experiments.lib import cli, codecs, inputs
from vqjax import __version__
from vqjax.codecs import packing
from vqjax.core import check_range
from vqjax.data import codes, files, formats, rows

REQUIRED = ("codec", "codes", "output")
OPTIONS = {
  "codec": cli.CODEC_OPTION,
  "codes": cli.Option(
    str, None, "Codes: folder of shards, .npy, .npz, .parquet, or packed bytes."
  ),
  "num_steps": cli.SEARCH_OPTIONS["num_steps"],
  "dtype": cli.SEARCH_OPTIONS["dtype"],
  "output": cli.Option(
    str, None, "File to write: .npy, .fvecs, .fbin, ... float32."
  ),
  "overwrite": cli.Option(bool, False, "Replace an existing output."),
}


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Writes the decoded vectors; returns what was written."""
  cli.require(config, *REQUIRED)
  files.check_output(config.output, config.overwrite, described=True)
  codec = codecs.open_codec(config.codec)
  sizes = codec.codebook_sizes
  width = len(sizes)
  if config.num_steps is not None:
    check_range("num_steps", config.num_steps, 1, width - codec.is_ivf)
    width = config.num_steps + codec.is_ivf
  found = _open(config.codes, sizes[:width])
  inputs.check_codec(config, codec, found.meta)
  width = width if config.num_steps else found.shape[1]
  if not 1 <= min(width, found.shape[1]) <= len(sizes):
    raise ValueError(
      f"{config.codes} has {found.shape[1]} codes per vector, but the codec "
      f"decodes at most {len(sizes)}."
    )
  result = {"output": config.output, "num_vectors": len(found)}
  meta = _describe(config, codec, found, width)
  if files.find_made(config.output, meta, config.overwrite):
    logging.info("%s is made already.", config.output)
    return result
  files.check_output(
    *(config.output, config.overwrite),
    num_bytes=4 * len(found) * codec.dim,
    described=True,
  )
  seconds = {}
  with cli.timed(seconds, "decode"):
    _write(config, codec, found, width, meta)
  logging.info(
    "%d vectors in %.1f s: %s", len(found), seconds["decode"], config.output
  )
  return result


def _describe(config, codec, found: codes.Codes, width: int) -> dict:
  """What tells these vectors from others, for the same command run again."""
  return {
    "format": "vqjax decoded",
    "shape": [len(found), codec.dim],
    "codec": codec.name,
    "codec_fingerprint": codec.fingerprint,
    **inputs.describe_codes(config, found),
    "num_codes": width,
    "dtype": codecs.product_dtype(config.dtype),
    "vqjax_version": __version__,
  }


def _write(config, codec, found: codes.Codes, width: int, meta: dict) -> None:
  """Decodes all codes into the output; its description goes next to it."""
  with cli.progress(len(found), "decode") as done:
    blocks = codec.decode_blocks(
      found, meta["dtype"], num_codes=width, progress=done
    )
    formats.write_vectors(
      config.output,
      blocks,
      dtype=np.float32,
      overwrite=config.overwrite,
      description=meta,
    )


def _open(path: str, sizes) -> codes.Codes:
  """Opens codes of any kind; packed bytes without a description by `sizes`."""
  if os.path.isdir(path) or path.lower().endswith((".npy", ".npz", ".parquet")):
    return codes.open_codes(path)
  meta, total = codes.read_description(path), os.path.getsize(path)
  sizes = meta.get("codebook_sizes", sizes)
  row_bytes = packing.num_bytes(sizes)
  if not total or total % row_bytes:
    raise ValueError(
      f"{path} has {total} bytes, which is no multiple of the {row_bytes} "
      f"bytes of {len(sizes)} packed codes: it is of another codec, of fewer "
      "steps (--num_steps), or cut."
    )
  shape = (total // row_bytes, row_bytes)
  codes.check_described(path, meta, (shape[0], len(sizes)))
  packed = rows.mapped(np.memmap(path, np.uint8, "r", shape=shape), path)
  unpack_fn = functools.partial(packing.unpack, sizes=sizes)
  return codes.Codes(
    [packed],
    meta,
    sizes=sizes,
    unpack_fn=unpack_fn,
    check_fn=lambda part: files.check_file(path, meta),
    paths=(path,),
  )


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
