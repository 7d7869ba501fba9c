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
