import functools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.training import optimisers

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party" / "golden" / "rqvae"


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


def test_schedules_with_warm_up_are_those_of_the_released_program():
  golden = json.loads((GOLDEN / "lr_schedules.json").read_text())
  make_fn = functools.partial(optimisers.make_schedule, peak_lr=1.0)
  for name in ("constant", "linear"):  # 3 of 10 epochs of 4 steps.
    schedule = make_fn(name, ramp_steps=12, total_steps=40)
    got = [float(schedule(step)) for step in range(40)]
    np.testing.assert_allclose(got, golden[name], rtol=1.2e-7)  # One bit.
    # Without warm-up, and past the end.
    schedule = make_fn(name, ramp_steps=0, total_steps=4)
    want = [1, 0.75, 0.5, 0.25, 0, 0] if name == "linear" else [1] * 6
    assert [float(schedule(step)) for step in range(6)] == want
  cosine = make_fn("cosine", ramp_steps=2, total_steps=6)
  want = [0, 0.5, 1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2, 0]
  got = [float(cosine(step)) for step in range(7)]
  np.testing.assert_allclose(got, want, atol=1e-7)


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="schedule must be one of .*'triangle'"):
    optimisers.make_schedule("triangle", peak_lr=1, ramp_steps=1, total_steps=1)
  with pytest.raises(ValueError, match="optimiser must be one of .*'lion'"):
    optimisers.make_optimiser(lambda step: 0.1, "lion")
  with pytest.raises(ValueError, match="train.clip_norm must lie between 0"):
    optimisers.make_optimiser(lambda step: 0.1, clip_norm=-1)
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


def _torch_step(name, w, g, state, lr, decay):
  """One step of torch.optim as its documentation writes it; float64."""
  t = state["t"] = state.get("t", 0) + 1
  if name == "adamw":
    w = w - lr * decay * w
  else:
    g = g + decay * w
  if name in ("adam", "adamw"):
    m = state["m"] = 0.9 * state.get("m", 0) + 0.1 * g
    v = state["v"] = 0.999 * state.get("v", 0) + 0.001 * g**2
    step = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
  elif name == "adagrad":
    v = state["v"] = state.get("v", 0) + g**2
    step = g / (np.sqrt(v) + 1e-10)
  elif name == "rmsprop":
    v = state["v"] = 0.99 * state.get("v", 0) + 0.01 * g**2
    step = g / (np.sqrt(v) + 1e-8)
  else:
    step = g
  return w - lr * step


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
@pytest.mark.parametrize("name", optimisers.OPTIMISERS)
def test_optimisers_are_those_of_torch(name, clip_norm):
  tx = optimisers.make_optimiser(
    lambda step: 0.01, name, weight_decay=0.1, clip_norm=clip_norm
  )
  rng = np.random.default_rng(0)
  want = rng.normal(size=3)
  params, states = {"w": jnp.asarray(want, jnp.float32)}, {}
  state = tx.init(params)
  for _ in range(4):
    g = rng.normal(size=3) * [1, 1, 0]  # Nothing comes of a gradient of zero.
    updates, state = tx.update(
      {"w": jnp.asarray(g, jnp.float32)}, state, params
    )
    params = {"w": params["w"] + updates["w"]}
    if clip_norm:
      g = g * min(clip_norm / (np.linalg.norm(g) + 1e-6), 1)
    want = _torch_step(name, want, g, states, 0.01, 0.1)
    np.testing.assert_allclose(params["w"], want, rtol=1e-6, atol=1e-7)
