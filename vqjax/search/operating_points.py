"""How fast a search is at what recall: measured, and the best of many settings.

A search has knobs; each setting of them is a point (recall, queries per
second). What counts of a series of points is its front: those that no other
point beats in both. Two programs are compared at equal recall, on their fronts.
"""

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

_MOST_CALLS = 1000  # Of a round.


class Point(NamedTuple):
  """One setting of a search, and how well and how fast it does."""

  setting: dict
  recall: float  # 0 to 1.
  qps: float  # Queries per second.


def measure(
  search_fns: dict[Hashable, Callable[[dict], Any]],
  settings: Sequence[dict],
  recall_fn: Callable[[Any], float],
  num_queries: int,
  *,
  num_rounds: int = 3,
  progress: Callable[[], None] | None = None,
) -> dict[Hashable, list[Point]]:
  """Measures every search at every setting.

  The searches take turns within a setting, so that a machine that slows down
  slows them all; the best of the rounds counts.

  Each search takes a setting, keyword values that are the same for every
  series, and searches all queries. `recall_fn` makes a recall of what it
  returned; the first of the rounds is not warmed up.
  """
  if num_rounds < 1 or num_queries < 1 or not settings:
    raise ValueError(
      "Measuring needs at least one round, query and setting, got "
      f"{num_rounds}, {num_queries} and {len(settings)}."
    )
  points = {name: [] for name in search_fns}
  for setting in settings:
    timed = time_interleaved(search_fns, setting, num_rounds=num_rounds)
    for name, (seconds, results) in timed.items():
      recall = float(recall_fn(results[0]))
      points[name].append(Point(dict(setting), recall, num_queries / seconds))
    if progress is not None:
      progress()
  return points


def time_interleaved(
  search_fns: dict[Hashable, Callable[[dict], Any]],
  setting: dict,
  *,
  num_rounds: int,
  num_warm_ups: int = 0,
  min_seconds: float = 0.0,
) -> dict[Hashable, tuple[float, list]]:
  """Returns seconds per call and all results of each search's best round.

  Single calls before the rounds warm up what compiles or fills caches. In a
  round a search that is done before `min_seconds` is called again, because one
  short call measures little but noise.
  """
  best = dict.fromkeys(search_fns, (np.inf, []))
  for number in range(-num_warm_ups, num_rounds):
    least = min_seconds if number >= 0 else 0.0
    for name, search_fn in search_fns.items():
      seconds, results = _take_turn(search_fn, setting, least)
      if number >= 0 and seconds < best[name][0]:
        best[name] = seconds, results
  return best


def _take_turn(search_fn, setting, min_seconds: float) -> tuple[float, list]:
  """Seconds per call of one round, and what each call returned."""
  results, began = [], time.perf_counter()
  while True:
    results.append(search_fn(setting))
    seconds = max(time.perf_counter() - began, 1e-9)
    if seconds >= min_seconds or len(results) == _MOST_CALLS:
      return seconds / len(results), results


def front(points: Sequence[Point]) -> list[Point]:
  """Points that no other beats in recall and speed, by rising recall."""
  kept = []
  for point in sorted(points, key=lambda p: (-p.recall, -p.qps)):
    if not kept or point.qps > kept[-1].qps:
      kept.append(point)
  return kept[::-1]


def fastest(points: Sequence[Point], recall: float) -> Point | None:
  """The fastest point of at least that recall; None if there is none."""
  enough = [point for point in points if point.recall >= recall]
  return max(enough, key=lambda point: point.qps, default=None)


def compare(
  series: dict[Hashable, Sequence[Point]], recalls: Sequence[float]
) -> list[list]:
  """Rows `[recall, qps of each series]`; 0 if a series stays below."""
  rows = []
  for recall in recalls:
    best = [fastest(points, recall) for points in series.values()]
    rows.append([recall, *(0.0 if p is None else p.qps for p in best)])
  return rows


def to_json(series: dict[str, Sequence[Point]]) -> dict[str, list[dict]]:
  """Points as plain values, setting by setting."""
  return {
    name: [
      {**point.setting, "recall": point.recall, "qps": round(point.qps, 1)}
      for point in points
    ]
    for name, points in series.items()
  }
