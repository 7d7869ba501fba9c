"""Pictures of what a search can do: recall against queries per second."""

import pathlib
from collections.abc import Sequence

from vqjax.data.formats import atomic_output
from vqjax.search.operating_points import Point, front


def plot_operating_points(
  path,
  series: dict[str, Sequence[Point]],
  *,
  title: str = "",
  recall_name: str = "recall",
  least_recall: float = 0.0,
) -> pathlib.Path:
  """Draws every series of points with its front, as a .png.

  Replaces an earlier picture. Points below `least_recall` are left out.
  """
  # The object interface: pyplot would start a window system.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  if not series:
    raise ValueError("There is no series of points to draw, got 0.")
  figure = Figure(figsize=(7.5, 5), layout="constrained")
  FigureCanvasAgg(figure)
  axes = figure.subplots()
  for i, (name, points) in enumerate(series.items()):
    color = f"C{i}"
    shown = [point for point in points if point.recall >= least_recall]
    axes.plot(*_columns(front(shown)), "-", color=color, label=name)
    axes.plot(*_columns(shown), ".", color=color, markersize=4, alpha=0.5)
  axes.set(
    xlabel=recall_name, ylabel="queries per second", title=title, yscale="log"
  )
  axes.grid(alpha=0.3, which="both")
  axes.legend()
  with atomic_output(path, overwrite=True) as temporary:
    figure.savefig(temporary, dpi=110, format="png")
  return pathlib.Path(path)


def _columns(points):
  return [p.recall for p in points], [p.qps for p in points]
