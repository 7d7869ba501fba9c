"""Makes ids unique: items that share one get other codewords, or a token more.

Codes are int `[N, L]` with codewords per level in `errors.sizes`; `errors`
knows what a codeword costs (`vqjax.ids.errors`). At most `capacity` items share
an id. The first `num_fixed` items keep theirs. All functions return new codes
and depend on nothing but their arguments.

References: the Sinkhorn loop, LC-Rec, arXiv 2311.09049; one more token, TIGER,
arXiv 2305.05065.
"""

import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from vqjax.codecs import sinkhorn as sinkhorn_lib
from vqjax.core import check_range
from vqjax.ids import groups

WIDTH = 32  # Items at once, and ids they choose among, beyond a last level.
_NUMBERS = 1 << 23  # Of what `errors` reads at once.


def over_full(codes_NL, capacity: int = 1, num_fixed: int = 0) -> np.ndarray:
  """Returns whether an item shares its id with too many, `[N]`."""
  over_N = groups.counts_of(codes_NL) > capacity
  over_N[:num_fixed] = False
  return over_N


def nearest(
  codes_NL,
  errors,
  *,
  capacity: int = 1,
  num_fixed: int = 0,
  progress: Callable | None = None,
) -> tuple[np.ndarray, int]:
  """Gives colliding items other last codewords; adds the least total error.

  The colliding items of a prefix choose among its free last codewords and their
  own. This is an assignment problem. At 3 levels of 256 codewords it is solved
  exactly for up to about 10,000 items of one prefix. More are solved in pieces
  of that size, those that fit their id best first. Items that find no free
  codeword are treated as by `backtrack`.

  Returns:
    Codes, and how many items got another codeword before the last.
  """
  return _settle_all(codes_NL, errors, 1, capacity, num_fixed, progress)


def backtrack(
  codes_NL,
  errors,
  *,
  capacity: int = 1,
  num_fixed: int = 0,
  progress: Callable | None = None,
) -> tuple[np.ndarray, int]:
  """As `nearest`, but the codeword before the last may change, too.

  If that leaves too few ids, so may the one before it, and so on. Items are
  settled 32 at a time, those that fit their id best first; each chooses among
  its 32 best free ids, which lie below the 32 best prefixes of each length.
  """
  return _settle_all(codes_NL, errors, 2, capacity, num_fixed, progress)


def _settle_all(codes_NL, errors, least, capacity, num_fixed, progress):
  """Settles ever deeper until no item is left; see `nearest`."""
  check_range("capacity", capacity, 1, 1 << 31)
  before_NL = np.asarray(codes_NL)
  codes_NL = before_NL.astype(np.int64)
  num_levels = len(errors.sizes)
  for depth in range(min(least, num_levels), num_levels + 1):
    over_N = over_full(codes_NL, capacity, num_fixed)
    if not over_N.any():
      break
    _settle(codes_NL, errors, depth, capacity, np.flatnonzero(over_N), progress)
  early_N = (codes_NL != before_NL)[:, :-1].any(axis=1)
  return codes_NL.astype(before_NL.dtype), int(early_N.sum())


