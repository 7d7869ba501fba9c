"""Sums that float32 alone would stop in."""

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import core


def test_a_million_small_numbers_are_all_added():
  start_2 = jnp.array([2.0**26, 0.0], jnp.float32)
  add = lambda total_2, _: (core.add_exactly(total_2, jnp.float32(3)), None)
  total_2, _ = jax.jit(lambda x: jax.lax.scan(add, x, length=1_000_000))(
    start_2
  )
  assert np.sum(total_2, dtype=float) == 2.0**26 + 3_000_000
  # float32 alone gives the start again.
  assert np.float32(2.0**26) + np.float32(3) == np.float32(2.0**26 + 4)


def test_the_mean_of_a_long_epoch_does_not_drift():
  add = lambda total_2, _: (core.add_exactly(total_2, jnp.float32(16000.3)), 0)
  total_2, _ = jax.jit(lambda x: jax.lax.scan(add, x, length=1_000_000))(
    jnp.zeros(2)
  )
  mean = np.sum(total_2, dtype=float) / 1_000_000
  np.testing.assert_allclose(mean, np.float32(16000.3), rtol=1e-7)
