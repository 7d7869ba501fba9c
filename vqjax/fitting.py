"""Training of a codec, for the command and for programs.

  codec = vqjax.fit(x, "qinco2_xs", num_codes=8, seed=0)

Functions take a configuration (`configs/`): this module and the commands are
the only places that see one.
"""

import contextlib
import os
import pathlib
import re
import tempfile
import time
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import devices, ivf_lists, shipped
from vqjax.codec import Codec, open_array
from vqjax.codecs import qinco, qinco_loss, registry, runner
from vqjax.codecs.rule import SearchRule
from vqjax.core import check_range
from vqjax.data import batches, unit
from vqjax.interop import faiss_io
from vqjax.training import checkpoints as checkpoints_lib
from vqjax.training import learners, loop, optimisers, writers

SEARCH = ("num_candidates", "beam_size", "num_joint_candidates")
_GROUPS = ("model", "encode", "train", "init", "ivf", "data")
_SHORT = {"opq": ("pq", {"opq": True})}  # Names for a setting of another.


@contextlib.contextmanager
def _keywords_in_errors():
  """Lets errors name settings as `fit` takes them, not as flags."""
  try:
    yield
  except ValueError as error:
    text = re.sub(r"--config\.\w+\.(\w+)", r"\1", str(error))
    if text == str(error):
      raise
    raise ValueError(text) from error


@_keywords_in_errors()
def fit(
  x,
  name: str = "qinco2_s",
  *,
  num_codes: int | None = None,
  seed: int = 0,
  **overrides,
) -> Codec:
  """Trains a codec on vectors `[N, D]` and returns it.

  Args:
    x: An array, a memory map, or the path of a file of vectors.
    name: A configuration by name, as "pq", "opq", "rq", "qinco2_xs",
      "ivf_qinco2_s" or "qinco2_xs:smoke", or the path of one.
    num_codes: Code positions; None for those of the configuration.
    seed: Of the start and of the batches.
    **overrides: Settings of the configuration by name, as `num_epochs=10`, or
      a whole group, as `train={"num_epochs": 10}`.

  Training that is to be stopped and resumed has a run folder: `vqjax train`,
  or in a program `vqjax.shipped.import_command("train").run(config, workdir)`.

  Raises:
    ValueError: There is no such configuration or setting, or a value does not
      fit the vectors.
    TypeError: Arguments are in the wrong order, or hold no numbers.
  """
  if not isinstance(name, str | os.PathLike):
    raise TypeError(
      "fit takes the vectors first, then the name of a configuration: "
      f'vqjax.fit(x, "qinco2_xs"); got {type(name).__name__} as the name.'
    )
  vectors = open_array(x)
  config = make_config(name, num_codes=num_codes, seed=seed, **overrides)
  if isinstance(x, str | os.PathLike):
    config.data.train = os.path.abspath(os.path.expanduser(x))
  if config.data.metric == "cosine":
    vectors = unit.UnitVectors(vectors)
  num_rows, held_out = batches.split(len(vectors), config.data.validation_size)
  batches.check_training(vectors, num_rows)
  check_words(config, num_rows)
  if num_rows < vectors.shape[1]:
    warnings.warn(
      f"fit got {len(vectors)} vectors of {vectors.shape[1]} dimensions: is "
      "the array transposed? Each row is a vector.",
      stacklevel=2,
    )
  began = time.monotonic()
  if config.codec != "qinco":
    params = fit_closed(config, vectors, num_rows)
  else:
    check_options(config)
    plan = make_plan(config, num_rows, 1.0)
    check_model(config, plan, (num_rows, vectors.shape[1]))
    with tempfile.TemporaryDirectory(prefix="vqjax-fit-") as folder:
      params, vectors = learn(
        config, pathlib.Path(folder), vectors, num_rows, held_out, plan
      )
    if params is None:
      raise KeyboardInterrupt("The training was stopped.")
  info = {
    "encode": config.encode.to_dict(),
    "metric": config.data.metric or "l2",
    "scale": 1.0,
  }
  codec = Codec(config.codec, params, info)
  mse = held_out_mse(codec, vectors, held_out)
  num_held_out = held_out.stop - held_out.start
  info["training"] = {
    "seconds": round(time.monotonic() - began, 1),
    "validation_mse": mse,
    "num_held_out": num_held_out,
  }
  if config.data.train:
    data = {"train": config.data.train, "validation_size": num_held_out}
    info["data"] = {**config.data.to_dict(), **data, "name": None}
  return codec


def make_config(
  name, *, num_codes: int | None = None, seed: int = 0, **overrides
):
  """Returns the configuration of `fit`, with these settings.

  Raises:
    ValueError: There is no such configuration or setting.
  """
  kind, _, argument = str(name).partition(":")
  kind, settings = _SHORT.get(kind, (kind, {}))
  config = shipped.read_config(kind + (f":{argument}" if argument else ""))
  config.seed = seed
  if num_codes is not None:
    has_network = config.codec == "qinco"
    config.model["num_steps" if has_network else "num_codes"] = num_codes
  for setting, value in {**settings, **overrides}.items():
    _override(config, setting, value)
  return config