def _settle(codes_NL, errors, depth, capacity, rows_n, progress) -> None:
  """Gives items codes that are free below their first codes, in place."""
  first = len(errors.sizes) - depth
  label_N, num_labels = groups.labels(codes_NL, first)
  is_open_N = np.zeros(len(codes_NL), bool)
  is_open_N[rows_n] = True
  # Rows of each prefix are consecutive in this order.
  order_N = np.argsort(label_N, kind="stable")
  starts = np.searchsorted(label_N[order_N], np.arange(num_labels + 1))
  most = max(_NUMBERS // errors.width, WIDTH)
  pieces = _pieces(
    codes_NL, errors, groups.pieces(label_N, rows_n), depth, most
  )
  label, done = -1, 0
  for rows_n, data_nX in _read(errors, pieces, most):
    if label != label_N[rows_n[0]]:
      label = label_N[rows_n[0]]
      members_n = order_N[starts[label] : starts[label + 1]]
      members_n = members_n[~is_open_N[members_n]]
      room = _Room(codes_NL[members_n, first:], errors.sizes[first:], capacity)
    if room.left(()):
      _place(codes_NL, rows_n, data_nX, errors, first, room)
    done += len(rows_n)
    if progress:
      progress(done, int(is_open_N.sum()))


def _pieces(codes_NL, errors, all_rows, depth, most) -> list[np.ndarray]:
  """Cuts groups that are too large; those that fit best come first."""
  size = most
  if depth > 1:
    size = int(np.clip(_NUMBERS // (WIDTH * max(errors.sizes)), 1, WIDTH))
  pieces = []
  for rows_n in all_rows:
    if len(rows_n) > size:
      own_n = np.concatenate(
        [
          errors.own(errors.read(part_n), codes_NL[part_n])
          for part_n in _cut(rows_n, most)
        ]
      )
      rows_n = rows_n[np.argsort(own_n, kind="stable")]
    pieces += _cut(rows_n, size)
  return pieces


def _cut(rows_n, size: int) -> list[np.ndarray]:
  return [rows_n[at : at + size] for at in range(0, len(rows_n), size)]


def _read(errors, pieces: list, most: int):
  """Yields pieces of rows and what `errors` reads of them, many at a time."""
  batch, num = [], 0
  for piece in [*pieces, None]:
    if batch and (piece is None or num + len(piece) > most):
      data_nX = errors.read(np.concatenate(batch))
      at = 0
      for rows_n in batch:
        yield rows_n, data_nX[at : at + len(rows_n)]
        at += len(rows_n)
      batch, num = [], 0
    if piece is not None:
      batch.append(piece)
      num += len(piece)


class _Room:
  """How many more items fit below each continuation of one prefix."""

  def __init__(self, codes_nd, sizes, capacity: int):
    """Counts items that stay; `codes_nd` are their codes after the prefix."""
    self.capacity = capacity
    self._limits = [
      capacity * math.prod(sizes[i:]) for i in range(len(sizes) + 1)
    ]
    self._counts, self._closed = {}, {}
    for path in map(tuple, codes_nd.tolist()):
      self.add(path)

  def add(self, path: tuple) -> None:
    """Counts one more item with this continuation, as far as it fits."""
    if not self.left(path):
      return
    for i in range(len(path) + 1):
      head = path[:i]
      self._counts[head] = self._counts.get(head, 0) + 1
      if i and self._counts[head] == self._limits[i]:
        self._closed.setdefault(head[:-1], []).append(head[-1])

  def left(self, path: tuple) -> int:
    """How many more fit."""
    return max(self._limits[len(path)] - self._counts.get(path, 0), 0)

  def closed(self, path: tuple) -> list[int]:
    """Next codewords below which nothing fits."""
    return self._closed.get(path, [])


def _place(codes_NL, rows_n, data_nX, errors, first: int, room) -> None:
  """Shares out free continuations among the items of a piece, in place."""
  codes_nL = codes_NL[rows_n]
  if first == len(errors.sizes) - 1:
    paths, cost_nC = _last_codewords(codes_nL, data_nX, errors, room)
  else:
    paths, cost_nC = _continuations(codes_nL, data_nX, errors, first, room)
  cost_nC -= errors.own(data_nX, codes_nL)[:, None]
  slots = np.arange(len(paths))
  if room.capacity > 1:
    left = [min(room.left(path), len(rows_n)) for path in paths]
    slots = np.repeat(slots, left)
  cost_nS = cost_nC[:, slots]
  is_known_nS = np.isfinite(cost_nS)
  spread = np.ptp(cost_nS[is_known_nS]) + 1
  far = cost_nS[is_known_nS].max() + spread * (len(rows_n) + 1)
  cost_nS[~is_known_nS] = far  # Only if nothing else is left.
  for i, slot in zip(*linear_sum_assignment(cost_nS), strict=True):
    if is_known_nS[i, slot]:
      path = paths[slots[slot]]
      codes_NL[rows_n[i], first:] = path
      room.add(path)


def _last_codewords(codes_nL, data_nX, errors, room):
  """All free last codewords, and their errors `[n, C]`."""
  level = len(errors.sizes) - 1
  error_nK = errors.children(data_nX, np.arange(len(codes_nL)), codes_nL, level)
  is_free_K = np.ones(errors.sizes[-1], bool)
  is_free_K[room.closed(())] = False
  words = np.flatnonzero(is_free_K)
  return [(word,) for word in words.tolist()], error_nK[:, words]


def _continuations(codes_nL, data_nX, errors, first: int, room):
  """The best free continuations of each item, errors `[n, C]`, inf for no."""
  beam_nFL, error_nF = _search(codes_nL, data_nX, errors, first, room)
  column, cost = {}, []
  paths = beam_nFL[..., first:].tolist()
  for i, f in zip(*np.nonzero(np.isfinite(error_nF)), strict=True):
    path = tuple(paths[i][f])
    cost.append((i, column.setdefault(path, len(column)), error_nF[i, f]))
  cost_nC = np.full((len(codes_nL), len(column)), np.inf)
  for i, at, error in cost:
    cost_nC[i, at] = error
  return list(column), cost_nC


def _search(codes_nL, data_nX, errors, first: int, room):
  """A beam search for at most `WIDTH` free continuations of each item.

  Prefixes below which nothing is free leave the beam, so that it finds as many
  as there are. What it lacks has error inf.
  """
  n, num_levels = codes_nL.shape
  beam_nFL, error_nF = codes_nL[:, None], np.zeros((n, 1))
  for level in range(first, num_levels):
    width = beam_nFL.shape[1]
    beam_BL = beam_nFL.reshape(-1, num_levels)
    at_B = np.repeat(np.arange(n), width)
    error_BK = errors.children(data_nX, at_B, beam_BL, level)
    for b, path in enumerate(beam_BL[:, first:level].tolist()):
      if closed := room.closed(tuple(path)):
        error_BK[b, closed] = np.inf
    error_nC = error_BK.reshape(n, -1)
    count = min(WIDTH, error_nC.shape[1])
    best_nF = np.argpartition(error_nC, count - 1, axis=1)[:, :count]
    best_nF.sort(axis=1)  # Ties go to the lower codeword.
    error_nF = np.take_along_axis(error_nC, best_nF, axis=1)
    order_nF = np.argsort(error_nF, axis=1, kind="stable")
    best_nF = np.take_along_axis(best_nF, order_nF, axis=1)
    error_nF = np.take_along_axis(error_nF, order_nF, axis=1)
    parents_nF, words_nF = np.divmod(best_nF, errors.sizes[level])
    beam_nFL = beam_nFL[np.arange(n)[:, None], parents_nF]
    beam_nFL[..., level] = words_nF
  return beam_nFL, error_nF


def sinkhorn(
  codes_NL,
  errors,
  *,
  epsilon: float = 0.003,
  num_iterations: int = 50,
  max_rounds: int = 20,
  capacity: int = 1,
  progress: Callable | None = None,
) -> tuple[np.ndarray, int]:
  """Other last codewords by Sinkhorn over each group, again and again.

  A round gives each group of items with one id last codewords that are shared
  out evenly over the group. It does not look at other groups, so that ids may
  collide anew; after `max_rounds` they are taken as they are.

  Returns:
    Codes, and the rounds that were used.
  """
  codes_NL = np.array(codes_NL)
  level = len(errors.sizes) - 1
  most = max(_NUMBERS // errors.width, WIDTH)
  for done in range(max_rounds):
    rows_n = np.flatnonzero(over_full(codes_NL, capacity))
    if not len(rows_n):
      return codes_NL, done
    pieces = groups.pieces(groups.labels(codes_NL)[0], rows_n)
    for rows_n, data_nX in _read(errors, pieces, most):
      at_n = np.arange(len(rows_n))
      error_nK = errors.children(data_nX, at_n, codes_NL[rows_n], level)
      codes_NL[rows_n, level] = sinkhorn_lib.assign(
        error_nK, epsilon, num_iterations
      )
    if progress:
      progress(done + 1, max_rounds)
  return codes_NL, max_rounds


def token(
  label_N, *, capacity: int = 1, every: bool = False, num_fixed: int = 0
) -> np.ndarray:
  """The token more of each item, `[N]`: its number in its group, by row.

  Args:
    label_N: Items with the same label share an id.
    capacity: Groups up to this size need no token.
    every: Gives all items a token, 0 if an id is unique.
    num_fixed: The first items have theirs already; those that have none count
      in their group all the same.

  Returns:
    int64, -1 for none.
  """
  label_N = np.asarray(label_N)
  rank_N = groups.ranks(label_N)
  counts = np.bincount(label_N, minlength=1) if len(label_N) else np.zeros(1)
  is_alone_N = counts[label_N] <= capacity
  if not every:
    rank_N[is_alone_N] = -1
  rank_N[:num_fixed] = -1
  return rank_N
