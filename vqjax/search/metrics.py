"""How many of the true neighbours a search found.

Two numbers go by the name of recall; here each is named by its definition.
Ids are rows of the base, best first; -1 is an empty slot and counts as not
found. A query without any true neighbour, a row of -1, is left out.

If several vectors are equally near, any of them is a true neighbour. Ids
alone cannot tell; with the `Errors` of results and true neighbours a result as
near as the true neighbour counts as found.
"""

from typing import NamedTuple

import numpy as np

from vqjax.core import check_range, check_shape

SAME = 1e-7  # Relative: as exact as distances in float32 are.


class Errors(NamedTuple):
  """What is less for nearer rows: squared distances, or minus inner products.

  Of each id of `found` and `true`, in float64; inf for ids of -1 and for
  results that are known to be farther than the true neighbours.
  """

  found_QR: np.ndarray
  true_QG: np.ndarray


def nn_recall_at(
  found_QR, true_QG, r: int, errors: Errors | None = None
) -> float:
  """Share of queries whose nearest neighbour is among the first `r` found.

  Also called 1-recall@r; the papers on QINCo write R@r. The nearest neighbour
  is the first column of `true_QG`, or with `errors` any vector as near.
  """
  found_QR, true_QG = _check(found_QR, true_QG, errors)
  check_range("r", r, 1, found_QR.shape[1], "the results per query")
  first_Q1 = true_QG[:, :1]
  is_found_Q = (found_QR[:, :r] == first_Q1).any(axis=1) & (first_Q1[:, 0] >= 0)
  if errors is not None:
    limit_Q1 = _limit(errors.true_QG[:, :1])
    is_near_QR = (errors.found_QR[:, :r] <= limit_Q1) & (found_QR[:, :r] >= 0)
    is_found_Q |= is_near_QR.any(axis=1) & (first_Q1[:, 0] >= 0)
  return float(is_found_Q[has_neighbour(true_QG)].mean())


def knn_recall_at(
  found_QR, true_QG, k: int, errors: Errors | None = None
) -> float:
  """Share of the `k` true neighbours that are among the first `k` found.

  Also called k-recall@k, or overlap. With `errors` vectors that are as near as
  the last of the `k` may stand for each other.
  """
  found_QR, true_QG = _check(found_QR, true_QG, errors)
  check_range("k", k, 1, found_QR.shape[1], "the results per query")
  check_range("k", k, 1, true_QG.shape[1], "the true neighbours per query")
  num_found, counted = 0, np.flatnonzero(has_neighbour(true_QG))
  found_QR, true_QG = found_QR[:, :k], true_QG[:, :k]
  for q in counted:
    true_G = true_QG[q][true_QG[q] >= 0]
    num_same = np.count_nonzero(np.isin(true_G, found_QR[q]))
    if errors is not None and len(true_G):
      num_same = max(num_same, _num_near(found_QR[q], true_QG[q], q, errors))
    num_found += num_same
  return num_found / (len(counted) * k)


def _num_near(found_R, true_G, q: int, errors: Errors) -> int:
  """How many true neighbours are found, or others as near as the last."""
  true_G = errors.true_QG[q, : len(true_G)][true_G >= 0]
  _, first_R = np.unique(found_R, return_index=True)
  first_R = first_R[found_R[first_R] >= 0]
  error_R = errors.found_QR[q, first_R]
  last = true_G.max()
  num_nearer = min(
    np.count_nonzero(_limit(error_R) < last),
    np.count_nonzero(_limit(true_G) < last),
  )
  num_within = np.count_nonzero(error_R <= _limit(last))
  num_last = np.count_nonzero(_limit(true_G) >= last)
  return num_nearer + min(num_within - num_nearer, num_last)


def _limit(error):
  """The largest number that counts as equal."""
  return error + SAME * np.abs(error)


def has_neighbour(true_QG) -> np.ndarray:
  """Which queries have any true neighbour, `[Q]`."""
  return (np.asarray(true_QG) >= 0).any(axis=1)


def _check(found_QR, true_QG, errors) -> tuple[np.ndarray, np.ndarray]:
  """Returns both as integer arrays of one length, or raises."""
  found_QR, true_QG = np.asarray(found_QR), np.asarray(true_QG)
  for name, ids in (("found", found_QR), ("true", true_QG)):
    if not np.issubdtype(ids.dtype, np.integer):
      raise TypeError(f"{name} must hold integer ids, got {ids.dtype}.")
  check_shape("found", found_QR, (None, None))
  check_shape("true", true_QG, (found_QR.shape[0], None))
  if not len(found_QR):
    raise ValueError("found must have at least one query, got 0.")
  if not has_neighbour(true_QG).any():
    raise ValueError("true must name a neighbour of a query, got -1 alone.")
  if errors is not None:
    check_shape("The errors of found", errors.found_QR, found_QR.shape)
    check_shape("The errors of true", errors.true_QG, true_QG.shape)
  return found_QR, true_QG
