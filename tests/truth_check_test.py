"""What tells a ground truth from that of other queries or another base."""

import numpy as np
import pytest

from experiments.lib import truth
from vqjax import evaluation
from vqjax.data import datasets
from vqjax.search import truth_check

Q, N, D, G = 40, 300, 6, 12


def _vectors(offset=0.0):
  rng = np.random.default_rng(0)
  scale_N1 = rng.uniform(0.2, 3, size=(N, 1))  # Norms matter to "ip".
  x_ND = scale_N1 * rng.normal(size=(N, D)) + offset
  return x_ND.astype("f4"), (rng.normal(size=(Q, D)) + offset).astype("f4")


def _neighbours(xq_QD, x_ND, metric="l2", dtype="f4"):
  """Ids of the nearest by float32 sums that cancel, as many programs do."""
  xq_QD, x_ND = xq_QD.astype(dtype), x_ND.astype(dtype)
  if metric == "cosine":
    x_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
  error_QN = -2 * xq_QD @ x_ND.T
  if metric == "l2":
    error_QN += (x_ND**2).sum(axis=1) + (xq_QD**2).sum(axis=1)[:, None]
  return error_QN.argsort(axis=1)[:, :G].astype(np.int32)


def _check(folder, x_ND, xq_QD, ids_QG, metric="l2", num_vectors=N, **limits):
  """Opens the files as commands do; returns the ids they go by."""
  files = {"base": x_ND, "queries": xq_QD, "groundtruth": ids_QG}
  for name, values in files.items():
    np.save(folder / f"{name}.npy", np.ascontiguousarray(values))
    files[name] = str(folder / f"{name}.npy")
  dataset = datasets.resolve(**files, metric=metric, **limits)
  opened, sizes = truth.of_dataset(dataset)
  return evaluation.read_ids(opened, num_vectors, sizes)


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("metric", datasets.METRICS)
def test_the_ground_truth_is_taken_as_it_is(metric, offset, tmp_path):
  x_ND, xq_QD = _vectors(offset)
  ids_QG = _neighbours(xq_QD, x_ND, metric)
  got_QG = _check(tmp_path, x_ND, xq_QD, ids_QG, metric)
  np.testing.assert_array_equal(got_QG, ids_QG)


