"""Columns of Lance data sets: lists as rows of vectors, and ids.

A data set is a folder that ends in .lance, `items.lance#embedding` picks a
column. Rows are read where they are asked for, in any order. pylance is an
optional dependency.
"""

import pathlib

import numpy as np

from vqjax.data import rows

SUFFIX = ".lance"


def import_lance():
  """Returns the package lance; raises ImportError that says how to get it."""
  try:
    import lance
  except ImportError as e:
    raise ImportError(
      "Lance data sets need pylance, which is not installed; run "
      "pip install 'vqjax[lance]'."
    ) from e
  return lance


def is_lance(path) -> bool:
  """Whether a path is of a Lance data set."""
  return pathlib.Path(path).suffix.lower() == SUFFIX


def open_data(path):
  """Opens a data set; raises ValueError if it is damaged, or none."""
  lance = import_lance()
  if not pathlib.Path(path).exists():
    raise FileNotFoundError(f"There is no Lance data set {path}.")
  try:
    return lance.dataset(str(path))
  except (ValueError, OSError, RuntimeError) as e:
    reason = " ".join(str(e).split())[:200]
    raise ValueError(
      f"{path} cannot be read, it is damaged or no Lance data set: {reason}. "
      "Write it anew, or bring back a copy."
    ) from e


def open_rows(path, column: str | None) -> rows.Rows:
  """Opens a column of lists of fixed size as rows `[N, D]`.

  None is the only such column.
  """
  data = open_data(path)
  column = _choose(data.schema, path, column)
  kind, name = data.schema.field(column).type, f"{path}#{column}"
  shape = (data.count_rows(), kind.list_size)
  dtype = np.dtype(kind.value_type.to_pandas_dtype())
  rows.check_table(name, shape, dtype)

  def read(at) -> np.ndarray:
    if isinstance(at, slice):
      span = {"offset": at.start, "limit": at.stop - at.start}
      table = data.to_table(columns=[column], **span) if span["limit"] else None
    else:  # It wants rising rows, each once.
      at, back_n = np.unique(at, return_inverse=True)
      table = data.take(at, columns=[column]) if len(at) else None
    if table is None:
      return np.empty((0, shape[1]), dtype)
    found = table.column(column).combine_chunks()
    numbers = found.flatten()
    if found.null_count or numbers.null_count:
      raise rows.VectorFileError(
        f"{name} has rows without a vector, or without a number; remove them, "
        "or fill them."
      )
    x_nD = numbers.to_numpy(zero_copy_only=False).reshape(-1, shape[1])
    return x_nD if isinstance(at, slice) else x_nD[back_n]

  return rows.Rows(read, shape, dtype, name)


def _choose(schema, path, column: str | None) -> str:
  """The name of a column of vectors; raises unless there is that one."""
  import pyarrow as pa

  def is_vectors(kind) -> bool:
    return pa.types.is_fixed_size_list(kind) and (
      pa.types.is_integer(kind.value_type)
      or pa.types.is_floating(kind.value_type)
    )

  usable = [field.name for field in schema if is_vectors(field.type)]
  if column is None and len(usable) == 1:
    return usable[0]
  if column in usable:
    return column
  said = f"no column {column!r} of vectors" if column else "several columns"
  said = said if usable else "no column of lists of numbers of fixed size"
  raise ValueError(
    f"{path} has {said}; choose one with {pathlib.Path(path).name}#name: "
    f"{', '.join(usable) or 'there is none'}. All columns are "
    f"{', '.join(schema.names[:20])}."
  )


def column_names(path) -> list[str]:
  """Returns the names of the columns."""
  return open_data(path).schema.names


def read_ids(path, column: str) -> np.ndarray:
  """Reads a column of integers or text whole: int64 `[N]`, or str objects."""
  import pyarrow as pa

  data = open_data(path)
  names = data.schema.names
  if column not in names:
    raise ValueError(
      f"{path} has no column {column!r}; its columns are {', '.join(names)}."
    )
  found = data.to_table(columns=[column]).column(column)
  if found.null_count:
    raise ValueError(f"{path}#{column} has rows without an id; fill them.")
  if pa.types.is_integer(found.type):
    return found.cast(pa.int64()).to_numpy()
  if not (
    pa.types.is_string(found.type) or pa.types.is_large_string(found.type)
  ):
    raise ValueError(
      f"{path}#{column} must hold integers or text to be ids, got {found.type}."
    )
  return found.cast(pa.large_string()).to_numpy().astype(object)
