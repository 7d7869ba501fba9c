"""Which lists a query looks into: the best ones, less those far behind.

With a ratio r, a list is skipped whose centroid is much worse for the query
than the best centroid. At equal recall this gains little, because queries
between many lists need them all; the best list is never skipped.
"""

import numpy as np

from vqjax.core import check_range, check_shape


def choose_lists(
  scores_QL: np.ndarray,
  nprobe: int,
  *,
  ratio: float | None = None,
  min_lists: int = 1,
  is_distance: bool = False,
) -> np.ndarray:
  """Returns the lists of each query `[Q, P]`, best first, -1 for a skipped one.

  Args:
    scores_QL: Of queries and centroids: inner products, or squared distances
      if `is_distance`. Of equal ones the lower list comes first.
    nprobe: Lists of a query; more than there are means all.
    ratio: Skips a list if its inner product is below `ratio` times the absolute
      value of the best, or if the best squared distance is below `ratio` times
      its own. None, 0 and less skip none.
    min_lists: So many of the best lists are never skipped, at least 1.
    is_distance: Whether less is better.

  Raises:
    ValueError: If a number is out of range.
  """
  check_shape("scores", scores_QL, (None, None))
  check_range("nprobe", nprobe, 1, np.inf)
  check_range("min_lists", min_lists, 1, np.inf)
  ratio = 0.0 if ratio is None else float(ratio)
  check_range("ratio_threshold", ratio, -np.inf, np.inf)
  gain_QL = -scores_QL if is_distance else scores_QL
  lists_QP = _best(gain_QL, min(int(nprobe), gain_QL.shape[1]))
  if ratio <= 0:
    return lists_QP
  found_QP = np.take_along_axis(scores_QL, lists_QP, axis=1)
  best_Q1 = found_QP[:, :1]
  if is_distance:
    is_far_QP = best_Q1 < ratio * found_QP
  else:
    is_far_QP = found_QP < ratio * np.abs(best_Q1)
  is_far_QP[:, : int(min_lists)] = False
  return np.where(is_far_QP, -1, lists_QP)


def _best(gain_QL: np.ndarray, num: int) -> np.ndarray:
  """The `num` largest of each row, largest first, ties by lower number."""
  num_queries, num_lists = gain_QL.shape
  if num == num_lists:
    return np.argsort(-gain_QL, axis=1, kind="stable")
  least_Q1 = np.partition(gain_QL, num_lists - num, axis=1)
  least_Q1 = least_Q1[:, num_lists - num, None]
  row_C, list_C = np.nonzero(gain_QL >= least_Q1)
  if len(row_C) > num_queries * num:  # Ties with the last one.
    kept = gain_QL[row_C, list_C] > least_Q1[row_C, 0]
    room_Q = num - np.bincount(row_C[kept], minlength=num_queries)
    tied = np.flatnonzero(~kept)
    first_Q = np.searchsorted(row_C[tied], np.arange(num_queries))
    place_C = np.arange(len(tied)) - first_Q[row_C[tied]]
    kept[tied] = place_C < room_Q[row_C[tied]]
    list_C = list_C[kept]
  lists_QP = list_C.reshape(num_queries, num)
  order_QP = np.argsort(
    -np.take_along_axis(gain_QL, lists_QP, axis=1), axis=1, kind="stable"
  )
  return np.take_along_axis(lists_QP, order_QP, axis=1)
