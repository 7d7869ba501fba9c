"""What the training loop needs to learn a QINCo.

A batch is the vectors `[N, D]`, for an IVF model with the list of each:
`vqjax.data.batches.WithLists`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqjax import devices
from vqjax.codecs import qinco, qinco_loss, runner
from vqjax.codecs.rule import SearchRule
from vqjax.core import Array
from vqjax.data import batches
from vqjax.training import loop

METRICS = ["loss", "mse", "mse_loss", "preselect_loss"]


def make_state(
  rows,
  tx: optax.GradientTransformation,
  *,
  seed: int,
  centroids_LD=None,
  **sizes,
) -> loop.TrainState:
  """Returns the state before the first step.

  Args:
    rows: The sample that the codebooks start from.
    tx: Optimiser.
    seed: Of the start.
    centroids_LD: Of the lists of an IVF model, in data units.
    **sizes: Of `qinco_loss.init`.
  """
  x_ND, lists_N = batches.split_lists(rows)
  lists = dict(centroids_LD=centroids_LD, lists_N=lists_N)
  params = qinco_loss.init(jax.random.key(seed), x_ND, **sizes, **lists)
  return state_of(params, tx)


def state_of(params, tx: optax.GradientTransformation) -> loop.TrainState:
  """Returns the state before the first step, from started parameters."""
  return loop.make_state(
    params, tx, qinco_loss.empty_stats(params), METRICS, qinco_loss.frozen
  )


def make_learner(
  held_out,
  rule: SearchRule,
  *,
  dtype: str,
  redraw: str,
  noise_share: float = 0.0,
) -> loop.Learner:
  """Returns the learner of a QINCo.

  Args:
    held_out: Rows that it is validated on, in memory.
    rule: The search of a training step and of the validation.
    dtype: Type of the products of a training step; validation has float32.
    redraw: What becomes of codewords that an epoch hardly used.
    noise_share: Of the variance of training vectors, see `mix_with_noise`.
  """
  step_rule = rule.replace(dtype=dtype)

  def loss(params, key, rows):
    x_ND, lists_N = batches.split_lists(rows)
    if noise_share:
      centres = qinco.centroids(params)[lists_N] if params.is_ivf else 0.0
      x_ND = centres + mix_with_noise(key, x_ND - centres, noise_share)
    return qinco_loss.loss(params, key, x_ND, lists_N, rule=step_rule)

  def errors(tables, rows):
    x_ND, lists_N = batches.split_lists(rows)
    codes_NM = qinco.encode(tables, x_ND, lists_N, rule)
    return jnp.sum((x_ND - qinco.decode(tables, codes_NM)) ** 2, axis=-1)

  prepare_fn, errors_fn = jax.jit(qinco.prepare), devices.data_parallel(errors)

  def validate(params):
    tables = prepare_fn(devices.to_local_devices(params))
    size = runner.encode_block(qinco.CODEC, tables, rule)
    return {"mse": mean_of_rows(partial(errors_fn, tables), held_out, size)}

  return loop.Learner(
    loss_fn=loss,
    join_stats_fn=qinco_loss.join_stats,
    merge_stats_fn=qinco_loss.merge_stats,
    end_epoch_fn=partial(qinco_loss.end_epoch, redraw=redraw),
    usage_fn=qinco_loss.usage,
    validate_fn=validate,
    frozen_fn=qinco_loss.frozen,
  )


def mix_with_noise(key: Array, x_ND: Array, share: float) -> Array:
  """Replaces a share of the variance of vectors `[N, D]` by noise.

  A vector becomes `m + sqrt(1 - share) (x - m) + sqrt(share / 2) e (x_i - x_j)`
  with the mean m, a normal number e and two rows i and j drawn for it. Mean
  and covariance stay those of the vectors, so that a network sees new vectors
  of their distribution in each epoch.
  """
  rows_key, size_key = jax.random.split(key)
  n = x_ND.shape[0]
  mixed_ND = jax.random.permutation(rows_key, x_ND)
  size_N1 = jax.random.normal(size_key, (n, 1)) * (share / 2) ** 0.5
  noise_ND = size_N1 * (mixed_ND - jnp.roll(mixed_ND, 1, axis=0))
  mean_1D = x_ND.mean(axis=0, keepdims=True)
  return mean_1D + (1 - share) ** 0.5 * (x_ND - mean_1D) + noise_ND


def mean_of_rows(
  fn: Callable,
  vectors,
  block_size: int,
  progress: Callable | None = None,
  rows: range | None = None,
) -> float:
  """Returns the mean of `fn`, rows to numbers `[N]`, over these rows, or all.

  Every process computes its share, and all return the same; `progress` is
  told of the rows done and those in the share.
  """
  rows = range(len(vectors)) if rows is None else rows
  mine = devices.process_rows(len(rows))
  blocks = batches.map_blocks(
    fn,
    vectors,
    block_size=block_size,
    rows=rows[mine.start : mine.stop],
    progress=progress,
  )
  parts = [np.zeros(0, np.float32), *(value_N for _, value_N in blocks)]
  value_N = devices.gather_rows(np.concatenate(parts), len(rows))
  return float(np.mean(value_N, dtype=float))
