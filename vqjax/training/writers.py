"""Where training reports to: JSON lines and TensorBoard."""

import json
import os
import pathlib

import numpy as np
from absl import logging

from vqjax import devices
from vqjax.data import files


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
    tensorboard: bool = False,
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
    if is_first:
      with files.atomic_output(self._path, overwrite=True) as temporary:
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
    self._file = self._path.open("a")
    self._tensorboard = None
    if tensorboard and is_first:
      self._tensorboard = _open_tensorboard(folder, first_step)

  def write(self, step: int, values: dict) -> None:
    """Appends one line; arrays become lists."""
    plain = {
      name: _rounded(np.asarray(value, np.float64).tolist())
      for name, value in values.items()
    }
    self._file.write(json.dumps({"step": step, **plain}) + "\n")
    self._file.flush()
    if self._tensorboard is not None:
      for name, value in plain.items():
        for i, scalar in enumerate(np.atleast_1d(value)):
          tag = name if np.ndim(value) == 0 else f"{name}/{i}"
          self._tensorboard.add_scalar(tag, scalar, step)

  def close(self) -> None:
    """Flushes and closes the files."""
    self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()


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


def _open_tensorboard(folder, first_step):
  try:
    import tensorboardX
  except ImportError as error:
    raise ImportError(
      "train.tensorboard needs tensorboardX: pip install 'vqjax[tensorboard]'."
    ) from error
  return tensorboardX.SummaryWriter(
    str(pathlib.Path(folder) / "tensorboard"), purge_step=first_step
  )
