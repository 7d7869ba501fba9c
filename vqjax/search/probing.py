"""Which lists a query looks into: the best ones, less those far behind.

With a ratio r, a list is skipped whose centroid is much worse for the query
than the best centroid. At equal recall this gains little, because queries
between many lists need them all; the best list is never skipped.
"""

import numpy as np

from vqjax.core import check_range, check_shape


def check(nprobe, ratio, min_lists) -> None:
  """Raises ValueError if one of the settings makes no sense."""
  check_range("nprobe", nprobe, 1, np.inf)
  check_range("min_lists", min_lists, 1, np.inf)
  check_range("ratio_threshold", ratio or 0.0, -np.inf, np.inf)


def skip_far(
  scores_QP: np.ndarray,
  lists_QP: np.ndarray,
  ratio: float | None,
  *,
  min_lists: int = 1,
  is_distance: bool = False,
) -> np.ndarray:
  """Returns the lists of each query `[Q, P]`, -1 for those too far behind.

  Args:
    scores_QP: Of queries and centroids, the best first: inner products, or
      squared distances if `is_distance`.
    lists_QP: The numbers of these lists.
    ratio: A list is skipped if its inner product is below `ratio` times the
      absolute value of the best, or if the best squared distance is below
      `ratio` times its own. None, 0 and less skip none.
    min_lists: So many of the best lists are never skipped, at least 1.
    is_distance: Whether less is better.
  """
  check_shape("lists", lists_QP, scores_QP.shape)
  if not ratio or ratio <= 0:
    return lists_QP
  best_Q1 = scores_QP[:, :1]
  if is_distance:
    is_far_QP = best_Q1 < ratio * scores_QP
  else:
    is_far_QP = scores_QP < ratio * np.abs(best_Q1)
  is_far_QP[:, : int(min_lists)] = False
  return np.where(is_far_QP, -1, lists_QP)
