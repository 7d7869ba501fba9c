"""Pictures of settings: what their labels, lines and legends say."""

import itertools

import numpy as np
import pytest

from vqjax.search import plots
from vqjax.search.operating_points import Point


def _points(num=30, seed=0):
  rng = np.random.default_rng(seed)
  return [
    Point({"nprobe": i, "num_network": i % 3, "k": 10}, recall, qps)
    for i, (recall, qps) in enumerate(rng.uniform(0.1, 1, (num, 2)))
  ]


@pytest.fixture
def drawn(tmp_path, monkeypatch):
  """Returns a function from panels to the figure drawn of them."""
  figures, make = [], plots.make_figure
  monkeypatch.setattr(
    plots,
    "make_figure",
    lambda *args: figures.append(make(*args)) or figures[-1],
  )

  def draw(panels):
    plots.plot_panels(tmp_path / "points.png", panels)
    return figures[-1][0]

  return draw


def _legend(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


def test_labels_stay_in_the_frame_and_apart(drawn):
  line = [Point({"nprobe": 10**9 + i}, i / 60, 200 - i) for i in range(1, 60)]
  line.append(Point({"nprobe": 10**9 + 60}, 1.0, 0.001))  # Makes it flat.
  figure = drawn({"recall": {"line": line}})
  (axes,) = figure.axes
  renderer = figure.canvas.get_renderer()
  frame = axes.get_window_extent(renderer)
  boxes = [label.get_window_extent(renderer) for label in axes.texts]
  assert 10 < len(boxes) < 60  # There is no room for all.
  for box in boxes:
    assert frame.x0 <= box.x0
    assert box.x1 <= frame.x1
    assert frame.y0 <= box.y0
    assert box.y1 <= frame.y1
  assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
  assert axes.texts[0].get_text() == "1000000060"  # The best recall goes first.


def test_ticks_are_plain_numbers(drawn):
  points = [Point({"nprobe": i}, i / 10, 90_000 / 4**i) for i in range(6)]
  (axes,) = drawn({"recall": {"ours": points}}).axes
  texts = [tick.get_text() for tick in axes.get_yticklabels(which="both")]
  assert {"100", "1,000", "10,000"} <= set(texts)
  assert not any("$" in text for text in texts)


def test_points_of_the_front_carry_the_knobs_that_vary(drawn):
  points = [
    Point({"nprobe": 1, "ratio": 1.5, "k": 10}, 0.2, 100.0),
    Point({"nprobe": 4, "ratio": None, "k": 10}, 0.8, 10.0),
    Point({"nprobe": 2, "ratio": None, "k": 10}, 0.1, 5.0),
  ]
  figure = drawn({"recall": {"ours": points}})
  texts = {label.get_text() for label in figure.axes[0].texts}
  assert texts == {"1/1.5", "4/-"}
  assert _legend(figure) == [
    "ours [nprobe/ratio]",
    "small dots: settings that another one beats",
  ]
  assert figure.legends[0].get_title().get_text() == (
    "labels: values of the knobs in [ ]"
  )


def test_two_points_are_no_line(drawn):
  front = [Point({"i": i}, i / 4, 4.0 - i) for i in (1, 2, 3)]
  figure = drawn({"recall": {"three": front, "two": front[:2]}})
  three, two = (figure.axes[0].lines[i] for i in (0, 2))
  assert (three.get_linestyle(), two.get_linestyle()) == ("-", "None")


def test_small_dots_are_the_points_off_the_front(drawn):
  points = _points()
  figure = drawn({"recall": {"a": points}})
  front, rest, _ = figure.axes[0].lines
  shown = [*front.get_xydata().tolist(), *rest.get_xydata().tolist()]
  assert sorted(shown) == sorted([p.recall, p.qps] for p in points)
  assert len(rest.get_xdata())


def test_panels_share_one_legend(drawn):
  figure = drawn(
    {"r@1": {"a": _points(seed=1)}, "r@10": {"a": _points(seed=2)}}
  )
  assert len(_legend(figure)) == 2
  assert [axes.get_xlabel() for axes in figure.axes] == [
    "r@1 (higher is better)",
    "r@10 (higher is better)",
  ]
