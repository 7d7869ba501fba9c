"""The picture of a training run: its curves against the training step."""

import pathlib

import numpy as np

from vqjax.training.writers import read_rows


def plot_curves(
  folder: pathlib.Path, *, scale: float, unit: str
) -> pathlib.Path:
  """Draws a run's `metrics.jsonl` to `curves.png`.

  Panels are the error, collisions, the use of the codewords of each code
  position and how evenly it is spread, and the learning rate; those without
  values are left out.
  """
  # The object interface: pyplot would start a window system.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  rows = read_rows(pathlib.Path(folder) / "metrics.jsonl")
  collisions = "validation_collision_rate"
  panels = [  # The value that a panel is of, its title and its curves.
    (
      ("validation_mse", f"MSE per vector{unit}"),
      lambda axes: _errors(axes, rows, scale),
    ),
    (
      (collisions, "collision rate, (items - ids) / items"),
      lambda axes: _curve(axes, rows, collisions, marker="o"),
    ),
    (
      ("usage_M", "share of codewords used in the epoch"),
      _positions("usage_M", rows),
    ),
    (
      ("entropy_M", "entropy of the codes, bits"),
      _positions("entropy_M", rows),
    ),
    (
      ("perplexity_M", "perplexity of the codes"),
      _positions("perplexity_M", rows),
    ),
    (("lr", "learning rate"), lambda axes: _curve(axes, rows, "lr")),
  ]
  known = set().union(*rows)
  panels = [panel for panel in panels if panel[0][0] in known]
  width = 3.5 * max(len(panels), 1)
  figure = Figure(figsize=(width, 3.8), layout="constrained")
  FigureCanvasAgg(figure)
  all_axes = figure.subplots(1, max(len(panels), 1), squeeze=False)[0]
  for axes, ((_, title), draw) in zip(all_axes, panels, strict=False):
    draw(axes)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("training step")
    axes.grid(alpha=0.3)
    axes.locator_params(axis="x", integer=True)
  path = pathlib.Path(folder) / "curves.png"
  figure.savefig(path, dpi=110)
  return path


def _errors(axes, rows, scale: float) -> None:
  """Training and validation error; the lowest of the latter has a star."""
  _curve(axes, rows, "train_mse", scale, label="training")
  steps, errors = _curve(
    axes, rows, "validation_mse", scale, label="validation", marker="o"
  )
  if steps:
    best = int(np.argmin(errors))
    label = f"best: {errors[best]:.4g} at step {steps[best]:,}"
    axes.plot(
      steps[best], errors[best], "k*", markersize=10, mfc="none", label=label
    )
  if axes.lines:
    shown = np.concatenate([line.get_ydata() for line in axes.lines])
    if 0 < 10 * shown.min() < shown.max():
      axes.set_yscale("log")
    axes.legend(fontsize=8)


def _positions(name: str, rows):
  """Returns a function that draws one curve for each code position."""
  from matplotlib import colormaps

  def draw(axes):
    values = [row[name] for row in rows if name in row]
    num = len(values[0]) if values else 0
    shown = {0, num - 1} if num > 8 else set(range(num))
    for m in range(num):
      label = f"position {m + 1}" if m in shown else None
      color = colormaps["viridis"](0.9 * m / max(num - 1, 1))
      _curve(axes, rows, name, place=m, label=label, color=color, linewidth=1)
    if num:
      axes.legend(fontsize=8)

  return draw


def _curve(axes, rows, name, scale=1.0, *, place=None, **style):
  """Draws one value against the training step; returns both.

  Two points are no curve: they are drawn as markers alone.
  """
  pick = lambda value: value if place is None else value[place]
  steps = [row["step"] for row in rows if name in row]
  values = [pick(row[name]) * scale for row in rows if name in row]
  if 0 < len(steps) <= 2:
    style.update(marker="o", linestyle="")
  if steps:
    axes.plot(steps, values, markersize=3, **style)
  return steps, values
