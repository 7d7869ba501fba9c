"""Search of whole vectors in lists, and which lists, against loops."""

import numpy as np
import pytest

from vqjax.interop import faiss_fast_ivf
from vqjax.search import flat_lists, flat_scan, probing


def _lists(x_ND, lists_N, ids_N, num_lists, metric="ip"):
  lists = flat_lists.empty(num_lists, x_ND.shape[1], has_norms=metric == "l2")
  flat_lists.add(lists, lists_N, ids_N, lambda a, b: x_ND[a:b])
  return lists


def _search(lists, queries_QD, probes_QP, k, metric="ip", **knobs):
  def score(queries_QD, slots_QR):
    return faiss_fast_ivf.exact_scores(queries_QD, lists.x_ND, slots_QR, metric)

  return flat_scan.search(lists, queries_QD, probes_QP, k, score, **knobs)


def _oracle(x_ND, lists_N, ids_N, queries_QD, probes_QP, k, metric):
  """Ids and scores of each query, one vector at a time."""
  found = []
  for query_D, probes_P in zip(queries_QD, probes_QP, strict=True):
    scored = []
    for x_D, number, item in zip(x_ND, lists_N, ids_N, strict=True):
      if number in probes_P:
        left_D = x_D.astype(float) - query_D
        score = -left_D @ left_D if metric == "l2" else x_D @ query_D
        scored.append((-score, item))
    scored = sorted(scored)[:k] + [(np.inf, -1)] * k
    found.append(scored[:k])
  negative_QK, ids_QK = np.moveaxis(np.array(found), 2, 0)
  return -negative_QK, ids_QK.astype(int)


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("num_queries", [2, 40])  # One by one; list by list.
@pytest.mark.parametrize("k", [1, 7, 60])
def test_search_is_that_of_loops(metric, num_queries, k):
  rng = np.random.default_rng(0)
  # Whole numbers: many ties, and both sides compute without rounding.
  x_ND = rng.integers(-2, 3, (200, 4)).astype(np.float32)
  lists_N = rng.integers(0, 7, 200)  # List 7 is empty.
  ids_N = rng.permutation(1000)[:200]
  queries_QD = rng.integers(-2, 3, (num_queries, 4)).astype(np.float32)
  probes_QP = np.array([rng.permutation(8)[:3] for _ in range(num_queries)])
  probes_QP[::3, 1] = -1
  lists = _lists(x_ND, lists_N, ids_N, 8, metric)
  scores_QK, ids_QK = _search(lists, queries_QD, probes_QP, k, metric)
  want = _oracle(x_ND, lists_N, ids_N, queries_QD, probes_QP, k, metric)
  np.testing.assert_array_equal(ids_QK, want[1])
  np.testing.assert_array_equal(scores_QK, want[0])
  assert (scores_QK.dtype, ids_QK.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_the_way_of_searching_does_not_show(metric, monkeypatch):
  rng = np.random.default_rng(1)
  x_ND = rng.normal(size=(500, 33)).astype(np.float32)
  x_ND[100:200] = x_ND[:100]  # Copies, in other lists or places.
  lists_N = rng.integers(0, 5, 500)
  queries_QD = rng.normal(size=(30, 33)).astype(np.float32)
  probes_QP = np.array([rng.permutation(5)[:4] for _ in range(30)])
  lists = _lists(x_ND, lists_N, np.arange(500), 5, metric)
  args = lists, queries_QD, probes_QP, 9, metric
  wanted = _search(*args)
  for name, value in (
    ("_GROUPED_FROM", 10**9),  # One by one.
    ("_MOST_FOUND", 40),  # Blocks of few queries, and many cuts to the best.
    ("_MOST_PRODUCTS", 1),
    ("_MOST_QUERIES", 1),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(flat_scan, name, value)
      for have, want in zip(_search(*args), wanted, strict=True):
        np.testing.assert_array_equal(have, want)
  for have, want in zip(_search(*args, num_threads=3), wanted, strict=True):
    np.testing.assert_array_equal(have, want)


def test_far_from_the_origin_no_neighbour_is_lost():
  rng = np.random.default_rng(2)
  x_ND = (1e4 + rng.normal(size=(300, 8))).astype(np.float32)
  queries_QD = (1e4 + rng.normal(size=(20, 8))).astype(np.float32)
  lists = _lists(x_ND, np.zeros(300, int), np.arange(300), 1, "l2")
  scores_QK, ids_QK = _search(
    lists, queries_QD, np.zeros((20, 1), int), 5, "l2"
  )
  left_QND = queries_QD[:, None].astype(float) - x_ND
  want_QN = np.square(left_QND).sum(axis=2)
  order_QK = np.argsort(want_QN, axis=1)[:, :5]
  np.testing.assert_array_equal(ids_QK, order_QK)
  want_QK = np.take_along_axis(want_QN, order_QK, 1)
  np.testing.assert_allclose(-scores_QK, want_QK, rtol=1e-6)


def test_lists_that_are_edited_are_as_if_built_so():
  rng = np.random.default_rng(3)
  x_ND = rng.normal(size=(120, 4)).astype(np.float32)
  lists_N, ids_N = rng.integers(0, 4, 120), rng.permutation(120)
  lists = _lists(x_ND[:40], lists_N[:40], ids_N[:40], 4, "l2")
  for start in range(40, 120, 10):
    rows = slice(start, start + 10)
    x_nD = x_ND[rows]
    flat_lists.add(
      lists, lists_N[rows], ids_N[rows], lambda a, b, x_nD=x_nD: x_nD[a:b]
    )
  gone_N = ids_N[::3]
  assert flat_lists.remove(lists, np.array([*gone_N, 999])) == len(gone_N)
  assert flat_lists.remove(lists, gone_N) == 0
  kept_N = np.setdiff1d(np.arange(120), np.arange(0, 120, 3))
  assert len(lists) == len(kept_N)
  wanted = _lists(x_ND[kept_N], lists_N[kept_N], ids_N[kept_N], 4, "l2")
  pairs = zip(flat_lists.parts(lists), flat_lists.parts(wanted), strict=True)
  for have, want in pairs:
    for a, b in zip(have, want, strict=True):
      np.testing.assert_array_equal(a, b)
  used_N = flat_lists.used_slots(lists)
  np.testing.assert_allclose(
    lists.half_N[used_N], np.square(lists.x_ND[used_N]).sum(axis=1) / 2, 1e-6
  )


def test_ids_take_four_bytes_until_one_needs_more():
  x_ND = np.ones((2, 3), np.float32)
  lists = _lists(x_ND, np.zeros(2, int), np.arange(2), 1)
  assert lists.ids_N.dtype == np.int32
  flat_lists.add(
    lists, np.zeros(1, int), np.array([2**40]), lambda a, b: x_ND[a:b]
  )
  found = _search(lists, x_ND[:1], np.zeros((1, 1), int), 3)[1]
  assert found.tolist() == [[0, 1, 2**40]]


def _choose_by_loops(scores_QL, nprobe, ratio, min_lists, is_distance):
  found = []
  for scores_L in scores_QL.tolist():
    sign = 1 if is_distance else -1
    order = sorted(range(len(scores_L)), key=lambda l: (sign * scores_L[l], l))
    row, best = [], scores_L[order[0]]
    for rank, l in enumerate(order[:nprobe]):
      far = scores_L[l] < ratio * abs(best)
      if is_distance:
        far = best < ratio * scores_L[l]
      row.append(-1 if ratio > 0 and far and rank >= min_lists else l)
    found.append(row)
  return found


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("nprobe", [1, 4, 9])
def test_lists_are_those_of_loops(nprobe, metric):
  rng = np.random.default_rng(nprobe)
  # Whole numbers: many ties, no rounding.
  centroids_LD = rng.integers(-2, 3, (9, 2)).astype(np.float32)
  queries_QD = rng.integers(-2, 3, (50, 2)).astype(np.float32)
  coarse = faiss_fast_ivf.make_coarse(centroids_LD, metric)
  scores_QP, lists_QP = faiss_fast_ivf.best_lists(coarse, queries_QD, nprobe)
  scores_QL = queries_QD @ centroids_LD.T
  if metric == "l2":
    left_QLD = queries_QD[:, None] - centroids_LD
    scores_QL = np.square(left_QLD).sum(axis=2)
  is_distance = metric == "l2"
  for ratio, min_lists in (
    *((0, 1), (0.5, 1), (0.9, 3), (1.0, 1), (2.0, 2), (-1.0, 1)),
  ):
    found_QP = probing.skip_far(
      *(scores_QP, lists_QP, ratio),
      min_lists=min_lists,
      is_distance=is_distance,
    )
    want = _choose_by_loops(scores_QL, nprobe, ratio, min_lists, is_distance)
    assert found_QP.tolist() == want
    assert (found_QP[:, 0] >= 0).all()  # The best is never skipped.
  assert probing.skip_far(scores_QP, lists_QP, None) is lists_QP


def test_numbers_without_sense_are_refused():
  with pytest.raises(ValueError, match="nprobe must lie between 1 and inf"):
    probing.check(0, 0.5, 1)
  with pytest.raises(ValueError, match="ratio_threshold .* got nan"):
    probing.check(1, float("nan"), 1)
  with pytest.raises(ValueError, match="min_lists"):
    probing.check(1, None, 0)


@pytest.mark.parametrize("num_queries", [1, 40])
def test_empty_lists_find_nothing(num_queries):
  lists = flat_lists.empty(3, 2, has_norms=False)
  queries_QD = np.ones((num_queries, 2), np.float32)
  probes_QP = np.tile(np.arange(3), (num_queries, 1))
  scores_QK, ids_QK = _search(lists, queries_QD, probes_QP, 4)
  np.testing.assert_array_equal(ids_QK, np.full((num_queries, 4), -1))
  np.testing.assert_array_equal(scores_QK, np.full((num_queries, 4), -np.inf))