def test_ties_and_empty_slots_are_no_errors(tmp_path):
  x_ND, xq_QD = _vectors()
  xq_QD[0] = x_ND[0]  # Which -1 must not be taken for.
  x_ND[N // 2 :] = x_ND[: N // 2]
  ids_QG = _neighbours(xq_QD, x_ND)
  ids_QG[::3] = (ids_QG[::3] + N // 2) % N  # The other of two equals.
  ids_QG[:, -4:] = -1
  _check(tmp_path, x_ND, xq_QD, ids_QG)
  _check(tmp_path, x_ND, xq_QD, ids_QG[:, :1].astype(np.uint64))


def test_minus_one_of_other_types_is_no_neighbour(tmp_path):
  x_ND, xq_QD = _vectors()
  want_QG = _neighbours(xq_QD, x_ND).astype(np.int64)
  want_QG[:, 7:], want_QG[3] = -1, -1
  as_unsigned_QG = want_QG.astype(np.uint32)
  for ids_QG in (
    as_unsigned_QG,
    as_unsigned_QG.astype(np.int64),
    want_QG.astype(np.uint64),
    want_QG.astype(np.int16),
  ):
    got_QG = _check(tmp_path, x_ND, xq_QD, ids_QG)
    np.testing.assert_array_equal(got_QG, want_QG)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("num_sampled", [N, 60])
@pytest.mark.parametrize(
  ("what", "explained"),
  [
    ("queries", "They fit no metric in any order: the file is of other q"),
    ("base", "They fit no metric in any order"),
    ("half", "They fit no metric in any order"),
    ("order", "They fit no metric in any order"),
    ("last", "farthest of them first: reverse each row"),
    ("farthest", "farthest rows of the base instead of the nearest"),
    ("ip", "right for the metric ip, but l2 is the metric here"),
    ("cosine", "right for the metric cosine, but l2 is the metric here"),
    ("one", "counted from 1: subtract 1"),
    ("one of ip", "counted from 1: subtract 1. It is right for the metric ip"),
  ],
)
def test_another_ground_truth_is_refused(
  what, explained, num_sampled, offset, tmp_path, monkeypatch
):
  monkeypatch.setattr(truth_check, "_NUM_SAMPLED", num_sampled)
  x_ND, xq_QD = _vectors(offset)
  if offset and what in ("ip", "cosine", "one of ip", "order"):
    pytest.skip("Far from the origin programs err as much.")
  near = lambda *args: _neighbours(*args, dtype="f8")
  good_QG = near(xq_QD, x_ND)
  bad_QG = {
    "queries": good_QG[::-1],
    "base": N - 1 - good_QG,
    "half": near(xq_QD, x_ND[: N // 2]),
    "order": good_QG[:, [0, 1, 2, 4, 3, 5]],
    "last": good_QG[:, ::-1],
    "farthest": near(-xq_QD + 2 * offset, x_ND),
    "ip": near(xq_QD, x_ND, "ip"),
    "cosine": near(xq_QD, x_ND, "cosine"),
    "one": good_QG + 1,
    "one of ip": near(xq_QD, x_ND, "ip") + 1,
  }[what]
  if what == "farthest":
    gap_QND = xq_QD[:, None].astype(float) - x_ND
    bad_QG = -np.square(gap_QND).sum(axis=2)
    bad_QG = bad_QG.argsort(axis=1)[:, :G]
  message = r"for query \d+ it has row .*, which is farther than row .*"
  if what == "order":
    a, b = good_QG[0, 3:5]
    message = f"for query 0 it has row {b}, which is farther than row {a}. "
  if bad_QG.max() == N:
    message = f"it names row {N}, but the base has only {N} .rows 0 to {N - 1}"
  with pytest.raises(ValueError, match=f"{message}.*{explained}"):
    _check(tmp_path, x_ND, xq_QD, bad_QG)


def test_what_is_no_list_of_ids_is_refused(tmp_path):
  x_ND, xq_QD = _vectors()
  good_QG = _neighbours(xq_QD, x_ND)
  late_QG, twice_QG, low_QG = good_QG.copy(), good_QG.copy(), good_QG.copy()
  late_QG[5, 2], twice_QG[6, 11], low_QG[7, 1] = -1, twice_QG[6, 0], -2
  for bad_QG, match in (
    (good_QG.astype("f4"), "integer ids, got float32; write the ids as int"),
    (good_QG.T, r"40 queries, got shape \(12, 40\), which is transposed"),
    (good_QG[:7], "a row for each of the 40 queries, got 7"),
    (late_QG, "-1, no neighbour, in front of a neighbour of query 5"),
    (twice_QG, f"names row {good_QG[6, 0]} twice for query 6"),
    (low_QG, "has id -2 for query 7; ids are rows of the base"),
    (np.full_like(good_QG, -1), "-1 alone: no query has a neighbour"),
  ):
    with pytest.raises(ValueError, match=match):
      _check(tmp_path, x_ND, xq_QD, bad_QG)


def test_a_wide_file_that_is_transposed_is_seen_by_its_ids(tmp_path):
  x_ND, xq_QD = _vectors()
  wide_QG = np.square(xq_QD[:, None] - x_ND).sum(axis=2).argsort(axis=1)
  with pytest.raises(ValueError, match=r"is transposed: write ids.T\. Or"):
    _check(tmp_path, x_ND, xq_QD, wide_QG[:, :90].T)


def test_that_of_more_rows_is_known_and_found_anew(tmp_path):
  x_ND, xq_QD = _vectors()
  whole_QG, some_QG = _neighbours(xq_QD, x_ND), _neighbours(xq_QD, x_ND[:200])
  check = lambda ids_QG, num, **limits: _check(
    tmp_path, x_ND, xq_QD, ids_QG, num_vectors=num, **limits
  )
  assert check(whole_QG, 100) is None  # An exact search is needed.
  assert check(some_QG, 100, num_base=200) is None
  np.testing.assert_array_equal(check(some_QG, 200), some_QG)
  with pytest.raises(ValueError, match="it names row|farther than row"):
    check(some_QG, 100)  # Nobody says that it is of 200.
  with pytest.raises(ValueError, match="farther than row"):
    check(some_QG, N, num_base=200)
