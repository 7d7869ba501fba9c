"""The indexes of vqjax behind the interface that both benchmarks share.

VIBE and ann-benchmarks call `fit(X)` or `fit_ood(...)`, then for each setting
`set_query_arguments(...)` and `query(v, n)` for each query, or
`batch_query(X, n)` for all. Results are row numbers, different from each other,
nearest first.

Threads are as many as OMP_NUM_THREADS says, else as the process has CPUs: VIBE
sets 1, ann-benchmarks gives its container one CPU.
"""

import os
import shutil
import tempfile

from vqjax import cpu

_THREADS = int(
  os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
  or len(os.sched_getaffinity(0))
)
# Before JAX and faiss start, which read them then.
os.environ.update(cpu.thread_variables(_THREADS))
cpu.prepare_libraries()

import numpy as np  # noqa: E402

import vqjax  # noqa: E402
from vqjax import shipped  # noqa: E402
from vqjax.data import unit  # noqa: E402
from vqjax.fast_ivf import FastIVF as _FastIVF  # noqa: E402
from vqjax.interop import faiss_hakes  # noqa: E402

_METRICS = {  # Their names to ours.
  "euclidean": "l2",
  "angular": "cosine",
  "cosine": "cosine",
  "normalized": "cosine",
  "ip": "ip",
}
_WARM = 16  # Queries after a change of the setting: what is compiled is kept.


class Method:
  """What the benchmarks call; a subclass has `_build` and `_search`."""

  def __init__(self, metric: str, **build):
    """Takes the settings; `metric` is as the benchmark calls it."""
    if metric not in _METRICS:
      raise ValueError(
        f"metric must be one of {', '.join(_METRICS)}; got {metric!r}."
      )
    self.metric, self.build, self.arguments = _METRICS[metric], build, {}
    self.name = str(self)

  def __str__(self) -> str:
    """Names all settings."""
    values = {**self.build, **self.arguments}
    text = ", ".join(f"{name}={value}" for name, value in values.items())
    return f"{type(self).__name__}({text})"

  def fit(self, X) -> None:
    """Builds the index of the vectors `[N, D]`."""
    self._fit(X, None, None)

  def _fit(self, X, X_learn, X_learn_neighbors) -> None:
    x_ND = np.ascontiguousarray(X, np.float32)
    self._sample_ND = x_ND[:_WARM].copy()
    self._build(x_ND, X_learn, X_learn_neighbors)

  def _set(self, **arguments) -> None:
    self.arguments = arguments
    self.name = str(self)

  def query(self, v, n: int) -> np.ndarray:
    """Returns row numbers of at most `n` nearest, int64."""
    return self._find(np.asarray(v, np.float32)[None], n)[0]

  def batch_query(self, X, n: int) -> None:
    """Searches all queries `[Q, D]`; `get_batch_results` has what it finds."""
    self.res = self._find(np.ascontiguousarray(X, np.float32), n)

  def get_batch_results(self) -> list[np.ndarray]:
    """Returns row numbers of each query of the last batch."""
    return self.res

  def _find(self, queries_QD, n: int) -> list[np.ndarray]:
    ids_QR = np.asarray(self._search(queries_QD, n), np.int64)
    # Slots of results that there are not would be the last row to them.
    return [ids_R[ids_R >= 0] for ids_R in ids_QR]


