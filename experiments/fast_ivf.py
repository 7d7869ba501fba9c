r"""Builds a fast IVF index of cosines and measures it against faiss.

  vqjax fast_ivf --data=base.npy --queries=query.npy --output=runs/lists
  vqjax fast_ivf --kind=pq --data=base.npy --queries=query.npy \
      --groundtruth=groundtruth.npy --metric=ip --output=runs/codes

Lists are learned from --data by mini-batch k-means and hold all of it. Then all
queries are searched at each setting, alternating with the baselines of faiss,
which have the same lists. A point is the best of --rounds rounds, after one
call that warms up; in a round the queries are searched for a tenth of a second,
or once if that takes longer. Afterwards --single searches 200 of them one by
one, at the best setting of each series.

The folder --output gets index (open it by FastIVF.load; index/index.faiss is a
plain faiss file), search.json with all points, and the picture search.png. If
interrupted, run it again to resume; with other values of --nprobe,
--ratio_threshold, --num_candidates or --baselines it adds their points.

Columns of the table: knn_recall@10 is the share of the true ten neighbours
among the first ten results, 1-recall@R the share of queries whose nearest
neighbour is among the first R; qps are queries per second of one call with all
of them. The last table has the bytes of a vector in memory and on disk, ids,
centroids and codewords included. Standard output gets each point as a JSON
line too, if it is a file or a pipe of its own.
"""

import itertools
import pathlib
import shutil

import jax
import numpy as np
from absl import logging

from experiments.lib import (
  cli,
  fast_ivf_kinds,
  search_data,
  search_measure,
  search_record,
  truth,
)
from vqjax import __version__, evaluation
from vqjax.core import check_range
from vqjax.data import batches, datasets, files, unit
from vqjax.fast_ivf import memory, sources
from vqjax.interop import faiss_bytes, faiss_fast_baselines, faiss_hakes
from vqjax.search import pipeline

