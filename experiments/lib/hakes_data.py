"""The vectors of a HAKES run: opened, counted, of length 1 for cosine."""

from typing import Any, NamedTuple

import numpy as np

from vqjax.data import batches, datasets
from vqjax.interop import faiss_io, hakes_files

METRICS = ("ip", "cosine", "l2")
_BLOCK = 16_384


class Data(NamedTuple):
  """Open files; `metric` is that of the index, "ip" or "l2"."""

  name: str
  base: Any
  train_queries: Any  # None: vectors of the base.
  train_neighbours: Any
  queries: Any
  groundtruth: Any
  metric: str
  is_cosine: bool

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
  if metric not in METRICS:
    raise ValueError(f"data.metric must be one of {METRICS}, got {metric!r}.")

  def open_file(path, dim=data.dim, dtype="<f4", limit=None):
    return path and hakes_files.open_rows(path, dim, dtype, max_vectors=limit)

  opened = Data(
    name=data.base or data.name,
    base=open_file(data.base or named.base, limit=data.num_base),
    train_queries=open_file(data.train_queries),
    train_neighbours=open_file(
      data.train_neighbours, config.samples.num_neighbours, "<i4"
    ),
    queries=open_file(data.queries or named.queries, limit=data.num_queries),
    groundtruth=open_file(
      data.groundtruth or named.groundtruth, data.groundtruth_dim, "<i4"
    ),
    metric="l2" if metric == "l2" else "ip",
    is_cosine=metric == "cosine",
  )
  _check(opened)
  return opened


def _check(data: Data) -> None:
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


def read(data: Data, vectors, rows) -> np.ndarray:
  """Reads rows as float32, of length 1 for cosine."""
  return _scaled(data, batches.read_rows(vectors, rows))


def read_all(data: Data, vectors) -> np.ndarray:
  """Reads all rows of an open file, see `read`."""
  return read(data, vectors, np.arange(len(vectors)))


def blocks(data: Data):
  """Yields the base in blocks of rows, see `read`."""
  parts = batches.map_blocks(lambda x: x, data.base, block_size=_BLOCK)
  return (_scaled(data, x_ND) for _, x_ND in parts)


def neighbours(data: Data, queries_QD, k: int) -> np.ndarray:
  """Ids `[Q, k]` of the true neighbours in the base, nearest first."""
  _, ids_QG = faiss_io.knn(queries_QD, blocks(data), k, metric=data.metric)
  return ids_QG


def _scaled(data: Data, x_ND) -> np.ndarray:
  if not data.is_cosine:
    return x_ND
  length_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
  if not length_N1.all():
    row = int(np.flatnonzero(length_N1[:, 0] == 0)[0])
    raise ValueError(
      f"A vector of zeros has no cosine: row {row} of {len(x_ND)} read; remove "
      "it, or set data.metric."
    )
  return x_ND / length_N1
