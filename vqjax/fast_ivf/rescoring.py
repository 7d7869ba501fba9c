"""Scores by whole vectors of results that codes have found."""

from collections.abc import Callable

import numpy as np

from vqjax.interop import faiss_fast_ivf
from vqjax.search import calibration, flat_lists, flat_scan


def search(
  index,
  queries,
  k: int,
  candidates_fn: Callable,
  *,
  rescore: bool,
  sort: bool,
  num_candidates: int | None,
  is_distance: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """Searches an index by its codes; returns scores and ids `[Q, k]`.

  Args:
    index: A `BaseIVF` with a `rescore_num_samples`.
    queries: As its `search` takes them.
    k: Results of a query.
    candidates_fn: `(queries_QD, lists_QP, k, is_ordered=)` returns what the
      codes say of the best, and their slots, `[Q, k]`.
    rescore: Scores them by whole vectors.
    sort: By the new score.
    num_candidates: How many are scored, if more than k.
    is_distance: Whether codes give distances, of which less is better.
  """
  num = k if num_candidates is None else max(num_candidates, k)
  num_samples = index.rescore_num_samples
  will_sort = rescore and sort and not 0 < num_samples < num
  if rescore:
    is_distance = index.metric == "l2"

  def find(queries_QD, lists_QP, width):
    lists = index._lists  # Made by now.
    most = max(min(num, len(index)), 1) if rescore else width
    found_QK, slots_QK = candidates_fn(
      queries_QD, lists_QP, most, is_ordered=not will_sort
    )
    if not rescore:
      return found_QK, ids_at(lists, slots_QK)
    scores_QK, slots_QK = score_anew(
      *(lists, index.metric, queries_QD, found_QK, slots_QK, num),
      num_samples=num_samples,
      sort=sort,
    )
    scores_QK, slots_QK = scores_QK[:, :width], slots_QK[:, :width]
    return (-scores_QK if is_distance else scores_QK), ids_at(lists, slots_QK)

  return index._search(queries, k, find, is_distance=is_distance)


def score_anew(
  lists: flat_lists.FlatLists,
  metric: str,
  queries_QD: np.ndarray,
  found_QK: np.ndarray,
  slots_QK: np.ndarray,
  k: int,
  *,
  num_samples: int,
  sort: bool,
) -> tuple[np.ndarray, np.ndarray]:
  """Returns scores, more for the better, and slots: by score, or as they are.

  Args:
    lists: The whole vectors.
    metric: Of the scores.
    queries_QD: float32.
    found_QK: Distances or scores by the codes, the best first.
    slots_QK: Of `lists`, -1 for none.
    k: Results that were asked for.
    num_samples: See `calibration.sample_ranks`.
    sort: By the new score.
  """
  is_there_QK = slots_QK >= 0
  ranks_R = calibration.sample_ranks(k, num_samples)
  is_exact = not 0 < num_samples < k
  ranks_R = ranks_R[ranks_R < slots_QK.shape[1]]
  slots_QR = np.ascontiguousarray(slots_QK[:, ranks_R])
  scores_QK = faiss_fast_ivf.exact_scores(
    queries_QD, lists.x_ND, slots_QR, metric
  )
  if not is_exact:
    slope_Q, offset_Q = calibration.fit_lines(
      found_QK[:, ranks_R], scores_QK, is_there_QK[:, ranks_R]
    )
    found_QK = np.where(is_there_QK, found_QK, 0)
    scores_QK = slope_Q[:, None] * found_QK + offset_Q[:, None]
    low, high = {"cosine": (0, 1), "l2": (-np.inf, 0)}.get(
      metric, (-np.inf, np.inf)
    )
    scores_QK = np.clip(scores_QK, low, high).astype(np.float32)
    scores_QK[~is_there_QK] = -np.inf
  if not sort:
    return scores_QK, slots_QK
  if is_exact:
    order_QK = flat_scan.order_of(scores_QK, slots_QK, lists)
  else:  # Equal ones stay in the order of the codes.
    order_QK = np.argsort(-scores_QK, axis=1, kind="stable")
  take = lambda table: np.take_along_axis(table, order_QK, axis=1)
  return take(scores_QK), take(slots_QK)


def ids_at(lists: flat_lists.FlatLists, slots_QK: np.ndarray) -> np.ndarray:
  """Returns the ids at slots, -1 at slot -1."""
  if not len(lists):
    return np.full(slots_QK.shape, -1)
  ids_QK = lists.ids_N[slots_QK].astype(np.int64)
  return np.where(slots_QK < 0, -1, ids_QK)
