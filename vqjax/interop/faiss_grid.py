"""Settings of a search, tried in an order that makes most of them needless.

More of any parameter is taken to cost time and to gain recall. So a setting
takes at least the time of every smaller one, and has at most the recall of
every larger one. If even these bounds lie behind the front of what was
measured, the setting need not be tried. `faiss.contrib.evaluation` has the
bounds.
"""

from collections.abc import Iterator, Sequence

import numpy as np
from faiss.contrib.evaluation import OperatingPointsWithRanges


class Grid:
  """All combinations of some values, with what is known of those measured."""

  def __init__(self, ranges: dict[str, Sequence], num_recalls: int = 1):
    """Takes the values of each parameter, from cheap to expensive.

    Each kind of recall has a front.
    """
    empty = [name for name, values in ranges.items() if not len(values)]
    if empty or not ranges:
      raise ValueError(f"Each parameter needs a value, got none for {empty}.")
    self._ranges = {name: list(values) for name, values in ranges.items()}
    self._fronts = [OperatingPointsWithRanges() for _ in range(num_recalls)]
    for front in self._fronts:
      for name, values in self._ranges.items():
        front.add_range(name, values)
    self.num_settings = self._fronts[0].num_experiments()

  def settings(self) -> Iterator[tuple[dict, bool]]:
    """Yields all settings, and whether each can be on one of the fronts.

    The cheapest comes first, then the most expensive, then the others in a
    random order, always the same. What `add` is told on the way counts.
    """
    first = self._fronts[0]
    # faiss wants two settings at least.
    order = first.sample_experiments(0) if self.num_settings > 1 else [0]
    for number in order:
      key = first.cno_to_key(number)
      may_win = any(front.should_run_experiment(key) for front in self._fronts)
      yield first.get_parameters(key), may_win

  def add(self, setting: dict, recalls: Sequence[float], seconds: float):
    """Takes note of a measurement; one off the grid is of no use here."""
    pairs = [(setting.get(name), self._ranges[name]) for name in self._ranges]
    if all(value in values for value, values in pairs):
      key = np.array([values.index(value) for value, values in pairs])
      for front, recall in zip(self._fronts, recalls, strict=True):
        front.add_operating_point(key, recall, seconds)
