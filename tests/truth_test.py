"""Recall of a `Truth` against loops over distances."""

import numpy as np
import pytest

from vqjax import evaluation
from vqjax.data import batches, unit
from vqjax.search import truth_check

Q, N, D = 30, 200, 5


def _case(num_copies, seed=0):
  rng = np.random.default_rng(seed)
  x_ND = np.tile(rng.normal(size=(N // num_copies, D)), (num_copies, 1))
  return x_ND.astype("f4"), rng.normal(size=(Q, D)).astype("f4")


def _errors(xq_QD, x_ND, metric):
  xq_QD, x_ND = xq_QD.astype(float), x_ND.astype(float)
  if metric == "l2":
    return np.square(xq_QD[:, None] - x_ND).sum(axis=2)
  if metric == "cosine":
    xq_QD = xq_QD / np.linalg.norm(xq_QD, axis=1, keepdims=True)
    x_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
  return -(xq_QD @ x_ND.T)


def _nn_recall(error_QN, found_QR, r):
  near = [
    min(error_N[i] for i in found_R[:r] if i >= 0) <= error_N.min() + 1e-9
    for error_N, found_R in zip(error_QN, found_QR, strict=True)
  ]
  return np.mean(near)


def _knn_recall(error_QN, found_QR, k):
  total = 0
  for error_N, found_R in zip(error_QN, found_QR, strict=True):
    last = np.sort(error_N)[k - 1]
    found = {i for i in found_R[:k] if i >= 0}
    nearer = sum(error_N[i] < last - 1e-9 for i in found)
    tied = sum(abs(error_N[i] - last) <= 1e-9 for i in found)
    total += nearer + min(tied, k - np.sum(error_N < last - 1e-9))
  return total / (k * len(error_QN))


def _open(base, queries, ids_QG, metric="l2"):
  if metric == "cosine":
    base, queries = unit.UnitVectors(base), unit.UnitVectors(queries)
  names = {"groundtruth": "gt", "base": "b", "queries": "q"}
  files = truth_check.Files(queries, base, ids_QG, metric, names)
  return evaluation.open_truth(files, len(base), base)


@pytest.mark.parametrize("num_listed", [None, 1, 10, 30])
@pytest.mark.parametrize("num_copies", [1, 2, 25])
@pytest.mark.parametrize("metric", truth_check.METRICS)
def test_equally_near_vectors_count_alike(metric, num_copies, num_listed):
  x_ND, xq_QD = _case(num_copies)
  error_QN = _errors(xq_QD, x_ND, metric).round(9)
  rng = np.random.default_rng(1)
  # Results: the nearest but for noise, and other copies than the list has.
  noisy_QN = error_QN + rng.normal(scale=0.1, size=error_QN.shape)
  found_QR = noisy_QN[:, ::-1].argsort(axis=1, kind="stable")[:, :20]
  found_QR = N - 1 - found_QR
  found_QR[4, 3:] = -1
  ids_QG = None
  if num_listed:
    ids_QG = error_QN.argsort(axis=1, kind="stable")[:, :num_listed]
  found = _open(x_ND, xq_QD, ids_QG, metric)
  got = found.recalls(found_QR)
  want = {f"1-recall@{r}": _nn_recall(error_QN, found_QR, r) for r in (1, 10)}
  want["knn_recall@10"] = _knn_recall(error_QN, found_QR, 10)
  assert got == pytest.approx(want)
  assert (found.num_ties() > 0) == (num_copies > 1)
  assert found.recalls(found_QR) == got  # From what was read before.


def test_queries_without_neighbours_are_left_out(caplog):
  x_ND, xq_QD = _case(1)
  error_QN = _errors(xq_QD, x_ND, "l2")
  ids_QG = error_QN.argsort(axis=1)[:, :10]
  found_QR = np.where(np.arange(Q)[:, None] % 2, ids_QG, N - 1 - ids_QG)
  whole = _open(x_ND, xq_QD, ids_QG).recalls(found_QR)
  some_QG = ids_QG.copy()
  some_QG[:10] = -1
  found = _open(x_ND, xq_QD, some_QG)
  assert found.num_without == 10
  want = _open(x_ND, xq_QD[10:], ids_QG[10:]).recalls(found_QR[10:])
  assert found.recalls(found_QR) == pytest.approx(want)
  assert whole != want or whole == want == 0.5


def test_without_the_base_ids_alone_count():
  x_ND, xq_QD = _case(2)
  ids_QG = _errors(xq_QD, x_ND, "l2").argsort(axis=1, kind="stable")[:, :1]
  files = truth_check.Files(xq_QD, None, ids_QG, "l2", {"groundtruth": "gt"})
  found = evaluation.open_truth(files, N)
  assert found.recalls(ids_QG) == {"1-recall@1": 1.0}
  assert found.recalls((ids_QG + N // 2) % N) == {"1-recall@1": 0.0}
  with pytest.raises(ValueError, match="names vectors beyond the 7 that are"):
    evaluation.open_truth(files, 7)
  with pytest.raises(ValueError, match="no ground truth; give the vectors"):
    evaluation.open_truth(files._replace(groundtruth=None), N)


def test_the_base_is_not_read_as_a_whole():
  x_ND, xq_QD = _case(1)
  ids_QG = _errors(xq_QD, x_ND, "l2").argsort(axis=1)[:, :20]
  large = np.vstack([x_ND, np.full((200_000, D), 9, np.float32)])
  rows = []

  class Counted(np.ndarray):
    def __getitem__(self, at):
      rows.append(at)
      return np.asarray(self)[at]

  found = _open(large.view(Counted), xq_QD, ids_QG)
  found.recalls(ids_QG)
  assert sum(map(np.size, rows)) < 30_000
  assert not any(isinstance(at, slice) for at in rows)
  assert batches.read_rows(large, [0]).shape == (1, D)
