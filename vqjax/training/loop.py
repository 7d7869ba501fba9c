"""The training loop of every learned codec.

The state holds all that the run depends on, the sums of the epoch included,
and batches depend on the step alone. A run that is killed anywhere and resumed
from a checkpoint therefore ends with the same bits as one that was not.
"""

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from flax import struct

from vqjax import devices
from vqjax.core import Array, add_exactly
from vqjax.data.batches import prefetch
from vqjax.training import console, optimisers, parting
from vqjax.training.checkpoints import Checkpoints, signed
from vqjax.training.writers import Writer

_GO_ON, _SAVE, _STOP = range(3)  # What a process wants; the greatest is done.


def _none_frozen(params):
  return jax.tree.map(lambda leaf: False, params)


class Learner(NamedTuple):
  """What the loop asks of a learned codec.

  Every device calls `loss_fn` with its part of the batch and the same key;
  loss and metrics are means over vectors.
  """

  loss_fn: Callable  # (params, key, rows) -> (loss, {"metrics", "stats"})
  join_stats_fn: Callable  # (stats of a part, name of a mesh axis) -> stats
  merge_stats_fn: Callable  # (stats, stats of a batch) -> stats
  end_epoch_fn: Callable  # (params, key, stats) -> (params, stats, report)
  usage_fn: Callable  # stats -> report
  # params -> figures by name, numbers or one for each code position
  validate_fn: Callable
  # params -> tree of bools: True for leaves without gradients and moments.
  frozen_fn: Callable = _none_frozen
  # (params, stats of the epoch so far) -> params, after each step
  update_fn: Callable = lambda params, stats: params


def learner_without_stats(
  loss_fn: Callable, validate_fn: Callable, frozen_fn: Callable = _none_frozen
) -> Learner:
  """Returns the learner of parameters that nothing is counted for: stats ()."""
  return Learner(
    loss_fn=loss_fn,
    join_stats_fn=lambda stats, axis_name: stats,
    merge_stats_fn=lambda stats, new: stats,
    end_epoch_fn=lambda params, key, stats: (params, stats, {}),
    usage_fn=lambda stats: {},
    validate_fn=validate_fn,
    frozen_fn=frozen_fn,
  )


@dataclasses.dataclass(frozen=True)
class Plan:
  """How long to train and how often to report and save."""

  seed: int
  num_epochs: int
  steps_per_epoch: int
  batch_size: int  # Over all devices and accumulated parts.
  accumulate: int = 1  # Parts of a batch whose gradients are added up.
  stop_patience: int | None = None  # Validations without a new best.
  cut_patience: int | None = None  # Epochs before the learning rate is cut.
  log_every: int = 50
  checkpoint_minutes: float = 10.0
  eval_epochs: int = 1  # From one validation to the next.
  scale: float = 1.0  # Of `measure` in the progress line.
  # What tells the best, of the figures of the validation and "train_loss".
  measure: str = "mse"
  best_of: tuple[str, ...] = ()  # Figures whose best checkpoint is kept,
  num_evaluated: int = 0  # and of the latest validations, how many.
  has_held_out: bool = False  # To warn when both errors part ways.

  @property
  def total_steps(self) -> int:
    """Steps of the whole run."""
    return self.num_epochs * self.steps_per_epoch


@struct.dataclass
class TrainState:
  """Everything a run continues from."""

  step: Array
  params: Any
  opt: Any
  stats: Any  # Of the codec, over the epoch so far.
  sums: dict  # Of the metrics over the epoch so far, see `core.add_exactly`.
  plateau: optimisers.Plateau


class Outcome(NamedTuple):
  """How a run ended; `is_done` is False after a signal."""

  state: TrainState
  is_done: bool


def make_state(
  params: Any,
  tx: optax.GradientTransformation,
  stats: Any,
  metrics: list[str],
  frozen_fn: Callable = _none_frozen,
) -> TrainState:
  """Returns the state before the first step; `frozen_fn` as the learner's."""
  return TrainState(
    step=jnp.int32(0),
    params=params,
    opt=tx.init(_learned(params, frozen_fn)),
    stats=stats,
    sums={name: jnp.zeros(2, jnp.float32) for name in metrics},
    plateau=optimisers.make_plateau(),
  )


def _learned(params, frozen_fn: Callable):
  """The parameters, None if they are frozen."""
  take_fn = lambda leaf, is_frozen: None if is_frozen else leaf
  return jax.tree.map(take_fn, params, frozen_fn(params))


def _join(learned, params):
  """The parameters with what was learned; frozen ones as they are."""
  take_fn = lambda new, old: old if new is None else new
  return jax.tree.map(take_fn, learned, params, is_leaf=lambda x: x is None)


