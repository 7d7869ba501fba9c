r"""Trains a codec from a configuration and writes a run folder.

  python -m experiments.train --config=configs/qinco2_s.py
  python -m experiments.train --config=configs/qinco2_s.py:smoke
  python -m experiments.train --config=configs/qinco2_s.py:bigann1M \
      --config.data.root=/data --workdir=runs/bigann
  python -m experiments.train --config=configs/qinco2_s.py \
      --config.data.train=my.fvecs --config.model.beam_size=8

Ctrl-C or SIGTERM saves and stops. The same command run again continues from the
last checkpoint, also after a kill, to the same result bit for bit; of a run
that is finished it says so. Every field of the file and of configs/base.py can
be set, as --config.train.num_epochs=10. The run folder ends with
codec.safetensors and codec.json, which evaluate, encode and decode take; of a
run that has not finished they take the best checkpoint. --finish ends such a
run with it.

More epochs can be asked of a run, finished or not, by a greater
--config.train.num_epochs. Training continues from the last checkpoint with the
learning rate that the longer schedule has there: with ramp_cosine it rises
again from the end of the old schedule.
"""

import functools
import pathlib
import shlex
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from ml_collections import config_dict

from experiments.lib import cli, codecs, ivf_lists, run_folder, train_run
from vqjax import devices
from vqjax.codec import Codec
from vqjax.codecs import pq, qinco, qinco_loss, rq, runner
from vqjax.codecs.rule import SearchRule
from vqjax.core import check_range
from vqjax.data import batches, datasets, files
from vqjax.interop import faiss_io
from vqjax.storage import codec_file
from vqjax.training import checkpoints as checkpoints_lib
from vqjax.training import curves, loop, optimisers, writers

_METRICS = ["loss", "mse", "mse_loss", "preselect_loss"]
SEARCH = ("num_candidates", "beam_size", "num_joint_candidates")


def run(
  config: config_dict.ConfigDict,
  workdir: str,
  *,
  resume: bool = False,
  finish: bool = False,
):
  """Trains into `workdir`; returns its summary, `None` when interrupted.

  A run that was begun there is continued. `resume` continues one that `finish`
  has ended early; `finish` ends one with its best checkpoint.

  Raises:
    ValueError: The folder holds another run, or another process is at work.
  """
  cli.keep_compiled()
  workdir = pathlib.Path(workdir)
  dataset = _resolve(config)
  xt_ND = datasets.open_split(dataset, "train")
  look = functools.partial(
    train_run.look,
    *(config, workdir, dataset, xt_ND),
    resume=resume,
    finish=finish,
  )
  if (summary := look().summary) is not None:
    return _say_finished(workdir, summary)
  with run_folder.locked(workdir):
    this = look()  # Again: another process may have finished it.
    if this.summary is not None:
      return _say_finished(workdir, this.summary)
    return _train(config, workdir, dataset, xt_ND, this, finish)


def _say_finished(workdir, summary: dict) -> dict:
  logging.info("%s is finished already: nothing to do.", workdir)
  return summary


def _train(config, workdir, dataset, xt_ND, this, finish: bool):
  """`run`, with the folder locked."""
  batches.check_training(xt_ND, this.num_rows)
  _check_words(config, this.num_rows)
  if this.plan is not None:
    schedule = _make_schedule(config, this.plan)
    _check_model(config, schedule, (this.num_rows, dataset.dim))
  train_run.begin(workdir, this)
  logging.info(
    "%s: %d training vectors, %d held out, %d dimensions.",
    dataset.name,
    this.num_rows,
    this.held_out.stop - this.held_out.start,
    dataset.dim,
  )
  began = time.monotonic()
  ended = {"seconds": 0}
  if this.plan is None:
    params = _fit_classic(config, xt_ND, this.num_rows)
  else:
    params, ended, xt_ND = _train_learned(
      config, workdir, dataset, xt_ND, this, schedule, finish
    )
  if params is None:
    return None
  ended["seconds"] = round(ended["seconds"] + time.monotonic() - began, 1)
  return _finish(config, workdir, dataset, xt_ND, params, this, ended)


def _resolve(config) -> datasets.Dataset:
  names = config.data.to_dict()
  names.pop("validation_size")
  return datasets.resolve(**names)


def _check_words(config, num_rows: int) -> None:
  """Raises ValueError where the vectors cannot fill the codebooks."""
  num = min(num_rows, config.init.max_vectors)
  check_range(
    "--config.model.codebook_size",
    config.model.codebook_size,
    *(2, num, f"{num} vectors cannot fill more codewords"),
  )


def _sample(config, xt_ND, num_rows: int) -> np.ndarray:
  """The training vectors that initialisation sees, `[n, D]` float32."""
  return batches.subsample(
    xt_ND, config.init.max_vectors, config.seed, num_rows=num_rows
  )


def _fit_classic(config, xt_ND, num_rows: int):
  """Fits PQ or RQ: closed form, nothing to resume."""
  x_ND = _sample(config, xt_ND, num_rows)
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


