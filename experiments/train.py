r"""Trains a codec from a configuration and writes a run folder.

  vqjax train --config=qinco2_s
  vqjax train --config=qinco2_s:smoke
  vqjax train --config=qinco2_s:bigann1M \
      --config.data.root=/data --workdir=runs/bigann
  vqjax train --config=qinco2_s \
      --config.data.train=my.fvecs --config.model.beam_size=8

Ctrl-C or SIGTERM saves and stops. The same command run again resumes from the
last checkpoint, also after a kill, to the same result bit for bit, or says that
the run is finished. Every field of the configuration can be set, for example
--config.train.num_epochs=10; --print_config lists them.

A finished run folder holds codec.safetensors and codec.json, which evaluate,
encode and decode read. Of an unfinished run they read the best checkpoint;
--finish ends such a run with it.

A greater --config.train.num_epochs extends a run, finished or not. Training
resumes from the last checkpoint with the learning rate that the longer schedule
has there: with ramp_cosine it rises again.
"""

import functools
import pathlib
import shlex
import time

from absl import logging
from ml_collections import config_dict

from experiments.lib import cli, plan_training, run_folder, train_run
from experiments.lib import plan as plan_lib
from vqjax import devices, fitting
from vqjax.codec import Codec
from vqjax.data import batches, datasets, files
from vqjax.storage import codec_file
from vqjax.training import curves, writers


def run(
  config: config_dict.ConfigDict | str,
  workdir,
  *,
  resume: bool = False,
  finish: bool = False,
  plan: bool = False,
):
  """Trains into `workdir`; returns its summary, `None` when interrupted.

  `config` is a configuration, or its name or file, as --config takes it. A run
  that was begun there is continued. `resume` continues one that `finish` has
  ended early; `finish` ends one with its best checkpoint. `plan` only says what
  training would take, see `plan.report`.

  Raises:
    ValueError: The folder holds another run, or another process is at work.
  """
  cli.keep_compiled()
  config, workdir = cli.config_of(config), pathlib.Path(workdir)
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
  if plan:
    return plan_training.run(config, xt_ND, dataset, look())
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
  fitting.check(config, this.plan, (this.num_rows, dataset.dim))
  train_run.begin(workdir, this)
  logging.info(
    "%s: %d training vectors, %d held out, %d dimensions.",
    dataset.name,
    this.num_rows,
    len(xt_ND) - this.num_rows,
    dataset.dim,
  )
  if this.num_rows < dataset.dim:
    logging.warning(
      "There are fewer training vectors than dimensions: is the array "
      "transposed? Each row is a vector."
    )
  began = time.monotonic()
  ended = {"seconds": 0}
  if this.plan is None:
    params = fitting.fit_closed(config, xt_ND, this.num_rows)
  else:
    params, ended, xt_ND = _train_learned(
      config, workdir, dataset, xt_ND, this, finish
    )
  if params is None:
    return None
  ended["seconds"] = round(ended["seconds"] + time.monotonic() - began, 1)
  return _finish(config, workdir, dataset, xt_ND, params, this, ended)


def _resolve(config) -> datasets.Dataset:
  names = config.data.to_dict()
  names.pop("validation_size")
  return datasets.resolve(**names)


def _train_learned(config, workdir, dataset, xt_ND, this, finish: bool):
  """Trains a learned codec: its best parameters, how it ended, the vectors.

  Those of an IVF model come with their list. The parameters are None when the
  run was interrupted.
  """
  num_rows, plan = this.num_rows, this.plan
  tracker = writers.open_tracker(
    "none" if finish else config.train.tracker, workdir, this.record
  )
  job = fitting.prepare(config, workdir, xt_ND, num_rows, this.held_out, plan)
  like, xt_ND = devices.abstract(job.abstract), job.vectors
  # Before there are checkpoints, so that a start that fails leaves none.
  has_begun = (workdir / "checkpoints").exists()
  state = None if has_begun else job.start_fn()
  checkpoints = fitting.open_checkpoints(
    workdir, plan, config.train.keep_checkpoints
  )
  step, writer = 0, None
  try:
    if finish:
      best = _best(workdir, checkpoints, like, plan, writers.seconds(workdir))
      best[1]["is_early"] = best[1]["last_step"] < plan.total_steps
      return (*best, xt_ND)
    found = checkpoints.restore_latest(like)
    if found is not None:
      step, state = found
      logging.info("Resuming from step %d of %d.", step, plan.total_steps)
    if state is None:  # Killed before the first checkpoint.
      state = job.start_fn()
    writer = writers.Writer(workdir, first_step=step, tracker=tracker)
    outcome = fitting.run_loop(job, state, plan, num_rows, checkpoints, writer)
    if devices.is_first():
      curves.plot_curves(workdir, scale=dataset.scale, unit=_unit(dataset))
    if not outcome.is_done:
      logging.warning(
        "Stopped at step %d of %d. Run the same command again to resume.",
        int(outcome.state.step),
        plan.total_steps,
      )
      return None, {}, xt_ND
    best = _best(workdir, checkpoints, outcome.state, plan, writer.seconds)
    return (*best, xt_ND)
  finally:
    if writer is not None:
      writer.close()
    checkpoints.close()


