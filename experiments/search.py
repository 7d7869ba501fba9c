r"""Searches an index at many settings: recall, speed, Pareto front, picture.

  python -m experiments.search --codec=runs/ivf --index=index.faiss \
      --decoders=decoders.safetensors --queries=query.bvecs \
      --groundtruth=groundtruth.ivecs --output=search.json
  python -m experiments.search ... --data=base.bvecs --train=learn.bvecs \
      --baselines=IVF-PQ,IVF-RQ,IVF-RaBitQ --output=compared.json
  python -m experiments.search --codec=runs/qinco2_s --index=index.faiss ... \
      --num_short=10,20,50,100,200,500,1000 --output=two_stages.json
  python -m experiments.search --decode_all --codec=runs/qinco2_s \
      --codes=codes --data=base.bvecs --queries=query.bvecs --output=all.json

Settings are all combinations of the lists given. Each parameter is taken to
cost time and to gain recall, so that many combinations need not be tried. A
point is the best of --rounds rounds after a call that compiles; in a round all
queries are searched again and again for a tenth of a second, or once where that
takes longer. Baselines take turns with ours. Stopped, it goes on with --resume.
The picture lies beside the output, as search.png; each point is also printed as
a JSON line when it is measured, alone on stdout: ... > points.jsonl

Columns of the table: nprobe lists are looked into, but for those left out by
max_ratio; their vectors are put in order by the additive decoder, the best
num_signs of these by their signs, or the best num_aq by the pairwise decoder,
and the best num_short of those by the network. With --filter vectors are put in
order by the filter, and the best num_words of these by their words, or the best
num_short by the network. qps are queries per second of one call with all
queries, and coarse (which finds the lists), scan (with the signs), words,
pairwise and network the microseconds per query that go into each step.
decoded are the vectors that the network decoded per query: one that queries
share counts once.

Times are those of all threads; --threads=1 keeps JAX and faiss to one CPU.
Bytes of a vector are those in the lists, without ids. IVF-RaBitQ has a bit for
each dimension of the randomly rotated vector, and 8 bytes.

With --decode_all there is no index: all codes are decoded by the network, and
the search among them is exact.
"""

import itertools
import math

import jax
from absl import logging

from experiments.lib import (
  cli,
  codecs,
  inputs,
  search_data,
  search_measure,
  search_record,
)
from vqjax import __version__
from vqjax.core import check_range
from vqjax.data import files
from vqjax.interop import (
  faiss_baselines,
  faiss_filter,
  faiss_hakes,
  faiss_ivf,
  searchers,
)
from vqjax.storage import sign_file

OPTIONS = {
  "codec": cli.CODEC_OPTION,
  "index": cli.Option(str, None, "Index of experiments.build_index."),
  "decoders": cli.Option(
    str, None, "Decoders of experiments.pairwise_decoder, for --num_aq."
  ),
  "signs": cli.Option(
    str, None, "Signs of experiments.signs, for --num_signs."
  ),
  "filter": cli.Option(
    str,
    None,
    "Filter of experiments.filter: scanned instead of the words, far faster; "
    "instead of --signs.",
  ),
  "queries": cli.Option(
    str, None, "Queries; those of the codec's data set if unset."
  ),
  "groundtruth": cli.Option(
    str,
    None,
    "Ids of their true neighbours, nearest first; found by exact search in "
    "--data if unset.",
  ),
  **cli.DATA_OPTIONS,
  "k": cli.Option(int, 10, "Results per query."),
  "nprobe": cli.Option(
    str, None, "Lists looked into, as 1,4,16; powers of two if unset."
  ),
  "ef_search": cli.Option(
    str, None, "Effort of a coarse quantiser that is a graph, as 32,128."
  ),
  "max_ratio": cli.Option(
    str,
    None,
    "Lists are left out whose centroid is farther than so many times the "
    "nearest (squared distances), as 1.3,1.5,inf; inf, no limit, if unset.",
  ),
  "num_signs": cli.Option(
    str,
    None,
    "Candidates that their signs put in order, as 0,10,20; 0 leaves them out.",
  ),
  "num_words": cli.Option(
    str,
    None,
    "Candidates of the filter that their words put in order, as 0,5,10; 0 "
    "leaves them out. Together with --num_short it is no setting.",
  ),
  "num_aq": cli.Option(
    str,
    None,
    "Candidates that the pairwise decoder puts in order, as 0,32,64; 0 leaves "
    "it out. Not above --num_short, or with signs or a filter, it is no "
    "setting.",
  ),
  "num_short": cli.Option(
    str,
    None,
    "Candidates that the network decodes, as 0,5,20; 0 leaves it out. Above a "
    "--num_signs that is not 0 it is no setting.",
  ),
  "threads": cli.Option(
    int, None, "CPUs to work on; all that the process may use if unset."
  ),
  "dtype": cli.Option(
    str,
    "auto",
    "Type of the products of scan and network: float32, bfloat16, or auto: "
    "bfloat16 on accelerators and on CPUs that have it (avx512_bf16), where "
    "they take half as long. Sums and distances are float32.",
  ),
  "rounds": cli.Option(int, 3, "Rounds per point, of which the best counts."),
  "baselines": cli.Option(
    str,
    "",
    "Also train and search these of faiss, on the same lists: any of "
    f"{','.join(faiss_baselines.NAMES)}. They need --data.",
  ),
  "train": cli.Option(
    str, None, "Their training vectors; those of the codec if unset."
  ),
  "decode_all": cli.Option(
    bool, False, "Search exactly among all --codes, decoded; no index."
  ),
  "codes": cli.Option(str, None, "Codes of the base, for --decode_all."),
  "output": cli.Option(str, None, "JSON file of the points."),
  "resume": cli.Option(bool, False, "Go on with the points still missing."),
  "overwrite": cli.Option(bool, False, "Replace existing outputs."),
}
_LEAST_RECALL = 0.02  # Below it a ground truth that nobody checked is doubted.


