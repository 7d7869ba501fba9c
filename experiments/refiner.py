r"""Makes a refiner of an index: a second code of every vector.

  vqjax refiner --kind=rabitq --index=index.faiss --data=base.bvecs \
      --output=refiner.safetensors
  vqjax refiner --kind=fastscan --codec=runs/ivf --index=index.faiss \
      --data=base.bvecs --output=refiner.faiss
  vqjax search ... --refiner=refiner.safetensors --num_refined=0,10,20

rabitq keeps one bit for each dimension of the residual: D / 8 + 2 bytes per
vector. A search re-ranks the best of its scan by these bits, which raises
recall.

fastscan keeps 4-bit codes: D / 8 + 1 bytes per vector (--num_parts=P: P / 2 +
1). faiss compares 32 of them at a time. A search scans them instead of the
codes of the index, which is faster and more accurate, and re-ranks the best by
the codewords of the index. The weights of the two distance estimates are
fitted to a few thousand vectors and kept in the description.

--data is what the index was made of: the id of a vector is its row. The index
itself is not changed. A refiner belongs to one index file: merge the parts of
an index before.
"""

import shlex

import numpy as np
from absl import logging

from experiments.lib import cli, inputs
from vqjax.data import batches, files
from vqjax.interop import faiss_fastscan, faiss_ivf, faiss_lists, searchers
from vqjax.search import refiners, residual_bits
from vqjax.storage import codec_file, refiner_file

REQUIRED = ("kind", "index", "data", "output")
OPTIONS = {
  "kind": cli.Option(
    str, None, "rabitq, for more recall, or fastscan, for more speed."
  ),
  "index": cli.Option(str, None, "Index of build_index."),
  "data": cli.Option(str, None, "Vectors of the index, row by row."),
  "output": cli.Option(
    str, None, "File to write: *.safetensors for rabitq, *.faiss for fastscan."
  ),
  "codec": cli.CODEC_OPTION._replace(
    help="The codec of the index, for fastscan: " + cli.CODEC_OPTION.help
  ),
  "num_parts": cli.Option(
    int,
    None,
    "Parts that fastscan divides a vector into, 4 bits each; a divisor of the "
    "dimensions, a quarter of them if unset.",
  ),
  "seed": cli.Option(int, 0, "Seed of the random rotation of rabitq."),
  "overwrite": cli.Option(bool, False, "Replace an existing output."),
}
_BLOCK = 16384
_MAX_TRAINED = 65536  # Vectors that rotation and codewords are learned from.
_NUM_COMPARED = 4096  # Vectors that the weights are fitted to.
_DECODE_ROWS = 512


def run(config, workdir=None) -> dict:
  """Writes the refiner; returns what was written."""
  del workdir
  cli.require(config, *REQUIRED)
  if config.kind not in refiners.KINDS:
    raise ValueError(
      f"--kind must be one of {', '.join(refiners.KINDS)}; got {config.kind!r}."
    )
  if config.kind == "rabitq":
    return _rabitq(config)
  return _fastscan(config)


def _rabitq(config) -> dict:
  refiner_file.check_path(config.output)
  files.check_output(config.output, overwrite=True)
  index, info = faiss_ivf.load(config.index)
  vectors = inputs.of_index(config, info)
  num_bytes = refiner_file.num_bytes(index.d)
  result = {
    "output": config.output,
    "num_vectors": index.ntotal,
    "code_bytes": num_bytes,
  }
  made_of = {"data": info.get("data"), "seed": config.seed}
  wanted = made_of | {"of_index": info["sha256"]}
  if files.find_made(
    config.output, wanted, config.overwrite, read_fn=refiner_file.describe
  ):
    logging.info("%s is made already.", config.output)
    return result
  files.check_output(
    config.output, overwrite=True, num_bytes=index.ntotal * num_bytes
  )
  contents = faiss_ivf.contents(index)
  rotation_DE = residual_bits.random_rotation(index.d, config.seed)
  bits_NW, scale_N, offset_N = _describe_residuals(
    contents, vectors, rotation_DE
  )
  if info["metric"] == "ip":  # The offset is all norms.
    offset_N[:] = 0
  bits = residual_bits.make_bits(bits_NW, scale_N, offset_N, rotation_DE)
  refiner_file.save(
    config.output,
    bits,
    of_index=info["sha256"],
    info=made_of,
    overwrite=config.overwrite,
  )
  _log_next(config, index.ntotal, num_bytes)
  return result


def _describe_residuals(contents, vectors, rotation_DE):
  """What `residual_bits.make_bits` takes, in the order of the rows."""
  num = len(contents.ids_N)
  order_N, ids_N = inputs.sort_ids(contents.ids_N, vectors)
  num_numbers = residual_bits.num_numbers(vectors.shape[1])
  out = (
    np.empty((num, num_numbers), np.uint32),
    np.empty(num, np.float32),
    np.empty(num, np.float32),
  )
  decode_fn = faiss_lists.make_decode_fn(contents.codebooks_MKD)
  with cli.progress(num, "refiner") as done:
    for start in range(0, num, _BLOCK):
      block = slice(start, start + _BLOCK)
      rows_n = order_N[block]
      x_nD = batches.read_rows(vectors, ids_N[block])
      found = residual_bits.describe(
        x_nD - contents.centre_D,
        *_scanned(contents, decode_fn, rows_n),
        rotation_DE,
      )
      for whole, part in zip(out, found, strict=True):
        whole[rows_n] = np.asarray(part)
      done(start + len(rows_n), num)
  return out


