"""The true nearest neighbours of queries: exact, in parts that any host makes.

faiss finds candidates, whose distances have rounding errors that depend on the
machine and on the blocks. All candidates within rounding of the k-th are
compared once more, in float64, by one function of query and vector; of equal
ones the lower row comes first. So the result is the same however the base is
cut into parts.
"""

from typing import NamedTuple

import numpy as np

from vqjax import evaluation
from vqjax.core import check_range
from vqjax.data import batches
from vqjax.interop import faiss_io
from vqjax.search import truth_check

_BLOCK = 16_384  # Rows of the base at a time.
_SPARE = 28  # Candidates of a block beyond k.
_PAIR_NUMBERS = 1 << 22  # Of pairs that are compared at once.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)


class Nearest(NamedTuple):
  """The best rows of each query, nearest first."""

  error_QK: np.ndarray  # float64, less for nearer ones; inf for none.
  ids_QK: np.ndarray  # int64, rows of the base; -1 for none.


class _Pairs(NamedTuple):
  """Queries and rows, the best of each query: by query, error and row."""

  q_N: np.ndarray
  error_N: np.ndarray
  id_N: np.ndarray


def search(
  xq_QD: np.ndarray,
  base,
  k: int,
  metric: str = "l2",
  *,
  rows: range | None = None,
  progress=None,
) -> Nearest:
  """Finds the k nearest of each query among consecutive rows of the base.

  Args:
    xq_QD: Queries, float32; of length 1 for "cosine".
    base: Open vectors `[N, D]`; of length 1 for "cosine".
    k: Neighbours of a query; beyond the number of rows there are none.
    metric: One of `vqjax.data.datasets.METRICS`.
    rows: Consecutive rows to search; None for all.
    progress: Called with `(rows done, rows in all)`.

  Raises:
    ValueError: Shapes do not fit, or a vector is not finite.
  """
  check_range("k", k, 1, 1 << 20)
  metric = evaluation.faiss_metric(metric)
  centre_D = None if metric == "ip" else faiss_io.far_centre(xq_QD)
  best = _Pairs(np.empty(0, int), np.empty(0), np.empty(0, int))
  limit_Q = np.full(len(xq_QD), np.inf)
  blocks = batches.map_blocks(
    lambda x_ND: x_ND, base, block_size=_BLOCK, rows=rows, progress=progress
  )
  stop = (rows or range(len(base))).stop
  for start, x_ND in blocks:
    x_ND = x_ND[: stop - start]
    slack_Q = _slack(xq_QD, x_ND, centre_D, metric)
    q_N, row_N = _candidates(xq_QD, x_ND, k, metric, limit_Q, slack_Q)
    error_N = _errors(xq_QD, x_ND, q_N, row_N, metric)
    new = _Pairs(q_N, error_N, row_N + start)
    best, limit_Q = _keep(_join(best, new), len(xq_QD), k)
  return _table(best, len(xq_QD), k)


def merge(parts, k: int) -> Nearest:
  """Joins what was found in different rows of the base."""
  joined, num = None, 0
  for part in parts:
    num = len(part.ids_QK)
    q_N, at_N = np.nonzero(part.ids_QK >= 0)
    new = _Pairs(q_N, part.error_QK[q_N, at_N], part.ids_QK[q_N, at_N])
    joined = new if joined is None else _join(joined, new)
    joined, _ = _keep(joined, num, k)
  if joined is None:
    raise ValueError("Merging needs at least 1 part, got 0.")
  return _table(joined, num, k)


def _slack(xq_QD, x_ND, centre_D, metric: str) -> np.ndarray:
  """By how much a distance of faiss may be wrong, `[Q]`."""
  norm_Q = np.linalg.norm(faiss_io.less(xq_QD, centre_D), axis=1)
  largest = np.linalg.norm(faiss_io.less(x_ND, centre_D), axis=1).max()
  size_Q = norm_Q * largest if metric == "ip" else (norm_Q + largest) ** 2
  return size_Q.astype(float) * _ROUNDING * xq_QD.shape[1] ** 0.5


