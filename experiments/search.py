r"""Searches an index at many settings: recall, speed, Pareto front, picture.

  vqjax search --codec=runs/ivf --index=index.faiss \
      --decoders=decoders.safetensors --queries=query.bvecs \
      --groundtruth=groundtruth.ivecs --output=search.json
  vqjax search ... --data=base.bvecs --train=learn.bvecs \
      --baselines=IVF-PQ,IVF-RQ,IVF-RaBitQ --output=compared.json
  vqjax search --codec=runs/qinco2_s --index=index.faiss ... \
      --num_network=10,20,50,100,200,500,1000 --output=two_stages.json
  vqjax search --decode_all --codec=runs/qinco2_s \
      --codes=codes --data=base.bvecs --queries=query.bvecs --output=all.json

Settings are all combinations of the values given. Larger values are assumed to
cost time and to raise recall, so that many combinations need not be tried. A
point is the best of --rounds rounds, after one call that compiles. In a round
all queries are searched repeatedly for a tenth of a second, or once if that
takes longer. Baselines are measured interleaved with ours. If interrupted, the
same command measures the points that are missing. The picture is search.png,
next to the output. Standard output gets each point as a JSON line too, if it is
a file or a pipe of its own: vqjax search ... > points.jsonl

Columns of the table: nprobe lists are searched. Their vectors are ordered by
the additive decoder, or by a fastscan refiner. The best num_refined of them are
re-ordered by the refiner, or the best num_pairwise by the pairwise decoder, and
the best num_network by the network. qps are queries per second of one call with
all queries; coarse (which finds the lists), scan, refine, pairwise and network
are the microseconds per query of each stage. decoded is the number of vectors
that the network decoded per query; one that several queries share counts once.

Times are with all threads; --threads=1 keeps JAX and faiss to one CPU.
The last table has the bytes of each index: those that every vector takes in
memory (code, norm, id, refiner), those that all vectors share (centroids,
graph, tables, codec), and both together per vector, as the files on disk.
IVF-RaBitQ takes one bit for each dimension of the randomly rotated vector, plus
8 bytes. An index of faiss also has an id of 8 bytes per vector in memory; ours
maps a file of ids. In the JSON, `bytes` are of code, norm and refiner alone,
`memory` is all.

--decode_all needs no index: it decodes all codes by the network and searches
the decoded vectors exactly.
"""

import itertools
import pathlib

import jax
import numpy as np
from absl import logging

from experiments.lib import (
  cli,
  codecs,
  inputs,
  search_data,
  search_measure,
  search_record,
  search_results,
)
from vqjax import __version__
from vqjax.codecs import additive
from vqjax.core import check_range
from vqjax.data import files
from vqjax.interop import (
  faiss_baselines,
  faiss_bytes,
  faiss_hakes,
  faiss_ivf,
  searchers,
)
from vqjax.storage import index_folder