REQUIRED = ("data", "queries", "output")
OPTIONS = {
  "data": cli.Option(
    str, None, "Vectors to index (.npy, .bvecs, items.parquet#embedding)."
  ),
  "queries": cli.Option(str, None, "Queries, of the same dimension."),
  "groundtruth": cli.Option(
    str,
    None,
    "Rows of their true neighbours, nearest first; found by exact search if "
    "unset.",
  ),
  "kind": cli.Option(
    str,
    "flat",
    "flat (whole vectors), pq (product codes find candidates, whole vectors "
    "score them) or compressed (vectors of fewer dimensions do).",
  ),
  "metric": cli.Option(str, "cosine", "cosine, ip or l2."),
  "nlist": cli.Option(
    int,
    None,
    "Lists; if unset, the power of two nearest to three square roots of the "
    "number of vectors, at most one for eight of them.",
  ),
  "nprobe": cli.Option(
    str,
    None,
    "Lists to search, as 1,4,16; if unset, powers of two up to four times the "
    "square root of --nlist.",
  ),
  "ratio_threshold": cli.Option(
    str,
    "0",
    "Skips lists that are far behind the best one of a query, as 0,0.5; never "
    "the best quarter of --nprobe. 0 skips none.",
  ),
  "k": cli.Option(int, 10, "Results per query."),
  "num_candidates": cli.Option(
    str,
    None,
    "Candidates that whole vectors score, as 50,100, of all that finds them by "
    "codes or short vectors; if unset, four and ten times --k.",
  ),
  "pq_num_centroids": cli.Option(int, 16, "Codewords of a sub-vector."),
  "pq_num_subvectors": cli.Option(
    int,
    None,
    "Sub-vectors, also of baselines; if unset, of four dimensions or a little "
    "more.",
  ),
  "engine": cli.Option(
    str,
    "auto",
    "Of --kind=pq: fastscan, for 16 centroids, tables, or auto: fastscan if it "
    "can be.",
  ),
  "compression_ndim": cli.Option(
    int, None, "Of the short vectors of --kind=compressed; a quarter if unset."
  ),
  "baselines": cli.Option(
    str,
    "IVFFlat,IVFPQfs+RFlat",
    "Also search these of faiss, on the same lists: any of "
    f"{','.join(faiss_fast_baselines.NAMES)}; none if empty.",
  ),
  "threads": cli.Option(
    int, None, "CPUs to use; all that the process may use if unset."
  ),
  "rounds": cli.Option(int, 3, "Rounds per point, of which the best counts."),
  "seed": cli.Option(int, 0, "Of k-means."),
  "single": cli.Option(bool, False, "Also time queries one by one."),
  "output": cli.Option(str, None, "Folder of index, points and picture."),
  "overwrite": cli.Option(bool, False, "Replace index and points."),
}
_MAX_TRAIN = 100_000  # Vectors that codewords of baselines are learned from.


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Returns what it wrote: `{"header", "latency", "points"}`."""
  cli.require(config, *REQUIRED)
  check_range("--rounds", config.rounds, 1, 1000)
  kind = fast_ivf_kinds.get(config.kind)
  names = search_data.baseline_names(config, faiss_fast_baselines.NAMES)
  dataset, base = _open_data(config)
  num, dim = base.shape
  settings = fast_ivf_kinds.settings(config, kind, num, dim)
  check_range("--k", config.k, 1, num, "vectors in --data")
  series = _series(config, kind, names, settings["nlist"], num)
  folder = pathlib.Path(config.output)
  num_threads = faiss_hakes.set_num_threads(config.threads)
  record = _open_record(config, folder, settings, dataset, base, num_threads)
  if _is_complete(config, folder, record, series):
    _summarise(config, folder, record, kind, "Made already")
    return {"header": record.header, "points": record.points}
  data = _open_truth(config, dataset, base)
  record.save()
  index = _open_index(folder, kind, settings, base, num_threads)
  found = memory.footprint_of(index, folder / "index")
  record.header["memory"][kind.class_name] = found.to_json()
  search_fns = {
    kind.class_name: fast_ivf_kinds.search_fn(kind, index, config.k),
    **_baseline_fns(config, names, series, index, base, record),
  }
  _explore(config, record, series, search_fns, data)
  if config.single:
    search_measure.time_single(record, search_fns, data.xq_QD)
  record.save()
  record.draw()
  _summarise(config, folder, record, kind, "Written")
  data.truth.report_ties()
  return {
    "header": record.header,
    "latency": record.latency,
    "points": record.points,
  }


def _open_data(config):
  """The data set of the flags, and the vectors, both looked at.

  Raises ValueError if something is wrong with vectors or queries.
  """
  dataset = datasets.resolve(
    base=config.data,
    queries=config.queries,
    groundtruth=config.groundtruth,
    metric=config.metric,
  )
  base = datasets.open_split(dataset, "base")
  queries = datasets.open_split(dataset, "queries")
  for vectors in (base, queries):
    sources.check(unit.raw(vectors), no_zeros=config.metric == "cosine")
  return dataset, base


def _open_truth(config, dataset, base) -> search_data.Data:
  """Queries and true neighbours, those of the file or of an exact search."""
  opened, sizes = truth.of_dataset(dataset)
  found = evaluation.open_truth(opened, len(base), base, sizes)
  return search_data.Data(found.xq_QD, found, base, config.metric)


def _series(config, kind, names, nlist: int, num: int) -> dict[str, list]:
  """Settings of each series, by its name."""
  get = search_data.numbers
  most = [2**i for i in range(nlist.bit_length()) if 4**i <= 16 * nlist]
  probes = {"nprobe": get(config, "nprobe", 1, nlist) or most}
  ratios = {"ratio_threshold": _ratios(config)}
  candidates = get(config, "num_candidates", config.k, num)
  if not candidates:
    candidates = sorted({min(n * config.k, num) for n in (4, 10)})
  codes = {"num_candidates": candidates}
  product = lambda ranges: [
    dict(zip(ranges, values, strict=True))
    for values in itertools.product(*ranges.values())
  ]
  own = probes | ratios | (codes if kind.has_candidates else {})
  found = {kind.class_name: product(own)}
  for name in names:
    has_codes = faiss_fast_baselines.has_codes(name)
    found[name] = product(probes | (codes if has_codes else {}))
  return found


def _ratios(config) -> list[float]:
  """Values of --ratio_threshold, rising."""
  try:
    values = sorted({float(part) for part in config.ratio_threshold.split(",")})
    for value in values:
      check_range("a ratio", value, 0, 1)
  except ValueError as error:
    raise ValueError(
      "--ratio_threshold must be numbers from 0 to 1, as 0,0.5; got "
      f"{config.ratio_threshold!r}."
    ) from error
  return values


def _open_record(config, folder, settings, dataset, base, num_threads):
  """The record of points, in a folder that is ours or new."""
  path, lists = folder / "search.json", folder / "index"
  resume = not config.overwrite
  if resume and lists.exists() and not path.exists():
    raise FileExistsError(
      f"{lists} exists already, but no {path.name} beside it says what it is "
      "of; choose another --output, or begin anew by --overwrite."
    )
  search_record.check_output(path, resume=resume)
  queries = datasets.open_split(dataset, "queries")
  given = config.groundtruth and datasets.open_split(dataset, "groundtruth")
  header = {
    "kind": config.kind,
    "settings": settings,
    "data": files.identify(base),
    "num_vectors": len(base),
    "num_lists": settings["nlist"],
    "queries": {"num": len(queries), **files.identify(queries)},
    "groundtruth": files.identify(given) if given is not None else "exact",
    "baseline_subvectors": fast_ivf_kinds.num_subvectors(config, base.shape[1]),
    "k": config.k,
    "rounds": config.rounds,
    "threads": search_record.threads(num_threads),
    "device": jax.devices()[0].device_kind,
    "vqjax": __version__,
    "memory": {},
  }
  recall = "knn_recall@10" if config.k >= evaluation.OVERLAP else "1-recall@1"
  if len(base) < evaluation.OVERLAP:
    recall = "1-recall@1"
  record = search_record.Record(path, header, resume=resume, recall=recall)
  if config.overwrite and lists.exists():
    path.unlink(missing_ok=True)
    shutil.rmtree(lists)
  return record


def _is_complete(config, folder, record, series) -> bool:
  """Whether all that is asked for has been measured and written."""
  return (
    (folder / "index").is_dir()
    and record.picture.exists()
    and not any(_missing(record, name, series[name]) for name in series)
    and not (config.single and not all(map(record.is_timed, series)))
  )


def _missing(record, name: str, settings) -> list[dict]:
  return [at for at in settings if not record.find(name, at)]


def _open_index(folder, kind, settings, base, num_threads):
  """Loads the index of the folder, or trains and writes it."""
  path = folder / "index"
  if path.exists():
    logging.info("Index: %s is there.", path)
    index = fast_ivf_kinds.class_of(kind).load(path)
    index.num_threads = num_threads
    return index
  index, seconds = fast_ivf_kinds.make(kind, settings, num_threads), {}
  with cli.timed(seconds, "train"):
    index.train(unit.raw(base))
  index.save(path)
  logging.info("Trained and filled %s in %.1f s.", index, seconds["train"])
  return index


def _baseline_fns(config, names, series, index, base, record) -> dict:
  """Searches with the baselines of which points or times are missing."""
  found, x_ND = {}, None
  for name in names:
    has_points = not _missing(record, name, series[name])
    if has_points and (not config.single or record.is_timed(name)):
      continue
    if x_ND is None:
      x_ND = batches.subsample(base, _MAX_TRAIN, config.seed)
    num_codes = record.header["baseline_subvectors"]
    with cli.elapsed(f"train faiss {name}"):
      baseline = faiss_fast_baselines.fit(
        name, index.centroids, x_ND, config.metric, num_codes
      )
    with cli.progress(len(base), f"add to {name}") as done:
      for x_nD in search_data.blocks(base, done):
        baseline.add(np.ascontiguousarray(x_nD, np.float32))
    record.header["memory"][name] = faiss_bytes.footprint(baseline).to_json()
    found[name] = _baseline_fn(baseline, config.k)
  return found


def _baseline_fn(index, k: int):
  def search(xq_QD, **setting):
    ids_QK = faiss_fast_baselines.search(index, xq_QD, k, **setting)
    return pipeline.Result(ids_QK, np.zeros(ids_QK.shape), {}, 0)

  return search


def _explore(config, record, series, search_fns, data) -> None:
  """Measures what is missing, all that has the same nprobe in turns."""
  jobs = [
    (name, at)
    for name in search_fns
    for at in _missing(record, name, series[name])
  ]
  of_probe = lambda job: job[1]["nprobe"]
  done_so_far = 0
  with cli.progress(len(jobs), "search", unit="settings") as done:
    for _, group in itertools.groupby(sorted(jobs, key=of_probe), of_probe):
      group = list(group)
      record.add(search_measure.measure_all(config, group, search_fns, data))
      done_so_far += len(group)
      done(done_so_far, len(jobs))


def _summarise(config, folder, record, kind, said: str) -> None:
  t = record.header["threads"]
  single = ""
  if record.latency:
    single = (
      f"\n\nThe fastest setting within 1 % of the best {record.recall}, one "
      f"query at a time:\n{record.latency_table()}"
    )
  logging.info(
    "%d vectors, %s, %s, k=%d, threads: %d of faiss, %d of JAX\n%s%s\n\n%s",
    record.header["num_vectors"],
    cli.count(record.header["num_lists"], "list"),
    *(config.metric, config.k, t["faiss"], t["jax"]),
    record.table(),
    single,
    record.memory_table(),
  )
  best = record.best(kind.class_name)
  num = best.get("num_candidates")
  ratio = best["ratio_threshold"]
  skips = ""
  if ratio:
    least = max(best["nprobe"] // 4, 1)
    skips = f"\n  index.ratio_threshold, index.min_lists = {ratio}, {least}"
  more = f", rescore=True, num_candidates={num}" if num else ""
  logging.info(
    "%s: %s, %s, %s\nTo search at the fastest setting within 1 %% of the best "
    "recall, in Python:\n  from vqjax.fast_ivf import %s\n  index = "
    "%s.load(%r)\n  index.nprobe = %d%s\n  scores, ids = index.search("
    "queries, k=%d%s)",
    *(said, folder / "index", record.path, record.picture),
    *(kind.class_name, kind.class_name, str(folder / "index")),
    *(best["nprobe"], skips, config.k, more),
  )


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
