"""Which settings are tried, against all that one could try."""

import itertools

import numpy as np
import pytest

from vqjax.interop import faiss_grid

_RANGES = {"a": [1, 2, 4, 8], "b": [0, 10, 20], "c": [None]}


def _front(measured, i):
  """Settings that nothing beats in recall `i` and seconds."""
  beats = lambda p, q: (
    p[0][i] >= q[0][i] and p[1] <= q[1] and (p[0][i], p[1]) != (q[0][i], q[1])
  )
  return {
    (q[0][i], q[1])
    for q in measured.values()
    if not any(beats(p, q) for p in measured.values())
  }


def _world(seed):
  """Recalls and seconds of every setting, rising in each parameter."""
  rng = np.random.default_rng(seed)
  rise = lambda axis, top: np.sort(rng.integers(0, top, (4, 3)), axis=axis)
  recall = lambda: np.sort(rise(0, 20), axis=1) / 20
  first, second, seconds = recall(), recall(), np.sort(rise(0, 30), axis=1) + 1
  return {
    (a, b): ((first[i, j], second[i, j]), float(seconds[i, j]))
    for i, a in enumerate(_RANGES["a"])
    for j, b in enumerate(_RANGES["b"])
  }


def _explore(world, num_recalls):
  grid = faiss_grid.Grid(_RANGES, num_recalls)
  tried, skipped = {}, []
  for setting, may_win in grid.settings():
    key = setting["a"], setting["b"]
    if may_win:
      recalls, seconds = world[key]
      grid.add(setting, recalls[:num_recalls], seconds)
      tried[key] = world[key]
    else:
      skipped.append(key)
  return tried, skipped


@pytest.mark.parametrize("seed", range(20))
def test_no_front_loses_a_point(seed):
  world = _world(seed)
  tried, skipped = _explore(world, num_recalls=2)
  assert len(tried) + len(skipped) == 12
  assert list(tried)[:2] == [(1, 0), (8, 20)]
  for i in range(2):
    assert _front(tried, i) == _front(world, i)


def test_something_is_skipped():
  # Recall that does not grow: the cheapest setting is enough.
  flat = {key: ((0.5,), seconds) for key, (_, seconds) in _world(0).items()}
  tried, skipped = _explore(flat, 1)
  assert len(skipped) == 10, tried


def test_what_is_known_need_not_be_tried():
  grid = faiss_grid.Grid(_RANGES)
  grid.add({"a": 2, "b": 0, "c": None}, [1.0], 1.0)
  grid.add({"a": 3, "b": 0, "c": None}, [1.0], 0.0)  # Not on the grid.
  for setting, may_win in grid.settings():
    # Larger than the perfect one; a smaller one may be faster.
    is_larger = setting["a"] >= 2
    assert may_win == (not is_larger), setting


def test_a_single_setting_and_none():
  grid = faiss_grid.Grid({"a": [3]})
  assert list(grid.settings()) == [({"a": 3}, True)]
  with pytest.raises(ValueError, match="needs a value, got none for .'b'"):
    faiss_grid.Grid({"a": [3], "b": []})
  order = [s for s, _ in faiss_grid.Grid(_RANGES).settings()]
  want = [
    dict(zip(_RANGES, values, strict=True))
    for values in itertools.product(*_RANGES.values())
  ]
  assert sorted(map(str, order)) == sorted(map(str, want))