def run(config, workdir=None) -> dict:
  """Returns what it wrote: `{"header", "latency", "points"}`."""
  del workdir
  cli.require(config, "codec", "output")
  check_range("--rounds", config.rounds, 1, 1000)
  if config.decode_all:
    return _run_decoded(config)
  cli.require(config, "index")
  if config.codes:
    raise ValueError("--codes are for --decode_all; an index has its own.")
  search_record.check_output(
    config.output, resume=config.resume, overwrite=config.overwrite
  )
  if config.signs and config.filter:
    raise ValueError(
      "--signs order the scan that a --filter replaces; give one of them."
    )
  names = search_data.baseline_names(config)
  num_threads = faiss_hakes.set_num_threads(config.threads)
  like, info = faiss_ivf.load(config.index, mmap=True)
  _check_whole(config, info)
  codec = codecs.open_codec(config.codec)
  dtype = codecs.ranking_dtype(config.dtype)
  searcher = searchers.open_searcher(
    *(config.codec, config.index, config.decoders, config.signs),
    filter=config.filter,
    dtype=dtype,
  )
  ranges = _ranges(config, info, searcher.parts)
  check_range("--k", config.k, 1, info["num_vectors"], "vectors in the index")
  data = search_data.open_data(
    codec, config, config.index, info["num_vectors"], info.get("data")
  )
  if names and data.base is None:
    raise ValueError("--baselines need --data, the vectors to fill them with.")
  train = search_data.open_train(codec, config) if names else None
  header = _header(config, codec, info, data, train, num_threads)
  record = search_record.Record(config.output, header, resume=config.resume)
  search_fns = {
    codec.name: lambda xq_QD, **at: searcher.search(xq_QD, config.k, **at),
    **_baseline_fns(config, names, ranges, like, train, data, record),
  }
  search_measure.explore(config, record, codec.name, ranges, search_fns, data)
  search_measure.time_single(record, search_fns, data.xq_QD)
  record.draw()
  _summarise(config, record, data)
  return {"header": record.header, "points": record.points}


def _check_whole(config, info: dict) -> None:
  """Raises ValueError where the index lacks rows of the base."""
  rows, num_rows = info.get("rows"), info.get("num_rows")
  if rows not in (None, [[0, num_rows]]):
    shown = ", ".join(f"{first}:{stop}" for first, stop in rows)
    raise ValueError(
      f"{config.index} is a part, rows {shown} of {num_rows}, so true "
      "neighbours would be missing; merge all parts first: python -m "
      "experiments.build_index --merge=a.faiss,b.faiss --output=index.faiss."
    )


def _baseline_fns(config, names, ranges, like, train, data, record) -> dict:
  """Searches with the baselines of which points or times are missing."""
  missing = []
  for name in names:
    settings = search_measure.baseline_settings(name, ranges)
    has_points = all(record.find(name, setting) for setting in settings)
    if not (has_points and record.is_timed(name)):
      missing.append(name)
  if not missing:
    return {}
  indexes = search_data.fit_baselines(missing, like, train, data.base)
  for name, index in indexes.items():
    record.header["bytes"][name] = faiss_baselines.lists_of(index).code_size
  return {
    name: search_data.baseline_fn(index, config.k)
    for name, index in indexes.items()
  }


