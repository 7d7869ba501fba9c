r"""Makes a filter of an index: 4-bit codes of its vectors, for faster searches.

  python -m experiments.filter --codec=runs/ivf --index=index.faiss \
      --data=base.bvecs --output=filter.faiss
  python -m experiments.search ... --filter=filter.faiss --num_words=0,5,10

A filter keeps the vectors of an index once more, in the same lists, as
D / 8 + 1 bytes each (--num_parts=P: P / 2 + 1), which faiss compares 32 at a
time in registers. A search with --filter scans these instead of the words of
the index, in less time and in a truer order; the words of the best, or the
network, then have a share in their distances.

How large a share is best is found from what words, network and filter know of
some thousand vectors. The data is what the index was made of: the id of a
vector is its row. The index itself stays as it is. A filter is of this index
file alone: parts are merged before.
"""

import shlex

import numpy as np
from absl import logging

from experiments.lib import cli, inputs
from vqjax.data import batches, files
from vqjax.interop import faiss_filter, faiss_ivf, searchers
from vqjax.storage import codec_file

OPTIONS = {
  "codec": cli.CODEC_OPTION,
  "index": cli.Option(str, None, "Index of experiments.build_index."),
  "data": cli.Option(str, None, "Vectors of the index, row by row."),
  "num_parts": cli.Option(
    int,
    None,
    "Parts that a vector is cut into, of 4 bits each; a divisor of its "
    "dimensions, and a quarter of them if unset.",
  ),
  "output": cli.Option(str, None, "filter.faiss to write."),
  "overwrite": cli.Option(bool, False, "Replace an existing output."),
}
_BLOCK = 16384
_MAX_TRAINED = 65536  # Vectors that rotation and words are learned from.
_NUM_COMPARED = 4096  # Vectors that the shares are found from.
_DECODE_ROWS = 512


def run(config, workdir=None) -> dict:
  """Writes the filter; returns its description."""
  del workdir
  cli.require(config, "codec", "index", "data", "output")
  files.check_output(config.output, overwrite=config.overwrite)
  loaded = codec_file.load_codec(config.codec)
  like, info = faiss_ivf.load(config.index)
  faiss_ivf.check_codec(config.index, info, loaded.fingerprint)
  num_parts = faiss_filter.check_parts(info["dim"], config.num_parts)
  vectors = inputs.of_index(config, info)
  contents = faiss_ivf.contents(like)
  order_N, ids_N = inputs.sort_ids(contents.ids_N, vectors)
  trained = batches.spread(len(ids_N), _MAX_TRAINED)
  xt_ND = batches.read_rows(vectors, ids_N[trained])
  seconds = {}
  logging.info("Learning the filter from %d vectors ...", len(xt_ND))
  with cli.timed(seconds, "learn"):
    index = faiss_filter.fit(like, xt_ND, num_parts=num_parts)
  logging.info("Learned in %.1f s.", seconds["learn"])
  with cli.progress(len(ids_N), "filter") as done:
    for start in range(0, len(ids_N), _BLOCK):
      ids_n = ids_N[start : start + _BLOCK]
      faiss_filter.add(index, batches.read_rows(vectors, ids_n), ids_n)
      done(start + len(ids_n), len(ids_N))
  at = batches.spread(len(ids_N), _NUM_COMPARED)
  x_ND = batches.read_rows(vectors, ids_N[at])
  errors = _errors(index, loaded, contents, order_N[at], x_ND)
  meta = faiss_filter.save(
    index,
    config.output,
    of_index=info["sha256"],
    info={"data": info.get("data"), **_describe(errors)},
    overwrite=config.overwrite,
  )
  _summarise(config, meta)
  return meta


def _errors(index, loaded, contents, rows_N, x_ND) -> dict[str, np.ndarray]:
  """What filter, words and network leave of vectors, `[N, D]` each."""
  decode_fn = searchers.make_decode_fn(loaded, "float32")
  lists_N = np.searchsorted(contents.starts, rows_N, "right") - 1
  network = []
  for start in range(0, len(rows_N), _DECODE_ROWS):
    n = rows_N[start : start + _DECODE_ROWS]
    codes_nM = contents.codes_NM[n].astype(np.int32)
    lists_n = lists_N[start : start + _DECODE_ROWS].astype(np.int32)
    pad = (0, _DECODE_ROWS - len(n))
    found_nD = decode_fn(
      np.pad(codes_nM, (pad, (0, 0)), "edge"), np.pad(lists_n, pad, "edge")
    )
    network.append(np.asarray(found_nD)[: len(n)])
  return {
    "filter": x_ND - faiss_filter.reconstruct(index, x_ND),
    "words": x_ND - faiss_ivf.make_rows_fn(contents)(rows_N),
    "network": x_ND - np.concatenate(network),
  }


def _describe(errors: dict[str, np.ndarray]) -> dict:
  """Mean squared errors, and the shares that make those of sums least."""
  mse = lambda left_ND: float(np.mean(np.sum(left_ND**2, axis=1), dtype=float))
  found = {f"mse_{name}": mse(left_ND) for name, left_ND in errors.items()}
  for name in ("words", "network"):
    # Of w + (f - w) (1 - share) with errors w and f, least in the square.
    differs_ND = (errors["filter"] - errors[name]).astype(float)
    along = np.sum(errors["filter"] * differs_ND)
    share = along / max(np.sum(differs_ND**2), 1e-30)
    found[f"{name}_share"] = float(np.clip(share, 0, 1))
  return found


def _summarise(config, meta: dict) -> None:
  rows = [
    [name, f"{meta[f'mse_{name}']:.6g}", share]
    for name, share in (
      ("filter", ""),
      ("words", f"{meta['words_share']:.3f}"),
      ("network", f"{meta['network_share']:.3f}"),
    )
  ]
  logging.info(
    "%s\n\nFilter of %d vectors, %d bytes each: %s, %s.json\nNext:\n"
    "  python -m experiments.search --codec=%s --index=%s --filter=%s "
    "--num_words=0,3,5,10",
    cli.table(["", "squared error", "share beside the filter"], rows),
    *(meta["num_vectors"], meta["code_bytes"], config.output, config.output),
    *map(shlex.quote, (config.codec, config.index, config.output)),
  )


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__)
