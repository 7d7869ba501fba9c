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

from absl import logging

from experiments.lib import cli, inputs
from vqjax.data import batches, files
from vqjax.interop import faiss_fastscan, faiss_ivf, refining, searchers
from vqjax.search import footprint, refiners
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


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Writes the refiner; returns what was written."""
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
  index, info = _open_index(config)
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
  with cli.progress(index.ntotal, "refiner") as done:
    bits = refining.rabitq(
      contents,
      _make_read_fn(contents, vectors),
      metric=info["metric"],
      seed=config.seed,
      progress=done,
    )
  refiner_file.save(
    config.output,
    bits,
    of_index=info["sha256"],
    info=made_of,
    overwrite=config.overwrite,
  )
  _log_next(config, index.ntotal, searchers.make_refiner(bits, contents))
  return result


def _open_index(config):
  """The index; with --codec it may be one without a description."""
  if not config.codec:
    return faiss_ivf.load(config.index)
  return inputs.open_index(config.index, codec_file.load_codec(config.codec))


def _fastscan(config) -> dict:
  cli.require(config, "codec")
  files.check_output(config.output, config.overwrite, described=True)
  loaded = codec_file.load_codec(config.codec)
  like, info = inputs.open_index(config.index, loaded)
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
  decode_fn = searchers.make_decode_fn(loaded, "float32")
  if info.get("is_cosine"):
    decode_fn = searchers.at_length_1(decode_fn)
  with cli.progress(like.ntotal, "refiner") as done:
    index, weights = refining.fastscan(
      like,
      contents,
      _make_read_fn(contents, vectors),
      decode_fn,
      num_parts=num_parts,
      progress=done,
    )
  meta = faiss_fastscan.save(
    index,
    config.output,
    of_index=info["sha256"],
    info={**wanted, **weights},
    overwrite=config.overwrite,
  )
  _log_weights(meta)
  found = searchers.make_refiner(faiss_fastscan.Loaded(index, meta), contents)
  _log_next(config, like.ntotal, found)
  return meta


def _make_read_fn(contents, vectors):
  """Returns `rows -> x_nD` for the rows of the index, whose ids are rows."""
  inputs.check_ids(contents.ids_N, vectors)
  return lambda rows_n: batches.read_rows(vectors, contents.ids_N[rows_n])


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


def _log_next(config, num_vectors: int, made: refiners.Refiner) -> None:
  paths = config.output, files.description_path(config.output)
  on_disk = {"refiner": footprint.file_bytes(*paths)}
  found = footprint.Footprint(num_vectors, made.num_bytes, on_disk)
  logging.info(
    "Written: %s of %d vectors. On top of the index it takes %s.\nNext:\n"
    "  vqjax search --codec=%s --index=%s --refiner=%s --num_refined=0,10,20",
    *(config.output, num_vectors, found),
    shlex.quote(config.codec or "CODEC"),
    *map(shlex.quote, (config.index, config.output)),
  )


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
