"""The picture of a training run."""

import json

import numpy as np
import pytest
from matplotlib.figure import Figure

from vqjax.training import curves


@pytest.fixture
def drawn(tmp_path, monkeypatch):
  """Returns a function from rows of metrics to the panels drawn."""
  figures = []
  save = Figure.savefig
  monkeypatch.setattr(
    Figure,
    "savefig",
    lambda self, *args, **kwargs: (
      figures.append(self) or save(self, *args, **kwargs)
    ),
  )

  def draw(rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    path = curves.plot_curves(tmp_path, scale=0.5, unit="")
    assert path.read_bytes().startswith(b"\x89PNG")
    return figures[-1].axes

  return draw


def _rows(errors, num_positions=3):
  return [
    {
      "step": 10 * i,
      "lr": 0.1,
      "train_mse": error,
      "validation_mse": error,
      "usage_M": [1.0] * num_positions,
    }
    for i, error in enumerate(errors, start=1)
  ]


def _labels(axes):
  return [text.get_text() for text in axes.get_legend().get_texts()]


def test_the_lowest_validation_error_is_marked(drawn):
  error, *_ = drawn(_rows([8.0, 4.0, 6.0]))
  assert _labels(error)[-1] == "best: 2 at step 20"
  np.testing.assert_array_equal(error.lines[-1].get_xydata(), [[20, 2.0]])


def test_code_positions_are_not_called_steps(drawn):
  _, usage, _ = drawn(_rows([3.0, 2.0, 1.0]))
  assert _labels(usage) == ["position 1", "position 2", "position 3"]
  assert usage.get_xlabel() == "training step"
  _, usage, _ = drawn(_rows([3.0, 2.0, 1.0], num_positions=9))
  assert _labels(usage) == ["position 1", "position 9"]


def test_two_points_are_no_line(drawn):
  for axes in drawn(_rows([3.0, 2.0])):
    assert all(line.get_linestyle() == "None" for line in axes.lines)
  learning_rate = drawn(_rows([3.0, 2.0, 1.0]))[-1]
  assert learning_rate.lines[0].get_linestyle() == "-"


def test_panels_without_values_are_left_out(drawn):
  rows = [{"step": i, "lr": 0.1} for i in (1, 2, 3)]
  (axes,) = drawn(rows)
  assert axes.get_title() == "learning rate"


def test_errors_of_several_decades_have_a_log_scale(drawn):
  for errors, scale in (
    ([3.0, 2.0, 1.0], "linear"),
    ([999.0, 7.0, 7.0], "log"),
  ):
    assert drawn(_rows(errors))[0].get_yscale() == scale
