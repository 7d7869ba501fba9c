r"""Builds an index from codes, in a file that faiss programs open too.

  vqjax build_index --codec=runs/ivf_qinco2_s --codes=codes \
      --decoders=decoders.safetensors --output=index.faiss

Codes are a folder of shards or a .npy file, both made by encode; --data=FILE
encodes vectors instead. They go into inverted lists, with codewords of the
additive decoder from pairwise_decoder. A PQ or RQ codec needs no --decoders,
because its own codewords are additive. The id of a vector is its row; item ids
of encode, or of --ids, lie beside the index, in index.faiss.ids.txt.
index.faiss.json describes the index.

A codec without lists gets one list. With --num_lists its vectors get lists by
k-means, and --output is a folder that search and vqjax.load_index open:

  vqjax build_index --codec=runs/rq --data=base.npy --num_lists=1024 \
      --output=my_index

Shards of the rows can be built at the same time, in index.faiss.parts, counted
from 0. The second command makes what is missing, and merges all into the index
that one process makes:

  ... --output=index.faiss --shard=3/16        one, as of sbatch --array=0-15
  ... --output=index.faiss --shards=16         all, and merge
  ... --output=index.faiss --shards=16 --engine=ray --workers=4       by Ray

Or parts of your own:

  ... --rows=0:500000 --output=a.faiss
  ... --rows=500000: --output=b.faiss
  vqjax build_index --merge=a.faiss,b.faiss --output=index.faiss

The index is made in memory: M + 9 bytes per vector of 8-bit codes, up to twice
that while it grows.
"""

import functools
import itertools
import os
import re
import shlex
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

import vqjax
from experiments.lib import (
  cli,
  codecs,
  engine,
  index_merge,
  inputs,
  parts,
  plan,
)
from vqjax import index as index_lib
from vqjax.codecs import additive
from vqjax.data import files, formats, item_ids, row_ids
from vqjax.interop import faiss_graph, faiss_ivf
from vqjax.search import footprint
from vqjax.storage import codec_file, index_folder

REQUIRED = ("output",)
OPTIONS = {
  "codec": cli.CODEC_OPTION,
  "codes": cli.Option(str, None, "Codes: folder of shards, or .npy."),
  "data": cli.Option(str, None, "Vectors to encode, instead of --codes."),
  "ids": cli.Option(
    str, None, f"{item_ids.FLAG_HELP} Those of --codes if unset."
  ),
  "num_lists": cli.Option(
    int,
    None,
    "Lists for a codec that has none, of --data; --output is a folder then.",
  ),
  "decoders": cli.Option(
    str,
    None,
    "decoders.safetensors of pairwise_decoder; a PQ or RQ codec needs none.",
  ),
  "coarse": cli.Option(
    str,
    None,
    "How lists are found: flat, by all distances, or hnsw, by a graph of the "
    "centroids. If unset, flat below 16,384 lists, as it is faster there.",
  ),
  "metric": cli.Option(
    str,
    "l2",
    "l2, ip, or cosine for codecs that were trained with it: their vectors are "
    "of length 1 and compared by l2.",
  ),
  "rows": cli.Option(str, None, "Only these rows, first:stop, for a part."),
  "merge": cli.Option(
    str, None, "Parts to merge, a.faiss,b.faiss; nothing else is built."
  ),
  **engine.SHARD_OPTIONS,
  **engine.OPTIONS,
  **{k: v for k, v in cli.SEARCH_OPTIONS.items() if k != "num_steps"},
  "assign": cli.ASSIGN_OPTION,
  "output": cli.Option(
    str, None, "Index file to write, index.faiss; a folder with --num_lists."
  ),
  "overwrite": cli.Option(bool, False, "Replace an existing output."),
  "plan": plan.OPTION,
}
_OF_SEARCH = (
  "rule",
  *codecs.SIZES,
  "dtype",
  "assign",
)  # Options of encoding --data.
_ID_BYTES = 4  # In the file of ids in list order; rows are below 2^32.
_BLOCK = 65536  # Codes read and added at a time.
_REPORTED = ("num_vectors", "num_lists", "bytes", "rows")