def _candidates(xq_QD, x_ND, k: int, metric: str, limit_Q, slack_Q):
  """Pairs of a query and a row that may be among its k nearest.

  `limit_Q` are errors of the k-th best so far.
  """
  num = min(k + _SPARE, len(x_ND))
  found_QC, row_QC = faiss_io.knn(xq_QD, x_ND, num, metric)
  error_QC = found_QC.astype(float) * (-1 if metric == "ip" else 1)
  last_Q = error_QC[:, min(k, num) - 1] if num >= k else np.inf
  bound_Q = np.minimum(limit_Q, last_Q + slack_Q) + slack_Q
  is_near_QC = error_QC <= bound_Q[:, None]
  # There may be more of them, as of many equal vectors: all are compared then.
  is_open_Q = is_near_QC[:, -1] & (num < len(x_ND))
  q_N, at_N = np.nonzero(is_near_QC & ~is_open_Q[:, None])
  pairs = [(q_N, row_QC[q_N, at_N])]
  for q in np.flatnonzero(is_open_Q):
    pairs.append(_all_near(xq_QD, x_ND, q, bound_Q[q], metric))
  return map(np.concatenate, zip(*pairs, strict=True))


def _all_near(xq_QD, x_ND, q: int, bound: float, metric: str):
  """Pairs of a query and all rows that are within a bound."""
  row_N = np.arange(len(x_ND))
  q_N = np.full(len(x_ND), q)
  near_N = np.flatnonzero(_errors(xq_QD, x_ND, q_N, row_N, metric) <= bound)
  return q_N[near_N], near_N


def _errors(xq_QD, x_ND, q_N, row_N, metric: str) -> np.ndarray:
  """Errors of pairs, float64."""
  size = max(_PAIR_NUMBERS // xq_QD.shape[1], 1)
  parts = [np.empty(0)]
  for start in range(0, len(q_N), size):
    pairs = slice(start, start + size)
    x_P1D = x_ND[row_N[pairs]][:, None]
    parts.append(truth_check.errors(xq_QD[q_N[pairs]], x_P1D, metric)[:, 0])
  return np.concatenate(parts)


def _join(a: _Pairs, b: _Pairs) -> _Pairs:
  return _Pairs(*map(np.concatenate, zip(a, b, strict=True)))


def _keep(pairs: _Pairs, num_queries: int, k: int):
  """The k best of each query, and the errors of the k-th, inf if there is none.

  Of equal errors the lower row is better.
  """
  order_N = np.lexsort((pairs.id_N, pairs.error_N, pairs.q_N))
  pairs = _Pairs(*(array[order_N] for array in pairs))
  first_Q = np.searchsorted(pairs.q_N, np.arange(num_queries + 1))
  rank_N = np.arange(len(pairs.q_N)) - first_Q[pairs.q_N]
  pairs = _Pairs(*(array[rank_N < k] for array in pairs))
  num_Q = np.minimum(np.diff(first_Q), k)
  limit_Q = np.full(num_queries, np.inf)
  last_Q = np.cumsum(num_Q) - 1
  limit_Q[num_Q == k] = pairs.error_N[last_Q[num_Q == k]]
  return pairs, limit_Q


def _table(pairs: _Pairs, num_queries: int, k: int) -> Nearest:
  error_QK = np.full((num_queries, k), np.inf)
  ids_QK = np.full((num_queries, k), -1, np.int64)
  first_Q = np.searchsorted(pairs.q_N, np.arange(num_queries))
  at_N = np.arange(len(pairs.q_N)) - first_Q[pairs.q_N]
  error_QK[pairs.q_N, at_N] = pairs.error_N
  ids_QK[pairs.q_N, at_N] = pairs.id_N
  return Nearest(error_QK, ids_QK)
