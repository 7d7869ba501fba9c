"""Holds the modules to the interfaces of VIBE and ann-benchmarks.

  python -m benchmarks.check                       # all of both, bundled data
  python -m benchmarks.check --suite=vibe --method=vqjax-hakes

Each module is put into a package like that of the benchmark, with its
config.yml and `methods.py`, and is run as the benchmark does: every setting of
its first build. It prints what is wrong; and recall, time of a query and cores
in use.
"""

import argparse
import contextlib
import importlib
import inspect
import itertools
import os
import pathlib
import shutil
import sys
import tempfile
import time
from typing import NamedTuple

import numpy as np
import yaml

HERE = pathlib.Path(__file__).resolve().parent
SAMPLE = HERE.parent / "third_party" / "sample_text"
SUITES = {
  "vibe": "cosine",
  "ann_benchmarks": "angular",
}  # Its name of a metric.
_WITH_OOD = ("vibe",)
_BASE = "class BaseANN:\n  def get_additional(self):\n    return {}\n"
_K = 10


class Entry(NamedTuple):
  """An algorithm of a config.yml."""

  name: str
  constructor: str
  is_ood: bool | None  # None if the suite gives no queries to learn from.
  builds: list[tuple]  # Without the metric.
  settings: list[tuple]


class Data(NamedTuple):
  """Vectors, queries, and row numbers of the true neighbours."""

  x_ND: np.ndarray
  xq_QD: np.ndarray
  true_QG: np.ndarray


def entries(suite: str) -> list[Entry]:
  """Reads config.yml as the benchmark does: all combinations, in order."""
  file = HERE / suite / "config.yml"
  (found,) = yaml.safe_load(file.read_text())["float"].values()
  result = []
  for each in found:
    builds, settings = [], []
    for group in each["run_groups"].values():
      for name, into in (("args", builds), ("query_args", settings)):
        values = group[name]
        lists = values.values() if isinstance(values, dict) else values
        into += itertools.product(*lists)
    result.append(
      Entry(
        each["name"],
        each["constructor"],
        each.get("ood", False) if suite in _WITH_OOD else None,
        builds,
        settings,
      )
    )
  return result


@contextlib.contextmanager
def package(suite: str):
  """Yields the module of a suite, in a package like that of the benchmark."""
  with tempfile.TemporaryDirectory() as folder:
    room = pathlib.Path(folder) / suite / "algorithms"
    shutil.copytree(HERE / suite, room / "vqjax")
    shutil.copy(HERE / "methods.py", room / "vqjax")
    (room / "base").mkdir()
    (room / "base" / "module.py").write_text(_BASE)
    sys.path.insert(0, folder)
    importlib.invalidate_caches()
    variables = dict(os.environ)
    try:
      yield importlib.import_module(f"{suite}.algorithms.vqjax.module")
    finally:
      sys.path.remove(folder)
      os.environ.clear()
      os.environ.update(variables)
      for name in [n for n in sys.modules if n.split(".")[0] == suite]:
        del sys.modules[name]


def load_data(num: int, num_queries: int) -> Data:
  """The bundled sentence embeddings, and their true neighbours."""
  x_ND = np.load(SAMPLE / "base.npy")[:num].astype(np.float32)
  xq_QD = np.load(SAMPLE / "query.npy")[:num_queries].astype(np.float32)
  return Data(x_ND, xq_QD, nearest(xq_QD, x_ND, 100))


def nearest(queries_QD, x_ND, k: int) -> np.ndarray:
  """Row numbers `[Q, k]` of the largest cosines."""
  unit = lambda y: y / np.linalg.norm(y, axis=1, keepdims=True)
  return np.argsort(-(unit(queries_QD) @ unit(x_ND).T), axis=1)[:, :k]