class _Source(NamedTuple):
  """Codes, list numbers first if the codec has lists."""

  num_rows: int
  blocks: Callable  # range of rows -> iterator of codes_NM, in order.
  made_of: dict  # What tells the codes from others of the same codec.
  ids_N: np.ndarray | None


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Writes the index; returns what was written."""
  cli.require(config, *REQUIRED)
  engine.check(config)
  num_shards, mine = engine.share(config)
  for name in ("rows", "merge", "plan", "num_lists"):
    if num_shards and config[name] != OPTIONS[name].default:
      raise ValueError(
        f"--shards are parts of all rows of an index: leave --{name} out."
      )
  if config.num_lists is not None:
    return _build_folder(config)
  files.check_output(config.output, config.overwrite, described=True)
  if config.merge and config.plan:
    raise ValueError("--merge only copies lists, seconds: leave --plan out.")
  job = _prepare_merge(config) if config.merge else _prepare(config)
  info = job.info
  if config.plan:
    return _plan(info["rows"][0], job.num_bytes, job.make_fn)
  made = files.find_made(config.output, info, config.overwrite)
  if made:
    logging.info("%s is made already.", config.output)
    return _report(config, made, job.data_flags)
  files.check_output(
    config.output, config.overwrite, num_bytes=job.num_bytes, described=True
  )
  make_fn = job.make_fn
  if num_shards:
    of_job = _parts(config, job, num_shards)
    _make_parts(config, job, of_job, mine)
    if config.shard:
      return {"output": str(of_job.path(mine[0]))}
    make_fn = lambda: _merge(of_job.paths, [job.empty_fn()])
  item_ids.save_beside(config.output, job.ids_N, overwrite=config.overwrite)
  info = faiss_ivf.save(
    make_fn(), config.output, info, overwrite=config.overwrite
  )
  if num_shards:
    of_job.remove()
  return _report(config, info, job.data_flags)


class _Job(NamedTuple):
  """An index that is to be built."""

  info: dict  # Its description.
  num_bytes: int
  make_fn: Callable  # Builds it; of other rows if they are given.
  ids_N: np.ndarray | None
  data_flags: str  # Of a search, for what the codec does not know.
  part_fn: Callable | None = None  # (rows, report) -> part.
  empty_fn: Callable | None = (
    None  # Makes the index that parts are merged into.
  )


def _parts(config, job: _Job, num: int) -> parts.Parts:
  info = {**job.info, "coarse": "flat"}  # No graph: the merge makes one.
  return parts.Parts(config.output, ".faiss", info, num)


def _make_parts(config, job: _Job, of_job: parts.Parts, mine) -> None:
  # What auto means here, not on a worker.
  dtype = {"dtype": codecs.product_dtype(config.dtype)} if config.data else {}
  of_job.make(
    *("build_index", {**config, **dtype}, mine, _maker(job, of_job)),
    verb="add",
    uses_gpus=bool(config.data),
  )


def open_parts(config) -> Callable:
  """Returns `make(shard, report)`, which writes a part of the index."""
  job = _prepare(config)
  return _maker(job, _parts(config, job, config.shards))


def _maker(job: _Job, of_job: parts.Parts) -> Callable:
  def make(shard: int, report: Callable) -> None:
    part = job.part_fn(of_job.rows(shard), report)
    path, info = of_job.path(shard), of_job.info_of(shard)
    faiss_ivf.save(part, path, info, overwrite=True)

  return make


def _plan(rows: list[int], num_bytes: int, make_fn) -> dict:
  """What an index of these rows would take."""
  first, num = rows[0], rows[1] - rows[0]
  fill_fn = lambda n: make_fn(range(first, first + n))
  stage = plan.scaled("fill the lists", fill_fn, num)
  # A list grows by doubling.
  return plan.report(
    [stage], rows=num, num_bytes=num_bytes, more_bytes=2 * num_bytes
  )


def _plan_folder(config, codec, num: int, values: dict, sizes: dict) -> dict:
  """What an index with lists of its own would take."""

  def build(n):
    x_nD = np.asarray(formats.open_vectors(config.data, max_vectors=n))
    vqjax.build_index(codec, x_nD, **values, **sizes)

  most = max(8192, 4 * config.num_lists)
  stage = plan.scaled("encode, find lists, fill them", build, num, most)
  num_bytes = num * (len(codec.codebook_sizes) + 9 + _ID_BYTES)
  num_bytes += 4 * config.num_lists * codec.dim
  # The codec, and its codewords in the index.
  num_bytes += 2 * sum(leaf.nbytes for leaf in jax.tree.leaves(codec.params))
  return plan.report(
    [stage], rows=num, num_bytes=num_bytes, more_bytes=3 * num_bytes
  )


def _build_folder(config) -> dict:
  """Writes an index with lists for a codec that has none, as a folder."""
  cli.require(config, "codec", "data")
  unused = ("codes", "decoders", "rows", "merge", "rule", "dtype", "assign")
  for name in unused:
    if config[name] != OPTIONS[name].default:
      raise ValueError(
        "--num_lists makes all parts of an index of --data, by the rule of "
        f"the codec; leave --{name} out."
      )
  folder = files.user_path(config.output)
  manifest = folder / index_folder.MANIFEST
  if folder.exists() and not (manifest.is_file() or config.overwrite):
    raise FileExistsError(
      f"{config.output} exists already; choose another folder, or add "
      "--overwrite."
    )
  files.check_folder(folder.parent)
  codec = codecs.open_codec(config.codec)
  is_cosine = codecs.check_cosine(codec, config.metric)
  sizes = {n: config[n] for n in codecs.SIZES if config[n] is not None}
  values = {
    "num_lists": config.num_lists,
    "metric": "cosine" if is_cosine else config.metric,
    "coarse": config.coarse,
  }
  x_ND = index_lib.open_for(config.data, codec.dim, values["metric"])
  rule = codec.rule.replace(**codec.check_settings(sizes))
  if config.plan:
    return _plan_folder(config, codec, len(x_ND), values, sizes)
  made_of = {
    "codec_fingerprint": codec.fingerprint,
    "num_rows": len(x_ND),
    "data": files.identify(x_ND),
    "encode": codec.describe_search(rule),
    **item_ids.describe(inputs.item_ids_of(config, len(x_ND))),
    **values,
  }
  if files.find_made(
    manifest,
    {"made_of": made_of},
    config.overwrite,
    read_fn=lambda _: index_folder.read_manifest(folder)[1],
  ):
    logging.info("%s is made already.", config.output)
    index = vqjax.load_index(folder)
  else:
    index = vqjax.build_index(
      codec, config.data, ids=config.ids, progress=True, **values, **sizes
    )
    index.save(folder, overwrite=config.overwrite, made_of=made_of)
  logging.info(
    "%d vectors in %s: %s. For a search %s.\nNext:\n"
    "  vqjax search --index=%s%s --output=search.json",
    *(len(index), cli.count(index.num_lists, "list"), config.output),
    *(
      index.footprint(),
      shlex.quote(config.output),
      _data_flags(config, codec),
    ),
  )
  return {
    "output": config.output,
    "num_vectors": len(index),
    "num_lists": index.num_lists,
  }


def _prepare(config) -> _Job:
  cli.require(config, "codec")
  if bool(config.codes) == bool(config.data):
    raise ValueError("Give either --codes or --data, what the index is of.")
  codec = codecs.open_codec(config.codec)
  is_cosine = codecs.check_cosine(codec, config.metric)
  codewords = _words(config, codec)
  source = (
    _open_codes(config, codec) if config.codes else _encode(config, codec)
  )
  rows = _parse_rows(config.rows, source.num_rows)
  info = {
    "codec": codec.name,
    "codec_fingerprint": codec.fingerprint,
    "decoders_fingerprint": codec_file.fingerprint(codewords),
    "num_rows": source.num_rows,
    "rows": [[rows.start, rows.stop]],
    "metric": _metric(config),
    **({"is_cosine": True} if is_cosine else {}),
    "coarse": _coarse(config, codec),
    **source.made_of,
    **item_ids.describe(source.ids_N),
  }
  # Codes, norms and ids; a graph of the centroids takes more.
  num_bytes = len(rows) * (len(codewords.codebooks_MKD) + 9 + _ID_BYTES)
  num_bytes += codewords.codebooks_MKD.nbytes + codec.centroids.nbytes
  fill = functools.partial(_fill, codec, source)
  empty_fn = lambda: _empty_index(config, codec, codewords)

  def make(rows=rows):
    """Returns the filled index."""
    index = empty_fn()
    with cli.progress(len(rows), "add") as done:
      fill(index, rows, lambda num: done(num, len(rows)))
    with cli.progress(2 * len(rows), "norms") as done:
      faiss_ivf.fit_norms(index, progress=done)
    return index

  def make_part(rows, report):
    """Returns a part: the norms are those of all parts, found by a merge."""
    flat = {**config, "coarse": "flat"}  # No graph: the merge has one.
    part_config = cli.get_config(OPTIONS, **flat)
    index = _empty_index(part_config, codec, codewords, is_shown=False)
    fill(index, rows, report)
    return index

  return _Job(
    *(info, num_bytes, make, source.ids_N, _data_flags(config, codec)),
    *(make_part, empty_fn),
  )


def _fill(codec, source: _Source, index, rows: range, report) -> None:
  """Adds the codes of some rows; `report(rows done)`."""
  first = rows.start
  for codes_NM in source.blocks(rows):
    ids_N = np.arange(first, first + len(codes_NM))
    faiss_ivf.add_codes(index, *inputs.split(codec, codes_NM), ids_N)
    first += len(codes_NM)
    report(first - rows.start)


def _coarse(config, codec) -> str:
  num_lists = len(codec.centroids)
  return config.coarse or faiss_ivf.default_coarse(num_lists)


def _metric(config) -> str:
  """What the index compares by: vectors of length 1 by l2 for the cosine."""
  return "l2" if config.metric == "cosine" else config.metric


def _words(config, codec) -> additive.AdditiveParams:
  """The codewords of the index: an additive codec's own, else fitted ones."""
  own = additive.from_codec(codec.tables)
  if own is not None:
    if config.decoders:
      inputs.decoders(config, codec)  # Of this codec, or it is a mistake.
      logging.info(
        "A code of this %s codec stands for a sum of its own codewords: the "
        "index gets these instead of those in %s.",
        *(codec.name, config.decoders),
      )
    return own
  if not config.decoders:
    raise ValueError(
      "--decoders is needed. Make them with "
      f"vqjax pairwise_decoder --codec={shlex.quote(config.codec)} "
      "--codes=CODES --data=VECTORS --output=decoders.safetensors."
    )
  return inputs.decoders(config, codec).additive