def _best(workdir, checkpoints, like, plan, seconds: float):
  """Parameters of the best checkpoint, and how the run ended.

  `seconds` are of earlier processes.
  """
  last, found = checkpoints.latest(), checkpoints.restore_best(like)
  if found is None:
    raise ValueError(
      f"The run in {workdir} has no checkpoint yet to finish it with; run the "
      "same command without --finish."
    )
  step, state = found
  logging.info(
    "The checkpoint with the best %s, of step %d, becomes the codec.",
    *(plan.measure.replace("_", " "), step),
  )
  ended = {"step": step, "last_step": last, "seconds": seconds}
  return devices.to_local_devices(state.params), ended


def _unit(dataset) -> str:
  return "" if dataset.scale == 1 else f" (x {dataset.scale:g})"


def _finish(config, workdir, dataset, xt_ND, params, this, ended: dict):
  """Writes the portable codec and the summary, and says what to do next."""
  held_out, num_rows, seconds = this.held_out, this.num_rows, ended["seconds"]
  began = time.monotonic()
  knobs = _rule_of(workdir) or config.encode.to_dict()
  codec = Codec(config.codec, params, {"encode": knobs})
  num_mine = len(devices.process_rows(held_out.stop - held_out.start))
  with cli.progress(num_mine, "validate") as done:
    validation = fitting.held_out_mse(codec, xt_ND, held_out, done)
  num_held_out = len(xt_ND) - num_rows
  training = {"seconds": seconds, "validation_mse": validation}
  training |= {"seed": config.seed}
  info = train_run.codec_info(config, dataset, num_held_out)
  info |= {"encode": knobs}
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
  sizes = ", ".join(f"{k}={v}" for k, v in knobs.items())
  logging.info(
    "Trained in %.0f s, validated in %.0f s. MSE%s of the %d %s vectors"
    "%s: %s\n"
    "Written to %s: %s\nNext:\n"
    "  vqjax evaluate --codec=%s%s%s%s",
    seconds,
    time.monotonic() - began,
    _unit(dataset),
    *((num_held_out, "held-out") if num_held_out else (num_rows, "training")),
    f", encoded with {sizes}" if sizes else "",
    cli.number(validation * dataset.scale),
    workdir,
    ", ".join(
      sorted(
        p.name for p in workdir.iterdir() if p.name != run_folder.LOCK_NAME
      )
    ),
    shlex.quote(str(workdir)),
    _to_measure(dataset, num_held_out),
    _to_search(workdir, dataset) if codec.is_ivf else "",
    "" if num_held_out else _to_ids(workdir, dataset),
  )
  return summary


def _to_measure(dataset, num_held_out: int) -> str:
  """What `evaluate` is to measure, if the set has no base of its own."""
  if dataset.base:
    return ""
  return " --split=validation" if num_held_out else " --data=BASE-VECTORS"


def _rule_of(workdir) -> dict | None:
  """The search stored with the codec of a run that is extended, else None.

  `tradeoff --write` may have changed it.
  """
  try:
    found = codec_file.load_codec(workdir / codec_file.TENSORS_NAME)
  except (OSError, ValueError):  # There is none, or it is damaged.
    return None
  if found.ranker is not None:
    logging.warning(
      "The ranker of the codec in %s was fitted to its network of before: both "
      "it and its search are dropped. `vqjax tradeoff --write` fits another.",
      workdir,
    )
    return None
  return found.info.get("encode")


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
    f"\n  vqjax {name} {shlex.join([f'--codec={workdir}', *options])}"
    for name, options in commands.items()
  )


def _to_ids(workdir, dataset) -> str:
  """The command that makes ids of the items, if these were all learned from."""
  data, ids = dataset.base or dataset.train, workdir / "ids"
  options = [f"--codec={workdir}", f"--data={data}", f"--output={ids}"]
  return f"\n  vqjax semantic_ids {shlex.join(options)}"


if __name__ == "__main__":
  cli.run_config(
    run,
    {
      "resume": cli.Option(
        bool,
        False,
        "Also resume a run that --finish has ended early. Any other run "
        "resumes without it.",
      ),
      "finish": cli.Option(
        bool,
        False,
        "End the run in --workdir: its best checkpoint becomes the codec.",
      ),
      "plan": plan_lib.OPTION,
    },
    "Name or file of a configuration: qinco2_s[:smoke|:bigann1M], ./mine.py.",
    multihost=True,
  )
