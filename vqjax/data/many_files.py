"""Many files of vectors as one: a folder, or a pattern such as `part-*.npy`.

The rows of the files follow each other in the order of their names, in which
numbers count as numbers: `part-10.npy` comes after `part-9.npy`. Mapped files
stay open. Of others, whose readers keep rows in memory, two stay open, or all
if they are small.
"""

import bisect
import collections
import glob
import pathlib
import re
import threading

import numpy as np
from absl import logging

from vqjax.data import rows

_MAGIC = re.compile(r"[*?\[]")
_SMALL_BYTES, _FEW_READERS = 1 << 31, 2


def find(path: pathlib.Path, suffixes) -> list[pathlib.Path] | None:
  """Returns the files of a folder or of a pattern, None if it is neither.

  Hidden files, and in a folder what are no vectors, are left out.

  Raises:
    FileNotFoundError: There are none.
    ValueError: They are of different kinds.
  """
  is_pattern = _MAGIC.search(str(path)) and not path.exists()
  if path.is_dir():
    found = [p for p in path.iterdir() if p.suffix.lower() in suffixes]
  elif is_pattern:
    found = map(pathlib.Path, glob.glob(str(path), recursive=True))
  else:
    return None
  found = [p for p in found if p.is_file() and not p.name.startswith(".")]
  found.sort(key=_in_order)
  if not found:
    what = "pattern has no files" if is_pattern else "folder has no vectors"
    raise FileNotFoundError(
      f"There are no vectors at {path}: this {what}; their suffix must be one "
      f"of {' '.join(suffixes)}."
    )
  kinds = {p.suffix.lower(): p for p in reversed(found)}
  if len(kinds) > 1:
    (_, one), (_, other) = list(kinds.items())[:2]
    raise ValueError(
      f"{path} has files of different kinds, {one.name} and {other.name}; "
      f"choose those of one, as {(one.parent if is_pattern else path)}/"
      f"*{one.suffix}."
    )
  return found


def _in_order(path: pathlib.Path) -> list:
  parts = re.split(r"(\d+)", str(path))
  return [int(p) if i % 2 else p for i, p in enumerate(parts)] + [str(path)]


def open_rows(name: str, paths, open_fn) -> rows.Rows:
  """Joins files as rows `[N, D]`; `open_fn` opens one of them.

  Raises ValueError if their dimensions differ.
  """
  reader = _Reader(name, paths, open_fn)
  return rows.Rows(reader.read, reader.shape, reader.dtype, name)


class _Reader:
  """Reads rows of many files, of which few are open."""

  def __init__(self, name: str, paths, open_fn):
    self._name, self._paths, self._open_fn = name, paths, open_fn
    self._open, self._lock = collections.OrderedDict(), threading.Lock()
    self._mapped, self._num_opened, self._most = {}, 0, _FEW_READERS
    self._ends, dtypes, dim, num, num_bytes = [], [], None, 0, 0
    for i, path in enumerate(paths):
      vectors = self._file(i)
      dim = dim or vectors.shape[1]
      if vectors.shape[1] != dim:
        raise ValueError(
          f"{path} has dimension {vectors.shape[1]}, but {paths[0]} has {dim}; "
          "all files must have one dimension: move the others away."
        )
      num += len(vectors)
      self._ends.append(num)
      dtypes.append(vectors.dtype)
      num_bytes += len(vectors) * dim * vectors.dtype.itemsize
    if num_bytes <= _SMALL_BYTES:
      self._most = len(paths)
    self.shape, self.dtype = (num, dim), np.result_type(*set(dtypes))

  def _file(self, i: int):
    if i in self._mapped:
      return self._mapped[i]
    if i not in self._open:
      vectors = self._open_fn(self._paths[i])
      if isinstance(vectors, rows.MappedRows):
        self._mapped[i] = vectors
        return vectors
      self._open[i] = vectors
      self._num_opened += 1
      if self._num_opened == 3 * len(self._paths) + 1:
        self._warn()
    self._open.move_to_end(i)
    while len(self._open) > self._most:
      self._open.popitem(last=False)
    return self._open[i]

  def _warn(self) -> None:
    if self._most < len(self._paths):
      logging.warning(
        "%s is too much to keep in memory, and batches of random rows read all "
        "of it: slow. Write it as .npy once and train on that:\n"
        '  python -c "from vqjax.data.formats import *; '
        "write_vectors('vectors.npy', open_vectors('%s'))\"",
        *(self._name, self._name),
      )

  def read(self, at) -> np.ndarray:
    """Rows of a slice of step 1, or of an array of row numbers."""
    with self._lock:
      if isinstance(at, slice):
        return self._read_slice(at.start, at.stop)
      out_nD = np.empty((len(at), self.shape[1]), self.dtype)
      file_n = np.searchsorted(self._ends, at, "right")
      for i in np.unique(file_n):
        is_in_n = file_n == i
        first = self._ends[i - 1] if i else 0
        out_nD[is_in_n] = self._file(int(i))[at[is_in_n] - first]
      return out_nD

  def _read_slice(self, start: int, stop: int) -> np.ndarray:
    out_nD = np.empty((stop - start, self.shape[1]), self.dtype)
    i, at = bisect.bisect_right(self._ends, start), start
    while at < stop:
      first, end = self._ends[i - 1] if i else 0, min(stop, self._ends[i])
      out_nD[at - start : end - start] = self._file(i)[at - first : end - first]
      i, at = i + 1, end
    return out_nD
