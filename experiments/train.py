r"""Trains a codec from a configuration and writes a run folder.

  python -m experiments.train --config=configs/qinco2_s.py
  python -m experiments.train --config=configs/qinco2_s.py:smoke
  python -m experiments.train --config=configs/qinco2_s.py:bigann1M \
      --config.data.root=/data --workdir=runs/bigann
  python -m experiments.train --config=configs/qinco2_s.py \
      --config.data.train=my.fvecs --config.model.beam_size=8

Ctrl-C or SIGTERM saves and stops; the same command with --resume goes on, to
the same result bit for bit. Every field of the file and of configs/base.py can
be set, as --config.train.num_epochs=10. The run folder ends with
codec.safetensors and codec.json, which evaluate, encode and decode take.
"""

import functools
import json
import os
import pathlib
import shlex
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import config_dict

from experiments.lib import cli, codecs, ivf_lists
from vqjax import devices
from vqjax.codecs import pq, qinco, qinco_loss, registry, rq
from vqjax.core import check_range
from vqjax.data import batches, datasets, files
from vqjax.interop import faiss_io
from vqjax.storage import codec_file
from vqjax.training import checkpoints as checkpoints_lib
from vqjax.training import curves, loop, optimisers, writers

_METRICS = ["loss", "mse", "mse_loss", "preselect_loss"]
SEARCH = ("num_candidates", "beam_size", "num_joint_candidates")


def run(config: config_dict.ConfigDict, workdir: str, *, resume: bool = False):
  """Trains into `workdir`; returns its summary, `None` when interrupted."""
  cli.keep_compiled()
  workdir = pathlib.Path(workdir)
  dataset = _resolve(config)
  xt_ND = datasets.open_split(dataset, "train")
  num_rows, held_out = batches.split(len(xt_ND), config.data.validation_size)
  plan = None
  if config.codec == "qinco":
    _check_options(config)
    plan = _make_plan(config, num_rows, dataset.scale)
  if _is_finished(workdir, config, plan, num_rows, resume):
    logging.info("%s is finished already: nothing to do.", workdir)
    return json.loads((workdir / "summary.json").read_text())
  logging.info(
    "%s: %d training vectors, %d held out, %d dimensions.",
    dataset.name,
    num_rows,
    held_out.stop - held_out.start,
    dataset.dim,
  )
  began = time.monotonic()
  if plan is None:
    params, seconds = _fit_classic(config, xt_ND), 0
  else:
    params, seconds, xt_ND = _train_learned(
      config, workdir, dataset, xt_ND, plan, resume
    )
  if params is None:
    return None
  seconds += time.monotonic() - began
  return _finish(config, workdir, dataset, xt_ND, params, seconds)


def _resolve(config) -> datasets.Dataset:
  names = config.data.to_dict()
  names.pop("validation_size")
  return datasets.resolve(**names)


def _check_options(config) -> None:
  """Raises ValueError for values of `config.train` that make no sense."""
  train = config.train
  for name in ("num_epochs", "epoch_size", "batch_size", "accumulate"):
    check_range(f"train.{name}", train[name], 1, 1 << 40)
  for name in ("log_every", "keep_checkpoints", "cut_patience"):
    check_range(f"train.{name}", train[name], 1, 1 << 40)
  check_range("train.ramp_epochs", train.ramp_epochs, 0, train.num_epochs)
  for name, known in (
    ("redraw", qinco_loss.REDRAWS),
    ("schedule", optimisers.SCHEDULES),
    ("dtype", ("auto", "float32", "bfloat16")),
  ):
    if train[name] not in known:
      raise ValueError(
        f"train.{name} must be one of {', '.join(known)}; got {train[name]!r}."
      )


