"""The modules for VIBE and ann-benchmarks, held to the interfaces."""

import types

import numpy as np
import pytest

from benchmarks import check

pytestmark = pytest.mark.usefixtures("one_thread")
_SMALL = {"vqjax-ivf": ("rq:smoke", 3, 8), "vqjax-fastivf": (8,)}


@pytest.fixture(scope="module", name="data")
def _data():
  return check.load_data(400, 8)


def _entry(suite, name):
  (found,) = [each for each in check.entries(suite) if each.name == name]
  return found


@pytest.mark.parametrize(
  ("suite", "name"),
  [
    pytest.param("ann_benchmarks", "vqjax-fastivf", marks=pytest.mark.slow),
    pytest.param("vibe", "vqjax-fastivf", marks=pytest.mark.slow),
    pytest.param("ann_benchmarks", "vqjax-ivf", marks=pytest.mark.slow),
    pytest.param("vibe", "vqjax-ivf", marks=pytest.mark.slow),
  ],
)
def test_methods_hold_to_the_interface(suite, name, data):
  entry = _entry(suite, name)
  entry = entry._replace(settings=[entry.settings[0], entry.settings[-1]])
  with check.package(suite) as module:
    found = check.check(module, entry, check.SUITES[suite], data, _SMALL[name])
  first, last = (recall for _, recall, *_ in found["rows"])
  assert last > first - 0.05
  assert last > (0.99 if name == "vqjax-fastivf" else 0.6)


@pytest.mark.slow
@pytest.mark.parametrize("suite", check.SUITES)
def test_hakes_learns_from_queries_where_there_are_some(suite):
  """VIBE gives them with their neighbours; else the base is learned from."""
  data = check.load_data(2000, 20)
  entry = _entry(suite, "vqjax-hakes")
  entry = entry._replace(settings=[(4, 50), (16, 500)])
  with check.package(suite) as module:
    found = check.check(
      module, entry, check.SUITES[suite], data, ("hakes:smoke", 16)
    )
  assert found["rows"][1][1] > 0.9


def test_both_suites_have_the_same_methods():
  vibe, ann = (check.entries(suite) for suite in check.SUITES)
  assert [e.name for e in vibe] == [e.name for e in ann]
  assert [e.constructor for e in vibe] == [e.constructor for e in ann]
  for suite in check.SUITES:
    with check.package(suite) as module:
      for entry in check.entries(suite):
        for build in entry.builds:
          method = getattr(module, entry.constructor)("euclidean", *build)
          assert all(str(value) in str(method) for value in build)
          assert isinstance(method, module.BaseANN)
        check.check_parameters(method, entry)
      with pytest.raises(ValueError, match="metric must be one of.*'hamming'"):
        module.VqjaxIVF("hamming")


class _Right:
  """A method without a fault."""

  def __init__(self, metric, num_lists):
    self.text = ""

  def __str__(self):
    return self.text

  def fit(self, X):
    self.x_ND = X

  def set_query_arguments(self, nprobe):
    self.text = str(nprobe)

  def query(self, v, n):
    return np.arange(min(n, len(self.x_ND)))

  def batch_query(self, X, n):
    self.res = [self.query(v, n) for v in X]

  def get_batch_results(self):
    return self.res


@pytest.mark.parametrize(
  ("name", "wrong", "words"),
  [
    ("query", lambda self, v, n: np.arange(n) - 1, "no row"),
    ("query", lambda self, v, n: np.zeros(n, int), "twice"),
    ("query", lambda self, v, n: np.arange(n + 1), "11 of 10"),
    ("query", lambda self, v, n: np.arange(5.0), "integers"),
    ("query", lambda self, v, n: list(range(n)), "arrays"),
    ("query", lambda self, v, n: np.arange(n)[None], "one axis"),
    ("get_batch_results", lambda self: self.res[1:], "each query"),
    (
      "get_batch_results",
      lambda self: [r + 5 for r in self.res],
      "batch_query",
    ),
    ("__str__", lambda self: "same", "leaves settings out"),
    ("fit_ood", lambda self, *_: None, "ood"),
  ],
)
def test_faults_are_seen(name, wrong, words, data):
  module = types.SimpleNamespace(VqjaxFastIVF=_Right)
  entry = _entry("vibe", "vqjax-fastivf")
  check.check(module, entry, "cosine", data)
  module.VqjaxFastIVF = type("Wrong", (_Right,), {name: wrong})
  with pytest.raises(AssertionError, match=words):
    check.check(module, entry, "cosine", data)
