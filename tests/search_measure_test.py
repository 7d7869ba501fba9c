"""What a point says, where a round has many calls."""

import types

import numpy as np

from experiments import search
from experiments.lib import cli, search_data, search_measure
from vqjax import evaluation
from vqjax.search import operating_points, pipeline


def test_times_of_repeated_calls_are_those_of_one(monkeypatch):
  now, number = 0.0, 0

  def search_fn(xq_QD):
    nonlocal now, number
    now, number = now + 0.5, number + 1
    ids_Q1 = np.zeros((len(xq_QD), 1), int)
    return pipeline.Result(ids_Q1, ids_Q1, {"scan": 0.1 * number}, 15)

  clock = types.SimpleNamespace(perf_counter=lambda: now)
  monkeypatch.setattr(operating_points, "time", clock)
  monkeypatch.setattr(search_measure, "_MIN_SECONDS", 2.0)
  found = evaluation.Truth(np.zeros((5, 2)), np.zeros((5, 1), int))
  data = search_data.Data(found.xq_QD, found, None, "l2")
  config = cli.get_config(search.OPTIONS, rounds=1)
  (point,) = search_measure.measure_all(
    config, [("a", {})], {"a": search_fn}, data
  )
  assert number == 5  # One to warm up, then four of half a second.
  assert point["qps"] == 5 / 0.5
  assert point["stage_us"] == {"scan": 1e6 * (0.2 + 0.3 + 0.4 + 0.5) / 4 / 5}
  assert point["decoded_per_query"] == 3
