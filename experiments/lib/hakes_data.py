"""The vectors of a HAKES run: opened, counted, of length 1 for cosine."""

from typing import Any, NamedTuple

import numpy as np

from vqjax import evaluation
from vqjax.data import batches, datasets, files, unit
from vqjax.interop import faiss_io, hakes_files
from vqjax.search import truth_check

_FILES = ("base", "train_queries", "train_neighbours", "queries", "groundtruth")
# What files hold is compared instead of their names.
FREE = (
  *("data.name", "data.root", *(f"data.{name}" for name in _FILES)),
  *("data.num_base", "base.path", "train.tracker"),
)
SAYS = {  # What is compared, by its flag.
  **{f"derived.{name}": f"what is in --config.data.{name}" for name in _FILES},
  "derived.base_side": "the checksum of --config.base.path",
}
_BLOCK = 16_384


class Data(NamedTuple):
  """Open files; `metric` is what the index has, "ip" or "l2"."""

  name: str
  base: Any
  train_queries: Any  # None: vectors of the base.
  train_neighbours: Any
  queries: Any
  groundtruth: Any
  metric: str
  is_cosine: bool
  paths: dict[str, str]  # Of these files, for messages.
  whole: Any  # All rows of the base, if `base` are its first; else None.

  @property
  def dim(self) -> int:
    """Dimensions of all vectors."""
    return self.base.shape[1]


def open_data(config) -> Data:
  """Opens the files of `config.data`; checks that they fit each other."""
  data = config.data
  own = [data.base, data.train_queries, data.queries, data.groundtruth]
  named = datasets.Dataset("own", 0)
  if any(own) and not data.base:
    raise ValueError("Files of your own need data.base, which they belong to.")
  if not data.base:
    named = datasets.get_dataset(data.name, data.root)
  metric = data.metric or named.metric
  if metric not in datasets.METRICS:
    raise ValueError(
      f"data.metric must be one of {datasets.METRICS}, got {metric!r}."
    )

  def open_file(path, dim=data.dim, dtype="<f4", limit=None):
    rows = path and hakes_files.open_rows(path, dim, dtype, max_vectors=limit)
    is_unit = path and metric == "cosine" and dtype == "<f4"
    return unit.UnitVectors(rows) if is_unit else rows

  paths = {
    "base": data.base or named.base,
    "queries": data.queries or named.queries,
    "groundtruth": data.groundtruth or named.groundtruth,
    "train_queries": data.train_queries,
    "train_neighbours": data.train_neighbours,
  }
  opened = Data(
    name=data.base or data.name,
    base=open_file(paths["base"], limit=data.num_base),
    train_queries=open_file(data.train_queries),
    train_neighbours=open_file(
      data.train_neighbours, config.samples.num_neighbours, "<i4"
    ),
    queries=open_file(paths["queries"], limit=data.num_queries),
    groundtruth=open_file(paths["groundtruth"], data.groundtruth_dim, "<i4"),
    metric=evaluation.faiss_metric(metric),
    is_cosine=metric == "cosine",
    paths=paths,
    whole=open_file(paths["base"]) if data.num_base else None,
  )
  _check(opened)
  return opened


def read_truth(data: Data, k: int) -> evaluation.Truth:
  """The queries and their true neighbours, `k` of each."""
  num = len(data.base)
  return evaluation.open_truth(
    _files(data), num, data.base, _sizes(data), num=k
  )


def _files(data: Data) -> truth_check.Files:
  metric = "cosine" if data.is_cosine else data.metric
  base = data.base if data.whole is None else data.whole
  return truth_check.Files(
    data.queries, base, data.groundtruth, metric, data.paths
  )


def _sizes(data: Data) -> list[int]:
  return [] if data.whole is None else [len(data.whole)]


def identify(config, data: Data) -> dict:
  """Returns what tells the files of a run from others: sizes and checksums."""
  found = {
    name: {"num": len(vectors), **files.identify(vectors)}
    for name in _FILES
    if (vectors := getattr(data, name)) is not None
  }
  if config.base.path:
    found["base_side"] = files.sha256(config.base.path)
  return found


def _check(data: Data) -> None:
  batches.check_training(data.base)
  for name in ("train_queries", "queries"):
    vectors = getattr(data, name)
    if vectors is not None and vectors.shape[1] != data.dim:
      raise ValueError(
        f"data.{name} must have the {data.dim} dimensions of data.base, got "
        f"{vectors.shape[1]}."
      )
  for name, owner in (
    ("train_neighbours", "train_queries"),
    ("groundtruth", "queries"),
  ):
    ids, queries = getattr(data, name), getattr(data, owner)
    if ids is None:
      continue
    if queries is None or len(ids) < len(queries):
      count = 0 if queries is None else len(queries)
      raise ValueError(
        f"data.{name} must have a row for each of the {count} vectors of "
        f"data.{owner}, got {len(ids)}."
      )
    if ids.dtype.kind not in "iu":
      raise ValueError(f"data.{name} must hold ids, got {ids.dtype}.")
  if data.train_neighbours is not None:
    _check_training(data)
  if data.groundtruth is not None:
    evaluation.read_ids(_files(data), len(data.base), _sizes(data))


def _check_training(data: Data) -> None:
  """Raises ValueError if the training neighbours are not of these files.

  An approximate search may have found them.
  """
  files = _files(data)
  names = data.paths | {
    "queries": data.paths["train_queries"],
    "groundtruth": data.paths["train_neighbours"],
  }
  files = files._replace(
    queries=data.train_queries, groundtruth=data.train_neighbours, names=names
  )
  ids_QG = truth_check.read_ids(files)
  truth_check.check(files, ids_QG, [len(data.base)], slack=0.5)


def read_all(vectors) -> np.ndarray:
  """Reads all rows of an open file, float32."""
  return batches.read_rows(vectors, np.arange(len(vectors)))


def blocks(data: Data):
  """Yields the base in blocks of rows."""
  parts = batches.map_blocks(lambda x: x, data.base, block_size=_BLOCK)
  return (x_ND for _, x_ND in parts)


def neighbours(data: Data, queries_QD, k: int) -> np.ndarray:
  """Ids `[Q, k]` of the true neighbours in the base, nearest first."""
  _, ids_QG = faiss_io.knn(queries_QD, blocks(data), k, metric=data.metric)
  return ids_QG
