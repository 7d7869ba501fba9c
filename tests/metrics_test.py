import numpy as np
import pytest

from vqjax.search import metrics

FOUND = np.array([[3, 1, 2], [7, 8, 9], [5, 4, -1], [-1, -1, -1]])
TRUE = np.array([[1, 3], [6, 7], [5, 0], [-1, 2]])


@pytest.mark.parametrize(("r", "want"), [(1, 1 / 4), (2, 2 / 4), (3, 2 / 4)])
def test_nn_recall_counts_the_nearest_alone(r, want):
  assert metrics.nn_recall_at(FOUND, TRUE, r) == want


@pytest.mark.parametrize(("k", "want"), [(1, 1 / 4), (2, 4 / 8)])
def test_knn_recall_counts_the_overlap(k, want):
  assert metrics.knn_recall_at(FOUND, TRUE, k) == want


def test_recalls_match_loops():
  rng = np.random.default_rng(0)
  draw = lambda n: np.stack([rng.permutation(30)[:n] for _ in range(50)])
  found, true = draw(12), draw(10)
  nn = [t[0] in list(f[:5]) for f, t in zip(found, true, strict=True)]
  knn = [
    len(set(f[:5].tolist()) & set(t[:5].tolist())) / 5
    for f, t in zip(found, true, strict=True)
  ]
  assert metrics.nn_recall_at(found, true, 5) == pytest.approx(np.mean(nn))
  assert metrics.knn_recall_at(found, true, 5) == pytest.approx(np.mean(knn))


def test_an_id_found_twice_counts_once():
  found, true = np.array([[4, 4]]), np.array([[4, 5]])
  assert metrics.knn_recall_at(found, true, 2) == 0.5


def test_wrong_arguments_are_refused():
  with pytest.raises(ValueError, match="r must lie between 1 and 3, got 4"):
    metrics.nn_recall_at(FOUND, TRUE, 4)
  with pytest.raises(ValueError, match="k must lie between 1 and 2, got 3"):
    metrics.knn_recall_at(FOUND, TRUE, 3)
  with pytest.raises(ValueError, match=r"\(4, None\), got \(3, 2\)"):
    metrics.nn_recall_at(FOUND, TRUE[:3], 1)
  with pytest.raises(TypeError, match="integer ids, got float64"):
    metrics.nn_recall_at(FOUND, TRUE * 1.0, 1)
  with pytest.raises(ValueError, match="at least one query"):
    metrics.nn_recall_at(FOUND[:0], TRUE[:0], 1)


def _with_errors(error_QN, found, true):
  pick = lambda ids: np.where(
    ids < 0, np.inf, np.take_along_axis(error_QN, np.maximum(ids, 0), axis=1)
  )
  return metrics.Errors(pick(found), pick(true))


@pytest.mark.parametrize("k", [1, 2, 5, 9])
def test_ties_match_the_best_of_all_true_lists(k):
  """Each list of k nearest is one truth; the overlap is that of the best."""
  rng = np.random.default_rng(k)
  error_QN = rng.integers(0, 4, (60, 12)).astype(float)  # Many are equal.
  found = np.stack([rng.permutation(12)[:9] for _ in range(60)])
  found[::5, 4:] = -1
  true = error_QN.argsort(axis=1, kind="stable")[:, :9]
  want = []
  for error_N, found_R in zip(error_QN, found, strict=True):
    here = {i for i in found_R[:k].tolist() if i >= 0}
    # Of equal ones those that were found come first.
    order = sorted(range(12), key=lambda i: (error_N[i], i not in here))
    want.append(len(here & set(order[:k])) / k)
  errors = _with_errors(error_QN, found, true)
  got = metrics.knn_recall_at(found, true, k, errors)
  assert got == pytest.approx(np.mean(want))
  nearest = (errors.found_QR[:, :k] == error_QN.min(axis=1)[:, None]).any(
    axis=1
  )
  assert metrics.nn_recall_at(found, true, k, errors) == nearest.mean()


def test_queries_without_a_neighbour_are_left_out():
  true = np.vstack([TRUE, np.full((3, 2), -1)])
  found = np.vstack([FOUND, FOUND[:3]])
  assert metrics.nn_recall_at(found, true, 2) == 2 / 4
  assert metrics.knn_recall_at(found, true, 2) == 4 / 8
  errors = _with_errors(np.ones((7, 10)), found, true)
  assert metrics.nn_recall_at(found, true, 2, errors) == 3 / 4  # All as near.
  with pytest.raises(ValueError, match="name a neighbour of a query, got -1"):
    metrics.nn_recall_at(found[4:], true[4:], 1)
