"""Columns of Parquet files: lists as rows of vectors, and ids.

pyarrow is an optional dependency. Rows are decoded in pieces of at most 16 MiB,
so that a row group of a million rows costs no more memory than a small one.
A file has no way to a row but through its row group from the start. Who reads
in order, as encoding does, decodes each row once. For batches of random rows,
as in training, a column of up to 2 GiB is kept in memory after its second
reading; of a larger one every batch reads all, which a warning says.
"""

import collections
import contextlib
import os
import threading

import numpy as np
from absl import logging

from vqjax.data import rows

ID = "id"  # Our own column of item ids.
_PIECE_BYTES = 1 << 24
_FEW_BYTES = 1 << 26  # Of pieces that are kept, see above.
_MOST_BYTES = 1 << 31
_MOST_LISTED = 20


def import_parquet():
  """Returns pyarrow; raises ImportError that says how to get it."""
  try:
    import pyarrow.parquet
  except ImportError as e:
    raise ImportError(
      "Parquet files need pyarrow, which is not installed; run "
      "pip install 'vqjax[parquet]'."
    ) from e
  return pyarrow


@contextlib.contextmanager
def _damage_in_words(name):
  """Makes any error of Arrow one that names the file."""
  try:
    yield
  except (rows.VectorFileError, MemoryError, PermissionError):
    raise
  except Exception as e:  # Arrow has several for each way to be damaged.
    reason = " ".join(str(e).split())[:200] or type(e).__name__
    raise ValueError(
      f"{name} cannot be read, it is truncated, damaged or no Parquet file: "
      f"{reason.rstrip('.')}. Write it anew, or bring back a copy."
    ) from e


def _open(path):
  pa = import_parquet()
  with _damage_in_words(path):
    # Else a column of a row group is read whole before its first piece.
    knobs = {"pre_buffer": False, "buffer_size": 1 << 20}
    return pa, pa.parquet.ParquetFile(path, **knobs)


def open_rows(path, column: str | None) -> rows.Rows:
  """Opens a column of lists of the Parquet file at `path` as rows `[N, D]`.

  None is the only column of lists. Lists may be of fixed size or not, of
  integers or floating point numbers.
  """
  pa, file = _open(path)
  column = _choose(pa, file, path, column)
  name = f"{path}#{column}"
  kind = _storage(pa, file.schema_arrow.field(column).type)
  if not file.metadata.num_rows:
    raise ValueError(f"{name} must hold vectors: it is empty, it has no rows.")
  dtype = np.dtype(kind.value_type.to_pandas_dtype())
  if pa.types.is_fixed_size_list(kind):
    dim = kind.list_size
  else:
    with _damage_in_words(name):
      groups = [i for i in range(file.num_row_groups) if _num_rows(file, i)]
      first = next(file.iter_batches(1, groups[:1], [column])).column(column)
      dim = len(first[0]) if first[0].is_valid else _refuse_null(name, 0)
  shape = (file.metadata.num_rows, dim)
  rows.check_table(name, shape, dtype)
  return rows.Rows(
    _Reader(pa, file, column, name, dim).read, shape, dtype, name
  )


def _num_rows(file, group: int) -> int:
  return file.metadata.row_group(group).num_rows


def _storage(pa, kind):
  """The type that values are stored as: tensors of fixed shape are lists."""
  is_extension = isinstance(kind, pa.BaseExtensionType)
  return kind.storage_type if is_extension else kind


def _is_vectors(pa, kind) -> bool:
  kind, types = _storage(pa, kind), pa.types
  is_list = (
    types.is_list(kind)
    or types.is_large_list(kind)
    or types.is_fixed_size_list(kind)
  )
  return is_list and (
    types.is_integer(kind.value_type) or types.is_floating(kind.value_type)
  )


def _choose(pa, file, path, column: str | None) -> str:
  """The name of a column of vectors; raises unless the file has that one."""
  schema = file.schema_arrow
  listed = _listed(schema)
  usable = [f.name for f in schema if _is_vectors(pa, f.type)]
  choose = f"choose one with {path.name}#name"
  if column is None:
    if len(usable) == 1:
      return usable[0]
    if usable:
      raise ValueError(
        f"{path} has {len(usable)} columns of vectors, {', '.join(usable)}; "
        f"{choose}."
      )
    raise ValueError(
      f"{path} has no column of lists of numbers, one list per vector; its "
      f"columns are {listed}."
    )
  _check_column(schema, path, column)
  if column not in usable:
    raise ValueError(
      f"{path}#{column} must hold a list of numbers per row, got "
      f"{str(schema.field(column).type)[:80]}; "
      f"{choose}: {', '.join(usable) or 'no column has such lists'}."
    )
  return column


