"""What training a codec would take, measured on its first steps."""

import pathlib
import tempfile

import jax
import numpy as np

from experiments.lib import cli, fit_time, plan
from vqjax import devices, fitting
from vqjax.codec import Codec
from vqjax.data import batches
from vqjax.training import loop

_ROWS = 65_536  # Of the training vectors, that steps are measured on.
_VALIDATED = 256  # Vectors of a measured validation.


def run(config, xt_ND, dataset, this) -> dict:
  """Measures and says the plan of a run, see `plan.report`."""
  batches.check_training(xt_ND, this.num_rows)
  fitting.check(config, this.plan, (this.num_rows, dataset.dim))
  found, _, num_bytes = stages(config, xt_ND, this)
  return plan.report(found, rows=this.num_rows, num_bytes=num_bytes)


def stages(config, xt_ND, this):
  """Measured stages, parameters of the codec's shapes, and bytes to write."""
  if this.plan is None:
    return _closed(config, xt_ND, this)
  num = max(_ROWS, config.init.get("max_vectors") or 0)
  xt_ND = xt_ND[: min(num, this.num_rows)]  # Lists of all would take long.
  few = slice(max(len(xt_ND) - _VALIDATED, 0), len(xt_ND))
  with tempfile.TemporaryDirectory(prefix="vqjax-plan-") as folder:
    args = pathlib.Path(folder), xt_ND, len(xt_ND), few, this.plan
    job, ready = _timed("prepare", fitting.prepare, config, *args)
    state, started = _timed("start", job.start_fn)
  ready = ready._replace(seconds=ready.seconds * this.num_rows / len(xt_ND))
  num_validations = this.plan.num_epochs // this.plan.eval_epochs
  num_held_out = this.held_out.stop - this.held_out.start
  amount = few.stop - few.start
  params = devices.to_local_devices(state.params)

  def validations(params):
    while True:
      jax.block_until_ready(job.learner.validate_fn(params))
      yield amount

  found = [
    ready,
    started,
    plan.measure(
      "validate",
      validations(state.params),
      (num_validations + 1) * num_held_out,
    ),
    plan.measure(
      "train", _steps(job, state, len(xt_ND), this.plan), this.plan.total_steps
    ),
  ]
  # Checkpoints have the moments of the optimiser too.
  num_kept = config.train.keep_checkpoints + max(this.plan.num_evaluated, 1)
  state_bytes = _num_bytes(job.abstract)
  return found, params, _num_bytes(params) + num_kept * state_bytes


def _timed(name: str, fn, *args):
  made = []
  stage = plan.measure(name, (made.append(fn(*args)) or 1 for _ in "1"), 1)
  return made[0], stage


def _steps(job, state, num_rows: int, lengths):
  """Trains step by step; yields 1 for each."""
  step_fn = loop.make_train_step(
    *(job.learner, job.tx, job.schedule),
    seed=lengths.seed,
    accumulate=lengths.accumulate,
  )
  reader = batches.BatchReader(
    job.vectors, lengths.seed, lengths.batch_size, num_rows
  )
  state = devices.replicate(jax.tree.map(jax.numpy.copy, state))
  wish_N = devices.shard(np.zeros(jax.local_device_count(), np.int32))
  for step in range(lengths.total_steps):
    rows = devices.shard(reader(step))
    state, metrics, _ = step_fn(state, wish_N, rows)
    jax.block_until_ready(metrics["loss"])
    yield 1


def _closed(config, xt_ND, this):
  seconds, params = fit_time.estimate(config, xt_ND, this.num_rows)
  codec = Codec(config.codec, params, {"encode": config.encode.to_dict()})
  num_held_out = this.held_out.stop - this.held_out.start

  def validations():
    for start in range(this.held_out.start, this.held_out.stop, _VALIDATED):
      stop = min(start + _VALIDATED, this.held_out.stop)
      fitting.held_out_mse(codec, xt_ND, slice(start, stop))
      yield stop - start

  with cli.elapsed("measure validation"):
    validated = plan.measure("validate", validations(), num_held_out)
  return [plan.Stage("fit", seconds), validated], params, _num_bytes(params)


def _num_bytes(tree) -> int:
  leaves = (leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype"))
  return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in leaves)
