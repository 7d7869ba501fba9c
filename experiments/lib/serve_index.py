"""What `vqjax serve` answers from: index folders, and the requests it takes."""

import io
import json
import math
from typing import NamedTuple

import numpy as np

import vqjax
from vqjax import shipped
from vqjax.data import files, unit
from vqjax.data.formats import check_vectors

_MAGIC = b"\x93NUMPY"


class Refused(ValueError):
  """What a client must change, with the status of HTTP."""

  def __init__(self, text: str, status: int = 400):
    """Takes the sentence that the client reads."""
    super().__init__(text)
    self.status = status


class Settings(NamedTuple):
  """Of a search, see `vqjax.index.Index.search`."""

  k: int = 10
  nprobe: int | None = None
  ef_search: int | None = None
  num_refined: int | None = None
  num_pairwise: int = 0
  num_network: int = 20


class Limits(NamedTuple):
  """Of a request."""

  max_bytes: int = 16 << 20
  max_queries: int = 1024
  max_k: int = 1000  # Also of the candidates of each stage.


class Shards:
  """Indexes that are searched as one: the nearest of all of them."""

  def __init__(self, folders: list[str]):
    """Opens the folders.

    Raises:
      ValueError: They differ in dimension or metric, or share an id.
    """
    self.folders = [str(files.user_path(folder)) for folder in folders]
    self.indexes = [vqjax.load_index(folder) for folder in self.folders]
    first = self.indexes[0]
    self.dim, self.metric = first.dim, first.metric
    for folder, index in zip(self.folders, self.indexes, strict=True):
      if (index.dim, index.metric) != (self.dim, self.metric):
        raise ValueError(
          f"{folder} has {index.dim} dimensions and metric {index.metric}, but "
          f"{self.folders[0]} has {self.dim} and {self.metric}: shards of one "
          "server must agree."
        )
    if len(self.indexes) > 1:
      self._check_ids()

  def __len__(self) -> int:
    """Number of vectors."""
    return sum(map(len, self.indexes))

  def _check_ids(self) -> None:
    ids = [index.ids for index in self.indexes]
    if len({np.asarray(each).dtype.kind in "iu" for each in ids}) > 1:
      raise ValueError(
        "Some of the shards have ids of text, others integers; they must agree."
      )
    values, counts = np.unique(np.concatenate(ids), return_counts=True)
    if (counts > 1).any():
      twice = values[np.argmax(counts > 1)]
      where = [
        folder
        for folder, each in zip(self.folders, ids, strict=True)
        if np.isin(twice, each)
      ]
      raise ValueError(
        f"Id {twice} is in {' and in '.join(where)}: build the shards with "
        "--ids, so that an id says which vector it is."
      )

  def search(self, queries_QD, settings: Settings):
    """Returns distances and ids `[Q, k]`, those of the library, merged."""
    found = [
      index.search(queries_QD, **settings._asdict()) for index in self.indexes
    ]
    if len(found) == 1:
      return found[0]
    distances_QC, ids_QC = (
      np.concatenate(parts, axis=1) for parts in zip(*found, strict=True)
    )
    far_QC = distances_QC if self.metric == "l2" else -distances_QC
    # Ties go to the lower id; of text, to the first shard.
    is_text = ids_QC.dtype.kind not in "iu"
    rank_QC = np.indices(ids_QC.shape)[1] if is_text else ids_QC
    order_QC = np.lexsort((rank_QC, far_QC), axis=1)[:, : settings.k]
    take = lambda x_QC: np.take_along_axis(x_QC, order_QC, axis=1)
    return take(distances_QC), take(ids_QC)

  def check(self, queries_QD) -> None:
    """Raises ValueError unless these queries can be searched."""
    check_vectors(queries_QD, dim=self.dim, name="queries")
    if self.metric == "cosine":
      unit.normalise(queries_QD, name="queries")

  def sample(self, num: int, seed: int) -> np.ndarray:
    """Queries `[num, D]` like the vectors that are searched."""
    return self.indexes[0].sample(num, seed=seed)

  def describe(self) -> dict:
    """What `/health` says."""
    return {
      "num_vectors": len(self),
      "dim": self.dim,
      "metric": self.metric,
      "shards": self.folders,
    }