def _open_codes(config, codec) -> _Source:
  inputs.refuse_search(config, _OF_SEARCH)
  found = inputs.of_codec(config, codec)
  blocks = lambda rows: inputs.blocks(found, codec.codebook_sizes, _BLOCK, rows)
  ids_N = inputs.item_ids_of(config, len(found))
  if ids_N is None:
    ids_N = item_ids.load_beside(config.codes, found.meta, len(found))
  made_of = inputs.describe_codes(config, found)
  return _Source(len(found), blocks, made_of, ids_N)


def _encode(config, codec) -> _Source:
  """Codes of vectors that are encoded when asked for."""
  num, blocks_fn, made_of = codecs.encode_data(codec, config)
  blocks = lambda rows: blocks_fn(rows=rows)
  return _Source(num, blocks, made_of, inputs.item_ids_of(config, num))


def _parse_rows(text: str | None, num_rows: int) -> range:
  """Reads first:stop; either may be left out."""
  match = re.fullmatch(r"(\d*):(\d*)", text or ":")
  if match:
    first, stop = int(match[1] or 0), int(match[2] or num_rows)
    if first < stop <= num_rows:
      return range(first, stop)
  raise ValueError(
    f"--rows must be first:stop, rows from 0 to {num_rows} with the last not "
    f"among them; got {text!r}."
  )


