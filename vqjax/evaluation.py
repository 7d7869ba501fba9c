"""Queries and their true neighbours: one way for library and commands.

The ground truth is the file that was given, once it is checked against queries
and base (`truth_check`), else what an exact search finds. A `Truth` measures
recall; vectors that are equally near count alike if the base is at hand.
"""

import numpy as np
from absl import logging

from vqjax import devices
from vqjax.data import batches, unit
from vqjax.interop import faiss_io
from vqjax.progress import progress
from vqjax.search import metrics, truth_check
from vqjax.search.truth_check import Files

RANKS = (1, 10, 100)  # R of 1-recall@R.
OVERLAP = 10  # K of knn_recall@K.
_BLOCK = 16_384  # Rows of the base at a time.
_BLOCK_NUMBERS = 1 << 22  # Of rows that are read to compare results.


class Truth:
  """The true neighbours of queries, and the recall of results."""

  def __init__(self, xq_QD, ids_QG, base=None, metric: str = "l2", *, num=None):
    """Takes queries, ids of neighbours and the base, as searches see them.

    Args:
      xq_QD: Queries; of length 1 for "cosine".
      ids_QG: Rows of the base, nearest first, -1 for none.
      base: The vectors that are searched, an open file, or None: equally near
        vectors are then told by their ids alone.
      metric: One of `vqjax.data.datasets.METRICS`.
      num: The most neighbours that a recall asks for.
    """
    self.xq_QD, self.ids_QG = xq_QD, ids_QG
    self._base, self._metric = base, metric
    self._asked = num or OVERLAP
    self._num = min(self._asked + 1, ids_QG.shape[1])
    self._keys = np.empty(0, np.int64)
    self._known = np.empty(0)
    if base is None:
      return
    head_QG = ids_QG[:, : self._num]
    q_QG = np.broadcast_to(np.arange(len(head_QG))[:, None], head_QG.shape)
    is_there = head_QG >= 0
    self._true_QG = np.full(head_QG.shape, np.inf)
    self._true_QG[is_there] = self._read(q_QG[is_there], head_QG[is_there])
    self._is_open_Q = self._find_open()
    self._is_tied_Q = np.zeros(len(ids_QG), bool)

  @property
  def num_without(self) -> int:
    """Queries without a neighbour, which recall leaves out."""
    return int(np.count_nonzero(~metrics.has_neighbour(self.ids_QG)))

  def names(self, num_results: int) -> list[str]:
    """The kinds of recall that the numbers of results and neighbours allow."""
    names = [f"1-recall@{r}" for r in RANKS if r <= num_results]
    if min(num_results, self.ids_QG.shape[1]) >= OVERLAP:
      names.append(f"knn_recall@{OVERLAP}")
    return names

  def recalls(self, found_QR, names=None) -> dict[str, float]:
    """The values of some names, all that `names` returns for None."""
    found_QR = np.asarray(found_QR)
    head_QG, errors = self.ids_QG, None
    if self._base is not None:
      head_QG = self.ids_QG[:, : self._num]
      errors = metrics.Errors(self._errors(found_QR), self._true_QG)
    kinds = {
      "1-recall": metrics.nn_recall_at,
      "knn_recall": metrics.knn_recall_at,
    }
    values = {}
    for name in names or self.names(found_QR.shape[1]):
      kind, num = name.split("@")
      values[name] = float(kinds[kind](found_QR, head_QG, int(num), errors))
    return values

  def num_ties(self) -> int:
    """Queries for which vectors tie with a neighbour that counts.

    The nearest, and the last that recall asks for. If the list ends with
    it, only ties that a search has found are known.
    """
    if self._base is None:
      return 0
    is_tied_Q = self._is_tied_Q
    if self._num > 1:
      is_tied_Q = is_tied_Q | self._is_same(1)
    if not self._ends_early():
      is_tied_Q = is_tied_Q | self._is_same(self._asked)
    return int(np.count_nonzero(is_tied_Q))

  def report_ties(self) -> None:
    """Says how many queries have ties, once results were measured."""
    if self.num_ties():
      logging.info(
        "Ties: for %d of %d queries several vectors are as near as the nearest "
        "or as the last neighbour that counts; any of them counts as found.",
        *(self.num_ties(), len(self.xq_QD)),
      )

  def _is_same(self, g: int) -> np.ndarray:
    """Whether neighbour `g` is as near as the one before it, `[Q]`."""
    before_Q, next_Q = self._true_QG[:, g - 1], self._true_QG[:, g]
    return np.isfinite(next_Q) & (
      next_Q <= before_Q + metrics.SAME * np.abs(before_Q)
    )

  def _find_open(self) -> np.ndarray:
    """Queries with vectors, maybe, as near as the last but not in the list."""
    num_there_Q = np.count_nonzero(self.ids_QG >= 0, axis=1)
    if self._num < 2:
      return num_there_Q > 0
    is_open_Q = self._is_same(self._num - 1)
    return is_open_Q | (num_there_Q < self._num) | self._ends_early()

  def _ends_early(self) -> bool:
    """Whether the list ends at the last neighbour that a recall asks for."""
    return self.ids_QG.shape[1] <= self._asked

  def _errors(self, found_QR) -> np.ndarray:
    """Errors of results; inf if they cannot be as near as the list."""
    out_QR = np.full(found_QR.shape, np.inf)
    for g in range(self._num):
      is_it_QR = (found_QR == self.ids_QG[:, g : g + 1]) & (found_QR >= 0)
      out_QR = np.where(is_it_QR, self._true_QG[:, g : g + 1], out_QR)
    is_left_QR = np.isinf(out_QR) & (found_QR >= 0) & self._is_open_Q[:, None]
    q_N, r_N = np.nonzero(is_left_QR)
    error_N = self._look_up(q_N, found_QR[q_N, r_N])
    out_QR[q_N, r_N] = error_N
    head_QG = self._true_QG[:, : self._asked]
    last_Q = np.where(np.isinf(head_QG), head_QG[:, :1], head_QG).max(axis=1)
    is_tied_N = error_N <= last_Q[q_N] + metrics.SAME * np.abs(last_Q[q_N])
    self._is_tied_Q[q_N[is_tied_N]] = True
    return out_QR

  def _look_up(self, q_N, ids_N) -> np.ndarray:
    """Errors of pairs of query and row; each is read once."""
    keys_N = q_N * len(self._base) + ids_N
    new = np.setdiff1d(keys_N, self._keys)
    if len(new):
      error_N = self._read(*np.divmod(new, len(self._base)))
      keys, known = np.append(self._keys, new), np.append(self._known, error_N)
      order = np.argsort(keys)
      self._keys, self._known = keys[order], known[order]
    if not len(keys_N):
      return np.empty(0)
    return self._known[np.searchsorted(self._keys, keys_N)]

  def _read(self, q_N, ids_N) -> np.ndarray:
    """Errors of pairs of query and row, from the base."""
    size = max(_BLOCK_NUMBERS // self.xq_QD.shape[1], 1)
    parts = [np.empty(0)]
    for start in range(0, len(q_N), size):
      block = slice(start, start + size)
      x_ND = batches.read_rows(self._base, ids_N[block])
      metric = faiss_metric(self._metric)  # Both are of length 1 for cosine.
      error_N1 = truth_check.errors(
        self.xq_QD[q_N[block]], x_ND[:, None], metric
      )
      parts.append(error_N1[:, 0])
    return np.concatenate(parts)


def faiss_metric(metric: str) -> str:
  """How vectors are compared: by "ip", at length 1, for "cosine"."""
  return "ip" if metric == "cosine" else metric


def read_ids(files: Files, num_vectors: int, sizes=()) -> np.ndarray | None:
  """The checked ids of the ground truth; None if a search must find them.

  That is if there is none, or one of more rows than `num_vectors`.

  The first `num_vectors` of the base are searched; `sizes` are other numbers of
  first rows that a ground truth may be of.

  Raises:
    ValueError: The ground truth is not of these files.
  """
  if files.groundtruth is None:
    return None
  name, ids_QG = files.names["groundtruth"], truth_check.read_ids(files)
  if files.base is None:
    if ids_QG.max() >= num_vectors:
      raise ValueError(
        f"{name} names vectors beyond the {num_vectors} that are searched; "
        "give the vectors that were encoded as --data, to find the true "
        "neighbours by exact search."
      )
    logging.warning(
      "%s is not checked: without the base, --data, it cannot be known that "
      "it belongs to these queries and vectors.",
      name,
    )
    return ids_QG
  limits = [min(size, len(files.base)) for size in (num_vectors, *sizes)]
  limits = [size for size in limits if size >= num_vectors]
  if truth_check.check(files, ids_QG, limits) == num_vectors:
    return ids_QG
  logging.info(
    "%s names vectors beyond the %d that are searched.", name, num_vectors
  )
  return None


def open_truth(
  files: Files,
  num_vectors: int,
  base=None,
  sizes=(),
  *,
  num: int = OVERLAP,
  is_shown: bool = True,
) -> Truth:
  """Queries and their true neighbours among the vectors that are searched.

  Says how many queries have none.

  `base` are the vectors that are searched, an open file, None if they are not
  at hand. `num` is the most neighbours of a query that a recall asks for;
  `is_shown` shows a progress line of an exact search. For the others see
  `read_ids`.
  """
  xq_QD = batches.read_rows(files.queries, np.arange(len(files.queries)))
  ids_QG = read_ids(files, num_vectors, sizes)
  if ids_QG is not None and ids_QG.shape[1] < num and base is not None:
    logging.info(
      "%s has %d neighbours of a query, but %d are asked for.",
      *(files.names["groundtruth"], ids_QG.shape[1], num),
    )
    ids_QG = None
  if ids_QG is None:
    if base is None:
      raise ValueError(
        "There is no ground truth; give the vectors that were encoded as "
        "--data, to find the true neighbours by exact search."
      )
    logging.info("Searching the true neighbours of %d queries.", len(xq_QD))
    k = min(num + 1, num_vectors)
    ids_QG = exact(xq_QD, base, k, files.metric, is_shown=is_shown)
  truth = Truth(xq_QD, ids_QG, base, files.metric, num=num)
  _report(truth)
  return truth


def _report(truth: Truth) -> None:
  num = len(truth.xq_QD)
  if truth.num_without:
    logging.warning(
      "%d of %d queries have no neighbour in the ground truth, -1 alone: they "
      "are left out of the recall.",
      *(truth.num_without, num),
    )


def exact(
  xq_QD, base, k: int, metric: str, *, is_shown: bool = True
) -> np.ndarray:
  """Ids `[Q, k]` of the nearest; every process searches its share."""
  mine = devices.process_rows(len(base))
  with progress(len(mine), "exact search", is_shown=is_shown) as done:
    blocks = batches.map_blocks(
      lambda x_ND: x_ND, base, block_size=_BLOCK, rows=mine, progress=done
    )
    return find(xq_QD, (x_ND for _, x_ND in blocks), k, len(base), metric)


def nearest(xq_QD, blocks, k: int, metric: str):
  """Distances and ids `[Q, k]` of the nearest in blocks `[n, D]`, as `knn`.

  For "cosine" queries are of length 1, and vectors of the blocks are made so.
  """
  if metric == "cosine":
    blocks = map(unit.scale, blocks)
  return faiss_io.knn(xq_QD, blocks, k, metric=faiss_metric(metric))


def find(xq_QD, blocks, k: int, num_base: int, metric: str) -> np.ndarray:
  """Ids `[Q, k]` of the nearest in the base; blocks are of our share of it."""
  error_QR, ids_QR = nearest(xq_QD, blocks, k, metric)
  ids_QR = np.where(
    ids_QR < 0, ids_QR, ids_QR + devices.process_rows(num_base).start
  )
  sign = 1 if metric == "l2" else -1  # Of others the greatest first.
  error_QR = np.concatenate(devices.gather(sign * error_QR), axis=1)
  ids_QR = np.concatenate(devices.gather(ids_QR), axis=1)
  order_QR = np.argsort(error_QR, axis=1, kind="stable")[:, :k]
  return np.take_along_axis(ids_QR, order_QR, axis=1)
