"""Trains `vqjax.codecs.compressor` by the one training loop."""

import pathlib
import tempfile
from typing import NamedTuple

import jax
import numpy as np
import optax

from vqjax import devices
from vqjax.codecs import compressor
from vqjax.data import batches
from vqjax.training import checkpoints, loop, writers

_TEMPERATURE = 0.05
_HELD_OUT = 1000


class Rows(NamedTuple):
  """Vectors `[N, D]`, and for each its list or its neighbours `[N, G, D]`."""

  x_ND: np.ndarray
  targets: np.ndarray


def fit_network(
  x_ND,
  lists_N: np.ndarray,
  num_lists: int,
  reduced_dim: int,
  *,
  num_epochs: int,
  steps_per_epoch: int,
  batch_size: int,
  seed: int,
  peak_lr: float = 0.005,
  is_shown: bool = True,
) -> compressor.Compressor:
  """Learns to tell the lists of vectors `[N, D]`, see `compressor.list_loss`.

  The optimiser is Adam at one learning rate. `x_ND` may be an open file.
  """

  def loss_fn(params, key, rows):
    loss, accuracy = compressor.list_loss(params, key, rows.x_ND, rows.targets)
    return loss, {"metrics": {"accuracy": accuracy}, "stats": ()}

  def take_fn(rows_n):
    return Rows(batches.read_rows(x_ND, rows_n), lists_N[rows_n])

  params = compressor.init(
    jax.random.key(seed), x_ND.shape[1], reduced_dim, num_lists
  )
  plan = _plan(num_epochs, steps_per_epoch, batch_size, seed)
  schedule = optax.constant_schedule(peak_lr)
  args = loss_fn, take_fn, len(x_ND), plan, schedule, ["loss", "accuracy"]
  return _train(params, *args, is_shown=is_shown).replace(
    head_EL=None, head_bias_L=None
  )


def fit_neighbours(
  x_ND,
  query_rows_Q: np.ndarray,
  near_QG: np.ndarray,
  reduced_dim: int,
  *,
  num_epochs: int,
  steps_per_epoch: int,
  batch_size: int,
  seed: int,
  peak_lr: float = 0.001,
  is_shown: bool = True,
) -> compressor.Compressor:
  """Learns to order neighbours, see `compressor.neighbour_loss`.

  Begins with the principal components of the sample; Adam, whose learning rate
  falls to 0.

  Args:
    x_ND: Vectors in memory.
    query_rows_Q: Rows of them that are the queries.
    near_QG: Rows of the neighbours of each.
    reduced_dim: E.
    num_epochs: Of `steps_per_epoch` steps, each of `batch_size` queries.
    steps_per_epoch: See above.
    batch_size: See above.
    seed: Of the batches.
    peak_lr: Learning rate of the first step.
    is_shown: Shows a progress line.
  """

  def loss_fn(params, key, rows):
    del key
    loss = compressor.neighbour_loss(params, *rows, _TEMPERATURE)
    return loss, {"metrics": {}, "stats": ()}

  def take_fn(rows_n):
    return Rows(x_ND[query_rows_Q[rows_n]], x_ND[near_QG[rows_n]])

  plan = _plan(num_epochs, steps_per_epoch, batch_size, seed)
  schedule = optax.cosine_decay_schedule(peak_lr, plan.total_steps)
  params = compressor.init_pca(x_ND, reduced_dim)
  args = loss_fn, take_fn, len(query_rows_Q), plan, schedule, ["loss"]
  return _train(params, *args, is_shown=is_shown)


def _plan(num_epochs, steps_per_epoch, batch_size, seed) -> loop.Plan:
  return loop.Plan(
    *(seed, num_epochs, steps_per_epoch, batch_size), measure="loss"
  )


def _train(params, loss_fn, take_fn, num, plan, schedule, metrics, *, is_shown):
  """Runs the loop in a folder of its own; returns the last parameters."""
  rows_n = batches.evenly_spaced_rows(num, min(num, _HELD_OUT))
  check_rows = take_fn(rows_n)
  value_fn = jax.jit(lambda params, key, rows: loss_fn(params, key, rows)[0])

  def validate(params):
    params = devices.to_local_devices(params)
    return {"loss": float(value_fn(params, jax.random.key(0), check_rows))}

  learner = loop.learner_without_stats(loss_fn, validate)

  def batch_fn(step):
    rows = batches.batch_rows(plan.seed, step, plan.batch_size, num)
    return take_fn(rows[devices.process_rows(plan.batch_size)])

  tx = optax.adam(schedule)
  state = loop.make_state(params, tx, (), metrics)
  with tempfile.TemporaryDirectory(prefix="vqjax-compressor-") as folder:
    folder = pathlib.Path(folder)
    saved = checkpoints.Checkpoints(folder / "checkpoints", measure="loss")
    writer = writers.Writer(folder)
    try:
      outcome = loop.train(
        *(learner, tx, schedule, state, batch_fn, plan),
        checkpoints=saved,
        writer=writer,
        is_shown=is_shown,
      )
    finally:
      writer.close()
      saved.close()
  if not outcome.is_done:
    raise KeyboardInterrupt("The training was stopped.")
  return jax.tree.map(
    np.asarray, devices.to_local_devices(outcome.state.params)
  )
