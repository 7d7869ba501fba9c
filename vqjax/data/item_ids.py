"""Item ids: what a user calls the rows of a file of vectors.

Ids are integers or text, one for each row, none twice. They come from a column
of the Parquet file that has the vectors, or from a file of their own:

  .npy                   integers or text `[N]`
  .txt                   one id a line, UTF-8; integers if all lines are
  file.parquet#column    integers or text; also folder.lance#column

Our outputs keep them beside the file whose rows they name, in FILE.ids.txt, or
ids.txt in a folder; a .parquet has them in its column "id". The description of
that file has their checksum.
"""

import hashlib
import pathlib
import sys

import numpy as np

from vqjax.data import files, formats, lance_rows, numpy_files, parquet

KIND = ("vqjax item ids", 1)
FLAG_HELP = (
  "Item ids, kept through to the results: a column of the Parquet files, or a "
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
    may_be_longer: Takes the first ids if there are more than vectors.

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
      f"{len(ids_N)} ids; give the ids of the same rows."
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


def check_items(ids, num: int, published_F=None) -> np.ndarray:
  """Returns item ids `[N]`, int64 or text; row numbers if `ids` is None.

  With published ids, which must be row numbers then, counting continues.

  Raises:
    TypeError: They are no integers or text, or of another kind than those.
    ValueError: One is there twice, or published already.
  """
  known_F = np.zeros(0, np.int64) if published_F is None else published_F
  if ids is None and known_F.dtype.kind != "i":
    raise TypeError("The known ids are text: give those of the new items.")
  first = int(known_F.max(initial=-1)) + 1 if ids is None else 0
  items_N = np.arange(first, first + num) if ids is None else np.asarray(ids)
  if items_N.dtype.kind in "iu":
    items_N = items_N.astype(np.int64)
  elif items_N.dtype.kind in "UO" and all(
    isinstance(item, str) for item in items_N.tolist()
  ):
    items_N = items_N.astype(object)
  else:
    raise TypeError(f"ids must be integers or text, got {items_N.dtype}.")
  if items_N.shape != (num,):
    raise ValueError(
      f"ids must have shape ({num},), one for each vector, got {items_N.shape}."
    )
  check(items_N)
  if len(known_F) and known_F.dtype != items_N.dtype:
    raise TypeError(
      f"The known ids are {'integers' if known_F.dtype.kind == 'i' else 'text'}"
      ", but the new ones are "
      f"{'integers' if items_N.dtype.kind == 'i' else 'text'}."
    )
  known = set(known_F.tolist())
  again = [row for row, item in enumerate(items_N.tolist()) if item in known]
  if again:
    raise ValueError(
      f"{len(again)} of the new items have ids already, the first is "
      f"{items_N[again[0]]} in row {again[0]}; append only new ones."
    )
  return items_N


def _shown(item) -> str:
  text = repr(item)
  return text if len(text) < 60 else f"{text[:57]}..."


def _load(source: str, data) -> tuple[str, np.ndarray]:
  """What messages call the ids, and the ids."""
  columns = []
  path, column = formats.split_path(source)
  if data is not None:
    table = formats.split_path(data)[0]
    if lance_rows.is_lance(table):
      columns = lance_rows.column_names(table)
      if source in columns:
        return f"{table}#{source}", lance_rows.read_ids(table, source)
    tables = [p for p in formats.paths_of(data) if p.is_file()]
    if tables and tables[0].suffix.lower() == ".parquet":
      columns = parquet.column_names(tables[0])
      if source in columns:
        return f"{table}#{source}", _read_column(tables, source)
  if lance_rows.is_lance(path) and column:
    return source, lance_rows.read_ids(path, column)
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
        f"choose the column of ids with {path.name}#name."
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


def _read_column(tables, column: str) -> np.ndarray:
  """Ids of a column of Parquet files, one after the other."""
  parts = [parquet.read_ids(table, column) for table in tables]
  for table, ids_n in zip(tables, parts, strict=True):
    if ids_n.dtype != parts[0].dtype:
      kind = "integers" if ids_n.dtype.kind == "i" else "text"
      raise ValueError(
        f"{table}#{column} holds {kind}, but {tables[0]}#{column} does not; "
        "ids must be of one kind: write the column anew."
      )
  return np.concatenate(parts)


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


def checksum(ids_N: np.ndarray) -> str:
  """Returns what tells these ids from others, 16 hex digits."""
  text = "\n".join(map(str, ids_N.tolist()))
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def describe(ids_N: np.ndarray | None) -> dict:
  """What the description of a file says whose rows have ids, or none."""
  return {} if ids_N is None else {"ids_checksum": checksum(ids_N)}


def save(path, ids_N: np.ndarray, *, overwrite: bool = False) -> None:
  """Writes ids as text, one a line, and next to them what they are."""
  kind = "integers" if ids_N.dtype.kind == "i" else "text"
  info = {"format": KIND[0], "version": KIND[1], "type": kind}
  with files.atomic_output(path, overwrite, description=info) as temporary:
    text = "".join(f"{item}\n" for item in ids_N.tolist())
    temporary.write_bytes(text.encode())


def path_beside(path) -> pathlib.Path:
  """Returns where the ids of the rows of a file, or of a folder, lie."""
  path = files.user_path(path)
  return (
    path / "ids.txt" if path.is_dir() else path.parent / f"{path.name}.ids.txt"
  )


def _has_column(path) -> bool:
  """Whether a file has the ids of its rows itself, in a column."""
  return pathlib.Path(path).suffix.lower() == ".parquet"


def save_beside(path, ids_N: np.ndarray | None, *, overwrite=False) -> None:
  """Writes the ids of the rows of a file or folder, unless they are there.

  To be called before the file is written: a file that is there has its ids.
  Ids that were left behind by a stopped command are replaced.
  """
  if ids_N is None or _has_column(path):
    return
  beside = path_beside(path)
  is_ours = bool(beside.is_file() and files.read_description(beside, KIND))
  if is_ours and checksum(_read_text(beside)) == checksum(ids_N):
    return
  save(beside, ids_N, overwrite=overwrite or is_ours)


def load_beside(path, info: dict, num: int) -> np.ndarray | None:
  """Reads the ids of the `num` rows of a file or folder; None for no ids.

  Args:
    path: The file or folder.
    info: Its description.
    num: Number of rows.

  Raises:
    FileNotFoundError: They are missing.
    ValueError: They are of other rows.
  """
  wanted = info.get("ids_checksum")
  if not wanted:
    return None
  beside, has_column = path_beside(path), _has_column(path)
  if not (has_column or beside.is_file()):
    raise FileNotFoundError(
      f"{beside} is missing, the item ids of {path}; bring it back, or make "
      f"{path} again."
    )
  ids_N = read(f"{path}#{parquet.ID}" if has_column else beside, num)
  if checksum(ids_N) != wanted:
    raise ValueError(
      f"{beside} has other item ids than {path} was made with; bring them "
      f"back, or make {path} again."
    )
  return ids_N


def pick(ids_N: np.ndarray, rows_X: np.ndarray) -> np.ndarray:
  """Ids of rows; row -1 has id -1, or None where ids are text."""
  found_X = ids_N[rows_X.clip(0)]
  found_X[rows_X < 0] = -1 if ids_N.dtype.kind == "i" else None
  return found_X


def num_bytes(ids_N: np.ndarray) -> int:
  """Returns the bytes of ids in memory, those of text as Python keeps it."""
  if ids_N.dtype.kind == "i":
    return ids_N.nbytes
  return ids_N.nbytes + sum(map(sys.getsizeof, ids_N.tolist()))
