"""A step of the training loop, and the two parts it cannot do without."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import bench_subjects
from experiments.lib.bench_arithmetic import Work, decode_work, encode_work
from experiments.lib.bench_timing import Contender, seconds
from vqjax import devices
from vqjax.codecs import qinco, qinco_loss
from vqjax.codecs.rule import SearchRule
from vqjax.training import loop, optimisers


def contenders(subject, rule: SearchRule) -> dict[str, Contender]:
  """Returns the step, its encode alone and its gradient alone."""
  settings, tables = subject.config.train, subject.codec.tables
  num = settings.batch_size * settings.accumulate * jax.device_count()
  x_ND = devices.shard(bench_subjects.rows(subject, num))
  encode_fn = jax.jit(
    lambda tables, x_ND: qinco.encode(tables, x_ND, None, rule)
  )
  gradient_fn = jax.jit(jax.grad(functools.partial(_decode_loss, rule.dtype)))
  codes_NM = encode_fn(tables, x_ND)
  encode, decode = encode_work(tables, rule), decode_work(tables)
  both_ways = Work(3 * decode.network, 3 * decode.total)
  whole = Work(*map(sum, zip(encode, both_ways, strict=True)))
  fns = {
    "step": (_make_step(subject, rule, x_ND), whole),
    "its encode": (lambda: encode_fn(tables, x_ND), encode),
    "its gradient": (
      lambda: gradient_fn(subject.codec.params, x_ND, codes_NM),
      both_ways,
    ),
  }
  return {
    name: Contender(fn, num, work, seconds(fn))
    for name, (fn, work) in fns.items()
  }


def _make_step(subject, rule: SearchRule, x_ND):
  """Returns a function that takes a step of the training loop each time."""
  settings, params = subject.config.train, subject.codec.params
  loss_fn = functools.partial(qinco_loss.loss, rule=rule)
  learner = loop.Learner(
    loss_fn=loss_fn,
    join_stats_fn=qinco_loss.join_stats,
    merge_stats_fn=qinco_loss.merge_stats,
    end_epoch_fn=None,  # These belong to the epoch, not to a step.
    usage_fn=None,
    validate_fn=None,
    frozen_fn=qinco_loss.frozen,
  )
  schedule = lambda step: 1e-6
  tx = optimisers.make_optimiser(
    schedule,
    weight_decay=settings.weight_decay,
    clip_value=settings.clip_value,
  )
  _, aux = jax.eval_shape(loss_fn, params, jax.random.key(0), x_ND)
  state = loop.make_state(
    params,
    tx,
    qinco_loss.empty_stats(params),
    ["loss", *aux["metrics"]],
    qinco_loss.frozen,
  )
  # Copies: the step donates its state.
  state = devices.replicate(jax.tree.map(jnp.copy, state))
  wish_N = devices.shard(np.zeros(jax.local_device_count(), np.int32))
  step_fn = loop.make_train_step(
    learner, tx, schedule, seed=0, accumulate=settings.accumulate
  )

  def step():
    nonlocal state
    state, metrics, _ = step_fn(state, wish_N, x_ND)
    return state.step, metrics

  return step


def _decode_loss(dtype, params, x_ND, codes_NM):
  """What a training step differentiates, given the codes."""
  errors_M, preselect_T = qinco_loss.decode_losses(
    qinco.prepare(params), qinco.normalise(params, x_ND), codes_NM, dtype
  )
  return errors_M.sum() + preselect_T.sum()