def _is_finished(workdir, config, plan, num_rows: int, resume: bool) -> bool:
  """Prepares the run folder; refuses to mix two runs."""
  file, new = workdir / "config.json", config.to_dict()
  # What batches and schedule follow from, beside the configuration.
  new["derived"] = {"training_vectors": num_rows}
  if plan is not None:
    new["derived"] |= {
      "vectors_per_step": plan.batch_size,
      "steps_per_epoch": plan.steps_per_epoch,
      "dtype": codecs.product_dtype(config.train.dtype),
    }
  is_finished = (workdir / "summary.json").exists()
  has_begun = file.exists() and (
    is_finished or (workdir / "checkpoints").exists()
  )
  _check_shared(workdir, has_begun)  # Before the first process writes there.
  if not has_begun:
    if resume and not file.exists():
      raise ValueError(
        f"There is no run to resume in {workdir}: it has no config.json. Leave "
        "--resume out to start one."
      )
    if devices.is_first():
      with files.atomic_output(file, overwrite=True) as temporary:
        pathlib.Path(temporary).write_text(json.dumps(new, indent=2))
    devices.gather(0)  # It is there for all.
    _check_shared(workdir, file.exists())
    return False
  old = json.loads(file.read_text())
  if not resume and not (is_finished and old == new):
    way = "Add --resume to go on with it, or choose" if old == new else "Choose"
    raise ValueError(
      f"{workdir} already holds a run{'' if old == new else ' of another'}"
      f"{'' if old == new else ' configuration'}. {way} another --workdir."
    )
  _check_same(old, new, workdir)
  return is_finished


def _check_shared(workdir, is_there: bool) -> None:
  """Raises ValueError unless all processes find the same in the folder."""
  if len(set(devices.gather(is_there))) > 1:
    raise ValueError(
      f"The processes find different files in {workdir}: --workdir must be a "
      "folder that all of them share."
    )


def _check_same(old: dict, new: dict, workdir, prefix: str = "") -> None:
  """Raises ValueError where the configuration of a run was changed."""
  for name in sorted(set(old) | set(new)):
    a, b = old.get(name), new.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      _check_same(a, b, workdir, f"{prefix}{name}.")
    elif a != b:
      raise ValueError(
        f"The run in {workdir} was started with {prefix}{name}={a}, now it is "
        f"{b}. Resume with the same configuration, or choose a new --workdir."
      )


def _sample(config, xt_ND) -> np.ndarray:
  """The training vectors that initialisation sees, `[n, D]` float32."""
  num_rows, _ = batches.split(len(xt_ND), config.data.validation_size)
  return batches.subsample(
    xt_ND, config.init.max_vectors, config.seed, num_rows=num_rows
  )


def _fit_classic(config, xt_ND):
  """Fits PQ or RQ: closed form, nothing to resume."""
  x_ND = _sample(config, xt_ND)
  model = config.model.to_dict()
  rotation = None
  if model.pop("opq", False):
    num_bits = max(model["codebook_size"] - 1, 1).bit_length()
    rotation = faiss_io.train_opq(x_ND, model["num_codes"], num_bits)
    rotation = jnp.asarray(rotation)
  kwargs = {"rotation": rotation} if config.codec == "pq" else {}
  module = {"pq": pq, "rq": rq}[config.codec]
  return module.fit(
    jax.random.key(config.seed),
    jnp.asarray(x_ND),
    num_iterations=config.init.num_iterations,
    **model,
    **kwargs,
  )


def _train_learned(config, workdir, dataset, xt_ND, plan, resume):
  """Trains a QINCo: the best parameters, and seconds of earlier processes.

  And the vectors, an IVF model's with their list. The parameters are None when
  the run was interrupted.
  """
  num_rows, held_out = batches.split(len(xt_ND), config.data.validation_size)
  schedule = _make_schedule(config, plan)
  _check_model(config, schedule, (num_rows, dataset.dim))
  centroids_LD, xt_ND = ivf_lists.prepare(config, workdir, xt_ND, num_rows)
  xv_ND = batches.read_rows(xt_ND, np.arange(held_out.start, held_out.stop))
  make_state = functools.partial(_make_state, config, schedule, centroids_LD)
  abstract = jax.eval_shape(
    make_state, jax.ShapeDtypeStruct((num_rows, xt_ND.shape[1]), jnp.float32)
  )
  state = None
  if not (workdir / "checkpoints").exists():
    state = make_state(jnp.asarray(_sample(config, xt_ND)))
  checkpoints = checkpoints_lib.Checkpoints(
    workdir / "checkpoints", num_latest=config.train.keep_checkpoints
  )
  step = checkpoints.latest() if resume else None
  if step is not None:
    state = checkpoints.restore(step, devices.abstract(abstract))
    logging.info("Going on from step %d of %d.", step, plan.total_steps)
  elif state is None:  # Killed before the first checkpoint.
    state = make_state(jnp.asarray(_sample(config, xt_ND)))
  learner, tx = _make_learner(config, xv_ND, schedule)
  reader = batches.BatchReader(
    xt_ND,
    config.seed,
    plan.batch_size,
    num_rows,
    jax.process_index(),
    jax.process_count(),
  )
  writer = writers.Writer(
    workdir, first_step=step or 0, tensorboard=config.train.tensorboard
  )
  try:
    outcome = loop.train(
      learner,
      tx,
      schedule,
      state,
      reader,
      plan,
      checkpoints=checkpoints,
      writer=writer,
    )
    if devices.is_first():
      curves.plot_curves(workdir, scale=dataset.scale, unit=_unit(dataset))
    if not outcome.is_done:
      logging.warning(
        "Stopped at step %d of %d. To go on, run the same command with "
        "--resume.",
        int(outcome.state.step),
        plan.total_steps,
      )
      return None, writer.seconds, xt_ND
    best = checkpoints.best()
    logging.info("The best validation error is that of step %d.", best)
    params = checkpoints.restore(best, outcome.state).params
    return devices.local(params), writer.seconds, xt_ND
  finally:
    writer.close()
    checkpoints.close()


