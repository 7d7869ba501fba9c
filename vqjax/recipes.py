"""How learned codecs are trained, from a configuration: a recipe for each.

A codec that is learned by gradient descent has a module with a `RECIPE`; `get`
finds it by the name of the codec. `vqjax.fitting` and the command `train` ask
it for what differs between codecs, and nothing else. Codecs of a closed form
have none: they have `fit`.
"""

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from vqjax.core import check_range
from vqjax.training import loop, optimisers, writers

_MODULES = {"qinco": "vqjax.recipe_qinco", "rqvae": "vqjax.recipe_rqvae"}


class Job(NamedTuple):
  """Training that is ready to start."""

  vectors: Any  # To draw batches from; of an IVF model with their lists.
  learner: loop.Learner
  tx: Any
  schedule: Callable  # Step -> learning rate.
  start_fn: Callable  # () -> the state before the first step.
  abstract: loop.TrainState  # Its shapes.
  state_fn: Callable  # Parameters -> such a state that starts from them.


class Recipe(NamedTuple):
  """What training asks of a learned codec. All take its configuration first.

  Functions that find something wrong raise ValueError, before any work.
  """

  plan_fn: Callable  # (config, num_rows, scale) -> loop.Plan
  check_fn: Callable  # (config, plan, (N, D)) -> None
  # (config, workdir, vectors, num_rows, slice held out, plan) -> Job
  prepare_fn: Callable
  set_num_codes_fn: Callable  # (config, num_codes) -> None
  # config -> fields of the parameters that are no arrays
  static_fn: Callable = lambda config: {}


def get(name: str) -> Recipe | None:
  """Returns the recipe of the codec called `name`, None without one."""
  if name not in _MODULES:
    return None
  return importlib.import_module(_MODULES[name]).RECIPE


def check_options(train, *, counts: tuple[str, ...] = ()) -> None:
  """Raises ValueError for values of `config.train` that make no sense.

  `counts` are names of whole numbers from 1 up that this codec has besides.
  """
  names = ("num_epochs", "batch_size", "accumulate", "log_every")
  for name in (*names, "keep_checkpoints", "cut_patience", *counts):
    check_range(f"--config.train.{name}", train[name], 1, 1 << 40)
  check_range("--config.train.early_stop", train.early_stop, 0, 1 << 40)
  check_range(
    "--config.train.ramp_epochs", train.ramp_epochs, 0, train.num_epochs
  )
  optimisers.check_name("schedule", train.schedule, optimisers.SCHEDULES)
  writers.check_tracker(train.tracker)
  make_tx(train, lambda step: 0.0)


def make_plan(config, steps_per_epoch: int, batch_size: int, **others):
  """Returns the `loop.Plan` of a configuration; `others` are further fields."""
  train = config.train
  is_plateau = train.schedule == "plateau"
  patience = train.stop_patience if is_plateau else 0
  return loop.Plan(
    seed=config.seed,
    num_epochs=train.num_epochs,
    steps_per_epoch=steps_per_epoch,
    batch_size=batch_size,
    accumulate=train.accumulate,
    stop_patience=train.early_stop or patience,
    cut_patience=train.cut_patience if is_plateau else None,
    log_every=train.log_every,
    checkpoint_minutes=train.checkpoint_minutes,
    has_held_out=config.data.validation_size != 0,
    **others,
  )


def make_schedule(train, plan: loop.Plan):
  """Returns the learning rate by step."""
  return optimisers.make_schedule(
    train.schedule,
    peak_lr=train.peak_lr,
    ramp_steps=train.ramp_epochs * plan.steps_per_epoch,
    total_steps=plan.total_steps,
  )


def make_tx(train, schedule):
  """Returns the optimiser of `config.train`."""
  return optimisers.make_optimiser(
    schedule,
    train.get("optimiser", "adamw"),
    weight_decay=train.weight_decay,
    clip_value=train.clip_value,
    clip_norm=train.get("clip_norm"),
  )


def product_dtype(name: str) -> str:
  """Returns the type of a network's products for `float32|bfloat16|auto`."""
  if name not in ("auto", "float32", "bfloat16"):
    raise ValueError(f"dtype must be auto, float32 or bfloat16; got {name!r}.")
  if name != "auto":
    return name
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"
