"""Pictures of settings: recall against queries per second, and their like."""

import pathlib
from collections.abc import Sequence

from vqjax.data.files import atomic_output
from vqjax.search.operating_points import Point, front

# Where a label may stand next to its point: offset in points, alignment.
_PLACES = (
  ((4, 3), "left", "bottom"),
  ((4, -3), "left", "top"),
  ((-4, 3), "right", "bottom"),
  ((-4, -3), "right", "top"),
  ((0, 6), "center", "bottom"),
  ((0, -6), "center", "top"),
)


def plot_panels(
  path, panels: dict[str, dict[str, Sequence[Point]]], *, title: str = ""
) -> pathlib.Path:
  """Draws panels side by side, one for each kind of recall, as a .png.

  Replaces an earlier picture. Points of a front carry the values of the knobs
  that vary; the legend names these knobs.

  `panels` has series of points by name, by the name of the recall. A series has
  the same colour in all panels that have it at the same place.
  """
  if not panels or not all(panels.values()):
    raise ValueError("There is no series of points to draw, got 0.")
  figure, columns = make_figure(len(panels))
  wanted = []
  for axes, (recall_name, series) in zip(columns, panels.items(), strict=True):
    axes.set(
      xlabel=f"{recall_name} (higher is better)",
      ylabel="queries per second (higher is better)",
      yscale="log",
    )
    for i, (name, points) in enumerate(series.items()):
      best, knobs = front(points), _varying(points)
      wanted += draw_series(
        axes,
        [(p.recall, p.qps) for p in points],
        [(p.recall, p.qps) for p in best],
        [_values(p.setting, knobs) for p in best],
        name=f"{name} [{'/'.join(knobs)}]" if knobs else name,
        color=f"C{i}",
      )
  figure.suptitle(title)
  about = "labels: values of the knobs in [ ]" if wanted else ""
  finish(figure, wanted, legend_title=about)
  with atomic_output(path, overwrite=True) as temporary:
    figure.savefig(temporary, dpi=110, format="png")
  return pathlib.Path(path)


def make_figure(num_panels: int = 1):
  """Returns a figure and its panels, side by side."""
  # The object interface: pyplot would start a window system.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  width = 8 if num_panels == 1 else 6.5 * num_panels
  figure = Figure(figsize=(width, 5.5), layout="constrained")
  FigureCanvasAgg(figure)
  return figure, figure.subplots(1, num_panels, squeeze=False)[0]


def draw_series(axes, every, best, labels, *, name: str, color: str) -> list:
  """Draws all points small and faint, and a line through the best.

  Two points are drawn without a line, which would promise points between them.

  `every` are pairs (x, y) of all settings, `best` the pairs that no other
  setting beats, in the order of x, with a text of `labels` each.

  Returns:
    The labels wanted, for `finish`, the most important first.
  """
  line = "o-" if len(best) > 2 else "o"
  axes.plot(*_columns(best), line, color=color, markersize=4, label=name)
  rest = [pair for pair in every if pair not in best]
  axes.plot(*_columns(rest), ".", color=color, markersize=4, alpha=0.4)
  wanted = [
    (axes, xy, text, color)
    for xy, text in zip(best, labels, strict=True)
    if text
  ]
  return wanted[-1:] + wanted[:-1]


def finish(figure, wanted: list, *, legend_title: str = "") -> None:
  """Adds grids, a legend below the panels, and as many labels as fit.

  A label that would leave its panel or cover a point or another label is moved
  to another side of its point, or left out.
  """
  handles = {}
  for axes in figure.axes:
    axes.grid(alpha=0.3, which="both")
    axes.margins(0.08)
    label_plainly(axes)
    for line, name in zip(*axes.get_legend_handles_labels(), strict=True):
      handles.setdefault(name, line)
  (dot,) = figure.axes[0].plot(
    [], [], ".", color="gray", markersize=4, alpha=0.6
  )
  handles["small dots: settings that another one beats"] = dot
  figure.legend(
    handles.values(),
    handles.keys(),
    loc="outside lower center",
    ncols=2,
    fontsize=8,
    title=legend_title,
    title_fontsize=8,
  )
  _place_labels(figure, wanted)


def label_plainly(axes) -> None:
  """Writes 4,000 at the ticks of logarithmic axes, not a power of ten."""
  from matplotlib import ticker

  class Plain(ticker.LogFormatter):
    def __call__(self, x, pos=None):
      # The class knows for which ticks there is room.
      return f"{x:,.10g}" if super().__call__(x, pos) else ""

  for axis in (axes.xaxis, axes.yaxis):
    if axis.get_scale() == "log":
      axis.set_major_formatter(Plain())
      axis.set_minor_formatter(Plain())


def _place_labels(figure, wanted) -> None:
  figure.draw_without_rendering()  # Only then the layout is known.
  renderer = figure.canvas.get_renderer()
  taken = [_box_of(axes, xy) for axes, xy, _, _ in wanted]
  for own, (axes, xy, text, color) in enumerate(wanted):
    others = taken[:own] + taken[own + 1 :]
    for offset, ha, va in _PLACES:
      label = axes.annotate(
        text,
        xy,
        xytext=offset,
        textcoords="offset points",
        ha=ha,
        va=va,
        fontsize=6,
        color=color,
      )
      box = label.get_window_extent(renderer)
      frame = axes.get_window_extent(renderer)
      inside = frame.x0 <= box.x0 and box.x1 <= frame.x1
      inside = inside and frame.y0 <= box.y0 and box.y1 <= frame.y1
      if inside and not box.count_overlaps(others):
        taken.append(box)
        break
      label.remove()


def _box_of(axes, xy):
  """The place of a marker, in pixels."""
  from matplotlib.transforms import Bbox

  x, y = axes.transData.transform(xy)
  return Bbox.from_extents(x - 2, y - 2, x + 2, y + 2)


def _varying(points: Sequence[Point]) -> list[str]:
  """Knobs that differ between the settings of a series."""
  knobs = dict.fromkeys(knob for p in points for knob in p.setting)
  return [k for k in knobs if len({str(p.setting.get(k)) for p in points}) > 1]


def _values(setting: dict, knobs: Sequence[str]) -> str:
  """The values of these knobs, as 16/0/10."""
  text = lambda value: f"{value:g}" if isinstance(value, float) else str(value)
  return "/".join(
    "-" if setting.get(knob) is None else text(setting[knob]) for knob in knobs
  )


def _columns(pairs):
  return [x for x, _ in pairs], [y for _, y in pairs]