def _header(config, codec, info, data, train, num_threads) -> dict:
  """What points must share to be compared; `Record` goes on with no others."""
  sha256 = lambda path: path and files.sha256(path)
  return {
    "codec": codec.fingerprint,
    "index": info["sha256"],
    "decoders": sha256(config.decoders),
    "signs": sha256(config.signs),
    "filter": sha256(config.filter),
    "num_vectors": info["num_vectors"],
    "num_lists": info["num_lists"],
    "coarse": info["coarse"],
    "queries": {"num": len(data.xq_QD), **files.identify(data.xq_QD)},
    "groundtruth": files.identify(data.true_QG),
    "k": config.k,
    "rounds": config.rounds,
    "dtype": codecs.ranking_dtype(config.dtype),
    "threads": search_record.threads(num_threads),
    "device": jax.devices()[0].device_kind,
    "vqjax": __version__,
    "bytes": {codec.name: _code_bytes(config, info)},
    "baselines": search_data.baselines_of(train, data.base) if train else {},
  }


def _code_bytes(config, info: dict) -> int:
  """Bytes of a vector: its codes, a byte for the norm, signs or filter."""
  bits = (info["codebook_size"] - 1).bit_length()
  num_bytes = math.ceil(info["num_codes"] * bits / 8) + 1
  if config.signs:
    num_bytes += sign_file.num_bytes(info["dim"])
  if config.filter:
    found = faiss_filter.load(config.filter, info).info
    num_bytes += found["code_bytes"]
  return num_bytes


def _ranges(config, info, parts) -> dict[str, list]:
  """Values of each parameter, rising; cut at the size of the index."""
  has_filter, has_signs = parts.filter is not None, bool(parts.signs)
  has_pairwise = parts.pairwise_fn is not None and not has_filter
  num_lists, num_vectors = info["num_lists"], info["num_vectors"]
  is_graph = info["coarse"] == "hnsw"
  if config.ef_search and not is_graph:
    raise ValueError(
      "--ef_search is the effort of a graph, but the coarse quantiser of "
      f"{config.index} is flat; leave it out."
    )
  if num_lists > 1:
    probes = [2**i for i in range(13) if 4**i <= 4 * num_lists]
    short = [0, 2, 5, 10, 20, 50]
  else:
    probes, short = [1], [0, 10, 20, 50, 100, 200, 500, 1000]
  ranges = {
    "nprobe": _numbers(config, "nprobe", 1, num_lists) or probes,
    "ef_search": _numbers(config, "ef_search", 1, 1 << 20) or [32, 128, 512],
    "max_ratio": _ratios(config.max_ratio),
    "num_signs": _numbers(config, "num_signs", 0, num_vectors)
    or ([0, 10, 20, 50] if has_signs else [None]),
    "num_words": _numbers(config, "num_words", 0, num_vectors)
    or ([0, 3, 5, 10] if has_filter else [0]),
    "num_aq": _numbers(config, "num_aq", 0, num_vectors)
    or ([0, 8, 32, 128] if has_pairwise else [0]),
    "num_short": _numbers(config, "num_short", 0, num_vectors) or short,
  }
  if not is_graph:
    ranges["ef_search"] = [None]
  if any(ranges["num_signs"]) and not has_signs:
    raise ValueError(
      "--num_signs asks for signs: give --signs=FILE of experiments.signs, or "
      "--num_signs=0."
    )
  if max(ranges["num_words"]) and not has_filter:
    raise ValueError(
      "--num_words asks for a filter: give --filter=FILE of "
      "experiments.filter, or --num_words=0."
    )
  if max(ranges["num_aq"]) and has_filter:
    raise ValueError(
      "With --filter --num_aq must be 0: words or the network put in order "
      "what the filter finds."
    )
  if max(ranges["num_aq"]) and not has_pairwise:
    raise ValueError(
      "--num_aq asks for the pairwise decoder: give --decoders=FILE of "
      "experiments.pairwise_decoder that has one, or --num_aq=0."
    )
  combined = itertools.product(*ranges.values())
  if not any(
    search_measure.is_one(dict(zip(ranges, values, strict=True)))
    for values in combined
  ):
    of_signs = (
      f" With --num_signs, got {ranges['num_signs']}, --num_aq must be 0 and "
      "--num_short at most that."
      if has_signs
      else " With --filter one of --num_words and --num_short must be 0."
      if has_filter
      else ""
    )
    raise ValueError(
      "No setting is left: --num_aq must be 0 or above --num_short, got "
      f"{ranges['num_aq']} and {ranges['num_short']}.{of_signs}"
    )
  return ranges


