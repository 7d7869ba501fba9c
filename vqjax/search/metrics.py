"""How many of the true neighbours a search found.

Two numbers go by the name of recall; here each is named by its definition.
Ids are rows of the base, best first; -1 is an empty slot and counts as not
found.
"""

import numpy as np

from vqjax.core import check_range, check_shape


def nn_recall_at(found_QR, true_QG, r: int) -> float:
  """Share of queries whose nearest neighbour is among the first `r` found.

  Also called 1-recall@r; the papers on QINCo write R@r. The nearest neighbour
  is the first column of `true_QG`.
  """
  found_QR, true_QG = _check(found_QR, true_QG)
  check_range("r", r, 1, found_QR.shape[1], "the results per query")
  first_Q1 = true_QG[:, :1]
  is_found_Q = (found_QR[:, :r] == first_Q1).any(axis=1) & (first_Q1[:, 0] >= 0)
  return float(is_found_Q.mean())


def knn_recall_at(found_QR, true_QG, k: int) -> float:
  """Share of the `k` true neighbours that are among the first `k` found.

  Also called k-recall@k, or overlap.
  """
  found_QR, true_QG = _check(found_QR, true_QG)
  check_range("k", k, 1, found_QR.shape[1], "the results per query")
  check_range("k", k, 1, true_QG.shape[1], "the true neighbours per query")
  num_found = 0
  for found_R, true_G in zip(found_QR[:, :k], true_QG[:, :k], strict=True):
    num_found += np.count_nonzero(np.isin(true_G[true_G >= 0], found_R))
  return num_found / (len(true_QG) * k)


def _check(found_QR, true_QG) -> tuple[np.ndarray, np.ndarray]:
  """Returns both as integer arrays of one length, or raises."""
  found_QR, true_QG = np.asarray(found_QR), np.asarray(true_QG)
  for name, ids in (("found", found_QR), ("true", true_QG)):
    if not np.issubdtype(ids.dtype, np.integer):
      raise TypeError(f"{name} must hold integer ids, got {ids.dtype}.")
  check_shape("found", found_QR, (None, None))
  check_shape("true", true_QG, (found_QR.shape[0], None))
  if not len(found_QR):
    raise ValueError("found must have at least one query, got 0.")
  return found_QR, true_QG