def _scanned(contents, decode_fn, rows_n):
  """Vectors of rows as the scan knows them, and what it takes for |xhat|^2.

  Less the centre that the scan subtracts.
  """
  lists_n = np.searchsorted(contents.starts, rows_n, "right") - 1
  centroids_nD = contents.centroids_LD[lists_n] - contents.centre_D
  xhat_nD = centroids_nD + decode_fn(contents.codes_NM[rows_n])
  scanned_n = np.square(centroids_nD).sum(axis=1)
  scanned_n += contents.low_L[lists_n]
  scanned_n += contents.step_L[lists_n] * contents.norm_N[rows_n]
  return xhat_nD, scanned_n


def _fastscan(config) -> dict:
  cli.require(config, "codec")
  files.check_output(config.output, config.overwrite, described=True)
  loaded = codec_file.load_codec(config.codec)
  like, info = faiss_ivf.load(config.index)
  faiss_ivf.check_codec(config.index, info, loaded.fingerprint)
  num_parts = faiss_fastscan.check_parts(info["dim"], config.num_parts)
  vectors = inputs.of_index(config, info)
  wanted = {
    "of_index": info["sha256"],
    "data": info.get("data"),
    "num_parts": num_parts,
  }
  made = files.find_made(config.output, wanted, config.overwrite)
  if made:
    logging.info("%s is made already.", config.output)
    return made
  num_bytes = info["num_vectors"] * (num_parts // 2 + 9)  # With ids.
  files.check_output(
    *(config.output, config.overwrite), num_bytes=num_bytes, described=True
  )
  contents = faiss_ivf.contents(like)
  order_N, ids_N = inputs.sort_ids(contents.ids_N, vectors)
  trained = batches.spread(len(ids_N), _MAX_TRAINED)
  xt_ND = batches.read_rows(vectors, ids_N[trained])
  seconds = {}
  logging.info("Learning the refiner from %d vectors ...", len(xt_ND))
  with cli.timed(seconds, "learn"):
    index = faiss_fastscan.fit(like, xt_ND, num_parts=num_parts)
  logging.info("Learned in %.1f s.", seconds["learn"])
  with cli.progress(len(ids_N), "refiner") as done:
    for start in range(0, len(ids_N), _BLOCK):
      ids_n = ids_N[start : start + _BLOCK]
      faiss_fastscan.add(index, batches.read_rows(vectors, ids_n), ids_n)
      done(start + len(ids_n), len(ids_N))
  at = batches.spread(len(ids_N), _NUM_COMPARED)
  x_ND = batches.read_rows(vectors, ids_N[at])
  errors = _errors(index, loaded, contents, order_N[at], x_ND)
  meta = faiss_fastscan.save(
    index,
    config.output,
    of_index=info["sha256"],
    info={**wanted, **_fit_weights(errors)},
    overwrite=config.overwrite,
  )
  _log_weights(meta)
  _log_next(config, meta["num_vectors"], meta["code_bytes"])
  return meta


def _errors(index, loaded, contents, rows_N, x_ND) -> dict[str, np.ndarray]:
  """Residuals of vectors after each of the codes, `[N, D]`."""
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
    "refiner": x_ND - faiss_fastscan.reconstruct(index, x_ND),
    "codewords": x_ND - faiss_ivf.make_rows_fn(contents)(rows_N),
    "network": x_ND - np.concatenate(network),
  }


def _fit_weights(errors: dict[str, np.ndarray]) -> dict:
  """Mean squared errors, and the weights with the least joint error."""
  mse = lambda left_ND: float(np.mean(np.sum(left_ND**2, axis=1), dtype=float))
  found = {f"mse_{name}": mse(left_ND) for name, left_ND in errors.items()}
  for name in ("codewords", "network"):
    # Of e + (f - e) (1 - weight) with errors e and f, least squares.
    differs_ND = (errors["refiner"] - errors[name]).astype(float)
    along = np.sum(errors["refiner"] * differs_ND)
    weight = along / max(np.sum(differs_ND**2), 1e-30)
    found[f"{name}_weight"] = float(np.clip(weight, 0, 1))
  return found


def _log_weights(meta: dict) -> None:
  rows = [
    [name, f"{meta[f'mse_{name}']:.6g}", weight]
    for name, weight in (
      ("refiner", ""),
      ("codewords", f"{meta['codewords_weight']:.3f}"),
      ("network", f"{meta['network_weight']:.3f}"),
    )
  ]
  header = ["", "squared error", "weight against the refiner"]
  logging.info("%s\n", cli.table(header, rows))


def _log_next(config, num_vectors: int, num_bytes: int) -> None:
  logging.info(
    "Written: %s, %d vectors, %d bytes each.\nNext:\n  vqjax search "
    "--codec=%s --index=%s --refiner=%s --num_refined=0,10,20",
    *(config.output, num_vectors, num_bytes),
    shlex.quote(config.codec or "CODEC"),
    *map(shlex.quote, (config.index, config.output)),
  )


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
