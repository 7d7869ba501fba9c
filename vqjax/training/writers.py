"""Where training reports to: JSON lines, TensorBoard, a picture of curves."""

import json
import os
import pathlib

import numpy as np

from vqjax import devices


class Writer:
  """Appends `{"step", ...}` lines to `metrics.jsonl` of a run folder.

  A run that goes on from `first_step` first drops the lines after it, which
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
    self.seconds = max([row.get("seconds", 0) for row in kept], default=0)
    self._path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    self._file = self._path.open("a")
    self._tensorboard = None
    if tensorboard and is_first:
      self._tensorboard = _open_tensorboard(folder, first_step)

  def write(self, step: int, values: dict) -> None:
    """Appends one line; arrays become lists."""
    plain = {
      name: np.asarray(value, np.float64).round(9).tolist()
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


def read_rows(path: pathlib.Path) -> list[dict]:
  """Returns the lines of a `metrics.jsonl`; a half-written last one is cut."""
  rows = []
  if pathlib.Path(path).exists():
    for line in pathlib.Path(path).read_text().splitlines():
      try:
        rows.append(json.loads(line))
      except json.JSONDecodeError:
        break
  return rows


def plot_curves(
  folder: pathlib.Path, *, scale: float, unit: str
) -> pathlib.Path:
  """Draws error, word usage and learning rate of a run to `curves.png`."""
  # The object interface: pyplot would start a window system.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = read_rows(pathlib.Path(folder) / "metrics.jsonl")
  series = lambda name: tuple(
    zip(*[(row["step"], row[name]) for row in rows if name in row], strict=True)
  )
  figure = Figure(figsize=(12, 3.6), layout="constrained")
  FigureCanvasAgg(figure)
  error_axes, usage_axes, entropy_axes, lr_axes = figure.subplots(1, 4)
  for name, style in (("train_mse", "-"), ("validation_mse", "o-")):
    if series(name):
      steps, values = series(name)
      error_axes.plot(
        steps,
        np.array(values) * scale,
        style,
        markersize=3,
        label=name.replace("_mse", ""),
      )
  error_axes.set(title=f"MSE per vector{unit}", yscale="log")
  error_axes.legend()
  for axes, name, title in (
    (usage_axes, "usage_M", "share of words used in the epoch"),
    (entropy_axes, "entropy_M", "entropy of the codes, bits"),
  ):
    if series(name):
      steps, values = series(name)
      for m, curve in enumerate(np.array(values).T):
        axes.plot(steps, curve, label=f"step {m}", linewidth=1)
      axes.legend(fontsize=6, ncols=2)
    axes.set_title(title)
  if series("lr"):
    lr_axes.plot(*series("lr"))
  lr_axes.set_title("learning rate")
  for axes in figure.axes:
    axes.set_xlabel("training step")
    axes.grid(alpha=0.3)
  path = pathlib.Path(folder) / "curves.png"
  figure.savefig(path, dpi=110)
  return path


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