def _numbers(config, name: str, low: int, high: int) -> list[int]:
  """Values of an option as 0,5,10, rising; those above `high` become it."""
  if config[name] is None:
    return []
  parts = [part.strip() for part in config[name].split(",")]
  if not all(part.isdecimal() and int(part) >= low for part in parts):
    raise ValueError(
      f"--{name} must be numbers from {low} on, as 4,8,16; got "
      f"{config[name]!r}."
    )
  values = sorted({min(int(part), high) for part in parts})
  if max(map(int, parts)) > high:
    logging.info("--%s is cut at %d, the size of the index.", name, high)
  return values


def _ratios(text: str | None) -> list[float | None]:
  """Limits as 1.2,1.5,inf, rising; None stands for none."""
  try:
    values = {float(part) for part in (text or "inf").split(",")}
  except ValueError:
    values = {0.0}
  if not all(value >= 1 for value in values):
    raise ValueError(
      f"--max_ratio must be numbers from 1 on, as 1.3,1.5,inf; got {text!r}."
    )
  return [None if math.isinf(value) else value for value in sorted(values)]


def _summarise(config, record, data) -> None:
  t = record.header["threads"]
  logging.info(
    "%d vectors, %d lists, k=%d, threads: %d of faiss, %d of JAX\n%s\n\nThe "
    "fastest setting within 1 %% of the best 1-recall@1:\n%s",
    *(record.header["num_vectors"], record.header["num_lists"], config.k),
    *(t["faiss"], t["jax"]),
    record.table(),
    record.latency_table(),
  )
  _doubt(data, max(p["recall"]["1-recall@1"] for p in record.points))
  best = record.best(next(iter(record.header["bytes"])))
  if not any(
    best[name] for name in ("num_short", "num_signs", "num_words")
  ) and any(p["setting"].get("num_short") for p in record.points):
    logging.warning(
      "The network gains less than 1 % of the best 1-recall@1: is the codec "
      "trained? Settings were left out as if more of it gained recall."
    )
  at = ", ".join(f"{k}={v}" for k, v in best.items() if v is not None)
  files = {
    "decoders": config.decoders,
    "signs": config.signs,
    "filter": config.filter,
  }
  options = "".join(f", {k}={v!r}" for k, v in files.items() if v)
  if record.header["dtype"] != "float32":
    options += f", dtype={record.header['dtype']!r}"
  logging.info(
    "Written: %s, %s\nTo search with a setting, in Python:\n  searcher = "
    "vqjax.interop.searchers.open_searcher(%r, %r%s)\n  searcher.search("
    "queries_QD, k=%d, %s)",
    *(record.path, record.picture, config.codec, config.index, options),
    *(config.k, at),
  )


def _doubt(data, recall: float) -> None:
  """Warns where the true neighbours may be those of others, unchecked."""
  if data.base is None and recall < _LEAST_RECALL:
    logging.warning(
      "The best 1-recall@1 is %.4f: does --groundtruth belong to --queries and "
      "to the vectors that were encoded? With these as --data it is checked.",
      recall,
    )


def _run_decoded(config) -> dict:
  """Exact search among all decoded codes."""
  cli.require(config, "codes")
  if config.index or config.baselines:
    raise ValueError("--decode_all searches --codes; leave --index out.")
  files.check_output(config.output, config.overwrite)
  num_threads = faiss_hakes.set_num_threads(config.threads)
  codec = codecs.open_codec(config.codec)
  found = inputs.of_codec(config, codec, may_be_short=True)
  data = search_data.open_data(
    codec, config, config.codes, len(found), found.meta.get("data")
  )
  seconds = {}
  ids_QR = search_data.search_decoded(codec, config, data, found, seconds)
  result = {
    "codec": codec.fingerprint,
    "num_vectors": len(found),
    "num_queries": len(data.xq_QD),
    "k": config.k,
    "threads": search_record.threads(num_threads),
    "device": jax.devices()[0].device_kind,
    "recall": search_data.recalls(ids_QR, data.true_QG),
    "seconds": round(seconds["search"], 3),
  }
  files.write_json(config.output, result, overwrite=config.overwrite)
  logging.info(
    "%d codes decoded and %d queries searched in %.1f s\n%s\nWritten: %s",
    *(len(found), len(data.xq_QD), seconds["search"]),
    cli.table(
      list(result["recall"]), [[f"{v:.4f}" for v in result["recall"].values()]]
    ),
    config.output,
  )
  _doubt(data, result["recall"]["1-recall@1"])
  return result


if __name__ == "__main__":
  cli.main(
    run,
    OPTIONS,
    __doc__,
    how_to_go_on="To go on, add --resume to the same command.",
  )
