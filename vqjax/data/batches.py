"""Which rows make batch number `i`, and reading them ahead of the device.

Batches have no state: the rows of a batch follow from the seed and the number
of the step alone, so that a resumed run sees what the uninterrupted one saw.
A pass over the set is a pseudo-random permutation of its rows, evaluated as
it is needed; a billion rows cost no more memory than ten.
"""

import concurrent.futures
import contextlib
import itertools
from typing import Any

import jax
import numpy as np
from flax import struct

from vqjax.data import formats, values

_FEISTEL_ROUNDS = 8
_SUBSAMPLE_ROUND = 1 << 62  # No pass over the data has this number.
_BLOCKS_AT_ONCE = 2  # In work, see `map_blocks`.
# Before training: bytes that are read, rows at a time, rows that must differ.
_CHECKED_BYTES, _CHECKED_ROWS, _COMPARED_ROWS = 1 << 28, 65_536, 4096


def permute(index_N, size: int, seed: int, round: int) -> np.ndarray:
  """Images `[N]` of `index_N` under a pseudo-random permutation of `size` rows.

  A balanced Feistel network over the next power of four, walked until it lands
  below `size`. Each `(seed, round)` is another permutation.
  Reference: Black and Rogaway, Ciphers with Arbitrary Finite Domains, 2002.
  """
  if size < 1:
    raise ValueError(f"There must be at least 1 row to permute, got {size}.")
  index_N = np.asarray(index_N)
  if index_N.size and not 0 <= index_N.min() <= index_N.max() < size:
    raise ValueError(
      f"Positions must lie between 0 and {size - 1}, got {index_N.min()} to "
      f"{index_N.max()}."
    )
  bits = max(1, ((size - 1).bit_length() + 1) // 2)
  keys = np.random.SeedSequence([seed, round]).generate_state(
    _FEISTEL_ROUNDS, np.uint64
  )
  out_N = _feistel(index_N.astype(np.uint64), bits, keys)
  while (outside_N := out_N >= size).any():
    out_N[outside_N] = _feistel(out_N[outside_N], bits, keys)
  return out_N.astype(np.int64)


def _feistel(x_N: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
  """One-to-one map of the numbers of `2 * bits` bits."""
  shift, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
  left_N, right_N = x_N >> shift, x_N & mask
  for key in keys:
    left_N, right_N = right_N, left_N ^ (_mix(right_N ^ key) & mask)
  return (left_N << shift) | right_N


def _mix(x_N: np.ndarray) -> np.ndarray:
  """Hashes 64 bits (the finaliser of SplitMix64); the product wraps."""
  x_N = (x_N ^ (x_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x_N = (x_N ^ (x_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x_N ^ (x_N >> np.uint64(31))


def batch_rows(
  seed: int, step: int, batch_size: int, num_rows: int
) -> np.ndarray:
  """Rows `[batch_size]` of batch number `step`.

  Batches walk on through the shuffled set, over the end of a pass too; each
  pass takes every row once, in a new order.
  """
  if step < 0 or batch_size < 1 or num_rows < 1:
    raise ValueError(
      "A batch needs step >= 0, batch_size >= 1 and num_rows >= 1, got "
      f"{step}, {batch_size} and {num_rows}."
    )
  step = int(step)  # Its product overflows int32 in a long run.
  at_N = step * batch_size + np.arange(batch_size, dtype=np.int64)
  pass_N, at_N = np.divmod(at_N, num_rows)
  parts = [
    permute(at_N[pass_N == number], num_rows, seed, int(number))
    for number in np.unique(pass_N)
  ]
  return np.concatenate(parts)


def split(
  num_vectors: int, validation_size: int | None = None
) -> tuple[int, slice]:
  """Number of training rows, and the slice of the last rows to validate on.

  None holds out a tenth, at most 3,000; of more than 300,000 vectors a
  hundredth, at most 10,000. A number is taken as it is, up to half of the
  vectors. With 0 none is held out, and all are trained and validated on.
  """
  if validation_size is None:
    most = max(3000, min(num_vectors // 100, 10_000))
    validation_size = max(min(num_vectors // 10, most), 1)
  if validation_size < 0:
    raise ValueError(
      f"validation_size must not be negative, got {validation_size}."
    )
  if num_vectors < 2:
    raise ValueError(
      "Training needs at least 2 vectors, one of them to validate on, got "
      f"{num_vectors}."
    )
  num_train_rows = num_vectors - min(validation_size, num_vectors // 2)
  if not validation_size:
    return num_vectors, slice(0, num_vectors)
  return num_train_rows, slice(num_train_rows, num_vectors)


@struct.dataclass
class WithLists:
  """Vectors, and the list that each of them is in: a batch, or a whole file.

  As a batch it is a tree of two arrays.
  """

  x_ND: Any  # An open file too.
  lists_N: Any

  def __len__(self) -> int:
    """Number of vectors."""
    return len(self.x_ND)


def split_lists(rows) -> tuple:
  """Returns vectors `[N, D]` and their lists, None for vectors alone."""
  return (
    (rows.x_ND, rows.lists_N) if isinstance(rows, WithLists) else (rows, None)
  )


def read_rows(vectors, rows) -> np.ndarray | WithLists:
  """Reads rows `[N]` of an open file as float32 `[N, D]`, in their order.

  Of `WithLists` they come with their lists, int32.

  Reads in the order of the file. Refuses NaN, Inf and integers that float32
  does not have by the name of the file and their row number.
  """
  rows = np.asarray(rows, np.int64)
  if isinstance(vectors, WithLists):
    lists_N = vectors.lists_N[rows].astype(np.int32)
    return WithLists(read_rows(vectors.x_ND, rows), lists_N)
  num = len(vectors)
  if rows.size and not 0 <= rows.min() <= rows.max() < num:
    raise ValueError(
      f"Rows must lie between 0 and {num - 1}, got {rows.min()} to "
      f"{rows.max()}."
    )
  order_N = np.argsort(rows, kind="stable")
  sorted_N = rows[order_N]
  x_ND = formats.to_float32(
    np.asarray(vectors[sorted_N]),
    name=formats.name_of(vectors),
    rows=sorted_N + getattr(vectors, "first_row", 0),
  )
  if (sorted_N == rows).all():
    return x_ND
  out_ND = np.empty_like(x_ND)
  out_ND[order_N] = x_ND
  return out_ND


class BatchReader:
  """`reader(step)` is this process's part of batch `step`, by `read_rows`.

  All processes draw the same batch of `batch_size` rows out of the first
  `num_rows`; process `i` of `c` reads its `i`-th part, `n = batch_size / c`.
  """

  def __init__(
    self,
    vectors,
    seed: int,
    batch_size: int,
    num_rows: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
  ):
    """Reads from open `vectors`; `num_rows` None means all of them."""
    num_rows = len(vectors) if num_rows is None else num_rows
    if not 1 <= num_rows <= len(vectors):
      raise ValueError(
        f"num_rows must lie between 1 and {len(vectors)}, got {num_rows}."
      )
    if batch_size < 1 or batch_size % process_count:
      raise ValueError(
        f"The batch size must be a multiple of the {process_count} processes, "
        f"got {batch_size}."
      )
    if not 0 <= process_index < process_count:
      raise ValueError(
        f"process_index must be below {process_count}, got {process_index}."
      )
    local = batch_size // process_count
    self._mine = slice(process_index * local, (process_index + 1) * local)
    self._args = (batch_size, num_rows)
    self._vectors, self._seed = vectors, seed

  def __call__(self, step: int) -> np.ndarray | WithLists:
    """Reads this process's rows of batch number `step`."""
    rows = batch_rows(self._seed, step, *self._args)[self._mine]
    return read_rows(self._vectors, rows)


def prefetch(make_item, steps, *, depth: int = 2, num_threads: int = 1):
  """Yields `make_item(step)` in order, up to `depth` made ahead in threads.

  An exception of `make_item` is raised here, at its step. Closing the
  generator, or leaving a loop over it, ends the threads. `steps` may be
  endless.
  """
  if depth < 1:
    raise ValueError(f"depth must be at least 1, got {depth}.")
  return _prefetch(make_item, iter(steps), depth, num_threads)


def _prefetch(make_item, steps, depth: int, num_threads: int):
  pool = concurrent.futures.ThreadPoolExecutor(num_threads, "vqjax-prefetch")
  try:
    ahead = [
      pool.submit(make_item, step) for step in itertools.islice(steps, depth)
    ]
    while ahead:
      item = ahead.pop(0).result()
      ahead += [
        pool.submit(make_item, step) for step in itertools.islice(steps, 1)
      ]
      yield item
  finally:
    pool.shutdown(wait=True, cancel_futures=True)


def map_blocks(
  fn, vectors, *, block_size: int, rows: range | None = None, progress=None
):
  """Yields `(start, fn(block))` for consecutive blocks of rows, as numpy.

  Two blocks are in work at once, each in a thread that reads it, calls `fn`
  and fetches the result: while one is read, or does what XLA does on one core,
  the other keeps the device busy. All blocks have one size, so that a jitted
  `fn` compiles once: the last is padded with its last row, and its results
  are cut back.

  Args:
    fn: takes float32 `[n, D]`, or `WithLists`, returns arrays `[n, ...]` or a
      pytree of them; called from two threads.
    vectors: `[N, D]`, an open file or an array, or `WithLists`.
    block_size: rows per block; a shorter input is one block of its own size.
    rows: consecutive rows to go through; None for all.
    progress: called with `(rows done, rows in all)` after each block.
  """
  if block_size < 1:
    raise ValueError(f"block_size must be at least 1, got {block_size}.")
  rows = range(len(vectors)) if rows is None else rows
  if not 0 <= rows.start <= rows.stop <= len(vectors) or rows.step != 1:
    raise ValueError(
      f"rows must be consecutive ones of the {len(vectors)}, got {rows}."
    )
  return _map_blocks(fn, vectors, min(block_size, len(rows)), rows, progress)


def _map_blocks(fn, vectors, block_size: int, rows: range, progress):
  def make(start):
    stop = min(start + block_size, rows.stop)
    block = _read_block(vectors, start, stop, block_size)
    cut_fn = lambda a: np.asarray(a)[: stop - start]
    return start, stop, jax.tree.map(cut_fn, fn(block))

  starts = rows[:: block_size or 1]
  made = prefetch(
    make, starts, depth=_BLOCKS_AT_ONCE, num_threads=_BLOCKS_AT_ONCE
  )
  with contextlib.closing(made) as blocks:
    for start, stop, result in blocks:
      if progress is not None:
        progress(stop - rows.start, len(rows))
      yield start, result


def in_blocks(fn, block_size: int):
  """Returns `fn` for any number of rows, cut into blocks: two at work at once.

  For the reason of `map_blocks`, and because small arrays stay in the caches.

  `fn` takes `[n, ...]` and returns one array `[n, ...]`; it is called from two
  threads, and at most `block_size` rows go to it as they are. The last block is
  padded with its last row, and its results are cut back.
  """
  if block_size < 1:
    raise ValueError(f"block_size must be at least 1, got {block_size}.")
  pool = concurrent.futures.ThreadPoolExecutor(_BLOCKS_AT_ONCE, "vqjax-blocks")

  def run(rows_N):
    if len(rows_N) <= block_size:
      return fn(rows_N)

    def make(start):
      block_N = rows_N[start : start + block_size]
      pad = [(0, block_size - len(block_N))] + [(0, 0)] * (rows_N.ndim - 1)
      return np.asarray(fn(np.pad(block_N, pad, "edge")))[: len(block_N)]

    return np.concatenate(
      list(pool.map(make, range(len(rows_N))[::block_size]))
    )

  return run


def _read_block(vectors, start: int, stop: int, block_size: int):
  """Rows `start` to `stop` as float32; repeats the last to fill the block."""
  if isinstance(vectors, WithLists):
    lists_N = np.asarray(vectors.lists_N[start:stop], np.int32)
    return WithLists(
      _read_block(vectors.x_ND, start, stop, block_size),
      np.pad(lists_N, (0, block_size - len(lists_N)), "edge"),
    )
  x_ND = formats.to_float32(
    np.asarray(vectors[start:stop]),
    name=formats.name_of(vectors),
    first_row=start + getattr(vectors, "first_row", 0),
  )
  if len(x_ND) == block_size:  # No copy.
    return x_ND
  return np.pad(x_ND, ((0, block_size - len(x_ND)), (0, 0)), "edge")


def evenly_spaced_rows(num_rows: int, most: int) -> np.ndarray:
  """At most `most` of the rows, at equal distances, int64."""
  num = min(num_rows, most)
  return np.unique(np.linspace(0, num_rows - 1, num, dtype=np.int64))


def check_training(vectors, num_rows: int | None = None) -> None:
  """Raises ValueError if nothing can be learned from the first rows.

  All of them are read if they take at most 256 MiB, else a sample: numbers
  that are no finite float32, or too large to be squared, are named by row.
  Vectors must differ (`values.check_spread`).
  """
  num_rows = len(vectors) if num_rows is None else num_rows
  most = max(_CHECKED_BYTES // (4 * vectors.shape[1]), 1)
  rows_N = evenly_spaced_rows(num_rows, most)
  for start in range(0, len(rows_N), _CHECKED_ROWS):
    read_rows(vectors, rows_N[start : start + _CHECKED_ROWS])
  sample_ND = np.asarray(vectors[evenly_spaced_rows(num_rows, _COMPARED_ROWS)])
  values.check_spread(sample_ND, name=formats.name_of(vectors))


def subsample(
  vectors, num: int, seed: int, *, num_rows: int | None = None
) -> np.ndarray | WithLists:
  """A random sample of `num` of the first `num_rows` rows, by `read_rows`.

  No row comes twice; the rows keep the order of the file. The same seed gives
  the same sample. All rows are taken if there are at most `num`.
  """
  num_rows = len(vectors) if num_rows is None else num_rows
  if num < 1 or not 1 <= num_rows <= len(vectors):
    raise ValueError(
      f"A sample needs num >= 1 and 1 <= num_rows <= {len(vectors)}, got "
      f"{num} and {num_rows}."
    )
  at_N = np.arange(min(num, num_rows))
  if num < num_rows:
    at_N = np.sort(permute(at_N, num_rows, seed, _SUBSAMPLE_ROUND))
  return read_rows(vectors, at_N)
