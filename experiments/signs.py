r"""Keeps a bit more of each dimension of the vectors of an index: their signs.

  python -m experiments.signs --index=index.faiss --data=base.bvecs \
      --output=signs.safetensors
  python -m experiments.search ... --signs=signs.safetensors --num_signs=0,10,20

What the words of the additive decoder leave of a vector is rotated at random,
and the signs of its coordinates are kept, with two bytes that say how long it
is: D / 8 + 2 bytes a vector, beside the M + 1 of its code. A search puts the
best of its scan in order by them, for a few additions each, and finds more than
the network does without them. (The network can follow; then both count.)

The data is what the index was made of: the id of a vector is its row. The index
itself stays as it is, for any faiss. Signs are of this index file alone: parts
are merged before.
"""

import shlex

import numpy as np
from absl import logging

from experiments.lib import cli, inputs
from vqjax.data import batches, files
from vqjax.interop import faiss_ivf, faiss_lists
from vqjax.search import signs as signs_lib
from vqjax.storage import sign_file

OPTIONS = {
  "index": cli.Option(str, None, "Index of experiments.build_index."),
  "data": cli.Option(str, None, "Vectors of the index, row by row."),
  "seed": cli.Option(int, 0, "Of the random rotation."),
  "output": cli.Option(str, None, "signs.safetensors to write."),
  "overwrite": cli.Option(bool, False, "Replace an existing output."),
}
_BLOCK = 16384


def run(config, workdir=None) -> dict:
  """Writes the signs; returns what was written."""
  del workdir
  cli.require(config, "index", "data", "output")
  sign_file.check_path(config.output)
  files.check_output(config.output, overwrite=config.overwrite)
  index, info = faiss_ivf.load(config.index)
  vectors = inputs.of_index(config, info)
  contents = faiss_ivf.contents(index)
  rotation_DE = signs_lib.random_rotation(index.d, config.seed)
  signs = signs_lib.make_signs(
    *_describe(contents, vectors, rotation_DE), rotation_DE
  )
  sign_file.save(
    config.output,
    signs,
    of_index=info["sha256"],
    info={"data": info.get("data"), "seed": config.seed},
    overwrite=config.overwrite,
  )
  logging.info(
    "Signs of %d vectors, %d bytes each: %s\nNext:\n  python -m "
    "experiments.search --codec=CODEC --index=%s --signs=%s "
    "--num_signs=0,10,20",
    *(index.ntotal, sign_file.num_bytes(index.d), config.output),
    *map(shlex.quote, (config.index, config.output)),
  )
  return {"output": config.output, "num_vectors": index.ntotal}


def _describe(contents, vectors, rotation_DE):
  """What `signs.make_signs` takes, in the order of the rows of the index."""
  num = len(contents.ids_N)
  order_N, ids_N = inputs.sort_ids(contents.ids_N, vectors)
  num_words = signs_lib.num_words(vectors.shape[1])
  out = (
    np.empty((num, num_words), np.uint32),
    np.empty(num, np.float32),
    np.empty(num, np.float32),
  )
  decode_fn = faiss_lists.make_decode_fn(contents.codebooks_MKD)
  with cli.progress(num, "signs") as done:
    for start in range(0, num, _BLOCK):
      block = slice(start, start + _BLOCK)
      rows_n = order_N[block]
      x_nD = batches.read_rows(vectors, ids_N[block])
      found = signs_lib.describe(
        x_nD, *_words(contents, decode_fn, rows_n), rotation_DE
      )
      for whole, part in zip(out, found, strict=True):
        whole[rows_n] = np.asarray(part)
      done(start + len(rows_n), num)
  return out


def _words(contents, decode_fn, rows_n):
  """What codes of rows add up to, and what the scan takes for its |xhat|^2."""
  lists_n = np.searchsorted(contents.starts, rows_n, "right") - 1
  centroids_nD = contents.centroids_LD[lists_n]
  xhat_nD = centroids_nD + decode_fn(contents.codes_NM[rows_n])
  scanned_n = np.square(centroids_nD).sum(axis=1)
  scanned_n += contents.low_L[lists_n]
  scanned_n += contents.step_L[lists_n] * contents.norm_N[rows_n]
  return xhat_nD, scanned_n


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__)
