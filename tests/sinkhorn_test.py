"""Sinkhorn against the plan itself in float64, and against other programs."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.codecs import sinkhorn

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party/golden/rqvae"
CASES = ((0.003, 50, ""), (0.01, 50, ""), (0.1, 50, ""), (0.01, 3, "_it3"))
_on_device = jax.jit(sinkhorn.log_plan, static_argnums=(1, 2))


def _oracle(sq_NK, epsilon, num_iterations):
  """The plan by its definition, without logarithms."""
  n, k = sq_NK.shape
  middle = (sq_NK.max() + sq_NK.min()) / 2
  plan_NK = np.exp((middle - sq_NK) / (sq_NK.max() - middle + 1e-5) / epsilon)
  for _ in range(num_iterations):
    for row in range(n):
      plan_NK[row] /= plan_NK[row].sum() * n
    for column in range(k):
      plan_NK[:, column] /= plan_NK[:, column].sum() * k
  return plan_NK * n


def test_plan_is_that_of_the_definition():
  sq_NK = np.random.default_rng(0).uniform(1, 5, size=(7, 4))
  plan_NK = np.exp(sinkhorn.log_plan(sq_NK, 0.2, 4))
  np.testing.assert_allclose(plan_NK, _oracle(sq_NK, 0.2, 4), rtol=1e-10)
  np.testing.assert_allclose(plan_NK.sum(axis=0), 7 / 4, rtol=1e-12)


@pytest.mark.parametrize("name", "ABCE")
def test_plans_are_those_of_the_released_program(name):
  golden = np.load(GOLDEN / "sinkhorn.npz")
  sq_NK = golden[f"{name}_dist"]
  np.testing.assert_allclose(
    sinkhorn.centre(sq_NK), golden[f"{name}_centred"], rtol=0, atol=1e-12
  )
  for epsilon, num_iterations, end in CASES:
    want_NK = golden[f"{name}_Q_{epsilon}{end}"]
    host_NK = np.exp(sinkhorn.log_plan(sq_NK, epsilon, num_iterations))
    np.testing.assert_allclose(host_NK, want_NK, rtol=1e-11, atol=1e-30)
    x_NK = jnp.asarray(sq_NK, jnp.float32)
    device_NK = np.exp(_on_device(x_NK, epsilon, num_iterations))
    # Of logarithms up to 333 float32 leaves 3e-5.
    np.testing.assert_allclose(device_NK, want_NK, rtol=1e-3, atol=1e-5)
    ids_N = sinkhorn.assign(sq_NK, epsilon, num_iterations)
    top_N2 = np.sort(want_NK, axis=1)[:, -2:]
    is_clear_N = top_N2[:, 1] - top_N2[:, 0] > 1e-6 * top_N2[:, 1]
    best_N = want_NK.argmax(axis=1)
    np.testing.assert_array_equal(ids_N[is_clear_N], best_N[is_clear_N])


def test_equal_rows_get_one_codeword_and_the_lowest():
  sq_NK = np.ones((3, 4))
  assert sinkhorn.assign(sq_NK, 0.01).tolist() == [0, 0, 0]
  assert sinkhorn.assign(jnp.asarray(sq_NK), 0.01).dtype == jnp.int32


@pytest.mark.parametrize(("epsilon", "count"), [(0.0, 5), (0.1, 0)])
def test_numbers_out_of_range_are_refused(epsilon, count):
  with pytest.raises(ValueError, match=f"got {epsilon} and {count}"):
    sinkhorn.assign(np.ones((2, 2)), epsilon, count)
