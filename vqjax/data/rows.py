"""Open vectors: rows that are read when they are asked for.

`MappedRows` are rows of a memory-mapped file, `Rows` are of a file that
cannot be mapped. Both know their `name`, for messages: the path, and what the
vectors are to who reads them, such as `x.npy (queries)`.

A mapped file that another program cuts short kills whoever reads behind its
end (SIGBUS, which Python cannot catch). So the size of the file is compared
before each read; only a cut between that and the read itself goes unnoticed.
"""

import numpy as np


class VectorFileError(ValueError):
  """An error whose message says all, which goes out as it is."""


class MappedRows(np.memmap):
  """A mapped array that knows its file; `rows[i]` checks that it is whole.

  `first_row` is the number, in the file, of the first row of a slice.
  """

  name = None
  first_row = 0
  _file_bytes = 0

  def __array_finalize__(self, parent):
    """Hands what is known of the file on to parts of the array."""
    super().__array_finalize__(parent)
    for name in ("name", "first_row", "_file_bytes"):
      setattr(self, name, getattr(parent, name, getattr(MappedRows, name)))

  def __array_wrap__(self, array, context=None, return_scalar=False):
    """Makes results of arithmetic plain arrays, or numbers."""
    array = np.asarray(array)
    return array[()] if return_scalar else array

  def __getitem__(self, rows):
    """Picks rows: mapped if they are a slice, else in memory."""
    if self._mmap is not None and self._mmap.size() < self._file_bytes:
      raise OSError(
        f"{self.name} shrank from {self._file_bytes} to {self._mmap.size()} "
        "bytes while it was being read; write it anew and start again."
      )
    found = super().__getitem__(rows)
    if not isinstance(found, MappedRows):
      return found
    first = rows[0] if isinstance(rows, tuple) and rows else rows
    if isinstance(first, slice):
      found.first_row += first.indices(len(self))[0]
    return found.view(np.ndarray) if found._mmap is None else found


def mapped(vectors: np.memmap, name: str) -> MappedRows:
  """Returns a mapped array as `MappedRows` of this name."""
  named = vectors.view(MappedRows)
  named.name, named._file_bytes = name, named._mmap.size()
  return named


class Rows:
  """Rows `[N, D]` that `read_fn` reads.

  `rows[i]` takes a slice, an integer or an array of them, in any order.
  """

  def __init__(self, read_fn, shape, dtype, name: str):
    """Makes them of a function of slices of step 1 and of arrays of rows.

    `read_fn` takes such a slice, or int64 `[n]`, and returns `[n, D]`. `shape`
    may have fewer rows than the file; messages use the `name`.
    """
    self._read_fn, self.name = read_fn, name
    self.shape, self.dtype, self.ndim = tuple(shape), np.dtype(dtype), 2

  def __len__(self) -> int:
    """Number of rows."""
    return self.shape[0]

  def __getitem__(self, rows) -> np.ndarray:
    """Reads rows; memory and time grow with their number alone."""
    if isinstance(rows, slice):
      start, stop, step = rows.indices(len(self))
      if step == 1:
        return self._read_fn(slice(start, max(start, stop)))
      rows = np.arange(start, stop, step)
    at = self._row_numbers(rows)
    return self._read_fn(at.ravel()).reshape(*at.shape, self.shape[1])

  def _row_numbers(self, rows) -> np.ndarray:
    at = np.asarray(rows)
    if at.dtype == bool:
      at = np.flatnonzero(at)
    at = at.astype(np.int64, casting="same_kind" if at.size else "unsafe")
    num = len(self)
    if at.size and not -num <= at.min() <= at.max() < num:
      raise IndexError(
        f"Rows of {self.name} must lie between 0 and {num - 1}, got {at.min()} "
        f"to {at.max()}."
      )
    return np.where(at < 0, at + num, at)

  def head(self, num: int) -> "Rows":
    """Returns the first rows, all if there are fewer."""
    shape = (min(num, len(self)), self.shape[1])
    return Rows(self._read_fn, shape, self.dtype, self.name)

  def __array__(self, dtype=None, copy=None) -> np.ndarray:
    """Reads all rows."""
    return np.asarray(self[:], dtype)


def check_table(name: str, shape, dtype) -> None:
  """Raises ValueError unless a table of a file can be vectors `[N, D]`."""
  shape, dtype = tuple(shape), np.dtype(dtype)
  if len(shape) != 2 or min(shape) < 1:
    advice = {
      0: "it is a single number.",
      1: "one vector is saved as x[None], numbers one by one as x[:, None].",
    }.get(len(shape), "join the axes with x.reshape(len(x), -1).")
    if 0 in shape:
      advice = "it is empty."
    raise ValueError(
      f"{name} must hold vectors of shape (N, D), got shape {shape}: {advice}"
    )
  if dtype.kind not in "iuf":
    advice = {
      "O": "Python objects are never loaded; save np.stack(rows) instead.",
      "b": "save x.astype(np.uint8).",
      "c": "save real and imaginary parts side by side.",
      "V": "save x.astype(np.float32).",
    }.get(dtype.kind, "save them as such.")
    if dtype.names:
      advice = f"save one of its fields {', '.join(dtype.names[:9])}."
    raise ValueError(
      f"{name} must hold integers or floating point numbers, got "
      f"{str(dtype)[:80]}: {advice}"
    )
