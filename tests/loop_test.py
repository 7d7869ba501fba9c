"""The loop over a toy codec: one number per dimension, drawn to the mean."""

import os
import re
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax import devices
from vqjax.training import checkpoints as checkpoints_lib
from vqjax.training import loop, optimisers, writers

METRICS = ["loss", "mse"]
DIM, BATCH = 3, 8


def _loss(params, key, x_ND):
  noise_D = 0.1 * jax.random.normal(key, params["w_D"].shape)
  mse = jnp.mean((x_ND - (params["w_D"] + noise_D)[None]) ** 2)
  stats = {"seen": jnp.float32(x_ND.shape[0])}
  return mse, {"metrics": {"mse": mse}, "stats": stats}


def _end_epoch(params, key, stats):
  redrawn = params["w_D"] + 1e-3 * jax.random.normal(key, params["w_D"].shape)
  fresh = jax.tree.map(jnp.zeros_like, stats)
  return {"w_D": redrawn}, fresh, _usage(stats)


def _usage(stats):
  return {"dead_words": stats["seen"]}


def _learner(loss_fn=_loss, validate_fn=None):
  return loop.Learner(
    loss_fn=loss_fn,
    join_stats_fn=jax.lax.psum,
    merge_stats_fn=lambda old, new: jax.tree.map(jnp.add, old, new),
    end_epoch_fn=_end_epoch,
    usage_fn=_usage,
    validate_fn=lambda params: {
      "mse": float((validate_fn or jnp.sum)(params["w_D"]))
    },
  )


def _batch(step):
  rng = np.random.default_rng(step)
  return (rng.normal(size=(BATCH, DIM)) + 2).astype(np.float32)


def _plan(**kwargs):
  return loop.Plan(
    **{
      **dict(seed=0, num_epochs=3, steps_per_epoch=4, batch_size=BATCH),
      **dict(log_every=3),
      **kwargs,
    }
  )


def _run(folder, *, plan=None, batch_fn=_batch, learner=None):
  """Trains in `folder` from its latest checkpoint on."""
  plan, learner = plan or _plan(), learner or _learner()
  schedule = optimisers.make_schedule(
    "ramp_cosine", peak_lr=0.05, ramp_steps=4, total_steps=plan.total_steps
  )
  params = {"w_D": jnp.zeros(DIM)}
  tx = optimisers.make_optimiser(schedule)
  state = loop.make_state(params, tx, {"seen": jnp.float32(0)}, METRICS)
  checkpoints = checkpoints_lib.Checkpoints(folder / "checkpoints")
  step = checkpoints.latest()
  if step is not None:
    state = checkpoints.restore(step, state)
  writer = writers.Writer(folder, first_step=step or 0)
  try:
    outcome = loop.train(
      learner, tx, schedule, state, batch_fn, plan,
      checkpoints=checkpoints, writer=writer,
    )  # fmt: skip
  finally:
    writer.close()
    checkpoints.close()
  return outcome, checkpoints


def _interrupting(at_step, number):
  def batch_fn(step):
    if step == at_step:
      os.kill(os.getpid(), number)
    return _batch(step)

  return batch_fn


def _rows(folder):
  rows = writers.read_rows(folder / "metrics.jsonl")
  return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


