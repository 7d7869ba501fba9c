"""Requests that come within a moment of each other, searched together.

  with Batcher(search_fn, window_s=0.002, max_queries=256) as batcher:
    distances_QR, ids_QR = batcher.submit(queries_QD, settings).result()

A search of many queries at once takes far less than one search for each. One
thread searches; any thread may submit.
"""

import collections
import threading
import time
from collections.abc import Callable, Hashable
from concurrent import futures
from typing import NamedTuple

import numpy as np


class _Request(NamedTuple):
  """Queries `[Q, D]`, with the settings of their search."""

  queries_QD: np.ndarray
  settings: Hashable
  future: futures.Future


class Batcher:
  """Searches requests with the same settings together."""

  def __init__(self, search_fn: Callable, *, window_s: float, max_queries: int):
    """Starts the thread that searches.

    Args:
      search_fn: `(queries_QD, settings) -> distances_QR, ids_QR`.
      window_s: Seconds that the first request waits for others.
      max_queries: Queries in a batch, at most; a larger request is one alone.
    """
    self._search_fn, self._window_s = search_fn, window_s
    self._max_queries = max_queries
    self._waiting = collections.deque()
    self._changed = threading.Condition()
    self._is_open = True
    self.num_batches, self.num_queries = 0, 0
    self._thread = threading.Thread(target=self._run, name="search")
    self._thread.start()

  def __enter__(self):
    """Returns itself."""
    return self

  def __exit__(self, *_):
    """Closes it."""
    self.close()

  def submit(self, queries_QD, settings: Hashable) -> futures.Future:
    """Returns a future of distances and ids `[Q, R]`.

    Raises:
      RuntimeError: It is closed.
    """
    request = _Request(queries_QD, settings, futures.Future())
    with self._changed:
      if not self._is_open:
        raise RuntimeError("The search is closed.")
      self._waiting.append(request)
      self._changed.notify()
    return request.future

  def close(self) -> None:
    """Answers what was submitted, and ends the thread."""
    with self._changed:
      self._is_open = False
      self._changed.notify()
    self._thread.join()

  def _run(self) -> None:
    while batch := self._take():
      groups = collections.defaultdict(list)
      for request in batch:
        groups[request.settings].append(request)
      for group in groups.values():
        self._answer(group)

  def _take(self) -> list[_Request]:
    """Waits for requests; returns none when it is closed."""
    size = lambda: sum(len(r.queries_QD) for r in self._waiting)
    with self._changed:
      self._changed.wait_for(lambda: self._waiting or not self._is_open)
      end = time.monotonic() + self._window_s
      while self._is_open and size() < self._max_queries:
        left = end - time.monotonic()
        if left <= 0 or not self._changed.wait(left):
          break
      batch, num = [], 0
      while self._waiting:
        num += len(self._waiting[0].queries_QD)
        if batch and num > self._max_queries:
          break
        batch.append(self._waiting.popleft())
      return batch

  def _answer(self, group: list[_Request]) -> None:
    """Searches requests with the same settings, and sets their results."""
    sizes = [len(request.queries_QD) for request in group]
    queries_QD = np.concatenate([request.queries_QD for request in group])
    try:
      found = self._search_fn(queries_QD, group[0].settings)
    except Exception as error:  # It belongs to those who wait for it.
      for request in group:
        request.future.set_exception(error)
      return
    self.num_batches += 1
    self.num_queries += len(queries_QD)
    ends = np.cumsum(sizes)
    for request, size, end in zip(group, sizes, ends, strict=True):
      part = slice(end - size, end)
      request.future.set_result(tuple(x_QR[part] for x_QR in found))
