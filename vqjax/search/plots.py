"""Pictures of what a search can do: recall against queries per second."""

import pathlib
from collections.abc import Sequence

from vqjax.data.files import atomic_output
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
  shown = {
    name: [point for point in points if point.recall >= least_recall]
    for name, points in series.items()
  }
  return plot_panels(path, {recall_name: shown}, title=title)


def plot_panels(
  path, panels: dict[str, dict[str, Sequence[Point]]], *, title: str = ""
) -> pathlib.Path:
  """Draws panels side by side, one for each kind of recall, as a .png.

  Replaces an earlier picture.

  Args:
    path: Picture to write.
    panels: By name of the recall: series of points by name. A series has the
      same colour in all panels that have it at the same place.
    title: Of the whole.
  """
  # The object interface: pyplot would start a window system.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  if not panels or not all(panels.values()):
    raise ValueError("There is no series of points to draw, got 0.")
  width = 7.5 if len(panels) == 1 else 6 * len(panels)
  figure = Figure(figsize=(width, 5), layout="constrained")
  FigureCanvasAgg(figure)
  columns = figure.subplots(1, len(panels), squeeze=False)[0]
  for axes, (recall_name, series) in zip(columns, panels.items(), strict=True):
    _draw(axes, series)
    axes.set(xlabel=recall_name, ylabel="queries per second", yscale="log")
    axes.grid(alpha=0.3, which="both")
  columns[0].legend()
  figure.suptitle(title)
  with atomic_output(path, overwrite=True) as temporary:
    figure.savefig(temporary, dpi=110, format="png")
  return pathlib.Path(path)


def _draw(axes, series) -> None:
  """Draws points small and faint, and the line through those on the front."""
  for i, (name, points) in enumerate(series.items()):
    best, color = front(points), f"C{i}"
    axes.plot(*_columns(best), "o-", color=color, markersize=4, label=name)
    axes.plot(*_columns(points), ".", color=color, markersize=4, alpha=0.4)


def _columns(points):
  return [p.recall for p in points], [p.qps for p in points]