def _assert_same(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at_step", [2, 7])
def test_resumed_equals_uninterrupted(tmp_path, at_step, number):
  whole, _ = _run(_made(tmp_path, "whole"))
  part = _made(tmp_path, "part")
  handler = signal.getsignal(number)
  stopped, saved = _run(part, batch_fn=_interrupting(at_step, number))
  assert signal.getsignal(number) is handler
  assert not stopped.is_done
  stop_step = int(stopped.state.step)
  assert stop_step < 12
  assert saved.latest() == stop_step
  resumed, _ = _run(part)
  assert resumed.is_done
  _assert_same(resumed.state, whole.state)
  assert _rows(part) == _rows(tmp_path / "whole")


def test_epochs_between_validations_end_without_one(tmp_path):
  values = iter([2.0, 1.0, 3.0])
  learner = _learner(validate_fn=lambda w_D: next(values))
  plan = _plan(num_epochs=5, eval_epochs=2)
  _, saved = _run(tmp_path, plan=plan, learner=learner)
  ends = [row for row in _rows(tmp_path) if "epoch" in row]
  assert [row.get("validation_mse") for row in ends] == [None, 2, None, 1, 3]
  assert [row["dead_words"] for row in ends] == [32] * 5
  saved = checkpoints_lib.Checkpoints(tmp_path / "checkpoints")
  assert saved.steps() == [16, 20]
  assert saved.best() == 16
  saved.close()


def test_a_learner_updates_parameters_by_its_statistics(tmp_path):
  learner = _learner()._replace(
    frozen_fn=lambda params: {"w_D": False, "seen": True},
    update_fn=lambda params, stats: {**params, "seen": stats["seen"]},
    loss_fn=lambda params, key, x_ND: _loss({"w_D": params["w_D"]}, key, x_ND),
  )
  params = {"w_D": jnp.zeros(DIM), "seen": jnp.float32(0)}
  tx = optimisers.make_optimiser(lambda step: 0.1)
  state = loop.make_state(
    params, tx, {"seen": jnp.float32(0)}, METRICS, learner.frozen_fn
  )
  step_fn = loop.make_train_step(learner, tx, lambda step: 0.1, seed=0)
  rows = devices.shard((np.zeros(jax.device_count(), np.int32), _batch(0)))
  for num_steps in (1, 2):
    state, _, _ = step_fn(state, *rows)
    assert float(state.params["seen"]) == num_steps * BATCH


def test_frozen_parts_have_neither_gradients_nor_moments():
  def loss(params, key, x_ND):  # Whose gradient would reach the frozen part.
    params = {"w_D": params["w_D"] + params["frozen_F"].sum()}
    return _loss(params, key, x_ND)

  frozen_fn = lambda params: {"w_D": False, "frozen_F": True}
  learner = _learner(loss)._replace(frozen_fn=frozen_fn)
  params = {"w_D": jnp.zeros(DIM), "frozen_F": jnp.full(1000, 2.0)}
  schedule = lambda step: 0.1
  tx = optimisers.make_optimiser(schedule)
  state = loop.make_state(
    params, tx, {"seen": jnp.float32(0)}, METRICS, frozen_fn
  )
  assert all(leaf.size < 1000 for leaf in jax.tree.leaves(state.opt))
  key = jax.random.fold_in(jax.random.key(0), 0)
  grad_D = jax.grad(lambda w_D: loss(params | {"w_D": w_D}, key, _batch(0))[0])(
    params["w_D"]
  )
  for accumulate in (1, 2):
    step_fn = loop.make_train_step(
      learner, tx, schedule, seed=0, accumulate=accumulate
    )
    rows = devices.shard((np.zeros(jax.device_count(), np.int32), _batch(0)))
    new, metrics, _ = step_fn(jax.tree.map(jnp.copy, state), *rows)
    np.testing.assert_array_equal(new.params["frozen_F"], 2.0)
    assert np.asarray(new.params["w_D"]).all()
    np.testing.assert_allclose(
      metrics["grad_norm"], np.linalg.norm(grad_D), rtol=1e-5
    )


def test_the_clock_saves_between_epochs(tmp_path):
  whole, _ = _run(_made(tmp_path, "whole"))
  often, saved = _run(
    _made(tmp_path, "often"), plan=_plan(checkpoint_minutes=0)
  )
  assert saved.steps()[-2:] == [11, 12]  # Epochs end at 4, 8 and 12.
  _assert_same(often.state, whole.state)


def test_the_progress_line_has_both_rates(tmp_path, capsys):
  _run(tmp_path, plan=_plan(scale=10.0))
  line = capsys.readouterr().err.splitlines()[-1]
  assert re.search(r"vec/s, [\d.e+]+ step/s, epoch 3/3, MSE [-\d.]+", line)


def test_killed_at_once_goes_on_from_the_last_epoch(tmp_path):
  whole, _ = _run(_made(tmp_path, "whole"))
  part = _made(tmp_path, "part")

  def dying(step):
    if step == 10:
      raise KeyboardInterrupt  # As a second Ctrl-C would.
    return _batch(step)

  with pytest.raises(KeyboardInterrupt):
    _run(part, batch_fn=dying)
  resumed, saved = _run(part)
  _assert_same(resumed.state, whole.state)
  assert _rows(part) == _rows(tmp_path / "whole")
  assert saved.latest() == 12


def _made(tmp_path, name):
  (tmp_path / name).mkdir()
  return tmp_path / name


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path):
  def poisoned(step):
    x_ND = _batch(step)
    return x_ND * np.nan if step == 6 else x_ND

  with pytest.raises(
    FloatingPointError, match=r"step 7 is nan. The last good .* step 4\."
  ):
    _run(tmp_path, batch_fn=poisoned)
  saved = checkpoints_lib.Checkpoints(tmp_path / "checkpoints")
  assert saved.steps() == [4]
  saved.close()


def test_a_gradient_that_is_not_finite_stops_before_it_is_saved(tmp_path):
  def cliff(params, key, x_ND):
    # sqrt(0): a finite loss without a finite gradient, from step 5 on.
    loss, aux = _loss(params, key, x_ND)
    return loss + jnp.sqrt(jnp.where(x_ND[0, 0] > 90, 0.0, 1.0) * loss), aux

  def batch_fn(step):
    return _batch(step) + (100 if step >= 4 else 0)

  with pytest.raises(FloatingPointError, match="grad_norm of step 5 is"):
    _run(tmp_path, batch_fn=batch_fn, learner=_learner(cliff))
  saved = checkpoints_lib.Checkpoints(tmp_path / "checkpoints")
  assert saved.steps() == [4]
  saved.close()


