"""Searches in indexes of a sample: settings, their recall, time and bytes."""

import functools

import numpy as np

import vqjax
from experiments.lib import cli, search_measure
from experiments.lib.tune_codecs import K, Sample
from vqjax import index as index_lib
from vqjax import index_build
from vqjax.interop import faiss_ivf
from vqjax.search import footprint, operating_points

REFINERS = (None, "rabitq")
_NUM_SINGLE = 20  # Queries that are searched one by one.
_MIN_SECONDS = 0.05  # Of a round.
_LINK_BYTES = 280  # Of a centroid in a graph: 64 links, places, a level.


def settings(
  num_lists: int, refiner: str | None, has_network: bool
) -> list[dict]:
  """Returns the searches to try; each is compiled, which takes seconds."""
  scored = [{"num_refined": 50}] if refiner else [{}]
  if has_network:
    by_network = [{**at, "num_network": 20} for at in scored]
    scored = [*scored, *by_network] if refiner else by_network
  probes = sorted({max(num_lists // part, 1) for part in (64, 16, 4, 1)})
  return [{"nprobe": nprobe, **at} for nprobe in probes for at in scored]


def measure(
  name: str, codec: vqjax.Codec, sample: Sample, seed: int, with_single: bool
) -> list[dict]:
  """Returns a series for each refiner: its bytes and its points.

  A point is a setting with recalls and microseconds per query of one call with
  all of them; `with_single` those of the front also have `ms`, the milliseconds
  of a query alone.
  """
  index = vqjax.build_index(codec, sample.xb_ND, metric=sample.metric)
  vectors = index_lib.open_for(sample.xb_ND, codec.dim, sample.metric)
  has_network = codec.name == "qinco"
  found = []
  for refiner in REFINERS:
    if refiner:
      index.make_refiner(refiner, vectors, np.arange(len(vectors)), seed)
    tried = settings(index.num_lists, refiner, has_network)
    what = f"search {name}" + (f" with {refiner}" if refiner else "")
    with cli.elapsed(what):
      points = _points(index, tried, sample, with_single)
    found.append(
      {
        "codec": name,
        "refiner": refiner,
        "num_lists": index.num_lists,
        "memory": index.footprint().to_json(),
        "points": points,
      }
    )
  return found


def _points(index, tried, sample: Sample, with_single: bool) -> list[dict]:
  """Measures settings in turns, so that a slow moment slows all."""
  queries_QD = sample.truth.xq_QD
  fns = [functools.partial(index.search, k=K, **at) for at in tried]
  timed = operating_points.time_interleaved(
    {i: lambda _, fn=fn: fn(queries_QD)[1] for i, fn in enumerate(fns)},
    {},
    num_rounds=3,
    num_warm_ups=1,
    min_seconds=_MIN_SECONDS,
  )
  names, points = ("1-recall@1", f"knn_recall@{K}"), []
  for at, (seconds, results) in zip(tried, timed.values(), strict=True):
    us = round(1e6 * seconds / len(queries_QD), 2)
    recalls = sample.truth.recalls(results[0], names)
    points.append({"setting": at, "recall": recalls, "us": us})
  for point in front(points) if with_single else []:
    search_fn = fns[points.index(point)]
    ms = search_measure.latencies(search_fn, queries_QD[:_NUM_SINGLE])
    point["ms"] = round(float(np.median(ms)), 3)
  return points


def front(points: list[dict]) -> list[dict]:
  """Returns the points that no other beats in recall and time."""
  found = [
    operating_points.Point(p, p["recall"][f"knn_recall@{K}"], 1e6 / p["us"])
    for p in points
  ]
  return [point.setting for point in operating_points.front(found)]


def bytes_of_all(memory: dict, num_lists: int, num_vectors: int) -> int:
  """Bytes in memory of such an index of `num_vectors`, in lists as many need.

  Codes, norms and refiners grow with the vectors, centroids with the lists;
  tables and codec stay. Ids of a saved index lie on disk.
  """
  found = footprint.from_json(memory)
  lists = index_build.default_lists(num_vectors)
  total = 0.0
  for part, size in found.ram.items():
    if part in ("ids", "graph"):
      continue
    if part in footprint.EACH:
      size *= num_vectors / found.num_vectors
    elif part == "centroids":
      size *= lists / num_lists
    total += size
  if faiss_ivf.default_coarse(lists) == "hnsw":
    total += _LINK_BYTES * lists
  return int(total)


def label(series: dict) -> str:
  """Returns what a series is called in tables."""
  refiner = series["refiner"]
  return series["codec"] + (f" + {refiner}" if refiner else "")


def report(all_series: list[dict], num_vectors: int) -> str:
  """Returns the table of the settings that no other of their series beats."""
  recall = f"knn_recall@{K}"
  has_ms = any("ms" in p for s in all_series for p in s["points"])
  header = ["front of", "lists", "nprobe", "refined", "network"]
  header += [
    recall,
    "1-recall@1",
    "us",
    *(["ms alone"] * has_ms),
    "MB shared by all",
  ]
  cells = []
  for series in all_series:
    memory = bytes_of_all(series["memory"], series["num_lists"], num_vectors)
    for point in front(series["points"]):
      at = point["setting"]
      cells.append(
        [
          label(series),
          series["num_lists"],
          at["nprobe"],
          at.get("num_refined", 0),
          at.get("num_network", 0),
          f"{point['recall'][recall]:.3f}",
          f"{point['recall']['1-recall@1']:.3f}",
          f"{point['us']:.1f}",
          *([f"{point['ms']:.2f}" if "ms" in point else ""] * has_ms),
          f"{memory / 1e6:,.1f}",
        ]
      )
  return cli.table(header, cells)