def _train_learned(
  config, workdir, dataset, xt_ND, this, schedule, finish: bool
):
  """Trains a QINCo: the best parameters, how it ended, and the vectors.

  Those of an IVF model come with their list. The parameters are None when the
  run was interrupted.
  """
  num_rows, held_out, plan = this.num_rows, this.held_out, this.plan
  centroids_LD, xt_ND = ivf_lists.prepare(config, workdir, xt_ND, num_rows)
  xv_ND = batches.read_rows(xt_ND, np.arange(held_out.start, held_out.stop))
  make_state = functools.partial(_make_state, config, schedule, centroids_LD)
  start = lambda: make_state(jnp.asarray(_sample(config, xt_ND, num_rows)))
  abstract = jax.eval_shape(
    make_state, jax.ShapeDtypeStruct((num_rows, xt_ND.shape[1]), jnp.float32)
  )
  # Before there are checkpoints, so that a start that fails leaves none.
  state = None if (workdir / "checkpoints").exists() else start()
  checkpoints = checkpoints_lib.Checkpoints(
    workdir / "checkpoints", num_latest=config.train.keep_checkpoints
  )
  step, writer = 0, None
  try:
    if finish:
      like = devices.abstract(abstract)
      best = _best(workdir, checkpoints, like, writers.seconds(workdir))
      best[1]["is_early"] = best[1]["last_step"] < plan.total_steps
      return (*best, xt_ND)
    found = checkpoints.restore_latest(devices.abstract(abstract))
    if found is not None:
      step, state = found
      logging.info("Going on from step %d of %d.", step, plan.total_steps)
    state = start() if state is None else state  # Killed before the first.
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
      workdir, first_step=step, tensorboard=config.train.tensorboard
    )
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
        "Stopped at step %d of %d. To go on, run the same command again.",
        int(outcome.state.step),
        plan.total_steps,
      )
      return None, {}, xt_ND
    best = _best(workdir, checkpoints, outcome.state, writer.seconds)
    return (*best, xt_ND)
  finally:
    if writer is not None:
      writer.close()
    checkpoints.close()


def _best(workdir, checkpoints, like, seconds: float):
  """Parameters of the best checkpoint, and how the run ended.

  `seconds` are those of earlier processes.
  """
  last, found = checkpoints.latest(), checkpoints.restore_best(like)
  if found is None:
    raise ValueError(
      f"The run in {workdir} has no checkpoint yet to finish it with; run the "
      "same command without --finish."
    )
  step, state = found
  logging.info("The best validation error is that of step %d.", step)
  ended = {"step": step, "last_step": last, "seconds": seconds}
  return devices.local(state.params), ended


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
    rule = SearchRule(**{knob: config[name][knob] for knob in SEARCH})
    try:
      qinco.check_rule(params, rule)
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
    num_rows = runner.encode_block(qinco.CODEC, tables, SearchRule(**knobs))
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


def _finish(config, workdir, dataset, xt_ND, params, this, ended: dict):
  """Writes the portable codec and the summary, and says what to do next."""
  held_out, seconds = this.held_out, ended["seconds"]
  is_ivf = getattr(params, "is_ivf", False)
  assign = ivf_lists.split if is_ivf else "auto"  # The lists are known.
  knobs = config.encode.to_dict()
  codec = Codec(config.codec, params, {"encode": knobs})
  encode_fn, block_size = codecs.make_encode_fn(
    codec, codec.rule, assign=assign
  )
  decode_fn = codecs.make_decode_fn(codec)

  def errors(rows):
    x_ND, _ = _split(params, rows)
    return jnp.sum((x_ND - decode_fn(encode_fn(rows))) ** 2, axis=-1)

  xv_ND = batches.read_rows(xt_ND, np.arange(held_out.start, held_out.stop))
  with cli.progress(len(devices.share(len(xv_ND))), "validate") as done:
    validation = codecs.mean_of_rows(errors, xv_ND, block_size, done)
  num_held_out = held_out.stop - held_out.start
  training = {"seconds": seconds, "validation_mse": validation}
  info = train_run.codec_info(config, dataset, num_held_out)
  info["training"] = training | {"num_held_out": num_held_out}
  summary = {
    "codec": str(workdir / "codec.safetensors"),
    "validation_mse": validation,
    "scale": dataset.scale,
    "encode": knobs,
    "num_held_out": num_held_out,
    **ended,
  }
  if not devices.is_first():
    return summary
  codec_file.save_codec(
    workdir, config.codec, params, info=info, overwrite=True
  )
  files.write_json(workdir / run_folder.SUMMARY_NAME, summary, overwrite=True)
  logging.info(
    "Done in %.0f s. MSE%s of the %d held-out vectors, encoded with %s: %s\n"
    "Written to %s: %s\nNext:\n"
    "  python -m experiments.evaluate --codec=%s%s%s",
    seconds,
    _unit(dataset),
    num_held_out,
    ", ".join(f"{k}={v}" for k, v in knobs.items()) or "the only search",
    cli.number(validation * dataset.scale),
    workdir,
    ", ".join(
      sorted(
        p.name for p in workdir.iterdir() if p.name != run_folder.LOCK_NAME
      )
    ),
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


if __name__ == "__main__":
  cli.run_config(
    run,
    {
      "resume": cli.Option(
        bool,
        False,
        "Also go on with a run that --finish has ended early. Any other run "
        "goes on without it.",
      ),
      "finish": cli.Option(
        bool,
        False,
        "End the run in --workdir: its best checkpoint becomes the codec.",
      ),
    },
    "Name or file of a configuration: qinco2_s[:smoke|:bigann1M], ./mine.py.",
    multihost=True,
  )