def test_accumulated_parts_equal_one_batch(tmp_path):
  def plain_loss(params, key, x_ND):  # Without noise, which parts would share.
    del key
    return _loss(params, jax.random.key(0), x_ND)

  one, _ = _run(_made(tmp_path, "one"), learner=_learner(plain_loss))
  four, _ = _run(
    _made(tmp_path, "four"),
    plan=_plan(accumulate=4),
    learner=_learner(plain_loss),
  )
  np.testing.assert_allclose(
    one.state.params["w_D"], four.state.params["w_D"], rtol=1e-5
  )
  # Adam does not see the scale of gradients, their norm in the report does.
  for row, other in zip(
    _rows(tmp_path / "one"), _rows(tmp_path / "four"), strict=True
  ):
    assert row == pytest.approx(other, rel=1e-5)


def test_checkpoints_keep_the_latest_and_the_best(tmp_path):
  values = iter([5.0, 1.0, 4.0, 3.0, 2.0])
  learner = _learner(validate_fn=lambda w_D: next(values))
  outcome, _ = _run(tmp_path, plan=_plan(num_epochs=5), learner=learner)
  saved = checkpoints_lib.Checkpoints(tmp_path / "checkpoints")
  assert saved.best() == 8
  assert saved.steps() == [8, 16, 20]
  best = saved.restore(8, outcome.state)
  assert int(best.step) == 8
  saved.close()


def test_the_best_is_found_while_it_is_written(tmp_path):
  values = iter([5.0, 4.0, 3.0, 2.0, 1.0])
  learner = _learner(validate_fn=lambda w_D: next(values))
  outcome, _ = _run(tmp_path, plan=_plan(num_epochs=4), learner=learner)
  saved = checkpoints_lib.Checkpoints(tmp_path / "checkpoints")
  saved.save(20, outcome.state, validation=1.0)
  assert saved.restore_best(outcome.state)[0] == 20
  saved.close()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
  outcome, _ = _run(tmp_path)
  saved = checkpoints_lib.Checkpoints(tmp_path / "checkpoints")
  other = outcome.state.replace(params={"w_D": jnp.zeros(DIM + 1)})
  with pytest.raises(ValueError, match="step 12 .* does not fit the model"):
    saved.restore(12, other)
  saved.close()


def test_the_last_epoch_redraws_nothing(tmp_path):
  calls = []

  def validate(w_D):
    calls.append(np.asarray(w_D))
    return 1.0

  outcome, _ = _run(tmp_path, learner=_learner(validate_fn=validate))
  assert len(calls) == 3
  _assert_same(calls[-1], outcome.state.params["w_D"])
  assert [row["dead_words"] for row in _rows(tmp_path) if "epoch" in row] == [
    32, 32, 32,
  ]  # fmt: skip


def test_plateau_stops_the_run(tmp_path):
  learner = _learner(validate_fn=lambda w_D: 1.0)
  plan = _plan(num_epochs=50, stop_patience=2, cut_patience=1)
  for _ in range(2):  # Resumed, it knows that it is done.
    outcome, _ = _run(tmp_path, plan=plan, learner=learner)
    assert outcome.is_done
    assert int(outcome.state.step) == 12  # One best, two no better.
  lrs = [row["lr"] for row in _rows(tmp_path) if "epoch" in row]
  assert lrs[2] == pytest.approx(0.1 * lrs[1], rel=0.1)  # The cut is reported.


def test_a_run_that_stopped_early_may_go_on(tmp_path, caplog):
  caplog.set_level("INFO", logger="absl")
  learner = _learner(validate_fn=lambda w_D: 1.0)
  plan = _plan(num_epochs=4)
  whole, _ = _run(_made(tmp_path, "whole"), plan=plan, learner=learner)
  part = _made(tmp_path, "part")
  early = _plan(num_epochs=4, stop_patience=2)
  stopped, _ = _run(part, plan=early, learner=learner)
  assert int(stopped.state.step) == 12
  said = "No new best in 2 validations: training ends here, at step 12 of 16"
  assert said in caplog.text
  on, _ = _run(part, plan=plan, learner=learner)
  _assert_same(on.state, whole.state)
  assert _rows(part) == _rows(tmp_path / "whole")


def test_parting_errors_are_said_once_also_by_a_run_that_resumes(
  tmp_path, caplog
):
  learner = _learner(validate_fn=lambda w_D: 1.0)
  plan = _plan(num_epochs=8, has_held_out=True)
  _run(tmp_path, plan=plan, learner=learner, batch_fn=_interrupting(14, 15))
  assert "no new best" not in caplog.text
  _run(tmp_path, plan=plan, learner=learner)
  assert caplog.text.count("no new best for 5 validations (best MSE 1)") == 1


def test_train_step_is_traced_once(tmp_path):
  traces = []

  def counting(params, key, x_ND):
    traces.append(1)
    return _loss(params, key, x_ND)

  _run(tmp_path, learner=_learner(counting))
  assert len(traces) == 1


def test_a_batch_that_the_devices_cannot_share_is_refused(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(jax, "device_count", lambda: 3)
  with pytest.raises(ValueError, match="batch of 8 .* multiple of the 3 dev"):
    _run(tmp_path)