def make_train_step(
  learner: Learner,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  *,
  seed: int,
  accumulate: int = 1,
) -> Callable:
  """Returns jitted `(state, wish_N, rows) -> (state, metrics, order)`.

  The state is donated. `wish_N` is a number per device, and `order` the
  greatest: what one process wants, all know at the same step.
  """
  learned_fn = lambda params: _learned(params, learner.frozen_fn)

  def grads_of(params, key, stats, rows):
    loss_fn = lambda learned: learner.loss_fn(_join(learned, params), key, rows)
    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, aux), grads = grad_fn(learned_fn(params))
    new = learner.join_stats_fn(aux["stats"], devices.DATA_AXIS)
    stats = learner.merge_stats_fn(stats, new)
    return stats, {"loss": loss, **aux["metrics"]}, grads

  compute_fn = grads_of if accumulate == 1 else _in_parts(grads_of, accumulate)

  def on_device(params, key, stats, wish_and_rows):
    wish_1, rows = wish_and_rows
    stats, metrics, grads = compute_fn(params, key, stats, rows)
    metrics, grads = jax.lax.pmean((metrics, grads), devices.DATA_AXIS)
    return stats, metrics, grads, jax.lax.pmax(wish_1[0], devices.DATA_AXIS)

  def train_step(state, wish_N, rows):
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    stats, metrics, grads, order = devices.shard_map_over_data(on_device)(
      state.params, key, state.stats, (wish_N, rows)
    )
    learned = learned_fn(state.params)
    updates, opt = tx.update(grads, state.opt, learned)
    updates = jax.tree.map(lambda u: u * state.plateau.scale, updates)
    params = _join(optax.apply_updates(learned, updates), state.params)
    state = state.replace(
      step=state.step + 1,
      params=learner.update_fn(params, stats),
      opt=opt,
      stats=stats,
      sums=jax.tree.map(add_exactly, state.sums, metrics),
    )
    extra = {
      "grad_norm": optax.tree.norm(grads),
      "lr": schedule(state.step - 1) * state.plateau.scale,
    }
    return state, {**metrics, **extra}, order

  return jax.jit(train_step, donate_argnums=0)


def _in_parts(grads_fn: Callable, num_parts: int) -> Callable:
  """Returns `grads_fn` over parts of the rows, one at a time, averaged."""

  def run(params, key, stats, rows):
    cut_fn = lambda x: x.reshape(num_parts, -1, *x.shape[1:])
    parts = jax.tree.map(cut_fn, rows)

    # Starting from the first part needs no zeros like the gradients.
    def add(carry, rows):
      stats, *total = carry
      stats, *new = grads_fn(params, key, stats, rows)
      return (stats, *jax.tree.map(jnp.add, total, new)), None

    first = jax.tree.map(lambda x: x[0], parts)
    rest = jax.tree.map(lambda x: x[1:], parts)
    first = grads_fn(params, key, stats, first)
    (stats, *total), _ = jax.lax.scan(add, first, rest)
    return stats, *jax.tree.map(lambda leaf: leaf / num_parts, total)

  return run