class IVFCodec(Method):
  """Codes in inverted lists, ordered by a refiner of residual bits."""

  def __init__(self, metric, codec="rq", num_codes=16, num_lists=1024):
    """Takes the name of a codec, as `vqjax.fit` does."""
    super().__init__(
      metric, codec=codec, num_codes=num_codes, num_lists=num_lists
    )

  def _build(self, x_ND, *_) -> None:
    is_cosine = self.metric == "cosine"
    codec = vqjax.fit(
      x_ND,
      self.build["codec"],
      num_codes=self.build["num_codes"],
      metric="cosine" if is_cosine else "l2",
    )
    self.index = vqjax.build_index(
      codec,
      x_ND,
      min(self.build["num_lists"], max(len(x_ND) // 40, 1)),
      metric=self.metric,
      refiner="rabitq",
    )

  def set_query_arguments(self, nprobe: int, num_refined: int) -> None:
    """Sets the lists of a query and its candidates for the refiner."""
    self._set(nprobe=nprobe, num_refined=num_refined)
    for n in (10, 100):
      for v in self._sample_ND:
        self.query(v, n)

  def _search(self, queries_QD, n):
    nprobe, num = self.arguments["nprobe"], self.arguments["num_refined"]
    return self.index.search(
      queries_QD, n, nprobe=nprobe, num_refined=max(num, n), num_network=0
    )[1]


class FastIVF(Method):
  """Whole vectors in inverted lists."""

  def __init__(self, metric, num_lists=1024):
    """Takes the number of lists."""
    super().__init__(metric, num_lists=num_lists)

  def _build(self, x_ND, *_) -> None:
    self.index = _FastIVF(
      x_ND.shape[1],
      min(self.build["num_lists"], max(len(x_ND) // 40, 1)),
      metric=self.metric,
      num_threads=_THREADS,
      verbose=False,
    )
    self.index.train(x_ND)

  def set_query_arguments(self, nprobe: int) -> None:
    """Sets the lists of a query."""
    self._set(nprobe=nprobe)
    self.index.nprobe = min(nprobe, self.index.nlist)

  def _search(self, queries_QD, n):
    return self.index.search(queries_QD, n)[1]


class Hakes(Method):
  """4-bit codes in lists, searched by what was learned from neighbours."""

  def __init__(self, metric, config="hakes", num_lists=0):
    """Takes a configuration by name; `num_lists` 0 is the square root of N."""
    super().__init__(metric, config=config, num_lists=num_lists)

  def fit_ood(self, X, X_learn, X_learn_neighbors) -> None:
    """Builds the index, learning from queries and their neighbours in X."""
    self._fit(X, X_learn, X_learn_neighbors)

  def _build(self, x_ND, X_learn, X_learn_neighbors) -> None:
    command = shipped.import_command("hakes")
    config = shipped.read_config(self.build["config"])
    config.data.update(num_base=None, num_queries=None)
    config.data.update(metric=self.metric)
    config.base.num_lists = self.build["num_lists"] or config.base.num_lists
    folder = tempfile.mkdtemp()
    try:
      config.data.base = f"{folder}/base.npy"
      np.save(config.data.base, x_ND)
      num = len(x_ND)
      if X_learn is not None:
        num = len(X_learn)
        config.data.train_queries = f"{folder}/learn.npy"
        config.data.train_neighbours = f"{folder}/near.npy"
        np.save(config.data.train_queries, np.asarray(X_learn, np.float32))
        np.save(config.data.train_neighbours, np.asarray(X_learn_neighbors))
      num -= config.samples.num_validation
      if num < config.train.batch_size:
        raise ValueError(
          f"HAKES learns from {config.train.batch_size} queries or more beside "
          f"{config.samples.num_validation} held out; got {num}."
        )
      for stage in ("base", "samples", "learn", "centroids", "index"):
        command.run(config, f"{folder}/run", stage=stage)
      self.index = faiss_hakes.load(f"{folder}/run/index.faiss")
    finally:
      shutil.rmtree(folder, ignore_errors=True)
    faiss_hakes.set_num_threads(_THREADS)

  def set_query_arguments(self, nprobe: int, num_refined: int) -> None:
    """Sets the lists of a query and the candidates compared in full."""
    self._set(nprobe=nprobe, num_refined=num_refined)

  def _search(self, queries_QD, n):
    if self.metric == "cosine":  # The reduction has a bias.
      queries_QD = unit.normalise(queries_QD, name="queries")
    num = max(self.arguments["num_refined"], n)
    return faiss_hakes.search(
      self.index,
      queries_QD,
      n,
      num_probes=self.arguments["nprobe"],
      refine_factor=num / n,
    )
