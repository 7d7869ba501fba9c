"""Tables of numbers as text: .csv, a vector on each line.

Numbers are parted by commas, semicolons, tabs or blanks, whichever the first
line has; a first line with other words is a header and left out. The file is
scanned once for its lines, then parsed in pieces of at most 4,096 lines, as
float32. A file that is read for the third time, as in training, is kept in
memory up to 2 GiB.
"""

import collections
import os
import pathlib
import threading

import numpy as np

from vqjax.data import rows

_PIECE_ROWS = 4096
_SCANNED_BYTES = 1 << 24
_FEW_BYTES, _MOST_BYTES = 1 << 26, 1 << 31


def open_rows(path: pathlib.Path) -> rows.Rows:
  """Opens a .csv as rows `[N, D]`, float32."""
  reader = _Reader(path)
  return rows.Rows(reader.read, reader.shape, np.float32, str(path))


class _Reader:
  """Parses rows in pieces; the last pieces are kept."""

  def __init__(self, path: pathlib.Path):
    self._path, self._lock, self.shape = path, threading.Lock(), None
    with open(path, "rb") as f:
      first = f.readline()
    self._delimiter = next((c for c in ",;\t" if c.encode() in first), None)
    start = 0 if self._is_numbers(first) else len(first)
    self._starts, num = _scan(path, start)
    if not num:
      raise ValueError(f"{path} must hold vectors: it has no line of numbers.")
    with open(path, "rb") as f:
      f.seek(start)
      dim = self._parse([f.readline()], 0).shape[1]
    self.shape = (num, dim)
    self._kept, self._kept_bytes, self._num_parsed = (
      collections.OrderedDict(),
      0,
      0,
    )
    self._budget = _FEW_BYTES

  def _is_numbers(self, line: bytes) -> bool:
    try:
      return bool(self._load([line]).size)
    except ValueError:
      return False

  def _load(self, lines) -> np.ndarray:
    text = [line.decode("utf-8-sig") for line in lines]
    return np.loadtxt(text, np.float32, None, self._delimiter, ndmin=2)

  def _parse(self, lines, first: int) -> np.ndarray:
    try:
      found_ND = self._load(lines)
    except ValueError:  # Of text, or of lines of different lengths.
      found_ND = np.empty((0, 0))
    dim = self.shape[1] if self.shape else found_ND.shape[1]
    if found_ND.shape == (len(lines), dim) and dim:
      return found_ND
    row, found = next(self._bad(lines, dim))
    text = lines[row].strip()[:60].decode(errors="replace")
    raise rows.VectorFileError(
      f"{self._path} must have {dim or 'some'} numbers on each line, got "
      f"{found} in row {first + row}, {text!r}; repair or remove it."
    )

  def _bad(self, lines, dim: int):
    """Yields the number of each line that is no vector, and what it has."""
    for row, line in enumerate(lines):
      try:
        size = self._load([line]).size if line.strip() else 0
      except ValueError:
        yield row, "text"
        continue
      if size != dim or not size:
        yield row, f"{size}"

  def _piece(self, piece: int) -> np.ndarray:
    if piece in self._kept:
      self._kept.move_to_end(piece)
      return self._kept[piece]
    start, end = self._starts[piece : piece + 2]
    with open(self._path, "rb") as f:
      f.seek(start)
      lines = f.read(end - start).removesuffix(b"\n").split(b"\n")
    first = piece * _PIECE_ROWS
    found_ND = self._parse(lines, first)
    self._keep(piece, found_ND)
    return found_ND

  def _keep(self, piece: int, found_ND) -> None:
    self._num_parsed += 1
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    num_bytes = self.shape[0] * self.shape[1] * 4
    is_random = self._num_parsed > 2 * len(self._starts)
    if is_random and num_bytes <= min(_MOST_BYTES, memory // 4):
      self._budget = num_bytes
    self._kept[piece] = found_ND
    self._kept_bytes += found_ND.nbytes
    while self._kept_bytes > self._budget and len(self._kept) > 1:
      self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes

  def read(self, at) -> np.ndarray:
    """Rows of a slice of step 1, or of an array of row numbers."""
    if isinstance(at, slice):
      at = np.arange(at.start, at.stop)
    out_nD = np.empty((len(at), self.shape[1]), np.float32)
    piece_n = at // _PIECE_ROWS
    with self._lock:
      for piece in np.unique(piece_n):
        is_in_n = piece_n == piece
        inside_n = at[is_in_n] - piece * _PIECE_ROWS
        out_nD[is_in_n] = self._piece(int(piece))[inside_n]
    return out_nD


def _scan(path, start: int) -> tuple[list[int], int]:
  """Bytes at which pieces begin, and that of the end; number of lines.

  Empty lines at the end count for nothing.
  """
  end = _end_of_text(path, start)
  starts, num, at = [start], 0, start
  with open(path, "rb") as f:
    f.seek(start)
    while at < end:
      block = np.frombuffer(f.read(min(_SCANNED_BYTES, end - at)), np.uint8)
      if not len(block):
        break
      breaks_n = np.flatnonzero(block == ord("\n"))
      numbers_n = num + 1 + np.arange(len(breaks_n))
      is_first_n = numbers_n % _PIECE_ROWS == 0
      starts += (at + 1 + breaks_n[is_first_n]).tolist()
      num, at = num + len(breaks_n), at + len(block)
  num += end > start  # The last line, whose break is behind the end.
  return [*starts, end], num


def _end_of_text(path, start: int) -> int:
  """The byte behind the last that is no white space."""
  end = path.stat().st_size
  with open(path, "rb") as f:
    while end > start:
      size = min(1 << 16, end - start)
      f.seek(end - size)
      left = len(f.read(size).rstrip())
      if left:
        return end - size + left
      end -= size
  return start