def _override(config, name: str, value) -> None:
  """Sets a group, or one setting in each of the groups that have it.

  Iterations are those of the codebooks, not of the lists.
  """
  if name in _GROUPS and name in config:
    config[name].update(value)
    return
  groups = [g for g in _GROUPS if g in config and name in config[g]]
  if not groups:
    known = sorted({key for g in _GROUPS if g in config for key in config[g]})
    near = shipped.did_you_mean(name, known)
    raise ValueError(
      f"This configuration has no setting {name!r}{near} It has "
      f"{', '.join(known)}."
    )
  for group in groups:
    if not (group == "ivf" and "init" in groups):
      config[group][name] = value


def check_words(config, num_rows: int) -> None:
  """Raises ValueError if the vectors cannot fill the codebooks."""
  num = min(num_rows, config.init.max_vectors)
  check_range(
    "--config.model.codebook_size",
    config.model.codebook_size,
    *(2, num, f"{num} vectors cannot fill more codewords"),
  )


def sample(config, vectors, num_rows: int):
  """Returns the training vectors that a codec starts from, and their lists."""
  return batches.subsample(
    vectors, config.init.max_vectors, config.seed, num_rows=num_rows
  )


def fit_closed(config, xt_ND, num_rows: int):
  """Fits PQ, OPQ or RQ to the sample: closed form, nothing to resume."""
  x_ND = sample(config, xt_ND, num_rows)
  model = config.model.to_dict()
  if model.pop("opq", False):
    num_bits = max(model["codebook_size"] - 1, 1).bit_length()
    rotation = faiss_io.train_opq(x_ND, model["num_codes"], num_bits)
    model["rotation"] = jnp.asarray(rotation)
  return registry.get(config.codec).fit(
    jax.random.key(config.seed),
    jnp.asarray(x_ND),
    num_iterations=config.init.num_iterations,
    **model,
  )


def learn(
  config,
  workdir: pathlib.Path,
  xt_ND,
  num_rows: int,
  held_out: slice,
  plan: loop.Plan,
):
  """Trains a QINCo to the end: the best parameters, and the vectors.

  Those of an IVF model come with their list. The parameters are None when the
  training was interrupted. Checkpoints lie in `workdir`.
  """
  learned = Learned(config, workdir, xt_ND, num_rows, held_out, plan)
  checkpoints = checkpoints_lib.Checkpoints(workdir / "checkpoints")
  writer = writers.Writer(workdir)
  try:
    outcome = run_loop(
      config, learned, learned.start(), plan, num_rows, checkpoints, writer
    )
    if not outcome.is_done:
      return None, learned.vectors
    _, best = checkpoints.restore_best(outcome.state)
    return devices.to_local_devices(best.params), learned.vectors
  finally:
    writer.close()
    checkpoints.close()


class Learned:
  """A QINCo to be trained: its rows, its start, its optimiser."""

  def __init__(self, config, workdir, xt_ND, num_rows, held_out, plan):
    """Makes the lists of an IVF model, where they are not there yet."""
    self.centroids_LD, self.vectors = ivf_lists.prepare(
      config, workdir, xt_ND, num_rows
    )
    self.held_out = batches.read_rows(
      self.vectors, np.arange(held_out.start, held_out.stop)
    )
    self.schedule = make_schedule(config, plan)
    self._config, self._num_rows = config, num_rows

  def start(self) -> loop.TrainState:
    """Returns the state before the first step."""
    rows = sample(self._config, self.vectors, self._num_rows)
    rows = jax.tree.map(jnp.asarray, rows)
    return make_state(self._config, self.schedule, self.centroids_LD, rows)

  def abstract(self):
    """Returns the shapes of a state."""
    make_fn = partial(
      make_state, self._config, self.schedule, self.centroids_LD
    )
    to_shape = lambda x: jax.ShapeDtypeStruct(
      (self._num_rows, *x.shape[1:]), x.dtype
    )
    return jax.eval_shape(make_fn, jax.tree.map(to_shape, self.held_out))


def run_loop(config, learned, state, plan, num_rows, checkpoints, writer):
  """Runs the training loop from a state; returns its outcome."""
  reader = batches.BatchReader(
    learned.vectors,
    config.seed,
    plan.batch_size,
    num_rows,
    jax.process_index(),
    jax.process_count(),
  )
  learner, tx = make_learner(config, learned.held_out, learned.schedule)
  return loop.train(
    learner,
    tx,
    learned.schedule,
    state,
    reader,
    plan,
    checkpoints=checkpoints,
    writer=writer,
  )


