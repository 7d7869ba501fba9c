"""What tells a ground truth from that of other queries or another base."""

import numpy as np
import pytest

from experiments.lib import search_data
from vqjax.data import datasets

Q, N, D, G = 40, 300, 6, 12


def _vectors(offset=0.0):
  rng = np.random.default_rng(0)
  scale_N1 = rng.uniform(0.2, 3, size=(N, 1))  # Norms matter to "ip".
  x_ND = scale_N1 * rng.normal(size=(N, D)) + offset
  return x_ND.astype("f4"), (rng.normal(size=(Q, D)) + offset).astype("f4")


def _neighbours(xq_QD, x_ND, metric="l2"):
  """Ids of the nearest by float32 sums that cancel, as many programs do."""
  error_QN = -2 * xq_QD @ x_ND.T
  if metric == "l2":
    error_QN += (x_ND**2).sum(axis=1) + (xq_QD**2).sum(axis=1)[:, None]
  return error_QN.argsort(axis=1)[:, :G].astype(np.int32)


def _check(folder, x_ND, xq_QD, ids_QG, metric="l2"):
  """Opens the files as a search does; returns the ids it goes by."""
  files = {"base": x_ND, "queries": xq_QD, "groundtruth": ids_QG}
  for name, values in files.items():
    np.save(folder / f"{name}.npy", np.ascontiguousarray(values))
    files[name] = str(folder / f"{name}.npy")
  dataset = datasets.own_dataset(**files, metric=metric)
  base = datasets.open_split(dataset, "base")
  return search_data._neighbours(dataset, xq_QD, base, N)


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
  ids_QG[:, ::3] = (ids_QG[:, ::3] + N // 2) % N  # The other of two equals.
  ids_QG[:, -4:] = -1
  _check(tmp_path, x_ND, xq_QD, ids_QG)
  _check(tmp_path, x_ND, xq_QD, ids_QG[:, :1].astype(np.uint64))


@pytest.mark.parametrize("num_sampled", [N, 60])
@pytest.mark.parametrize(
  "what", ["queries", "base", "half", "order", "metric", "none"]
)
def test_another_ground_truth_is_refused(
  what, num_sampled, tmp_path, monkeypatch
):
  monkeypatch.setattr(search_data, "_NUM_SAMPLED", num_sampled)
  x_ND, xq_QD = _vectors()
  good_QG = _neighbours(xq_QD, x_ND)
  bad_QG = {
    "queries": good_QG[::-1],
    "base": N - 1 - good_QG,
    "half": _neighbours(xq_QD, x_ND[: N // 2]),
    "order": good_QG[:, [0, 1, 2, 4, 3, 5]],
    "metric": _neighbours(xq_QD, x_ND, "ip"),
    "none": np.full_like(good_QG, -1),
  }[what]
  message = r"for query \d+ it has row .*, which is farther than row .*; give"
  if what == "order":
    a, b = good_QG[0, 3:5]
    message = f"for query 0 it has row {b}, which is farther than row {a};"
  with pytest.raises(ValueError, match=message):
    _check(tmp_path, x_ND, xq_QD, bad_QG)