REQUIRED = ("index", "output")  # Or --decode_all and --codes.
OPTIONS = {
  "codec": cli.CODEC_OPTION,
  "index": cli.Option(
    str,
    None,
    "Index file of build_index, a released .faissindex, or a folder of "
    "ivf_pipeline or of a program's Index.save, which needs no other flag if "
    "the codec knows its queries.",
  ),
  "decoders": cli.Option(
    str,
    None,
    "Decoders of pairwise_decoder, or a released pairwise .pt, for "
    "--num_pairwise.",
  ),
  "refiner": cli.Option(
    str, None, "Refiner of the command refiner, for --num_refined."
  ),
  "queries": cli.Option(
    str, None, "Queries; if unset, from the codec's data set."
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
    str,
    None,
    "Lists to search, as 1,4,16; if unset, powers of two up to twice the "
    "square root of the number of lists, at most 4,096.",
  ),
  "ef_search": cli.Option(
    str, None, "Effort to find lists by a graph of centroids, as 32,128."
  ),
  "num_refined": cli.Option(
    str,
    None,
    "Candidates that the refiner re-orders, as 0,10,20; 0 leaves it out. "
    "Combined only with a --num_network that is not above it.",
  ),
  "num_pairwise": cli.Option(
    str,
    None,
    "Candidates that the pairwise decoder re-orders, as 0,32,64; 0 leaves it "
    "out. Combined only with a smaller --num_network, and with no refiner.",
  ),
  "num_network": cli.Option(
    str,
    None,
    "Candidates that the network decodes, as 0,5,20; 0 leaves it out.",
  ),
  "threads": cli.Option(
    int, None, "CPUs to use; all that the process may use if unset."
  ),
  "dtype": cli.Option(
    str,
    "auto",
    "Type of the products of scan and network: float32, bfloat16, or auto: "
    "bfloat16 on accelerators and on CPUs that have it (avx512_bf16): "
    "they take half as long there. Sums and distances are float32.",
  ),
  "rounds": cli.Option(int, 3, "Rounds per point, of which the best counts."),
  "baselines": cli.Option(
    str,
    "",
    "Also train and search these indexes of faiss on the same lists: any of "
    f"{','.join(faiss_baselines.NAMES)}. They need --data.",
  ),
  "train": cli.Option(
    str, None, "Training vectors of the baselines; if unset, from the codec."
  ),
  "decode_all": cli.Option(
    bool, False, "Search exactly among all --codes, decoded; no index."
  ),
  "codes": cli.Option(str, None, "Codes of the base, for --decode_all."),
  "output": cli.Option(
    str,
    None,
    "JSON file of the points; if --index is a folder, search.json beside the "
    "index file that it stands for.",
  ),
  "results": cli.Option(
    str,
    None,
    "Also write the results of all queries at the fastest setting within 1 % "
    "of the best recall: .npy of ids, or .parquet with distances.",
  ),
  "overwrite": cli.Option(bool, False, "Replace existing outputs."),
}
_LEAST_RECALL = 0.02  # Below it an unchecked ground truth is doubted.


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Returns what it wrote: `{"header", "latency", "points"}`."""
  check_range("--rounds", config.rounds, 1, 1000)
  if config.decode_all:
    cli.require(config, "codec", "output")
    return _run_decoded(config)
  cli.require(config, "index")
  config, folder = _open_folder(config)
  cli.require(config, "codec", "output")
  if config.codes:
    raise ValueError("--codes are for --decode_all; an index has its own.")
  resume = not config.overwrite
  search_record.check_output(config.output, resume=resume)
  if config.results:
    search_results.check_output(config.results, config.overwrite)
  names = search_data.baseline_names(config)
  num_threads = faiss_hakes.set_num_threads(config.threads)
  codec = codecs.open_codec(config.codec)
  like, info = inputs.open_index(config.index, codec, mmap=True)
  _check_whole(config, info)
  dtype = codecs.ranking_dtype(config.dtype)
  searcher = searchers.open_searcher(
    config.codec,
    config.index,
    config.decoders,
    config.refiner,
    dtype=dtype,
  )
  _check_rows(config, searcher.parts.ids_N)
  ranges = _ranges(config, info, searcher.parts)
  check_range("--k", config.k, 1, info["num_vectors"], "vectors in the index")
  data = search_data.open_data(
    codec, config, config.index, info["num_vectors"], info.get("data")
  )
  if names and data.base is None:
    raise ValueError("--baselines need --data, the vectors to fill them with.")
  if (info["metric"], data.metric) == ("l2", "ip"):
    logging.warning(
      "%s compares by l2, but recall is of inner products, the metric of the "
      "codec: build it with --metric=ip, unless vectors are of length 1.",
      config.index,
    )
  train = search_data.open_train(codec, config) if names else None
  header = _header(config, codec, info, data, train, num_threads)
  on_disk = searchers.disk_bytes(
    *(config.codec, config.index, config.decoders, config.refiner)
  )
  header["memory"] = {codec.name: searcher.footprint(on_disk).to_json()}
  record = search_record.Record(config.output, header, resume=resume)
  search_fns = {
    codec.name: lambda xq_QD, **at: searcher.search(xq_QD, config.k, **at),
    **_baseline_fns(config, names, ranges, like, train, data, record),
  }
  search_measure.explore(config, record, codec.name, ranges, search_fns, data)
  search_measure.time_single(record, search_fns, data.xq_QD)
  record.draw()
  if config.results:
    info["queries"] = record.header["queries"]
    search_fn = lambda **at: search_fns[codec.name](data.xq_QD, **at)
    best = record.best(codec.name)
    search_results.write(config.results, search_fn, best, info, config)
  _summarise(config, folder, record, data)
  return {"header": record.header, "points": record.points}


def _open_folder(config):
  """Returns the options with the files of --index, if that is a folder.

  The folder comes second, None if it is none or is searched with other files.
  """
  folder = files.user_path(config.index)
  if not folder.is_dir():
    return config, None
  paths, _ = index_folder.read_manifest(folder)
  is_whole = not (config.codec or config.decoders or config.refiner)
  opened = config.copy_and_resolve_references()
  for name in ("codec", "decoders", "refiner"):
    if config[name] is None and name in paths:
      opened[name] = paths[name]
  opened.index = paths["index"]
  # In a generation it is of that one, and is removed with it.
  beside = pathlib.Path(paths["index"]).with_name("search.json")
  opened.output = config.output or str(beside)
  return opened, config.index if is_whole else None


def _check_rows(config, ids_N) -> None:
  """Raises ValueError unless ids are rows, as in a ground truth."""
  if not np.array_equal(np.sort(ids_N), np.arange(len(ids_N))):
    raise ValueError(
      f"The ids in {config.index} are not rows 0 to {len(ids_N) - 1} of a "
      "base, so recall cannot be measured; search it in a program, by "
      "vqjax.load_index."
    )


def _check_whole(config, info: dict) -> None:
  """Raises ValueError if the index lacks rows of the base."""
  rows, num_rows = info.get("rows"), info.get("num_rows")
  if rows not in (None, [[0, num_rows]]):
    shown = ", ".join(f"{first}:{stop}" for first, stop in rows)
    raise ValueError(
      f"{config.index} is a part, rows {shown} of {num_rows}, so true "
      "neighbours would be missing. Merge all parts first: "
      "vqjax build_index --merge=a.faiss,b.faiss --output=index.faiss."
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
    found = faiss_bytes.footprint(index)
    record.header["memory"][name] = found.to_json()
  return {
    name: search_data.baseline_fn(index, config.k)
    for name, index in indexes.items()
  }


def _header(config, codec, info, data, train, num_threads) -> dict:
  """What points must share to be compared; `Record` resumes with no others."""
  sha256 = lambda path: path and files.sha256(path)
  return {
    "codec": codec.fingerprint,
    "index": info["sha256"],
    "decoders": sha256(config.decoders),
    "refiner": sha256(config.refiner),
    "num_vectors": info["num_vectors"],
    "num_lists": info["num_lists"],
    "coarse": info["coarse"],
    "queries": {"num": len(data.xq_QD), **files.identify(data.xq_QD)},
    "groundtruth": files.identify(data.truth.ids_QG),
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
  """Bytes of a vector: its codes, a byte for the norm, and the refiner."""
  num_bytes = faiss_ivf.code_bytes(info)
  if config.refiner:
    num_bytes += searchers.refiner_bytes(config.refiner, info)
  return num_bytes


def _ranges(config, info, parts) -> dict[str, list]:
  """Values of each parameter, rising; cut at the size of the index."""
  num_lists, num_vectors = info["num_lists"], info["num_vectors"]
  has_refiner = parts.refiner is not None
  has_own_scan = has_refiner and parts.refiner.kind == "fastscan"
  has_pairwise = parts.pairwise_fn is not None and not has_own_scan
  is_graph = info["coarse"] == "hnsw"
  if config.ef_search and not is_graph:
    raise ValueError(
      "--ef_search is the effort of a graph, but the coarse quantiser of "
      f"{config.index} is flat; leave it out."
    )
  probes, network = [1], [0, 10, 20, 50, 100, 200, 500, 1000]
  if num_lists > 1:
    probes = [2**i for i in range(13) if 4**i <= 4 * num_lists]
    network = [0, 2, 5, 10, 20, 50]
  if info["codec"] in additive.CODECS:
    network = [0]  # It has none: the scan has its decoded vectors already.
  ranges = {
    "nprobe": search_data.numbers(config, "nprobe", 1, num_lists) or probes,
    "ef_search": search_data.numbers(config, "ef_search", 1, 1 << 20)
    or [32, 128, 512],
    "num_refined": search_data.numbers(config, "num_refined", 0, num_vectors)
    or _default_refined(parts.refiner),
    "num_pairwise": search_data.numbers(config, "num_pairwise", 0, num_vectors)
    or ([0, 8, 32, 128] if has_pairwise else [0]),
    "num_network": search_data.numbers(config, "num_network", 0, num_vectors)
    or network,
  }
  if not is_graph:
    ranges["ef_search"] = [None]
  if max(ranges["num_refined"]) and not has_refiner:
    raise ValueError(
      "--num_refined needs a refiner: give --refiner=FILE of the command "
      "refiner, or --num_refined=0."
    )
  if max(ranges["num_pairwise"]) and has_own_scan:
    raise ValueError(
      "--num_pairwise must be 0 with a fastscan refiner, which knows more; "
      "codewords or the network re-order what it finds."
    )
  if max(ranges["num_pairwise"]) and not has_pairwise:
    raise ValueError(
      "--num_pairwise needs the pairwise decoder: give --decoders=FILE of "
      "pairwise_decoder that has one, or --num_pairwise=0."
    )
  combined = itertools.product(*ranges.values())
  settings = (dict(zip(ranges, values, strict=True)) for values in combined)
  if not any(map(search_measure.is_valid_setting, settings)):
    raise ValueError(
      "No setting is left. --num_pairwise must be 0 or above --num_network, "
      "and with a --num_refined above 0 it must be 0 and --num_network at most "
      f"that; got num_refined={ranges['num_refined']}, "
      f"num_pairwise={ranges['num_pairwise']}, "
      f"num_network={ranges['num_network']}."
    )
  return ranges


def _default_refined(refiner) -> list[int]:
  if refiner is None:
    return [0]
  return [0, 10, 20, 50] if refiner.kind == "rabitq" else [0, 3, 5, 10]


def _summarise(config, folder, record, data) -> None:
  t = record.header["threads"]
  logging.info(
    "%d vectors, %s, k=%d, threads: %d of faiss, %d of JAX\n%s\n\nThe "
    "fastest setting within 1 %% of the best 1-recall@1:\n%s\n\n%s",
    record.header["num_vectors"],
    cli.count(record.header["num_lists"], "list"),
    *(config.k, t["faiss"], t["jax"]),
    record.table(),
    record.latency_table(),
    record.memory_table(),
  )
  data.truth.report_ties()
  _doubt(data, max(p["recall"]["1-recall@1"] for p in record.points))
  best = record.best(next(iter(record.header["bytes"])))
  has_network = any(p["setting"].get("num_network") for p in record.points)
  if has_network and not (best["num_network"] or best["num_refined"]):
    logging.warning(
      "The network gains less than 1 % of the best 1-recall@1: is the codec "
      "trained? Settings were left out as if more of it gained recall."
    )
  logging.info(
    "Written: %s, %s\n%s",
    *(record.path, record.picture),
    search_results.next_steps(config, folder, best, record.header["dtype"]),
  )


def _doubt(data, recall: float) -> None:
  """Warns if the true neighbours, unchecked, may be of other files."""
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
    "recall": data.truth.recalls(ids_QR),
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
  data.truth.report_ties()
  _doubt(data, result["recall"]["1-recall@1"])
  return result


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
