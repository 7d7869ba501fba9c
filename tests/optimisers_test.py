import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.training import optimisers


def test_ramp_cosine_is_the_formula():
  schedule = optimisers.make_schedule(
    "ramp_cosine", peak_lr=2.0, ramp_steps=10, total_steps=100
  )
  assert float(schedule(0)) == pytest.approx(0.2)
  assert float(schedule(9)) == pytest.approx(2.0)
  assert float(schedule(10)) == pytest.approx(2.0)
  middle = 2 * np.cos(np.pi / 2 * 50 / 100)
  assert float(schedule(60)) == pytest.approx(middle, rel=1e-5)
  assert float(schedule(200)) == pytest.approx(2e-3)  # The floor.


def test_unknown_schedule_is_refused():
  with pytest.raises(ValueError, match="'cosine'; known are ramp_cosine"):
    optimisers.make_schedule("cosine", peak_lr=1, ramp_steps=1, total_steps=1)
  with pytest.raises(ValueError, match="peak_lr .* must be above 0 .* got -1"):
    optimisers.make_schedule("plateau", peak_lr=-1, ramp_steps=1, total_steps=1)


def test_plateau_cuts_and_counts():
  plateau = optimisers.make_plateau()
  scales, since_best = [], []
  for value in [3.0, 2.0, 2.0, 2.5, 2.0, 2.0, 1.0]:
    plateau = optimisers.advance_plateau(
      plateau, jnp.float32(value), patience=2
    )
    scales.append(round(float(plateau.scale), 6))
    since_best.append(int(plateau.since_best))
  assert scales == [1, 1, 1, 0.1, 0.1, 0.01, 0.01]
  assert since_best == [0, 0, 1, 2, 3, 4, 0]


def test_optimiser_is_adamw_with_clipped_gradients():
  lr, decay = 0.01, 0.1
  tx = optimisers.make_optimiser(
    lambda step: lr, weight_decay=decay, clip_value=0.1
  )
  params = {"w": jnp.asarray([1.0, -2.0])}
  grads = {"w": jnp.asarray([5.0, 0.05])}  # The first is clipped to 0.1.
  state = tx.init(params)
  updates, state = tx.update(grads, state, params)
  # The first step of Adam is lr * sign, whatever the size of the gradient.
  want = -lr * np.sign(grads["w"]) - lr * decay * np.asarray(params["w"])
  np.testing.assert_allclose(updates["w"], want, rtol=1e-4)
  updates, _ = tx.update({"w": jnp.asarray([0.1, 0.05])}, state, params)
  # A clipped gradient leaves the moments of one that was 0.1 all along.
  np.testing.assert_allclose(updates["w"], want, rtol=1e-4)


@pytest.mark.parametrize("rate", [0.0, -1.0, float("nan"), 11.0])
def test_a_rate_that_learns_nothing_is_refused(rate):
  with pytest.raises(ValueError, match="--config.train.peak_lr.* above 0"):
    optimisers.make_schedule(
      "plateau", peak_lr=rate, ramp_steps=0, total_steps=1
    )
