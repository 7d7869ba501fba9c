"""What a training run is: its plan, its record, and whether it may resume.

The same command run again resumes, or says that all is done. A run refuses
other training vectors and other settings, except for more epochs, what is only
reported, and another split of the same batch over devices.
"""

import functools
import os
import pathlib
from typing import NamedTuple

from absl import logging

from experiments.lib import run_folder
from vqjax import devices, fitting, recipe_qinco, recipes
from vqjax.data import batches, datasets, files, formats
from vqjax.storage import codec_file
from vqjax.training import loop

# Settings that may differ: what files hold is compared instead of their names,
# how many vectors are held out instead of how that was asked for.
_FREE = (
  *("data.name", "data.root", *(f"data.{name}" for name in datasets.SPLITS)),
  *("data.num_train", "data.num_base", "data.num_queries"),
  *("data.validation_size", "ivf.centroids", "derived.codec"),
  *("train.log_every", "train.checkpoint_minutes", "train.keep_checkpoints"),
  *("train.tracker", "train.save_limit", "train.start"),
  "train.tensorboard",  # Of earlier versions.
)
_SAYS = {  # Of names that are no flags.
  "derived.data.train": "the checksum of the vectors in --config.data.train",
  "derived.data.start": "the codec in --config.train.start",
  "derived.data.centroids": "the checksum of --config.ivf.centroids",
  "derived.training_vectors": "the number of training vectors "
  "(--config.data.num_train)",
  "derived.held_out": "the number of held-out vectors "
  "(--config.data.validation_size)",
  "derived.vectors_per_step": "vectors per step (--config.train.batch_size x "
  "devices x --config.train.accumulate)",
  "derived.noise_share": "the share of noise (--config.train.noise_share; runs "
  "of earlier versions had 0)",
  "derived.dtype": "the type of the products (--config.train.dtype)",
  "train.num_epochs": "--config.train.num_epochs (more can be asked for, "
  "--finish ends a run early)",
}


class Run(NamedTuple):
  """A run as this command wants it, and what of it is there."""

  record: dict  # Contents of config.json.
  plan: loop.Plan | None  # None for codecs without steps.
  num_rows: int
  held_out: slice
  summary: dict | None  # Of a run that is finished.
  has_begun: bool


def look(config, workdir: pathlib.Path, dataset, xt_ND, **wishes) -> Run:
  """Compares the command with what is in the folder; changes nothing.

  `wishes` are the flags `resume` and `finish`.

  Raises:
    ValueError: The folder holds another run, or there is none to finish.
  """
  run_folder.check_shared(workdir)
  old = run_folder.read_config(workdir)
  num_rows, held_out = _split(config, len(xt_ND), old)
  plan = fitting.make_plan(config, num_rows, dataset.scale)
  record = _record(config, dataset, xt_ND, plan, num_rows)
  if old is None:
    if wishes.get("finish"):
      raise ValueError(f"There is no run to finish in {workdir}.")
    return Run(record, plan, num_rows, held_out, None, False)
  summary = run_folder.read_summary(workdir)
  has_more = _check_same(workdir, old, record)
  is_early = summary is not None and summary.get("is_early", False)
  if has_more or (is_early and wishes.get("resume")):
    summary = None
  elif is_early:
    logging.info(
      "--finish has ended the run in %s early; --resume trains the rest.",
      workdir,
    )
  return Run(record, plan, num_rows, held_out, summary, True)


def begin(workdir: pathlib.Path, run: Run) -> None:
  """Gives the folder to the run; to be called under its lock."""
  summary = workdir / run_folder.SUMMARY_NAME
  # First: a run of more epochs must never look finished.
  if devices.is_first() and summary.exists():
    if run_folder.read_summary(workdir) is None:
      logging.warning("%s is damaged: it is written again.", summary)
    summary.unlink()
  run_folder.write_config(workdir, run.record)


def _split(config, num: int, old: dict | None) -> tuple[int, slice]:
  """As `batches.split`; a run that has begun keeps what it holds out."""
  size = config.data.validation_size
  if old is not None and size is None:
    size = old.get("derived", {}).get("held_out")
    if size is None:  # Of an earlier version, which always wrote a number.
      size = old.get("data", {}).get("validation_size")
  return batches.split(num, size)


def _record(config, dataset, xt_ND, plan, num_rows: int) -> dict:
  """Contents of config.json: settings, and what follows from them and data."""
  num_held_out = len(xt_ND) - num_rows
  made_of = {"train": files.identify(xt_ND)}
  if (ivf := config.get("ivf")) and ivf.centroids:
    made_of["centroids"] = files.identify(formats.open_vectors(ivf.centroids))
  if "train" in config and config.train.get("start"):
    made_of["start"] = codec_file.load_codec(config.train.start).fingerprint
  derived = {
    "training_vectors": num_rows,
    "held_out": num_held_out,
    "data": made_of,
  }
  if plan is not None:
    derived |= {
      "vectors_per_step": plan.batch_size,
      "steps_per_epoch": plan.steps_per_epoch,
      "codec": {  # With a checkpoint it is a codec.
        "name": config.codec,
        "static": recipes.get(config.codec).static_fn(config),
        "info": codec_info(config, dataset, num_held_out),
      },
    }
    if "dtype" in config.train:
      derived["dtype"] = recipes.product_dtype(config.train.dtype)
    if "noise_share" in config.train:
      derived["noise_share"] = recipe_qinco.noise_share(
        config, plan, (num_rows, xt_ND.shape[1])
      )
  return config.to_dict() | {"derived": derived}


def codec_info(config, dataset, num_held_out: int) -> dict:
  """What a codec of this run says of itself; its data from any folder."""
  data = config.data.to_dict() | {"validation_size": num_held_out}
  paths = [name for name in datasets.SPLITS if data[name]]
  data |= {name: os.path.abspath(data[name]) for name in paths}
  return {
    "encode": config.encode.to_dict(),
    "metric": dataset.metric,
    "scale": dataset.scale,
    **fitting.levels_info(config),
    "config": fitting.settings_of(config),
    "data": {**data, "name": None} if paths else data,
  }


def _check_same(workdir, old: dict, new: dict) -> bool:
  """Whether there is more to do; refuses what differs otherwise.

  That is more epochs, a later early stop, or another figure that chooses the
  best checkpoint.
  """
  found = run_folder.differences(old, new)
  take = functools.partial(run_folder.take, found)
  take(*_FREE)
  # A switch that an earlier version did not have was off.
  is_off = lambda both: all(value in (None, False) for value in both)
  take(*(name for name, both in found.items() if is_off(both)))
  known = old.get("derived", {})
  for name in ("data", "held_out"):  # Earlier versions do not say it.
    if name not in known:
      take(f"derived.{name}")
  if "derived.vectors_per_step" not in found:
    take("train.batch_size", "train.accumulate")
  elif "train.batch_size" in found or "train.accumulate" in found:
    take("derived.vectors_per_step")
  if "derived.steps_per_epoch" not in found:
    take("train.epoch_size")
  take("derived.steps_per_epoch")  # It follows from what is compared.
  if "derived.dtype" not in found:
    take("train.dtype")
  elif "train.dtype" in found:
    take("derived.dtype")
  before, wanted = found.get("train.num_epochs", (1, 1))
  has_more = wanted > before
  if has_more:
    take("train.num_epochs")
  before, wanted = found.get("train.early_stop", (1, 1))
  has_more |= bool(before) and not 0 < wanted <= before
  has_more |= "train.best" in found
  take("train.early_stop", "train.best")
  run_folder.refuse(workdir, found, _SAYS)
  return has_more