def _empty_index(
  config, codec, codewords: additive.AdditiveParams, is_shown: bool = True
):
  """Returns the index to fill; parts of the same codes get equal ones."""
  centroids_LD = codec.centroids
  num_lists = len(centroids_LD)
  codebooks_MKD = np.asarray(codewords.codebooks_MKD)
  coarse, metric, graph = _coarse(config, codec), _metric(config), None
  with cli.progress(num_lists, "lists", unit="list", is_shown=is_shown) as done:
    if (coarse, metric) == ("hnsw", "l2"):
      graph = faiss_graph.find_or_make(
        centroids_LD, codec.graph_file, progress=done
      )
    return faiss_ivf.make_index(
      *(centroids_LD, codebooks_MKD),
      coarse=coarse,
      metric=metric,
      by_residual=codec.is_ivf,
      graph=graph,
      progress=done,
    )


def _prepare_merge(config) -> _Job:
  others = ("codes", "data", "ids", "decoders", "rows", "coarse", "metric")
  for name in (*others, *_OF_SEARCH):
    if config[name] != OPTIONS[name].default:
      raise ValueError(f"--merge takes parts as they are; leave --{name} out.")
  paths = config.merge.split(",")
  info = index_merge.join_descriptions(paths)  # Before anything large is read.

  num_bytes = sum(map(os.path.getsize, paths))
  ids_N = item_ids.load_beside(paths[0], info, info["num_rows"])
  merge_fn = lambda: _merge(paths)
  return _Job(info, num_bytes, merge_fn, ids_N, _data_flags(config))


