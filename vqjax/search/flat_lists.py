"""Whole vectors in inverted lists: each list is one stretch of a matrix.

List l holds the slots `starts_L[l]` to `starts_L[l] + sizes_L[l]`; the slots
behind, up to the start of the next list, are free. A vector that is added goes
to the first free slot of its list. When a list is full, all are laid out anew,
with room for an eighth more.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from vqjax.core import check_shape

BLOCK = 16384  # Vectors that are read at a time.
_NO_IDS = np.empty(0, np.int32)


@dataclasses.dataclass
class FlatLists:
  """Vectors by list; changed in place by `add` and `remove`."""

  x_ND: np.ndarray  # float32, a row for each slot.
  ids_N: np.ndarray  # int32, or int64 if an id needs it.
  half_N: np.ndarray | None  # Half of the squared norms, for distances.
  starts: np.ndarray  # `[L + 1]` int64.
  sizes_L: np.ndarray  # int64.
  largest: float = 0.0  # Of all norms so far.

  def __len__(self) -> int:
    """Number of vectors."""
    return int(np.add.reduce(self.sizes_L))

  @property
  def num_bytes(self) -> int:
    """Bytes in memory of all arrays, free slots included."""
    arrays = (self.x_ND, self.ids_N, self.half_N, self.starts, self.sizes_L)
    return sum(array.nbytes for array in arrays if array is not None)


def empty(num_lists: int, dim: int, *, has_norms: bool) -> FlatLists:
  """Returns lists without vectors; `has_norms` for distances."""
  return FlatLists(
    np.empty((0, dim), np.float32),
    _NO_IDS,
    np.empty(0, np.float32) if has_norms else None,
    np.zeros(num_lists + 1, np.int64),
    np.zeros(num_lists, np.int64),
  )


def add(
  lists: FlatLists,
  lists_N: np.ndarray,
  ids_N: np.ndarray,
  read_fn: Callable[[int, int], np.ndarray],
) -> None:
  """Adds vectors to their lists; `read_fn(start, stop)` returns `[n, D]`.

  Only a block of the vectors is in memory besides the lists.
  """
  num_lists = len(lists.sizes_L)
  check_shape("ids", ids_N, lists_N.shape)
  added_L = np.bincount(lists_N, minlength=num_lists)
  if (lists.starts[:-1] + lists.sizes_L + added_L > lists.starts[1:]).any():
    sizes_L = lists.sizes_L + added_L
    room_L = sizes_L // 8 + 4 if len(lists) else np.zeros_like(sizes_L)
    _lay_out(lists, np.where(sizes_L > 0, sizes_L + room_L, 0))
  if len(ids_N) and ids_N.max() >= 2**31:
    lists.ids_N = lists.ids_N.astype(np.int64)
  for start in range(0, len(lists_N), BLOCK):
    stop = min(start + BLOCK, len(lists_N))
    lists_n = lists_N[start:stop]
    slots_n = _free_slots(lists, lists_n)
    x_nD = read_fn(start, stop)
    lists.x_ND[slots_n] = x_nD
    lists.ids_N[slots_n] = ids_N[start:stop]
    squared_n = np.einsum("nd,nd->n", x_nD, x_nD)
    if lists.half_N is not None:
      lists.half_N[slots_n] = squared_n / 2
    lists.largest = max(lists.largest, float(np.sqrt(squared_n.max())))
    lists.sizes_L += np.bincount(lists_n, minlength=num_lists)


def _free_slots(lists: FlatLists, lists_n: np.ndarray) -> np.ndarray:
  """The slots that vectors of these lists go to, in their order."""
  return (lists.starts[:-1] + lists.sizes_L)[lists_n] + _ranks(lists_n)


def _ranks(lists_N: np.ndarray) -> np.ndarray:
  """How many vectors of the same list come before each."""
  order_N = np.argsort(lists_N, kind="stable")
  sorted_N = lists_N[order_N]
  ranks_N = np.empty(len(lists_N), np.int64)
  first_N = np.searchsorted(sorted_N, sorted_N)
  ranks_N[order_N] = np.arange(len(lists_N)) - first_N
  return ranks_N


def places_of_last(lists: FlatLists, lists_N: np.ndarray) -> np.ndarray:
  """Places in their lists of the vectors that were added last, int64 `[N]`."""
  added_L = np.bincount(lists_N, minlength=len(lists.sizes_L))
  return (lists.sizes_L - added_L)[lists_N] + _ranks(lists_N)


def _lay_out(lists: FlatLists, room_L: np.ndarray) -> None:
  """Moves all vectors into lists that have room for so many."""
  starts = np.zeros(len(room_L) + 1, np.int64)
  np.cumsum(room_L, out=starts[1:])
  for name in ("x_ND", "ids_N", "half_N"):
    old = getattr(lists, name)
    if old is None:
      continue
    new = np.zeros((starts[-1], *old.shape[1:]), old.dtype)
    for l in np.flatnonzero(lists.sizes_L):
      size = lists.sizes_L[l]
      before = old[lists.starts[l] : lists.starts[l] + size]
      new[starts[l] : starts[l] + size] = before
    setattr(lists, name, new)
  lists.starts = starts


def used_slots(lists: FlatLists) -> np.ndarray:
  """The slots of all vectors, list after list, int64 `[N]`."""
  place = np.arange(len(lists)) - np.repeat(
    np.cumsum(lists.sizes_L) - lists.sizes_L, lists.sizes_L
  )
  return np.repeat(lists.starts[:-1], lists.sizes_L) + place


def remove(lists: FlatLists, ids_N: np.ndarray) -> int:
  """Removes the vectors of these ids, if any; returns how many there were."""
  slots_N = used_slots(lists)
  slots_N = slots_N[np.isin(lists.ids_N[slots_N], ids_N)]
  lists_N = np.searchsorted(lists.starts, slots_N, "right") - 1
  for l in np.unique(lists_N):
    start, size = lists.starts[l], lists.sizes_L[l]
    kept = np.delete(np.arange(size), slots_N[lists_N == l] - start) + start
    for array in (lists.x_ND, lists.ids_N, lists.half_N):
      if array is not None:
        array[start : start + len(kept)] = array[kept]
    lists.sizes_L[l] = len(kept)
  return len(slots_N)


def parts(lists: FlatLists):
  """Yields the number, ids and vectors of each list that has any."""
  for l in np.flatnonzero(lists.sizes_L).tolist():
    start, stop = lists.starts[l], lists.starts[l] + lists.sizes_L[l]
    yield l, lists.ids_N[start:stop], lists.x_ND[start:stop]
