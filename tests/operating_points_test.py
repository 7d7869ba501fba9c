"""Fronts of recall and speed, their measurement and their picture."""

import itertools
import time
import types

import numpy as np
import pytest
from matplotlib import image

from vqjax.search import operating_points, plots
from vqjax.search.operating_points import Point


def _points(n=60, seed=0):
  values = np.random.default_rng(seed).integers(1, 12, (n, 2))
  return [Point({"i": i}, r / 12, 100.0 * q) for i, (r, q) in enumerate(values)]


@pytest.mark.parametrize("seed", range(5))
def test_front_is_what_nothing_beats(seed):
  points = _points(seed=seed)
  beats = lambda a, b: (
    a.recall >= b.recall
    and a.qps >= b.qps
    and (a.recall, a.qps) != (b.recall, b.qps)
  )
  want = {
    (b.recall, b.qps) for b in points if not any(beats(a, b) for a in points)
  }
  front = operating_points.front(points)
  assert {(p.recall, p.qps) for p in front} == want
  assert len(front) == len(want)
  # Rising recall, falling speed.
  for a, b in itertools.pairwise(front):
    assert a.recall < b.recall
    assert a.qps > b.qps


def test_fastest_and_compare():
  points = [Point({}, 0.8, 50.0), Point({}, 0.9, 40.0), Point({}, 0.95, 45.0)]
  assert operating_points.fastest(points, 0.85).qps == 45
  assert operating_points.fastest(points, 0.8).qps == 50
  assert operating_points.fastest(points, 0.96) is None
  series = {"a": points, "b": [Point({}, 0.97, 7.0)]}
  assert operating_points.compare(series, [0.8, 0.96]) == [
    [0.8, 50.0, 7.0],
    [0.96, 0.0, 7.0],
  ]
  assert operating_points.to_json({"a": [Point({"k": 3}, 0.5, 1.26)]}) == {
    "a": [{"k": 3, "recall": 0.5, "qps": 1.3}]
  }


def test_measure_takes_turns_and_the_best_round():
  calls, seconds = [], iter([0.05, 0.0, 0.001, 0.0])

  def slow_at_first(setting):
    calls.append(("slow", setting["k"]))
    time.sleep(next(seconds))
    return setting["k"]

  def fast(setting):
    calls.append(("fast", setting["k"]))
    return 2 * setting["k"]

  done = []
  points = operating_points.measure(
    {"slow": slow_at_first, "fast": fast},
    [{"k": 1}, {"k": 2}],
    lambda result: result / 10,
    num_queries=10,
    num_rounds=2,
    progress=lambda: done.append(1),
  )
  assert (
    calls == [("slow", 1), ("fast", 1)] * 2 + [("slow", 2), ("fast", 2)] * 2
  )
  assert [p.recall for p in points["slow"]] == [0.1, 0.2]
  assert [p.recall for p in points["fast"]] == [0.2, 0.4]
  assert points["slow"][0].qps > 10 / 0.04  # Not that of the first round.
  assert points["slow"][0].setting == {"k": 1}
  assert len(done) == 2


def test_take_turns_leaves_warm_ups_out():
  calls = []

  def first_is_slow(setting):
    calls.append(setting["k"])
    time.sleep(0.02 if len(calls) == 2 else 0.0)
    return len(calls)

  seconds, results = operating_points.time_interleaved(
    {"a": first_is_slow}, {"k": 7}, num_rounds=2, num_warm_ups=1
  )["a"]
  assert calls == [7, 7, 7]
  assert results == [3]  # The second call was slow, the first does not count.
  assert seconds < 0.02


class _Clock:
  """Stands still but for the calls of what is timed."""

  def __init__(self, monkeypatch):
    self.now = 0.0
    fake = types.SimpleNamespace(perf_counter=lambda: self.now)
    monkeypatch.setattr(operating_points, "time", fake)

  def search_fn(self, seconds):
    """A search that takes these seconds, and returns the number of its call."""
    waiting = enumerate(seconds)

    def search_fn(_):
      number, took = next(waiting)
      self.now += took
      return number

    return search_fn


def test_short_calls_are_repeated(monkeypatch):
  clock = _Clock(monkeypatch)
  fns = {
    "quick": clock.search_fn([2**-6, *[2**-4] * 2, *[2**-5] * 4]),
    "slow": clock.search_fn([2**-6, 1.0, 0.5]),
  }
  timed = operating_points.time_interleaved(
    fns, {}, num_rounds=2, num_warm_ups=1, min_seconds=2**-3
  )
  assert timed == {"quick": (2**-5, [3, 4, 5, 6]), "slow": (0.5, [2])}
  endless = {"none": clock.search_fn(itertools.repeat(0.0))}
  timed = operating_points.time_interleaved(
    endless, {}, num_rounds=1, min_seconds=9.0
  )
  assert timed["none"][1] == list(range(operating_points._MOST_CALLS))


def test_picture_is_written(tmp_path):
  path = tmp_path / "points.png"
  series = {"one": _points(seed=1), "two": _points(seed=2)}
  plots.plot_panels(path, {"recall": series})
  first = path.read_bytes()
  assert first.startswith(b"\x89PNG")
  plots.plot_panels(path, {"recall": {"one": _points(seed=1)}})
  second = path.read_bytes()
  assert second != first
  panels = {"one": {"a": _points(seed=1)}, "two": {"a": _points(seed=2)}}
  plots.plot_panels(path, panels, title="Two")
  height, width = image.imread(path).shape[:2]
  assert width > 2 * height  # Side by side.


def test_nothing_to_measure_or_draw_is_refused(tmp_path):
  with pytest.raises(ValueError, match="got 3, 10 and 0"):
    operating_points.measure({}, [], float, 10)
  with pytest.raises(ValueError, match="no series .* got 0"):
    plots.plot_panels(tmp_path / "x.png", {"recall": {}})
  with pytest.raises(ValueError, match="no series .* got 0"):
    plots.plot_panels(tmp_path / "x.png", {})
