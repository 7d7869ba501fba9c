import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles
from vqjax.codecs import distances


def _pair(n=30, k=11, d=5):
  rng = np.random.default_rng(0)
  draw = lambda rows: jnp.asarray(rng.normal(size=(rows, d)), jnp.float32)
  return draw(n), draw(k)


def test_sq_distances_match_loops():
  x_ND, y_KD = _pair()
  got_NK = distances.sq_distances(x_ND, y_KD)
  # float32 products of numbers near 1.
  np.testing.assert_allclose(
    got_NK, oracles.sq_distances(x_ND, y_KD), rtol=1e-5, atol=1e-5
  )


def test_sq_distances_of_equal_rows_are_not_negative():
  x_ND = _pair(200, d=64)[0] * 100
  got_NN = distances.sq_distances(x_ND, x_ND)
  assert float(got_NN.min()) >= 0


@pytest.mark.parametrize("block_size", [1, 7, 30, 4096])
def test_nearest_matches_loops(block_size):
  x_ND, y_KD = _pair()
  ids_N = distances.nearest(x_ND, y_KD, block_size=block_size)
  assert ids_N.dtype == jnp.int32
  np.testing.assert_array_equal(ids_N, oracles.nearest(x_ND, y_KD))


def test_nearest_is_the_same_under_jit():
  x_ND, y_KD = _pair()
  jitted = jax.jit(distances.nearest, static_argnames="block_size")
  np.testing.assert_array_equal(
    jitted(x_ND, y_KD, block_size=7), distances.nearest(x_ND, y_KD)
  )


def test_nearest_gives_ties_to_the_lower_row():
  x_ND, y_KD = _pair()
  twice_KD = jnp.concatenate([y_KD, y_KD])
  ids_N = distances.nearest(x_ND, twice_KD)
  np.testing.assert_array_equal(ids_N, oracles.nearest(x_ND, y_KD))


def test_nearest_of_nan_stays_in_range():
  x_ND, y_KD = _pair()
  ids_N = distances.nearest(x_ND.at[3].set(jnp.nan), y_KD)
  assert 0 <= int(ids_N.min()) <= int(ids_N.max()) < len(y_KD)


def test_scan_blocks_runs_every_row_once_and_in_order():
  x_N = jnp.arange(10.0)
  body = lambda total, x_B: (total + x_B.sum(), x_B * 2)
  total, out_N = distances.scan_blocks(body, jnp.zeros(()), x_N, block_size=4)
  assert float(total) == 45
  np.testing.assert_array_equal(out_N, x_N * 2)


def test_wrong_sizes_are_refused():
  x_ND, y_KD = _pair()
  with pytest.raises(ValueError, match=r"y must have shape \(None, 5\), got"):
    distances.sq_distances(x_ND, y_KD[:, :4])
  with pytest.raises(ValueError, match=r"y must have shape \(None, 5\), got"):
    distances.nearest(x_ND, y_KD[:, :4])
  with pytest.raises(ValueError, match="block_size must be at least 1, got 0"):
    distances.nearest(x_ND, y_KD, block_size=0)
