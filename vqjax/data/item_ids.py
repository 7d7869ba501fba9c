"""Item ids: what a user calls the rows of a file of vectors.

Ids are integers or text, one for each row, none twice. They come from a column
of the Parquet file that has the vectors, or from a file of their own:

  .npy                   integers or text `[N]`
  .txt                   one id a line, UTF-8; integers where all lines are
  file.parquet#column    integers or text

Our own outputs keep them as .txt, which any program reads.
"""

import pathlib

import numpy as np

from vqjax.data import files, formats, numpy_files, parquet

KIND = ("vqjax item ids", 1)
FLAG_HELP = (
  "Item ids, kept through to the results: a column of the Parquet file, or a "
  ".npy, a .txt with an id a line, or file.parquet#column."
)
_SUFFIXES = (".npy", ".txt", ".parquet")


def read(
  source, num: int, *, data=None, may_be_longer: bool = False
) -> np.ndarray:
  """Reads the ids of `num` rows: int64 `[N]`, or an array of str objects.

  Args:
    source: A column of the Parquet file `data`, or a file.
    num: Number of vectors.
    data: Path of the vectors, `items.parquet#embedding`.
    may_be_longer: Takes the first ids where there are more than vectors.

  Raises:
    FileNotFoundError: There is no such file or column.
    ValueError: An id is missing, empty or there twice, or their number differs.
  """
  name, ids_N = _load(str(source), data)
  if len(ids_N) > num and may_be_longer:
    ids_N = ids_N[:num]
  if len(ids_N) != num:
    raise ValueError(
      f"{name} must have an id for each of the {num} vectors, got "
      f"{len(ids_N)} ids; give those of the same rows."
    )
  check(ids_N, name)
  return ids_N


def check(ids_N: np.ndarray, name: str = "ids") -> None:
  """Raises ValueError if an id is there twice, or is no single line of text."""
  rows = {}
  for row, item in enumerate(ids_N.tolist()):
    if (first := rows.setdefault(item, row)) != row:
      raise ValueError(
        f"{name} must differ, but {_shown(item)} is in rows {first} and {row}; "
        "remove one of these items, or give each an id of its own."
      )
    if isinstance(item, str) and (not item or "\n" in item or "\r" in item):
      what = "is empty" if not item else f"has a line break, {_shown(item)},"
      raise ValueError(
        f"{name} must be text of one line, but the id in row {row} {what} "
        "which an output with an id a line cannot hold."
      )


def _shown(item) -> str:
  text = repr(item)
  return text if len(text) < 60 else f"{text[:57]}..."


def _load(source: str, data) -> tuple[str, np.ndarray]:
  """What messages call the ids, and the ids."""
  columns = []
  path, column = formats.split_path(source)
  if data is not None:
    table = formats.split_path(data)[0]
    if table.suffix.lower() == ".parquet" and table.is_file():
      columns = parquet.column_names(table)
      if source in columns:
        return f"{table}#{source}", parquet.read_ids(table, source)
  if not path.is_file():
    hint = f"; {table} has the columns {', '.join(columns)}" if columns else ""
    raise FileNotFoundError(
      f"There are no item ids {source!r}: expected a file, "
      f"{', '.join(_SUFFIXES)}, or a column of the Parquet file of the "
      f"vectors{hint}."
    )
  suffix = path.suffix.lower()
  if suffix == ".parquet":
    if column is None:
      raise ValueError(
        f"{path} has several columns, {', '.join(parquet.column_names(path))}; "
        f"choose that of the ids with {path.name}#name."
      )
    return source, parquet.read_ids(path, column)
  if suffix == ".txt":
    return source, _read_text(path)
  if suffix == ".npy":
    return source, numpy_files.read_ids(path)
  raise ValueError(
    f"{path} cannot hold item ids: the suffix must be one of "
    f"{', '.join(_SUFFIXES)}."
  )


def _read_text(path: pathlib.Path) -> np.ndarray:
  found = files.read_description(path, KIND)
  files.check_file(path, found)
  try:
    text = path.read_bytes().decode("utf-8-sig")
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} must be text in UTF-8, an id a line, but byte {error.start} is "
      "none; save it as UTF-8."
    ) from error
  lines = text.removesuffix("\n").split("\n") if text else []
  lines = [line.removesuffix("\r") for line in lines]
  if found.get("type") != "text" and all(map(_is_integer, lines)):
    return np.array(list(map(int, lines)), np.int64)
  return np.array(lines, object)


def _is_integer(line: str) -> bool:
  """Whether a line is an integer as Python writes it, of 64 bits."""
  digits = line.removeprefix("-")
  if not digits.isascii() or not digits.isdecimal() or len(digits) > 19:
    return False
  return str(int(line)) == line and -(1 << 63) <= int(line) < 1 << 63


def save(path, ids_N: np.ndarray, *, overwrite: bool = False) -> None:
  """Writes ids as text, one a line, and next to them what they are."""
  kind = "integers" if ids_N.dtype.kind == "i" else "text"
  info = {
    "format": KIND[0],
    "version": KIND[1],
    "type": kind,
    "num": len(ids_N),
  }
  with files.atomic_output(path, overwrite, description=info) as temporary:
    text = "".join(f"{item}\n" for item in ids_N.tolist())
    temporary.write_bytes(text.encode())