def train(
  learner: Learner,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  state: TrainState,
  batch_fn: Callable[[int], Any],
  plan: Plan,
  *,
  checkpoints: Checkpoints,
  writer: Writer,
  is_shown: bool = True,
) -> Outcome:
  """Trains from `state` to the end of the plan, or to a signal.

  All processes call it. A signal to one of them, or its clock, stops or saves
  all at the same step: what each wants goes to the device with its batch, and
  the answer comes back with the metrics.

  Args:
    learner: The codec.
    tx: Optimiser.
    schedule: Learning rate by step, for the report; `tx` has its own.
    state: From `make_state` or a checkpoint; consumed.
    batch_fn: Step to this process's rows of that batch, an array or a tree.
    plan: Lengths and intervals.
    checkpoints: Where to save.
    writer: Where to report.
    is_shown: Shows a progress line.

  Raises:
    FloatingPointError: The loss of a step is not finite.
  """
  devices.check_batch(plan.batch_size // plan.accumulate)
  step_fn = make_train_step(
    learner, tx, schedule, seed=plan.seed, accumulate=plan.accumulate
  )
  step, saved = int(state.step), time.monotonic()
  started = saved - writer.seconds
  if _is_stale(state, plan):  # A run that had stopped by itself.
    return Outcome(state, True)
  watch = parting.Watch(plan, writer.ends)
  state = devices.replicate(state)
  pending = collections.deque()
  bar, text = console.make_bar(plan, step, is_shown), ""
  # Placed by the thread that reads, so that no step waits for a copy.
  batches = prefetch(
    lambda step: devices.shard(batch_fn(step)), range(step, plan.total_steps)
  )
  wishes = [
    devices.shard(np.full(jax.local_device_count(), wish, np.int32))
    for wish in (_GO_ON, _SAVE, _STOP)
  ]
  with contextlib.closing(batches), console.catch_signals() as stop, bar:
    for rows in batches:
      is_due = time.monotonic() - saved > 60 * plan.checkpoint_minutes
      wish = _STOP if stop.is_set() else _SAVE if is_due else _GO_ON
      state, metrics, order = step_fn(state, wishes[wish], rows)
      step += 1
      pending.append((step, metrics, order))
      order = _report(pending, plan, writer, checkpoints, keep=2)
      bar.update(plan.batch_size)
      bar.set_postfix_str(console.rate_text(bar, plan, text), refresh=False)
      is_epoch_end = step % plan.steps_per_epoch == 0
      if order == _GO_ON and not is_epoch_end:
        continue
      rest = _report(pending, plan, writer, checkpoints, keep=0)
      order, figures = max(order, rest), None
      if is_epoch_end:
        state, row, figures = _end_epoch(learner, state, plan, step)
        row.update(lr=metrics["lr"], seconds=time.monotonic() - started)
        if figures is not None:
          _check_figures(figures, step, checkpoints)
          text = console.epoch_text(row, plan, step, figures)
        writer.write(step, row)
        if (warning := watch.warning(row)) and devices.is_first():
          logging.warning("%s", warning)
        bar.set_postfix_str(console.rate_text(bar, plan, text), refresh=False)
      if order == _GO_ON and figures is None:
        continue
      checkpoints.save(
        step,
        jax.tree.map(jnp.copy, state),
        validation=figures and signed(plan.measure, figures[plan.measure]),
        figures=figures,
      )
      saved = time.monotonic()
      if _is_stale(state, plan):
        return Outcome(state, True)
      if order == _STOP:
        return Outcome(state, step == plan.total_steps)
  return Outcome(state, True)


def _report(pending, plan, writer, checkpoints, *, keep) -> int:
  """Writes the metrics of all but the last `keep` steps, which may be running.

  Fetching late lets the device run ahead of the host. Returns the greatest
  order of these steps.
  """
  greatest = _GO_ON
  while len(pending) > keep:
    step, metrics, order = pending.popleft()
    greatest = max(greatest, int(order))
    for name in ("loss", "grad_norm"):
      if not math.isfinite(metrics[name]):
        _stop_on(name, float(metrics[name]), step, checkpoints)
    if step % plan.log_every == 0:
      writer.write(step, metrics)
  return greatest


def _stop_on(name, value, step, checkpoints):
  """Raises FloatingPointError, naming the checkpoint to resume from."""
  checkpoints.wait()
  good = checkpoints.latest()
  kept = (
    "There is no checkpoint yet."
    if good is None
    else f"The last good checkpoint is of step {good}."
  )
  raise FloatingPointError(
    f"The {name} of step {step} is {value}. {kept} A lower train.peak_lr, a "
    "longer ramp or train.dtype=float32 helps."
  )


def _is_stale(state, plan) -> bool:
  """Says so if the validation error has not fallen for long enough."""
  if not plan.stop_patience:
    return False
  since = int(state.plateau.since_best)
  if since < plan.stop_patience:
    return False
  logging.info(
    "No new best in %d validations: training ends here, at step %d of %d.",
    *(since, int(state.step), plan.total_steps),
  )
  return True


def _end_epoch(learner, state, plan, step):
  """Redraws idle codewords and validates: state, report and figures.

  The figures, single numbers, are None in an epoch without a validation.
  """
  key = jax.random.fold_in(jax.random.key(plan.seed + 1), step)
  is_last = step == plan.total_steps
  if is_last:
    params, row = state.params, learner.usage_fn(state.stats)
    stats = jax.tree.map(jnp.zeros_like, state.stats)
  else:
    params, stats, row = jax.jit(learner.end_epoch_fn)(
      state.params, key, state.stats
    )
  epoch = step // plan.steps_per_epoch
  means = {
    f"train_{name}": np.sum(total_2, dtype=float) / plan.steps_per_epoch
    for name, total_2 in jax.device_get(state.sums).items()
  }
  found, figures, plateau = {}, None, state.plateau
  if is_last or epoch % plan.eval_epochs == 0:
    found = learner.validate_fn(params)
    figures = {k: float(v) for k, v in found.items() if np.ndim(v) == 0}
    figures["train_loss"] = means["train_loss"]
    plateau = optimisers.advance_plateau(
      plateau,
      jnp.float32(signed(plan.measure, figures[plan.measure])),
      patience=plan.cut_patience or plan.num_epochs + 1,
    )
  state = state.replace(
    params=params,
    stats=stats,
    sums=jax.tree.map(jnp.zeros_like, state.sums),
    plateau=plateau,
  )
  found = {f"validation_{name}": value for name, value in found.items()}
  row = {"epoch": epoch, **found, **means, **row}
  return devices.replicate(state), row, figures


def _check_figures(figures, step, checkpoints) -> None:
  for name, value in figures.items():
    if not math.isfinite(value):
      _stop_on(f"validation_{name}", value, step, checkpoints)