def check(module, entry: Entry, metric: str, data: Data, build=None) -> dict:
  """Runs an entry as the benchmark does; raises AssertionError if it is wrong.

  Args:
    module: From `package`.
    entry: From `entries`.
    metric: Name that the benchmark has for the cosine.
    data: From `load_data`.
    build: Arguments of the constructor; the first of the entry if None.

  Returns:
    The settings and their figures.
  """
  method = getattr(module, entry.constructor)(
    metric, *(entry.builds[0] if build is None else build)
  )
  check_parameters(method, entry)
  x_ND, before_ND = data.x_ND, data.x_ND.copy()
  began = time.perf_counter()
  if entry.is_ood:
    learn_QD = x_ND[: len(x_ND) // 2] + np.float32(0.01)
    method.fit_ood(x_ND, learn_QD, nearest(learn_QD, x_ND, 100))
  else:
    method.fit(x_ND)
  rows, names = [], set()
  seconds = time.perf_counter() - began
  assert np.array_equal(x_ND, before_ND), "fit changes the vectors."
  for setting in entry.settings:
    method.set_query_arguments(*setting)
    names.add(str(method))
    rows.append([setting, *_check_setting(method, data)])
  assert len(names) == len(entry.settings), "str leaves settings out."
  return {"name": str(method), "seconds": seconds, "rows": rows}


def check_parameters(method, entry: Entry) -> None:
  """Raises unless config.yml has a value for each parameter."""
  for what, values in (
    (type(method).__init__, [("metric", *b) for b in entry.builds]),
    (type(method).set_query_arguments, entry.settings),
  ):
    for each in values:
      inspect.signature(what).bind(method, *each)
  is_right = entry.is_ood in (None, hasattr(method, "fit_ood"))
  assert is_right, "ood in config.yml."


def _check_setting(method, data: Data) -> tuple[float, float, float]:
  """Recall, milliseconds of a query, and cores that it keeps busy."""
  num = len(data.x_ND)
  single = [method.query(v, _K) for v in data.xq_QD]
  began, cpu = time.perf_counter(), time.process_time()
  again = [method.query(v, _K) for v in data.xq_QD]
  taken, cpu = time.perf_counter() - began, time.process_time() - cpu
  assert method.batch_query(data.xq_QD, _K) is None, "batch_query returns."
  batch = method.get_batch_results()
  assert len(batch) == len(data.xq_QD), "A result for each query is needed."
  hits = []
  for ids, repeated, together, true_G in zip(
    single, again, batch, data.true_QG, strict=True
  ):
    for each in (ids, together):
      assert isinstance(each, np.ndarray), "Results are arrays."
      assert each.ndim == 1, "Results are of one axis."
      assert each.dtype.kind == "i", "Results are integers."
      assert len(each) <= _K, f"There are {len(each)} of {_K} results."
      assert len(set(each.tolist())) == len(each), "A result is there twice."
      assert ((each >= 0) & (each < num)).all(), "A result is no row."
    assert np.array_equal(ids, repeated), "The same query has another result."
    hits.append(len(np.intersect1d(ids, true_G[:_K])) / _K)
    # Sums of float32 in another order may swap the last ones.
    assert len(np.intersect1d(ids, together)) >= len(ids) - 1, "batch_query."
  few = method.query(data.xq_QD[0], num + 5)
  assert len(few) <= num, "There are more results than vectors."
  assert len(set(few.tolist())) == len(few), "A result is there twice."
  return float(np.mean(hits)), 1000 * taken / len(single), cpu / taken


def main() -> None:
  """Checks what the flags name."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--suite", choices=SUITES, help="both if unset")
  parser.add_argument("--method", help="name in config.yml; all if unset")
  parser.add_argument("--num", type=int, default=12_000, help="vectors")
  parser.add_argument("--queries", type=int, default=100)
  asked = parser.parse_args()
  data = load_data(asked.num, asked.queries)
  num = 0
  for suite in [asked.suite] if asked.suite else SUITES:
    with package(suite) as module:
      for entry in entries(suite):
        if asked.method not in (None, entry.name):
          continue
        num += 1
        found = check(module, entry, SUITES[suite], data)
        print(f"\n{suite} {found['name']}: built in {found['seconds']:.0f} s")
        print("setting         knn_recall@10  ms/query  cores")
        for setting, recall, ms, cores in found["rows"]:
          print(f"{setting!s:15} {recall:13.3f} {ms:9.3f} {cores:6.2f}")
  if not num:
    parser.error(f"There is no method {asked.method!r} in config.yml.")
  print("\nAll hold to the interface.")


if __name__ == "__main__":
  main()
