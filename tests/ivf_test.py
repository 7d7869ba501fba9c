"""The scan of inverted lists against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.search import ivf

CENTROIDS_LD = np.random.default_rng(8).normal(size=(6, 5)).astype(np.float32)


def _random_lists(rng, *, num=90, num_lists=6, m=3, k=8, d=5):
  """Host arrays for `make_lists`; one list is empty."""
  list_N = np.sort(rng.choice(np.r_[0 : num_lists - 1], num))
  starts = np.searchsorted(list_N, np.arange(num_lists + 1))
  return {
    "starts_L1": starts,
    "codes_NM": rng.integers(0, k, (num, m)).astype(np.uint16),
    "norm_N": rng.integers(0, 256, num).astype(np.uint8),
    "low_L": rng.normal(size=num_lists).astype(np.float32),
    "step_L": rng.uniform(0, 0.1, num_lists).astype(np.float32),
    "codebooks_MKD": rng.normal(size=(m, k, d)).astype(np.float32),
  }


def _distance(arrays, x_D, row, at):
  """What the scan computes, term by term."""
  r_D = sum(
    book_KD[code]
    for book_KD, code in zip(
      arrays["codebooks_MKD"], arrays["codes_NM"][row], strict=True
    )
  )
  norm = arrays["low_L"][at] + arrays["step_L"][at] * arrays["norm_N"][row]
  return np.sum((x_D - CENTROIDS_LD[at]) ** 2) - 2 * x_D @ r_D + norm


def _scan(arrays, xq_QD, probes_QP, **sizes):
  centroids_QPD = CENTROIDS_LD[probes_QP]
  distances_QP = ((xq_QD[:, None] - centroids_QPD) ** 2).sum(axis=-1)
  lists = ivf.make_lists(**arrays)
  found = ivf.scan(
    lists,
    jnp.asarray(xq_QD),
    jnp.asarray(probes_QP, jnp.int32),
    jnp.asarray(distances_QP),
    **sizes,
  )
  return [np.asarray(x) for x in found]


@pytest.mark.parametrize(("m", "num_probes"), [(3, 6), (4, 1), (9, 3)])
def test_scan_finds_what_loops_find(num_probes, m, monkeypatch):
  monkeypatch.setattr(ivf, "TILE", 8)  # Lists of one, two or more tiles.
  jax.clear_caches()
  rng = np.random.default_rng(num_probes)
  arrays = _random_lists(rng, m=m)
  xq_QD = rng.normal(size=(7, 5)).astype(np.float32)
  probes_QP = np.stack([rng.permutation(6)[:num_probes] for _ in range(7)])
  probes_QP[0, -1] = -1
  rows_QR, lists_QR, distances_QR = _scan(
    arrays, xq_QD, probes_QP, num_tiles=20, num_best=10
  )
  starts = arrays["starts_L1"]
  for q, x_D in enumerate(xq_QD):
    want = sorted(
      (_distance(arrays, x_D, row, at), row, at)
      for at in probes_QP[q]
      if at >= 0
      for row in range(starts[at], starts[at + 1])
    )[:10]
    num = len(want)
    np.testing.assert_allclose(
      distances_QR[q, :num], [w[0] for w in want], rtol=1e-4, atol=1e-4
    )
    np.testing.assert_array_equal(rows_QR[q, :num], [w[1] for w in want])
    np.testing.assert_array_equal(lists_QR[q, :num], [w[2] for w in want])
    assert (rows_QR[q, num:] == -1).all()
    assert np.isposinf(distances_QR[q, num:]).all()


@pytest.mark.parametrize(("m", "k"), [(1, 4), (5, 256), (3, 1000)])
def test_codes_come_back(m, k):
  rng = np.random.default_rng(0)
  arrays = _random_lists(rng, m=m, k=k)
  arrays["codes_NM"][0] = k - 1
  lists = ivf.make_lists(**arrays)
  rows = np.array([[5, 0], [89, 3]])
  found = np.asarray(ivf.codes_at(lists, rows))
  np.testing.assert_array_equal(found, arrays["codes_NM"][rows])


def test_tables_of_bfloat16_products_say_nearly_the_same():
  rng = np.random.default_rng(2)
  arrays = _random_lists(rng)
  xq_QD = rng.normal(size=(4, 5)).astype(np.float32)
  probes_QP = np.tile(np.arange(5), (4, 1))
  sizes = dict(num_tiles=8, num_best=90)
  exact_QR = _scan(arrays, xq_QD, probes_QP, **sizes)[2]
  half_QR = _scan(arrays | {"dtype": "bfloat16"}, xq_QD, probes_QP, **sizes)[2]
  assert not np.array_equal(half_QR, exact_QR)
  np.testing.assert_allclose(half_QR, exact_QR, atol=0.02 * exact_QR.max())


def test_more_tiles_change_nothing():
  rng = np.random.default_rng(1)
  arrays = _random_lists(rng)
  xq_QD = rng.normal(size=(4, 5)).astype(np.float32)
  probes_QP = np.tile(np.arange(3), (4, 1))
  a, b = (
    _scan(arrays, xq_QD, probes_QP, num_tiles=tiles, num_best=5)
    for tiles in (3, 7)
  )
  for x, y in zip(a, b, strict=True):
    np.testing.assert_array_equal(x, y)


def test_what_does_not_fit_is_refused():
  arrays = _random_lists(np.random.default_rng(0))
  with pytest.raises(ValueError, match=r"codes must have shape \(None, 3\)"):
    ivf.make_lists(**{**arrays, "codes_NM": arrays["codes_NM"][:, :2]})
  with pytest.raises(ValueError, match=r"starts must have shape \(7,\)"):
    ivf.make_lists(**{**arrays, "starts_L1": arrays["starts_L1"][:-1]})
  xq_QD = np.zeros((1, 5), np.float32)
  most = ivf.TILE
  with pytest.raises(ValueError, match=f"between 1 and {most}, got {most + 1}"):
    _scan(arrays, xq_QD, np.zeros((1, 1), int), num_tiles=1, num_best=most + 1)