def _merge(paths, before=()):
  """Returns the index of all parts, which go into the first of `before`."""
  with cli.progress(len(paths), "merge", unit="part") as done:

    def load():
      for number, path in enumerate(paths, 1):
        yield faiss_ivf.load(path).index
        done(number, len(paths))

    return faiss_ivf.merge(itertools.chain(before, load()))


def _report(config, info: dict, data_flags: str) -> dict:
  """Says what was written, what is missing, and what to run next."""
  output, num_rows = config.output, info["num_rows"]
  beside = footprint.file_bytes(row_ids.path_beside(output))
  logging.info(
    "%d vectors in %s: %s, %d bytes per vector in memory for code and norm; on "
    "disk %d more for ids, 8 in the file of faiss and %d in list order, which "
    "a search maps; %.1f MB with centroids and codewords; what it is in %s.",
    *(info["num_vectors"], cli.count(info["num_lists"], "list"), output),
    *(faiss_ivf.code_bytes(info), 8 + _ID_BYTES, _ID_BYTES),
    (info["bytes"] + beside) / 1e6,
    files.description_path(output),
  )
  stops = [0, *[stop for _, stop in info["rows"]]]
  firsts = [*[first for first, _ in info["rows"]], num_rows]
  missing = [
    f"{stop}:{first}"
    for stop, first in zip(stops, firsts, strict=True)
    if stop < first
  ]
  if missing:
    logging.info(
      "Of %d rows it lacks %s. Build them with --rows=%s, and\n  "
      "vqjax build_index --merge=%s,... --output=...",
      *(num_rows, " and ".join(missing), missing[0], shlex.quote(output)),
    )
  else:
    logging.info(
      "Next:\n  vqjax search --codec=%s --index=%s%s%s --output=search.json",
      *(shlex.quote(config.codec or "CODEC"), shlex.quote(output)),
      *(_decoders_flag(config, info), data_flags),
    )
  return {"output": output, **{name: info[name] for name in _REPORTED}}


def _decoders_flag(config, info: dict) -> str:
  """The flag of a search that needs the decoders of this index."""
  if config.decoders:
    return f" --decoders={shlex.quote(config.decoders)}"
  return "" if info["codec"] in additive.CODECS else " --decoders=DECODERS"


def _data_flags(config, codec=None) -> str:
  """The flags of a search if the codec does not know base and queries."""
  trained_on = codec.info.get("data", {}) if codec else {}
  if trained_on.get("name") or trained_on.get("queries"):
    return ""
  base = shlex.quote(config.data) if config.data else "BASE"
  return f" --queries=QUERIES --data={base}"


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
