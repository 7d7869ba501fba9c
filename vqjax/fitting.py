"""Training of a codec, for the command and for programs.

  codec = vqjax.fit(x, "qinco2_xs", num_codes=8, seed=0)

Functions take a configuration (`configs/`): this module and the commands are
the only places that see one.
"""

import contextlib
import functools
import json
import os
import pathlib
import re
import tempfile
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import devices, recipes, shipped
from vqjax.codec import Codec, open_array
from vqjax.codecs import registry, runner
from vqjax.core import check_range
from vqjax.data import batches, formats, unit
from vqjax.interop import faiss_io
from vqjax.storage import codec_file
from vqjax.training import checkpoints as checkpoints_lib
from vqjax.training import learners, loop, writers

_GROUPS = ("model", "encode", "loss", "train", "init", "ivf", "data")
_KEPT = ("model", "loss", "init", "train")  # With a codec.


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
    num_codes: Code positions; None for as many as in the configuration.
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
  plan = make_plan(config, num_rows, 1.0)
  check(config, plan, (num_rows, vectors.shape[1]))
  if num_rows < vectors.shape[1]:
    warnings.warn(
      f"fit got {len(vectors)} vectors of {vectors.shape[1]} dimensions: is "
      "the array transposed? Each row is a vector.",
      stacklevel=2,
    )
  began = time.monotonic()
  if plan is None:
    params = fit_closed(config, vectors, num_rows)
  else:
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
    **levels_info(config),
    "config": settings_of(config),
  }
  codec = Codec(config.codec, params, info)
  mse = held_out_mse(codec, vectors, held_out)
  num_held_out = len(vectors) - num_rows
  info["training"] = {
    "seconds": round(time.monotonic() - began, 1),
    "validation_mse": mse,
    "num_held_out": num_held_out,
    "seed": config.seed,
  }
  if config.data.train:
    data = {"train": config.data.train, "validation_size": num_held_out}
    info["data"] = {**config.data.to_dict(), **data, "name": None}
  return codec


def levels_info(config) -> dict:
  """What a codec says of its levels, for semantic ids."""
  return {"is_balanced": True} if config.model.get("is_balanced") else {}


def make_config(
  name, *, num_codes: int | None = None, seed: int = 0, **overrides
):
  """Returns the configuration of `fit`, with these settings.

  Raises:
    ValueError: There is no such configuration or setting.
  """
  config = shipped.read_config(name)
  config.seed = seed
  if num_codes is not None:
    recipe = recipes.get(config.codec)
    if recipe is None:
      config.model.num_codes = num_codes
    else:
      recipe.set_num_codes_fn(config, num_codes)
  for setting, value in overrides.items():
    _override(config, setting, value)
  return config


def _override(config, name: str, value) -> None:
  """Sets a group, or one setting in each of the groups that have it.

  Iterations are of the codebooks, not of the lists.
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
  value = tuple(value) if isinstance(value, list) else value
  for group in groups:
    if not (group == "ivf" and "init" in groups):
      config[group][name] = value


def make_plan(config, num_rows: int, scale: float) -> loop.Plan | None:
  """Returns lengths and intervals of the training; None for a closed form.

  Raises:
    ValueError: An option makes no sense.
  """
  recipe = recipes.get(config.codec)
  return recipe and recipe.plan_fn(config, num_rows, scale)


def check(config, plan: loop.Plan | None, shape) -> None:
  """Raises ValueError if the codec does not fit `[N, D]` training vectors."""
  if "codebook_size" in config.model:
    num = min(shape[0], config.init.max_vectors)
    check_range(
      "--config.model.codebook_size",
      config.model.codebook_size,
      *(2, num, f"{num} vectors cannot fill more codewords"),
    )
  if plan is not None:
    recipes.get(config.codec).check_fn(config, plan, shape)


def fit_closed(config, xt_ND, num_rows: int):
  """Fits PQ, OPQ or RQ to the sample: closed form, nothing to resume."""
  x_ND = batches.subsample(
    xt_ND, config.init.max_vectors, config.seed, num_rows=num_rows
  )
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
  """Trains a learned codec to the end: the best parameters, and the vectors.

  Those of an IVF model come with their list. The parameters are None when the
  training was interrupted. Checkpoints lie in `workdir`.
  """
  job = prepare(config, workdir, xt_ND, num_rows, held_out, plan)
  checkpoints = open_checkpoints(workdir, plan)
  writer = writers.Writer(workdir)
  try:
    outcome = run_loop(job, job.start_fn(), plan, num_rows, checkpoints, writer)
    if not outcome.is_done:
      return None, job.vectors
    _, best = checkpoints.restore_best(outcome.state)
    return devices.to_local_devices(best.params), job.vectors
  finally:
    writer.close()
    checkpoints.close()


def prepare(config, *args) -> recipes.Job:
  """Returns the job of a learned codec; the rest is that of its recipe."""
  job = recipes.get(config.codec).prepare_fn(config, *args)
  if not config.train.get("start"):
    return job
  return job._replace(start_fn=functools.partial(_go_on, config, job))


def _go_on(config, job: recipes.Job):
  """The state before the first step, from the parameters of a codec.

  Raises ValueError unless it is one that the configuration could make.
  """
  found = codec_file.load_codec(config.train.start)
  shapes = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  if found.name != config.codec or shapes(found.params) != shapes(
    job.abstract.params
  ):
    raise ValueError(
      f"--config.train.start={config.train.start} is a {found.name} codec of "
      "other sizes than --config.model; give the configuration that it was "
      "trained with."
    )
  spec = registry.get(found.name)
  if spec.is_ivf(found.params):
    centroids_LD = formats.open_vectors(config.ivf.centroids or "")
    own_LD = np.asarray(spec.centroids(found.params))
    if not np.allclose(centroids_LD, own_LD, rtol=1e-4, atol=1e-4):
      raise ValueError(
        f"--config.ivf.centroids={config.ivf.centroids} are other centroids "
        f"than those of {config.train.start}, whose lists stay."
      )
  return job.state_fn(jax.tree.map(jnp.asarray, found.params))


def settings_of(config) -> dict:
  """What a codec keeps of the configuration that trained it, plain values."""
  kept = {n: config[n].to_dict() for n in _KEPT if n in config}
  kept.get("train", {}).pop("start", None)
  return json.loads(json.dumps(kept))


def open_checkpoints(
  workdir: pathlib.Path, plan: loop.Plan, num_latest: int = 2
) -> checkpoints_lib.Checkpoints:
  """Opens the checkpoints of a run, which keeps what its plan says."""
  return checkpoints_lib.Checkpoints(
    workdir / "checkpoints",
    num_latest=num_latest,
    num_evaluated=plan.num_evaluated,
    measure=plan.measure,
    best_of=plan.best_of,
  )


def run_loop(
  job: recipes.Job, state, plan, num_rows: int, checkpoints, writer
) -> loop.Outcome:
  """Runs the training loop from a state; returns its outcome."""
  reader = batches.BatchReader(
    job.vectors,
    plan.seed,
    plan.batch_size,
    num_rows,
    jax.process_index(),
    jax.process_count(),
  )
  return loop.train(
    job.learner,
    job.tx,
    job.schedule,
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

  size = runner.encode_block(codec.spec, codec.tables, codec.rule)
  at = range(held_out.start, held_out.stop)
  return learners.mean_of_rows(errors, rows, size, progress, rows=at)
