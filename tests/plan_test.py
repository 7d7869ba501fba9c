import itertools

import numpy as np
import pytest

from configs import qinco2_xs
from experiments import build_index, encode, ivf_centroids, ivf_pipeline, train
from experiments.lib import plan
from vqjax import shipped

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def short(monkeypatch):
  monkeypatch.setattr(plan, "_SECONDS", 0.2)


class _Clock:
  """Time that passes only when it is told to."""

  now = 0.0

  def perf_counter(self):
    return self.now

  def sleep(self, seconds):
    self.now += seconds


@pytest.fixture
def clock(monkeypatch):
  monkeypatch.setattr(plan, "time", _Clock())
  return plan.time


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  """A folder with x.npy, 700 vectors of 8 dimensions, and a pq codec."""
  folder = tmp_path_factory.mktemp("data")
  np.save(folder / "x.npy", RNG.normal(size=(700, 8)).astype(np.float32))
  config = _pq(folder)
  train.run(config, folder / "pq")
  return folder


def _pq(folder):
  config = shipped.read_config("pq")
  config.data.train = str(folder / "x.npy")
  config.model.update(num_codes=2, codebook_size=16)
  config.init.num_iterations = 2
  return config


def _is_unchanged(folder, fn):
  before = sorted(folder.rglob("*"))
  found = fn()
  assert sorted(folder.rglob("*")) == before
  assert set(found) == {"rows", "bytes", "memory", "seconds"}
  assert found["memory"] > 1e6
  return found


def _steps(clock, first):
  clock.sleep(first)
  yield 10
  while True:
    clock.sleep(0.05)
    yield 10


@pytest.mark.parametrize("first", [0.05, 3.0])
def test_a_rate_is_that_of_later_steps(clock, first):
  stage = plan.measure("a", _steps(clock, first), 1000)
  assert clock.now < first + 0.3
  assert stage.seconds == pytest.approx(first + 99 * 0.05)
  few = plan.measure("a", itertools.islice(_steps(clock, first), 3), 30)
  assert few.seconds == pytest.approx(first + 2 * 0.05)
  one = plan.measure("a", itertools.islice(_steps(clock, first), 1), 30)
  assert one.seconds == pytest.approx(3 * first)


def test_work_without_steps_grows_by_a_line(clock):
  asked = []
  fit = lambda num: asked.append(num) or clock.sleep(5 + num * 1e-3)
  stage = plan.scaled("a", fit, 100_000, 4096)
  assert asked == [4096, 8192]
  assert stage.seconds == pytest.approx(105)
  assert plan.scaled("a", fit, 1000).seconds == pytest.approx(6)


def test_durations_are_said_in_words():
  seconds = (3.14, 150, 40_000)
  assert [*map(plan.duration, seconds)] == ["3.1 s", "2 min", "11.1 h"]


def test_encode(data):
  values = dict(codec=data / "pq", data=data / "x.npy", plan=True)
  for output, row_bytes, more in (
    ("codes.npy", 8, {}),
    ("codes.bin", 1, {"raw": True}),
    ("codes", 2, {"shards": 3}),
  ):
    run = lambda o=output, m=more: encode.run(**values, output=data / o, **m)
    found = _is_unchanged(data, run)
    assert found["rows"] == 700
    assert found["bytes"] == 700 * row_bytes


def test_build_index(data):
  values = dict(codec=data / "pq", data=data / "x.npy", plan=True)
  run = lambda **more: build_index.run(**values, output=data / "i", **more)
  assert _is_unchanged(data, run)["rows"] == 700
  found = _is_unchanged(data, lambda: run(rows="100:"))
  assert found["rows"] == 600
  # Codewords of 2 x 16 x 8 numbers, and a centroid.
  assert found["bytes"] == 600 * (2 + 9 + build_index._ID_BYTES) + 4 * (
    2 * 16 * 8 + 8
  )
  found = _is_unchanged(data, lambda: run(num_lists=5))
  assert found["bytes"] > 700 * 10
  with pytest.raises(ValueError, match="only copies lists"):
    build_index.run(merge="a,b", output=data / "i", plan=True)


def test_ivf_centroids(data):
  values = dict(data=data / "x.npy", output=data / "c.npy", plan=True)
  for start in ("two-level", "random"):
    run = lambda s=start: ivf_centroids.run(
      num_centroids=9, num_iterations=2, start=s, **values
    )
    found = _is_unchanged(data, run)
    assert (found["rows"], found["bytes"]) == (700, 9 * 8 * 4)
  with pytest.raises(ValueError, match="leave --minibatch out"):
    ivf_centroids.run(num_centroids=9, minibatch=True, **values)


def test_train(data, tmp_path):
  run = lambda: train.run(_pq(data), data / "new", plan=True)
  found = _is_unchanged(data, run)
  assert (found["rows"], found["bytes"]) == (630, 16 * 8 * 4)


@pytest.mark.slow
def test_what_training_writes_is_about_what_was_said(tmp_path):
  config = qinco2_xs.get_config("smoke")
  found = _is_unchanged(
    tmp_path, lambda: train.run(config, tmp_path / "a", plan=True)
  )
  made = train.run(config, tmp_path / "a")
  assert found["rows"] > 0
  size = sum(p.stat().st_size for p in (tmp_path / "a").rglob("*"))
  assert found["bytes"] == pytest.approx(size, rel=0.5)
  # A run that is finished says so.
  assert train.run(config, tmp_path / "a", plan=True) == made


@pytest.mark.slow
def test_ivf_pipeline(tmp_path):
  run = lambda: ivf_pipeline.run(
    "ivf_qinco2_xs:smoke", tmp_path / "a", plan=True
  )
  assert _is_unchanged(tmp_path, run)["rows"] > 0
