"""Vectors for training: arrays, memory maps, files, or iterators of batches."""

import itertools
import os

import numpy as np

from vqjax.codec import open_array
from vqjax.codecs import minibatch_kmeans
from vqjax.data import batches, formats, unit

_BLOCK = 16384
_CHECKED_BYTES = 1 << 28  # That are looked at before training.


def is_iterator(data) -> bool:
  """Whether batches are to be taken from it one by one."""
  return hasattr(data, "__next__")


def open_vectors(data):
  """Opens vectors `[N, D]`: an array, a memory map, or the path of a file.

  Raises:
    TypeError: It is something else, or holds no numbers.
  """
  if not isinstance(data, str | os.PathLike) and not hasattr(data, "shape"):
    try:
      data = np.asarray(data)
    except ValueError:  # Batches of different lengths.
      data = np.zeros((), object)
  if getattr(data, "ndim", 2) != 2:
    raise TypeError(
      "data must be an array [N, D], the path of a file, or an iterator of "
      f"arrays [n, D], got {data.ndim} dimensions; of a list of batches give "
      "iter(batches)."
    )
  return open_array(data, name="data")


def check(vectors, *, no_zeros: bool) -> None:
  """Raises ValueError if vectors cannot be clustered; names the row.

  All are read if they take at most 256 MiB, else a sample.
  """
  num, dim = vectors.shape
  most = max(_CHECKED_BYTES // (4 * dim), 1)
  rows_N = batches.evenly_spaced_rows(num, most)
  for start in range(0, len(rows_N), _BLOCK):
    _read(vectors, rows_N[start : start + _BLOCK], no_zeros)


def _read(vectors, rows_N, no_zeros: bool) -> np.ndarray:
  x_ND = batches.read_rows(vectors, rows_N)
  if no_zeros:
    is_zero_N = ~x_ND.any(axis=1)
    unit.refuse_zeros(is_zero_N, name=formats.name_of(vectors), rows=rows_N)
  return x_ND


def draw(vectors, seed: int, batch_size: int, *, no_zeros: bool, first=0):
  """Yields batches without end, from number `first` on, read in a thread.

  They walk through the vectors in random order, pass after pass; which rows a
  batch has follows from the seed and its number.
  """

  def read(number):
    rows_N = batches.batch_rows(seed, number, batch_size, len(vectors))
    return _read(vectors, rows_N, no_zeros)

  numbers = itertools.count(first)
  return batches.prefetch(read, numbers, depth=minibatch_kmeans.CHUNK)


def take(iterator, *, no_zeros: bool):
  """Yields the batches of an iterator as float32 `[n, D]`, checked."""
  dim = None
  for number, x_ND in enumerate(iterator):
    x_ND, name = np.asarray(x_ND), f"batch {number} of the iterator"
    formats.check_vectors(x_ND, dim=dim, name=name)
    dim = x_ND.shape[1]
    x_ND = formats.to_float32(x_ND, name=name)
    if no_zeros:
      unit.refuse_zeros(~x_ND.any(axis=1), name=name)
    if len(x_ND):
      yield x_ND


def first_vectors(stream, wanted: int, *, allow_fewer: bool) -> np.ndarray:
  """The first K vectors; the rest of their last batch is not used.

  Raises ValueError if the stream has fewer, unless that is allowed.
  """
  found, num = [], 0
  while num < wanted and (x_ND := next(stream, None)) is not None:
    found.append(x_ND)
    num += len(x_ND)
  if not found:
    raise ValueError("The iterator has no vectors.")
  if not allow_fewer:
    check_enough(num, wanted)
  return np.concatenate(found)[:wanted]


def check_enough(num: int, wanted: int) -> None:
  """Raises ValueError if there are fewer vectors than centroids."""
  if num < wanted:
    raise ValueError(
      f"num_centroids={wanted} needs at least as many vectors, got {num}; ask "
      "for fewer centroids, or give allow_fewer=True."
    )
