"""Exact search of whole vectors in chosen lists, a matrix product at a time.

Many queries: for each list one product of its vectors and the queries that
probe it. Few queries: for each query a product with each of its lists. Products
round differently, so the last digits of their numbers are not compared:
whatever comes within rounding of the k-th best is scored once more, by one
function of query and vector, and ranked by that score and the lower id.
So both ways give the same result.

A gain is more for the better vector: the inner product, less half of the
squared norm of the vector if distances are asked for.
"""

import concurrent.futures
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from vqjax import cpu
from vqjax.search.flat_lists import FlatLists

_MOST_FOUND = 1 << 22  # Candidates held for a block of queries, and per thread.
_MOST_PRODUCTS = 1 << 19  # Numbers of a product: they stay in the cache.
_MOST_QUERIES = 8192  # Of a block.
_GROUPED_FROM = 2  # Queries that probe a list, on average, for it to pay.
_SHARED_FROM = 512  # Vectors of a query for each thread.
_PIECES = 4  # Of the work of each thread, so that all end together.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)

ScoreFn = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Found(NamedTuple):
  """Candidates: the queries, slots and gains of each."""

  query_C: np.ndarray
  slot_C: np.ndarray
  gain_C: np.ndarray


def search(
  lists: FlatLists,
  queries_QD: np.ndarray,
  probes_QP: np.ndarray,
  k: int,
  score_fn: ScoreFn,
  *,
  num_threads: int = 1,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns the scores `[Q, k]` and ids `[Q, k]` of the best in the lists.

  Fewer than k end in id -1 and score -inf.

  Args:
    lists: The vectors.
    queries_QD: float32.
    probes_QP: Lists of each query, the best first, -1 for none.
    k: Results of a query.
    score_fn: `(queries_QD, slots_QR) -> score_QR` scores slots for each query,
      more for the better, -inf for slot -1.
    num_threads: Threads that many queries are searched by.
  """
  num_queries, nprobe = probes_QP.shape
  if num_queries * nprobe >= _GROUPED_FROM * len(lists.sizes_L):
    num_first = _first_probes(lists, nprobe, k)
    block, search_fn = _block_size(lists, num_first, k), _search_grouped
  else:
    block, search_fn = 1, _search_each
    if num_queries > 1:
      block = max(_MOST_FOUND // _largest(lists, nprobe), 1)
  args = k, score_fn, num_threads
  if num_queries <= block:
    return search_fn(lists, queries_QD, probes_QP, *args)
  starts = range(0, num_queries, block)
  found = [
    search_fn(lists, queries_QD[i : i + block], probes_QP[i : i + block], *args)
    for i in starts
  ]
  scores_QK, ids_QK = map(np.concatenate, zip(*found, strict=True))
  return scores_QK, ids_QK


def _largest(lists: FlatLists, num: int) -> int:
  """The most vectors that so many lists hold, at least 1."""
  return max(int(np.sort(lists.sizes_L)[-num:].sum()), 1)


def _slack(lists: FlatLists, queries_QD) -> np.ndarray:
  """By how much two ways of computing a gain may differ."""
  norm_Q = np.sqrt(np.einsum("qd,qd->q", queries_QD, queries_QD))
  size_Q = norm_Q * lists.largest
  if lists.half_N is not None:
    size_Q += lists.largest**2 / 2
  return size_Q * np.float32(_ROUNDING * queries_QD.shape[1] ** 0.5)


def _first_probes(lists: FlatLists, nprobe: int, k: int) -> int:
  """Lists whose vectors give a good idea of the k-th best."""
  mean = max(len(lists) / len(lists.sizes_L), 1)
  return min(nprobe, int(np.ceil(1.5 * k / mean)))


def _block_size(lists: FlatLists, first: int, k: int) -> int:
  """Queries to take at a time, for their candidates to fit in memory."""
  mean = -(-len(lists) // len(lists.sizes_L))
  num = max(2 * k, min(_largest(lists, first), 4 * first * mean))
  return int(np.clip(_MOST_FOUND // num, 64, _MOST_QUERIES))


def _search_each(lists, queries_QD, probes_QP, k, score_fn, num_threads):
  """Scores and ids of the best of each query, all of whose slots are scored."""
  scores_QK = np.full((len(queries_QD), k), -np.inf, np.float32)
  ids_QK = np.full(scores_QK.shape, -1, np.int64)
  slots = [_slots_of(lists, probes_P) for probes_P in probes_QP]
  if len(slots) == 1:
    found = [_score_one(queries_QD, slots[0], score_fn, num_threads)]
  else:
    slots_QC = np.full((len(slots), max(map(len, slots), default=0)), -1)
    for slot_C, row_C in zip(slots, slots_QC, strict=True):
      row_C[: len(slot_C)] = slot_C
    found = score_fn(queries_QD, slots_QC)
  for number, (slot_C, score_C) in enumerate(zip(slots, found, strict=True)):
    score_C, num = score_C[: len(slot_C)], len(slot_C)
    if num > k:
      least = np.partition(score_C, num - k)[num - k]
      kept = (score_C >= least).nonzero()[0]
      score_C, slot_C = score_C[kept], slot_C[kept]
    id_C = lists.ids_N[slot_C]
    order_K = np.lexsort((id_C, -score_C))[:k]
    scores_QK[number, : len(order_K)] = score_C[order_K]
    ids_QK[number, : len(order_K)] = id_C[order_K]
  return scores_QK, ids_QK


def _score_one(query_1D, slot_C, score_fn, num_threads: int) -> np.ndarray:
  """Scores of one query, whose slots threads share: as if of many queries."""
  num = len(slot_C)
  num_parts = max(min(num_threads, num // _SHARED_FROM), 1)
  if num_parts == 1:
    return score_fn(query_1D, slot_C[None])[0]
  width = -(-num // num_parts)
  slots_QR = np.full(num_parts * width, -1)
  slots_QR[:num] = slot_C
  queries_QD = np.repeat(query_1D, num_parts, axis=0)
  return score_fn(queries_QD, slots_QR.reshape(num_parts, width)).ravel()


def _slots_of(lists: FlatLists, probes_P) -> np.ndarray:
  """All slots of some lists."""
  probes_P = probes_P[probes_P >= 0]
  size_P = lists.sizes_L[probes_P]
  stop_P = size_P.cumsum()
  shift_P = lists.starts[probes_P] - stop_P + size_P
  slots = shift_P.repeat(size_P)
  slots += np.arange(len(slots))
  return slots


def _search_grouped(lists, queries_QD, probes_QP, k, score_fn, num_threads):
  """Scores and ids of the best of each query, a list at a time.

  The best lists come first; what they hold says which of the vectors in the
  other lists come too late.
  """
  slack_Q = _slack(lists, queries_QD)
  first = _first_probes(lists, probes_QP.shape[1], k)
  least_Q = np.full(len(queries_QD), -np.inf, np.float32)
  found = _join([])

  def scan(groups):
    return _scan_groups(lists, queries_QD, groups, k, least_Q, score_fn)

  with (
    cpu.one_blas_thread(),
    concurrent.futures.ThreadPoolExecutor(num_threads) as pool,
  ):
    for columns in (slice(0, first), slice(first, None)):
      groups = _group(probes_QP[:, columns])
      pieces = _pieces(lists, groups, _PIECES * num_threads)
      found = _join([found, *pool.map(scan, pieces)])
      found, least_Q = _keep_best(found, k, slack_Q)
  slots_QK, _, scores_QK = _rank(lists, queries_QD, found, k, score_fn)
  if not len(lists):
    return scores_QK, slots_QK
  ids_QK = lists.ids_N[slots_QK].astype(np.int64)
  return scores_QK, np.where(slots_QK < 0, -1, ids_QK)


def _group(probes_QP: np.ndarray) -> list[tuple[int, np.ndarray]]:
  """Each list that is probed, and the queries that do."""
  flat = probes_QP.ravel()
  kind = np.int16 if flat.max(initial=0) < 2**15 else flat.dtype
  order = np.argsort(flat.astype(kind), kind="stable")  # A radix sort of int16.
  order = order[np.searchsorted(flat[order], 0) :]
  sorted_lists = flat[order]
  edges = np.flatnonzero(np.diff(sorted_lists, prepend=-1, append=-1))
  query_C = order // probes_QP.shape[1]
  return [
    (int(sorted_lists[a]), query_C[a:b]) for a, b in itertools.pairwise(edges)
  ]


def _pieces(lists: FlatLists, groups: list, num: int) -> list[list]:
  """Groups in a few pieces of about the same work."""
  work = np.cumsum(
    [len(query_C) * lists.sizes_L[l] + 20_000 for l, query_C in groups]
  )
  if not len(work):
    return []
  cuts = np.searchsorted(work, np.arange(1, num) * (work[-1] / num))
  edges = np.unique([0, *cuts, len(groups)])
  return [groups[a:b] for a, b in itertools.pairwise(edges)]


def _scan_groups(
  lists: FlatLists, queries_QD, groups, k, least_Q, score_fn
) -> Found:
  """Candidates of some lists that are as good as the k-th known so far."""
  found, num_found = [], 0
  for l, query_C in groups:
    first, size = int(lists.starts[l]), int(lists.sizes_L[l])
    step = max(_MOST_PRODUCTS // len(query_C), 256)
    queries_CD = queries_QD[query_C]
    for start in range(first, first + size, step):
      stop = min(start + step, first + size)
      gain = queries_CD @ lists.x_ND[start:stop].T
      if lists.half_N is not None:
        gain -= lists.half_N[start:stop]
      kept = np.flatnonzero(gain >= least_Q[query_C, None])
      if not len(kept):
        continue
      row, column = np.divmod(kept, stop - start)
      found.append(Found(query_C[row], column + start, gain.ravel()[kept]))
      num_found += len(kept)
      if num_found > _MOST_FOUND:
        # Many are as good as each other: by score and id then.
        joined = _join(found)
        found = [_keep_exactly(lists, queries_QD, joined, k, score_fn)]
        num_found = len(found[0].gain_C)
  return _join(found)


def _join(found: list[Found]) -> Found:
  if not found:
    return Found(*np.zeros((2, 0), np.int64), np.zeros(0, np.float32))
  return Found(*map(np.concatenate, zip(*found, strict=True)))


def _keep_best(found: Found, k: int, slack_Q) -> tuple[Found, np.ndarray]:
  """The k best of each query and what is within rounding; and the least gain.

  They come query by query, the best first.
  """
  bits_C = found.gain_C.view(np.int32)
  # Floats as integers of the same order, turned round.
  down_C = ~(bits_C ^ ((bits_C >> 31) & 0x7FFFFFFF)).astype(np.int64)
  key_C = (found.query_C << 32) + (down_C + (1 << 31))
  order_C = np.argsort(key_C)
  found = Found(*(array[order_C] for array in found))
  num_Q = np.bincount(found.query_C, minlength=len(slack_Q))
  stop_Q = np.cumsum(num_Q)
  least_Q = np.full(len(slack_Q), -np.inf, np.float32)
  full = np.flatnonzero(num_Q >= k)
  least_Q[full] = found.gain_C[(stop_Q - num_Q)[full] + k - 1] - slack_Q[full]
  kept_C = found.gain_C >= least_Q[found.query_C]
  return Found(*(array[kept_C] for array in found)), least_Q


def _rank(
  lists: FlatLists, queries_QD, found: Found, k: int, score_fn: ScoreFn
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Slots, gains and scores `[Q, k]` of the best by score and lower id."""
  num_queries = len(queries_QD)
  order_C = np.argsort(found.query_C, kind="stable")
  found = Found(*(array[order_C] for array in found))
  num_Q = np.bincount(found.query_C, minlength=num_queries)
  first_Q = np.cumsum(num_Q) - num_Q
  slots_QK = np.full((num_queries, k), -1, np.int64)
  gains_QK = np.full((num_queries, k), -np.inf, np.float32)
  scores_QK = gains_QK.copy()
  start = 0
  while start < num_queries:
    # As many queries as a table with the same width for all may have.
    width_q = np.maximum.accumulate(num_Q[start : start + _MOST_QUERIES])
    fits_q = width_q * np.arange(1, len(width_q) + 1) <= _MOST_FOUND
    stop = start + max(int(fits_q.sum()), 1)
    width = int(width_q[stop - start - 1])
    rows, kept = slice(start, stop), slice(0, min(width, k))
    place_qR = np.arange(width)
    is_there_qR = place_qR < num_Q[rows, None]
    at_qR = np.where(is_there_qR, first_Q[rows, None] + place_qR, 0)
    if width:
      slot_qR = np.where(is_there_qR, found.slot_C[at_qR], -1)
      score_qR = score_fn(queries_QD[rows], slot_qR)
      order_qK = order_of(score_qR, slot_qR, lists)[:, kept]
      take = lambda table, order=order_qK: np.take_along_axis(table, order, 1)
      slots_QK[rows, kept] = take(slot_qR)
      gains_QK[rows, kept] = take(
        np.where(is_there_qR, found.gain_C[at_qR], -np.inf)
      )
      scores_QK[rows, kept] = take(score_qR)
    start = stop
  return slots_QK, gains_QK, scores_QK


def order_of(score_QR, slot_QR, lists: FlatLists) -> np.ndarray:
  """Returns the order of each row: by score, more first, then by lower id."""
  order_QR = np.argsort(-score_QR, axis=1)
  sorted_QR = np.take_along_axis(score_QR, order_QR, axis=1)
  has_ties_Q = (sorted_QR[:, 1:] == sorted_QR[:, :-1]).any(axis=1)
  tied = np.flatnonzero(has_ties_Q)
  ids_TR = np.where(slot_QR[tied] < 0, 0, lists.ids_N[slot_QR[tied]])
  order_QR[tied] = np.lexsort((ids_TR, -score_QR[tied]), axis=1)
  return order_QR


def _keep_exactly(lists, queries_QD, found, k, score_fn) -> Found:
  """The k best of each query, by score and lower id."""
  slots_QK, gains_QK, _ = _rank(lists, queries_QD, found, k, score_fn)
  query_C, place_C = np.nonzero(slots_QK >= 0)
  return Found(query_C, slots_QK[query_C, place_C], gains_QK[query_C, place_C])