def _listed(schema) -> str:
  names = [f"{f.name} ({str(f.type)[:40]})" for f in schema][:_MOST_LISTED]
  more = ", ..." if len(schema) > _MOST_LISTED else ""
  return ", ".join(names) + more or "none"


def _check_column(schema, path, column: str) -> None:
  num = len(schema.get_all_field_indices(column))
  if num != 1:
    found = f"{num} columns" if num else "no column"
    raise ValueError(
      f"{path} has {found} {column!r}; its columns are {_listed(schema)}."
    )


def _refuse_null(name: str, row: int):
  raise rows.VectorFileError(
    f"{name} has no value in row {row}; remove rows without a value, or fill "
    "them."
  )


class _Reader:
  """Reads rows of a column in pieces; the last pieces are kept."""

  def __init__(self, pa, file, column: str, name: str, dim: int):
    self._pa, self._file, self._name, self._dim = pa, file, name, dim
    self._column = column
    kind = _storage(pa, file.schema_arrow.field(column).type)
    self._dtype = np.dtype(kind.value_type.to_pandas_dtype())
    row_bytes = max(dim * self._dtype.itemsize, 1)
    self._size = max(_PIECE_BYTES // row_bytes, 1)  # Rows of a piece, at most.
    # Of each piece: its row group and its first row; of each group: its first
    # piece.
    self._groups, self._firsts, self._group_pieces, row = [], [], [], 0
    for group in range(file.num_row_groups):
      self._group_pieces.append(len(self._firsts))
      num = _num_rows(file, group)
      firsts = range(row, row + num, self._size)
      self._firsts += firsts
      self._groups += [group] * len(firsts)
      row += num
    self._firsts, self._ends = np.array(self._firsts), [*self._firsts[1:], row]
    self._num_bytes = row * row_bytes
    self._budget, self._num_read, self._kept_bytes = _FEW_BYTES, 0, 0
    self._kept = collections.OrderedDict()
    self._stream, self._group, self._next = None, -1, -1
    self._lock = threading.Lock()  # One reader, for threads of `map_blocks`.

  def read(self, at) -> np.ndarray:
    """Rows of a slice of step 1, or of an array of row numbers."""
    if isinstance(at, slice):
      at = np.arange(at.start, at.stop)
    out_nD = np.empty((len(at), self._dim), self._dtype)
    piece_n = np.searchsorted(self._firsts, at, "right") - 1
    order_n = np.argsort(piece_n, kind="stable")
    _, starts = np.unique(piece_n[order_n], return_index=True)
    with self._lock:
      for to_n in np.split(order_n, starts[1:]) if len(at) else ():
        piece = int(piece_n[to_n[0]])
        out_nD[to_n] = self._piece(piece)[at[to_n] - self._firsts[piece]]
    return out_nD

  def _piece(self, piece: int) -> np.ndarray:
    if piece in self._kept:
      self._kept.move_to_end(piece)
      return self._kept[piece]
    group = self._groups[piece]
    if self._stream is None or group != self._group or piece < self._next:
      self._stream = self._file.iter_batches(
        self._size, [group], [self._column], use_threads=False
      )
      self._group, self._next = group, self._group_pieces[group]
    while self._next <= piece:
      found_ND = self._decode_next()
    return found_ND

  def _decode_next(self) -> np.ndarray:
    """Decodes the next piece of the stream, and keeps it."""
    piece, first = self._next, self._firsts[self._next]
    with _damage_in_words(self._name):
      try:
        batch = next(self._stream)
        found_ND = self._to_numpy(batch.column(self._column), first)
        if first + len(found_ND) != self._ends[piece]:
          raise ValueError(f"rows are missing from row {first} on")
      except BaseException:
        self._stream = None
        raise
    self._next += 1
    self._num_read += 1
    if self._num_read == 2 * len(self._firsts) + 1:
      self._expect_more()
    self._kept[piece] = found_ND
    self._kept_bytes += found_ND.nbytes
    while self._kept_bytes > self._budget and len(self._kept) > 1:
      self._kept_bytes -= self._kept.popitem(last=False)[1].nbytes
    return found_ND

  def _expect_more(self) -> None:
    """Decides what to keep of a column that is read for the third time."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if self._num_bytes <= min(_MOST_BYTES, memory // 4):
      self._budget = self._num_bytes
      return
    logging.warning(
      "%s takes %.1f GB, too much to keep in memory, and each batch of random "
      "rows reads all of it: slow. Write it as .npy once and train on that:\n"
      '  python -c "from vqjax.data.formats import *; '
      "write_vectors('vectors.npy', open_vectors('%s'))\"",
      *(self._name, self._num_bytes / 1e9, self._name),
    )

  def _to_numpy(self, column, first: int) -> np.ndarray:
    """A column of a batch as `[n, D]`; `first` is its row in the file."""
    if isinstance(column.type, self._pa.BaseExtensionType):
      column = column.storage
    if column.null_count:
      _refuse_null(self._name, first + _first_null(column))
    if not self._pa.types.is_fixed_size_list(column.type):
      sizes_n = np.diff(column.offsets.to_numpy())
      if (wrong := sizes_n != self._dim).any():
        row = int(np.argmax(wrong))
        raise rows.VectorFileError(
          f"{self._name} has {sizes_n[row]} numbers in row {first + row}, but "
          f"{self._dim} in row 0; all vectors need one dimension: remove or "
          "repair that row."
        )
    numbers = column.flatten()
    if numbers.null_count:
      row, at = divmod(_first_null(numbers), self._dim)
      raise rows.VectorFileError(
        f"{self._name} has no number in row {first + row}, dimension {at}; "
        "remove rows without a value, or fill them."
      )
    return numbers.to_numpy(zero_copy_only=False).reshape(-1, self._dim)


def _first_null(column) -> int:
  return int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))


def column_names(path) -> list[str]:
  """Returns the names of the columns of a file."""
  return _open(path)[1].schema_arrow.names


def read_ids(path, column: str) -> np.ndarray:
  """Reads a column of integers or text whole: int64 `[N]`, or str objects."""
  pa, file = _open(path)
  schema = file.schema_arrow
  _check_column(schema, path, column)
  kind, name = schema.field(column).type, f"{path}#{column}"
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  is_integer = pa.types.is_integer(kind)
  if not (
    is_integer or pa.types.is_string(kind) or pa.types.is_large_string(kind)
  ):
    raise ValueError(
      f"{name} must hold integers or text to be ids, got {kind}; the columns "
      f"are {_listed(schema)}."
    )
  with _damage_in_words(name):
    found = file.read([column]).column(column)
    if found.null_count:
      _refuse_null(name, _first_null(found.combine_chunks()))
    if is_integer:
      return found.cast(pa.int64()).to_numpy()
    return found.cast(pa.large_string()).to_numpy().astype(object)


def write_blocks(path, column: str, blocks, ids_N=None) -> int:
  """Writes blocks `[n, D]` as a column of lists as they come; returns `N`.

  `ids_N` are integers or text, which become the column "id" before it.
  """

  def columns():
    num = 0
    for block_nD in blocks:
      found = {column: block_nD}
      if ids_N is not None:
        found = {ID: ids_N[num : num + len(block_nD)], **found}
      num += len(block_nD)
      yield found

  return write_columns(path, columns())


def write_columns(path, blocks) -> int:
  """Writes dicts of columns, as of `write`, as they come; returns the rows."""
  pa, writer, num = import_parquet(), None, 0
  try:
    for columns in blocks:
      table = _table(pa, columns)
      writer = writer or pa.parquet.ParquetWriter(path, table.schema)
      writer.write_table(table)
      num += len(table)
  finally:
    if writer:
      writer.close()
  return num


def write(path, columns: dict[str, np.ndarray]) -> None:
  """Writes arrays `[N]` and `[N, D]` as columns, the latter as lists."""
  pa = import_parquet()
  pa.parquet.write_table(_table(pa, columns), path)


def _table(pa, columns: dict[str, np.ndarray]):
  arrays = {}
  for name, array in columns.items():
    if array.ndim == 2 and array.dtype.kind != "O":
      flat = pa.array(array.ravel())
      arrays[name] = pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
    else:
      arrays[name] = pa.array(array.tolist())
  return pa.table(arrays)