def held_out_mse(codec: Codec, rows, held_out: slice, progress=None) -> float:
  """Returns the squared error per vector of held-out rows.

  Lists that the rows carry are taken as they are.
  """
  assign_fn = batches.split_lists if codec.is_ivf else None
  encode_fn = runner.make_encode_fn(
    codec.spec, codec.tables, codec.rule, assign_fn
  )
  decode_fn = runner.make_decode_fn(codec.spec, codec.tables)

  def errors(rows):
    x_ND, _ = batches.split_lists(rows)
    return jnp.sum((x_ND - decode_fn(encode_fn(rows))) ** 2, axis=-1)

  rows = batches.read_rows(rows, np.arange(held_out.start, held_out.stop))
  size = runner.encode_block(codec.spec, codec.tables, codec.rule)
  return learners.mean_of_rows(errors, rows, size, progress)


def make_schedule(config, plan: loop.Plan):
  """Returns the learning rate by step."""
  return optimisers.make_schedule(
    config.train.schedule,
    peak_lr=config.train.peak_lr,
    ramp_steps=config.train.ramp_epochs * plan.steps_per_epoch,
    total_steps=plan.total_steps,
  )


def _make_tx(config, schedule):
  return optimisers.make_optimiser(
    schedule,
    weight_decay=config.train.weight_decay,
    clip_value=config.train.clip_value,
  )


def make_state(config, schedule, centroids_LD, rows) -> loop.TrainState:
  """Returns the state before the first step, started from a sample."""
  sizes = {k: v for k, v in config.model.items() if k not in SEARCH}
  sizes |= {k: v for k, v in config.init.items() if k != "max_vectors"}
  return learners.make_state(
    rows,
    _make_tx(config, schedule),
    seed=config.seed,
    centroids_LD=centroids_LD,
    **sizes,
  )


def make_learner(config, held_out, schedule):
  """Returns the learner of a QINCo, and its optimiser."""
  learner = learners.make_learner(
    held_out,
    SearchRule(**{name: config.model[name] for name in SEARCH}),
    dtype=product_dtype(config.train.dtype),
    redraw=config.train.redraw,
  )
  return learner, _make_tx(config, schedule)


def check_model(config, plan: loop.Plan, shape) -> None:
  """Raises ValueError if model and searches do not fit `[N, D]` vectors."""
  make_fn = partial(make_state, config, make_schedule(config, plan), None)
  # Without lists, which change nothing here and may take long to make.
  abstract = jax.eval_shape(make_fn, jax.ShapeDtypeStruct(shape, jnp.float32))
  check_search(config, abstract.params)


def check_search(config, params) -> None:
  """Raises ValueError unless the searches of the config fit the model."""
  for name in ("model", "encode"):
    rule = SearchRule(**{knob: config[name][knob] for knob in SEARCH})
    try:
      qinco.check_rule(params, rule)
    except ValueError as error:
      raise ValueError(f"In config.{name}: {error}") from error


def product_dtype(name: str) -> str:
  """Returns the type of a network's products for `float32|bfloat16|auto`."""
  if name not in ("auto", "float32", "bfloat16"):
    raise ValueError(f"dtype must be auto, float32 or bfloat16; got {name!r}.")
  if name != "auto":
    return name
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def check_options(config) -> None:
  """Raises ValueError for values of the configuration that make no sense."""
  train = config.train
  qinco_loss.check_redraw(train.redraw, "--config.train.redraw")
  for name in ("num_epochs", "epoch_size", "batch_size", "accumulate"):
    check_range(f"--config.train.{name}", train[name], 1, 1 << 40)
  for name in ("log_every", "keep_checkpoints", "cut_patience"):
    check_range(f"--config.train.{name}", train[name], 1, 1 << 40)
  check_range(
    "--config.train.ramp_epochs", train.ramp_epochs, 0, train.num_epochs
  )
  for name, known in (
    ("schedule", optimisers.SCHEDULES),
    ("dtype", ("auto", "float32", "bfloat16")),
  ):
    if train[name] not in known:
      raise ValueError(
        f"--config.train.{name} must be one of {', '.join(known)}; got "
        f"{train[name]!r}."
      )


def make_plan(config, num_rows: int, scale: float) -> loop.Plan:
  """Returns the lengths and intervals of the training loop."""
  train = config.train
  batch_size = train.batch_size * jax.device_count() * train.accumulate
  if num_rows < batch_size:
    raise ValueError(
      f"A step takes {batch_size} vectors (--config.train.batch_size x devices "
      f"x --config.train.accumulate), but there are only {num_rows} to train "
      "on. Lower --config.train.batch_size or --config.data.validation_size."
    )
  is_plateau = train.schedule == "plateau"
  return loop.Plan(
    seed=config.seed,
    num_epochs=train.num_epochs,
    steps_per_epoch=max(min(train.epoch_size, num_rows) // batch_size, 1),
    batch_size=batch_size,
    accumulate=train.accumulate,
    stop_patience=train.stop_patience if is_plateau else None,
    cut_patience=train.cut_patience if is_plateau else None,
    log_every=train.log_every,
    checkpoint_minutes=train.checkpoint_minutes,
    scale=scale,
  )