def read_request(
  body: bytes, fields: dict, defaults: Settings, limits: Limits
) -> tuple[np.ndarray, Settings]:
  """Returns the queries `[Q, D]`, float32, and the settings of a request.

  Args:
    body: JSON with `queries` and settings, or a .npy file of queries.
    fields: Settings in the address, as text.
    defaults: Settings that the request does not name.
    limits: What a request may ask for.

  Raises:
    Refused: It is not such a request, or beyond the limits.
  """
  values = {name: _integer(name, text) for name, text in fields.items()}
  if body.startswith(_MAGIC):
    queries_QD = _read_npy(body)
  else:
    asked = _read_json(body)
    queries_QD = _numbers(asked.pop("queries"))
    values |= asked
  if len(queries_QD) > limits.max_queries:
    raise Refused(
      f"A request may have {limits.max_queries} queries, got "
      f"{len(queries_QD)}: send them in parts.",
      413,
    )
  return queries_QD, _settings(values, defaults, limits)


def _settings(values: dict, defaults: Settings, limits: Limits) -> Settings:
  for name, value in values.items():
    if name not in Settings._fields:
      near = shipped.did_you_mean(name, Settings._fields)
      raise Refused(
        f"There is no setting {name!r}{near} Known are "
        f"{', '.join(Settings._fields)}."
      )
    if value is None and getattr(Settings(), name) is None:
      continue
    if type(value) is not int:
      raise Refused(f"{name} must be an integer, got {value!r:.50}.")
    least = int(name in ("k", "nprobe", "ef_search"))
    most = (1 << 31) - 1 if name == "nprobe" else limits.max_k
    if not least <= value <= most:
      raise Refused(f"{name} must lie between {least} and {most}, got {value}.")
  return defaults._replace(**values)


def _integer(name: str, text: str) -> int:
  try:
    return int(text)
  except ValueError:
    raise Refused(f"{name} must be an integer, got {text!r:.50}.") from None


def _read_json(body: bytes) -> dict:
  try:
    asked = json.loads(body)
  except (ValueError, RecursionError) as error:
    raise Refused(
      f"The body is neither JSON nor a .npy file: {error}."
    ) from None
  if not isinstance(asked, dict) or "queries" not in asked:
    raise Refused('The body must be like {"queries": [[...], ...], "k": 10}.')
  return asked


def _numbers(queries) -> np.ndarray:
  try:
    found = np.asarray(queries)
  except (ValueError, OverflowError):  # Rows of different length.
    found = np.empty(0, object)
  return _as_rows(found)


def _as_rows(found: np.ndarray) -> np.ndarray:
  """Queries as float32 `[Q, D]`; one vector is one query."""
  if (
    found.dtype.kind not in "iuf" or found.ndim not in (1, 2) or not len(found)
  ):
    raise Refused(
      "queries must be one vector or a list of vectors of equal length, of "
      "numbers."
    )
  with np.errstate(over="ignore"):  # It is Inf, and refused.
    return np.atleast_2d(found).astype(np.float32)


def _read_npy(body: bytes) -> np.ndarray:
  """An array, with no more memory than its bytes."""
  file = io.BytesIO(body)
  try:
    is_first = np.lib.format.read_magic(file) == (1, 0)
    version = "1_0" if is_first else "2_0"
    read = getattr(np.lib.format, f"read_array_header_{version}")
    shape, is_fortran, dtype = read(file)
  except (ValueError, SyntaxError, TypeError) as error:
    raise Refused(f"The .npy file is damaged: {error}.") from None
  data = body[file.tell() :]
  if dtype.kind not in "iuf":
    raise Refused(f"queries must be numbers, got {dtype}.")
  if min(shape, default=0) < 1 or (
    math.prod(shape) * dtype.itemsize != len(data)
  ):
    raise Refused(
      f"The .npy file says shape {shape} of {dtype}, but has {len(data)} bytes."
    )
  found = np.frombuffer(data, dtype)
  return _as_rows(found.reshape(shape, order="F" if is_fortran else "C"))
