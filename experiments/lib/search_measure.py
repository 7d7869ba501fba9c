"""Measures searches: settings worth trying, interleaved, and single queries."""

import functools
import itertools
import time

import numpy as np
from absl import logging

from experiments.lib import cli
from vqjax.interop import faiss_baselines, faiss_grid
from vqjax.search import operating_points

_PROBE = ("nprobe", "ef_search")  # What baselines share with ours.
_FRONTS = ("1-recall@1", "knn_recall@10")  # Settings must gain in one.
_NUM_SINGLE = 200  # Queries that are searched one by one.
_MIN_SECONDS = 0.1  # Of a round; a call with few queries takes a hundredth.


def baseline_settings(name: str, ranges) -> list[dict]:
  """Returns all settings of a baseline."""
  probes = itertools.product(ranges["nprobe"], ranges["ef_search"])
  settings = [{"nprobe": n, "ef_search": ef} for n, ef in probes]
  if name != "IVF-RaBitQ":
    return settings
  bits = faiss_baselines.QUERY_BITS
  return [{**s, "query_bits": b} for s in settings for b in bits]


def explore(config, record, ours: str, ranges, search_fns, data) -> None:
  """Measures the settings that can be on a front, baselines along with them."""
  waiting = {
    name: [
      s for s in baseline_settings(name, ranges) if not record.find(name, s)
    ]
    for name in search_fns
    if name != ours
  }

  def of_probe(probe):
    """Baselines at the lists of a setting, once each."""
    found = []
    for name, settings in waiting.items():
      here = [s for s in settings if all(s[k] == probe[k] for k in _PROBE)]
      found += [(name, s) for s in here]
      waiting[name] = [s for s in settings if s not in here]
    return found

  def measure(jobs):
    points = measure_all(config, jobs, search_fns, data)
    record.add(points)
    return points

  possible = data.truth.names(config.k)
  fronts = [name for name in _FRONTS if name in possible]
  grid = faiss_grid.Grid(ranges, len(fronts))
  add = lambda p: grid.add(
    p["setting"], [p["recall"][name] for name in fronts], 1 / p["qps"]
  )
  for point in record.points:
    if point["series"] == ours:
      add(point)
  num_tried = 0
  with cli.progress(grid.num_settings, "search", unit="settings") as done:
    for number, (setting, may_win) in enumerate(grid.settings(), 1):
      if (
        is_valid_setting(setting) and may_win and not record.find(ours, setting)
      ):
        add(measure([(ours, setting), *of_probe(setting)])[0])
        num_tried += 1
      done(number, grid.num_settings)
  for setting in baseline_settings("", ranges):
    if jobs := of_probe(setting):  # If none of ours was worth trying.
      measure(jobs)
  logging.info(
    "Measured %d of %d settings.%s",
    *(num_tried, grid.num_settings),
    ""
    if num_tried == grid.num_settings
    else " The others cannot be the best at any recall, have stages that undo "
    "each other, or were measured before.",
  )


def is_valid_setting(setting: dict) -> bool:
  """Returns whether no stage of a setting is undone by a later one."""
  network, pairwise = setting["num_network"], setting["num_pairwise"]
  if setting["num_refined"]:
    return not pairwise and network <= setting["num_refined"]
  return not 0 < pairwise <= network


def measure_all(config, jobs, search_fns, data) -> list[dict]:
  """Points of `(series, setting)`, measured interleaved."""
  fns = {
    i: lambda _, name=name, at=at: search_fns[name](data.xq_QD, **at)
    for i, (name, at) in enumerate(jobs)
  }
  timed = operating_points.time_interleaved(
    fns,
    {},
    num_rounds=config.rounds,
    num_warm_ups=1,
    min_seconds=_MIN_SECONDS,
  )
  num = len(data.xq_QD)
  points = []
  for (name, setting), (seconds, results) in zip(
    jobs, timed.values(), strict=True
  ):
    result, stages = results[0], _stage_us(results, num)
    points.append(
      {
        "series": name,
        "setting": setting,
        "recall": data.truth.recalls(result.ids_QR),
        "qps": round(num / seconds, 2),
        "stage_us": stages,
        "decoded_per_query": round(result.num_decoded / num, 3)
        if stages
        else None,
      }
    )
  return points


def _stage_us(results, num_queries: int) -> dict[str, float]:
  """Microseconds per query of each stage, the mean of some calls."""
  mean = lambda stage: float(np.mean([r.seconds[stage] for r in results]))
  return {
    stage: round(1e6 * mean(stage) / num_queries, 3)
    for stage in results[0].seconds
  }


def time_single(record, search_fns, xq_QD) -> None:
  """Times queries one by one at the best setting of each series."""
  with cli.progress(len(search_fns), "single", unit="series") as done:
    for number, (name, search_fn) in enumerate(search_fns.items(), 1):
      setting = record.best(name)
      one_fn = functools.partial(search_fn, **setting)
      ms = latencies(one_fn, xq_QD[:_NUM_SINGLE])
      record.add_latency(
        {
          "series": name,
          "setting": setting,
          "num_queries": len(ms),
          "p50_ms": round(float(np.percentile(ms, 50)), 3),
          "p95_ms": round(float(np.percentile(ms, 95)), 3),
        }
      )
      done(number, len(search_fns))


def latencies(search_fn, xq_QD) -> list[float]:
  """Milliseconds of each query, in the second pass over all of them."""
  for x_D in xq_QD:
    search_fn(x_D[None])  # Compiles for the sizes that come.
  ms = []
  for x_D in xq_QD:
    began = time.perf_counter()
    search_fn(x_D[None])
    ms.append(1e3 * (time.perf_counter() - began))
  return ms
