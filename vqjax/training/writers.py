"""Where training reports to: JSON lines, and a tracker if one is asked for."""

import contextlib
import importlib
import json
import os
import pathlib
import secrets
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import logging

from vqjax import devices
from vqjax.data import files

TRACKERS = ("none", "tensorboard", "wandb", "trackio")
_PACKAGES = {  # And the extra of vqjax that installs each.
  "tensorboard": ("tensorboardX", "tracking"),
  "wandb": ("wandb", "tracking"),
  "trackio": ("trackio", "trackio"),
}


class Tracker(NamedTuple):
  """Where numbers go besides the JSON lines."""

  log_fn: Callable = lambda step, scalars: None
  close_fn: Callable = lambda: None


class Writer:
  """Appends `{"step", ...}` lines to `metrics.jsonl` of a run folder.

  A run that resumes from `first_step` first drops the lines after it, which
  an interrupted run may have written without keeping their checkpoint. Only
  the first process writes; what the others have to say is the same.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    *,
    first_step: int = 0,
    tracker: Tracker | None = None,
  ):
    is_first = devices.is_first()
    self._path = pathlib.Path(folder) / "metrics.jsonl"
    if not is_first:
      self._path = pathlib.Path(os.devnull)
    kept = [row for row in read_rows(self._path) if row["step"] <= first_step]
    if not first_step:
      kept = []
    # Of training so far, over all processes that worked on the run.
    self.seconds = _seconds(kept)
    self.ends = [row for row in kept if "epoch" in row]  # Of its epochs.
    if is_first:
      with files.atomic_output(self._path, overwrite=True) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    self._file = self._path.open("a")
    self._tracker = tracker or Tracker()

  def write(self, step: int, values: dict) -> None:
    """Appends one line; arrays become lists."""
    plain = {
      name: _rounded(np.asarray(value, np.float64).tolist())
      for name, value in values.items()
    }
    self._file.write(json.dumps({"step": step, **plain}) + "\n")
    self._file.flush()
    scalars = {}
    for name, value in plain.items():
      for i, scalar in enumerate(np.atleast_1d(value)):
        scalars[name if np.ndim(value) == 0 else f"{name}/{i}"] = float(scalar)
    self._tracker.log_fn(step, scalars)

  def close(self) -> None:
    """Flushes and closes the files."""
    self._file.close()
    self._tracker.close_fn()


def seconds(folder: pathlib.Path) -> float:
  """Returns how long the run in a folder has been trained, in all."""
  return _seconds(read_rows(pathlib.Path(folder) / "metrics.jsonl"))


def _seconds(rows: list[dict]) -> float:
  return max([row.get("seconds", 0) for row in rows], default=0)


def _rounded(value):
  """Nine significant digits, of a number or of each in a list."""
  if isinstance(value, list):
    return [_rounded(one) for one in value]
  return float(f"{value:.9g}")


def read_rows(path: pathlib.Path) -> list[dict]:
  """Returns the lines of a `metrics.jsonl`; damaged ones are left out.

  Says how many, unless it is the last one alone: a killed run leaves that.
  """
  path = pathlib.Path(path)
  lines = path.read_bytes().splitlines() if path.exists() else []
  rows = [_parse(line) for line in lines]
  num_damaged = sum(row is None for row in rows[:-1])
  if num_damaged:
    logging.warning(
      "%s has %d damaged lines of %d; they are left out.",
      *(path, num_damaged, len(lines)),
    )
  return [row for row in rows if row is not None]


def _parse(line: bytes) -> dict | None:
  """The row of a line; None if it is none."""
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  is_row = isinstance(row, dict) and type(row.get("step")) is int
  return row if is_row else None


def check_tracker(name: str) -> None:
  """Raises unless the tracker is known and its package is installed."""
  if name not in TRACKERS:
    raise ValueError(
      f"--tracker (train.tracker) must be one of {', '.join(TRACKERS)}; got "
      f"{name!r}."
    )
  if name == "none":
    return
  package, extra = _PACKAGES[name]
  try:
    importlib.import_module(package)
  except ImportError as error:
    raise ImportError(
      f"--tracker={name} needs {package}: pip install 'vqjax[{extra}]'."
    ) from error


def open_tracker(name: str, folder: pathlib.Path, settings: dict) -> Tracker:
  """Opens a tracker of a run folder, in the first process.

  Args:
    name: One of `TRACKERS`.
    folder: The run folder; what the tracker keeps lies below it.
    settings: Of the run, for those who look at it.
  """
  check_tracker(name)
  if name == "none" or not devices.is_first():
    return Tracker()
  folder = pathlib.Path(folder).absolute()
  open_fn = {
    "tensorboard": _open_tensorboard,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
  }[name]
  return open_fn(folder, settings)


def _open_tensorboard(folder: pathlib.Path, settings: dict) -> Tracker:
  import tensorboardX

  del settings
  opened = []

  def log(step, scalars):
    if not opened:  # What an interrupted run has written after it goes.
      path = str(folder / "tensorboard")
      opened.append(tensorboardX.SummaryWriter(path, purge_step=step))
    for name, value in scalars.items():
      opened[0].add_scalar(name, value, step)

  return Tracker(log, lambda: [each.close() for each in opened])


def _run_id(own: pathlib.Path) -> str:
  """The name of the one run of a run folder, however often it resumes."""
  own.mkdir(parents=True, exist_ok=True)
  path = own / "run_id"
  if not path.exists():
    with files.atomic_output(path) as temporary:
      temporary.write_text(secrets.token_hex(8), encoding="utf-8")
  return path.read_text(encoding="utf-8").strip()


def _open_wandb(folder: pathlib.Path, settings: dict) -> Tracker:
  """One run of W&B for one run folder."""
  import wandb

  own = folder / "wandb"
  try:
    run = wandb.init(
      id=_run_id(own),
      name=folder.name,
      dir=str(folder),
      config=settings,
      resume="allow",
      settings=wandb.Settings(silent=True),
    )
  except wandb.errors.Error as error:
    raise ValueError(
      f"wandb could not start: {error} With WANDB_MODE=offline in the "
      f"environment it writes into {own} and needs no network."
    ) from error
  return Tracker(lambda step, scalars: run.log(scalars, step=step), run.finish)


def _open_trackio(folder: pathlib.Path, settings: dict) -> Tracker:
  """One run of Trackio for one run folder, in the local data base.

  `trackio show` finds it there; TRACKIO_SPACE_ID in the environment sends it to
  a Space of Hugging Face instead.
  """
  import trackio

  with contextlib.redirect_stdout(sys.stderr):  # It greets.
    run = trackio.init(
      project=os.environ.get("TRACKIO_PROJECT", "vqjax"),
      name=f"{folder.name}-{_run_id(folder / 'trackio')[:8]}",
      config=settings,
      resume="allow",
      embed=False,
      auto_log_gpu=False,
      auto_log_cpu=False,
    )

  def close():
    with contextlib.redirect_stdout(sys.stderr):
      run.finish()

  return Tracker(lambda step, scalars: run.log(scalars, step=step), close)