def _make_plan(config, num_rows: int, scale: float) -> loop.Plan:
  train = config.train
  batch_size = train.batch_size * jax.device_count() * train.accumulate
  if num_rows < batch_size:
    raise ValueError(
      f"A step takes {batch_size} vectors (train.batch_size x devices x "
      f"train.accumulate), but there are only {num_rows} to train on. Lower "
      "--config.train.batch_size or --config.data.validation_size."
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


def _make_schedule(config, plan):
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


def _make_state(config, schedule, centroids_LD, x_ND):
  sizes = {k: v for k, v in config.model.items() if k not in SEARCH}
  start = {k: v for k, v in config.init.items() if k != "max_vectors"}
  if centroids_LD is not None:
    x_ND, lists_N = ivf_lists.split(x_ND)
    start |= dict(centroids_LD=centroids_LD, lists_N=lists_N)
  params = qinco_loss.init(jax.random.key(config.seed), x_ND, **sizes, **start)
  return loop.make_state(
    params,
    _make_tx(config, schedule),
    qinco_loss.empty_stats(params),
    _METRICS,
    qinco_loss.frozen,
  )


def _check_model(config, schedule, shape) -> None:
  """Raises ValueError where model and searches do not fit `[N, D]` vectors."""
  make_state = functools.partial(_make_state, config, schedule, None)
  # Without lists, which change nothing here and may take long to make.
  abstract = jax.eval_shape(
    make_state, jax.ShapeDtypeStruct(shape, jnp.float32)
  )
  check_search(config, abstract.params)


def check_search(config, params) -> None:
  """Raises ValueError unless the searches of the config fit the model."""
  for name in ("model", "encode"):
    sizes = [config[name][knob] for knob in SEARCH]
    try:
      qinco.check_search(params, *sizes)
    except ValueError as error:
      raise ValueError(f"In config.{name}: {error}") from error


def _make_learner(config, xv_ND, schedule):
  """Returns what the loop needs of a QINCo, and its optimiser."""
  knobs = {name: config.model[name] for name in SEARCH}

  def loss(params, key, x_ND, **options):
    return qinco_loss.loss(params, key, *_split(params, x_ND), **options)

  def errors(tables, x_ND):
    x_ND, lists_N = _split(tables, x_ND)
    codes_NM = qinco.encode(tables, x_ND, lists_N, **knobs)
    return jnp.sum((x_ND - qinco.decode(tables, codes_NM)) ** 2, axis=-1)

  prepare_fn, errors_fn = jax.jit(qinco.prepare), devices.data_parallel(errors)

  def validate(params):
    tables = prepare_fn(devices.local(params))
    codec = codecs.Codec("qinco", qinco, tables, {}, "")
    num_rows = codecs.block_rows(codec, knobs) * jax.local_device_count()
    return codecs.mean_of_rows(
      functools.partial(errors_fn, tables), xv_ND, num_rows
    )

  learner = loop.Learner(
    loss_fn=functools.partial(
      loss,
      dtype=codecs.product_dtype(config.train.dtype),
      **knobs,
    ),
    join_stats_fn=qinco_loss.join_stats,
    merge_stats_fn=qinco_loss.merge_stats,
    end_epoch_fn=functools.partial(
      qinco_loss.end_epoch, redraw=config.train.redraw
    ),
    usage_fn=qinco_loss.usage,
    validate_fn=validate,
    frozen_fn=qinco_loss.frozen,
  )
  return learner, _make_tx(config, schedule)


def _split(params, rows):
  """Vectors `[N, D]`, and their lists `[N]` or None, of what is read."""
  is_ivf = getattr(params, "is_ivf", False)
  return ivf_lists.split(rows) if is_ivf else (rows, None)


def _unit(dataset) -> str:
  return "" if dataset.scale == 1 else f" (x {dataset.scale:g})"


def _finish(config, workdir, dataset, xt_ND, params, seconds):
  """Writes the portable codec and the summary, and says what to do next."""
  _, held_out = batches.split(len(xt_ND), config.data.validation_size)
  is_ivf = getattr(params, "is_ivf", False)
  assign = ivf_lists.split if is_ivf else "auto"  # The lists are known.
  module = registry.get(config.codec)
  codec = codecs.Codec(config.codec, module, module.prepare(params), {}, "")
  knobs = config.encode.to_dict()
  encode_fn, block_size = codecs.make_encode_fn(codec, knobs, assign=assign)
  decode_fn = codecs.make_decode_fn(codec)

  def errors(rows):
    x_ND, _ = _split(params, rows)
    return jnp.sum((x_ND - decode_fn(encode_fn(rows))) ** 2, axis=-1)

  xv_ND = batches.read_rows(xt_ND, np.arange(held_out.start, held_out.stop))
  with cli.progress(len(devices.share(len(xv_ND))), "validate") as done:
    validation = codecs.mean_of_rows(errors, xv_ND, block_size, done)
  info = {
    "encode": knobs,
    "metric": dataset.metric,
    "scale": dataset.scale,
    "data": _data_record(config, held_out.stop - held_out.start),
    "training": {"seconds": round(seconds, 1), "validation_mse": validation},
  }
  summary = {
    "codec": str(workdir / "codec.safetensors"),
    "validation_mse": validation,
    "scale": dataset.scale,
    "encode": knobs,
    "seconds": round(seconds, 1),
  }
  if not devices.is_first():
    return summary
  codec_file.save_codec(
    workdir, config.codec, params, info=info, overwrite=True
  )
  with files.atomic_output(workdir / "summary.json", overwrite=True) as file:
    pathlib.Path(file).write_text(json.dumps(summary, indent=2))
  logging.info(
    "Done in %.0f s. Validation MSE%s, encoded with %s: %.4f\n"
    "Written to %s: %s\nNext:\n"
    "  python -m experiments.evaluate --codec=%s%s%s",
    seconds,
    _unit(dataset),
    ", ".join(f"{k}={v}" for k, v in knobs.items()) or "the only search",
    validation * dataset.scale,
    workdir,
    ", ".join(sorted(p.name for p in workdir.iterdir())),
    shlex.quote(str(workdir)),
    "" if dataset.base else " --split=validation",
    _to_search(workdir, dataset) if codec.is_ivf else "",
  )
  return summary


def _to_search(workdir, dataset) -> str:
  """Commands that make an index of a codec with lists."""
  at = lambda name: str(workdir / name)
  codes, decoders = at("codes.npy"), at("decoders.safetensors")
  base = [f"--data={dataset.base or 'BASE'}", f"--output={codes}"]
  if dataset.num_base:
    base.insert(1, f"--num_vectors={dataset.num_base}")
  commands = {
    "encode": base,
    "pairwise_decoder": [f"--data={dataset.train}", f"--output={decoders}"],
    "build_index": [
      *(f"--codes={codes}", f"--decoders={decoders}"),
      f"--output={at('index.faiss')}",
    ],
  }
  return "".join(
    f"\n  python -m experiments.{name} "
    f"{shlex.join([f'--codec={workdir}', *options])}"
    for name, options in commands.items()
  )


def _data_record(config, num_held_out: int) -> dict:
  """`config.data`, so that it can be found from any folder."""
  data = config.data.to_dict() | {"validation_size": num_held_out}
  paths = [name for name in datasets.SPLITS if data[name]]
  data |= {name: os.path.abspath(data[name]) for name in paths}
  return {**data, "name": None} if paths else data


if __name__ == "__main__":
  cli.run_config(
    run,
    {"resume": cli.Option(bool, False, "Go on with the run in --workdir.")},
    "Configuration, e.g. configs/qinco2_s.py[:smoke|:bigann1M].",
    how_to_go_on="To go on, add --resume to the same command.",
    multihost=True,
  )
