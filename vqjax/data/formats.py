"""Vector files: opens them memory-mapped, writes them whole or not at all.

A file holds `N` vectors of `D` numbers. The suffix tells its layout:

  .bvecs .fvecs .ivecs   per vector an int32 `D`, then uint8/float32/int32
  .fbin .u8bin .i8bin    uint32 `N` and `D` once, then all the numbers
  .ibin                  the same for ids: int64, or int32, behind which their
                         float32 distances may follow
  .npy                   numpy's own: any integer or floating type, bfloat16
  .npz                   `file.npz#name` picks an array, else the only one
  .hdf5 .h5              `file.hdf5#group/name` picks a data set, else "train"
                         or the only one
  .parquet               `file.parquet#column`, else the only column of lists
  .lance                 `folder.lance#column`, else the only column of lists
  .csv                   a vector on each line, with or without a header

A folder, or a pattern such as `part-*.npy`, is all of its files, one after the
other; `folder#column` picks a column of each.

Only a .npz is read whole, and of a .csv the lines are counted: else
`open_vectors` costs the same for a thousand vectors as for a billion. A .npy in
Fortran order is read where it lies, but each row touches all of the file: slow
if that is larger than memory.
"""

import functools
import itertools
import os
import pathlib
import re

import numpy as np

from vqjax.data import (
  csv_files,
  files,
  hdf5,
  lance_rows,
  many_files,
  numpy_files,
  parquet,
  rows,
  values,
)

_VECS = {".bvecs": "<u1", ".fvecs": "<f4", ".ivecs": "<i4"}
_BIN = {".fbin": "<f4", ".u8bin": "<u1", ".i8bin": "<i1", ".ibin": "<i4"}
_HDF5 = (".hdf5", ".h5")
_WITH_PARTS = dict.fromkeys(_HDF5, hdf5.open_rows)
_WITH_PARTS |= {".npz": numpy_files.open_npz, ".parquet": parquet.open_rows}
SUFFIXES = (*_VECS, *_BIN, ".npy", ".csv", *_WITH_PARTS)
_WITH_PART = re.compile(r"\.(hdf5|h5|npz|parquet|lance)#", re.IGNORECASE)
_MAX_DIM = 1_000_000
_BLOCK_BYTES = 1 << 24


def open_vectors(path, *, max_vectors: int | None = None, role=None):
  """Opens a file of vectors as an array `[N, D]` that reads on demand.

  Slices and integer arrays pick rows. What can be mapped comes as read-only
  `rows.MappedRows`, an `np.memmap`, in the type of the file; the rest as
  `rows.Rows`.

  `max_vectors` shows only the first ones; a shorter file is no error. `role` is
  what the vectors are to the user, for messages: "queries".

  Raises:
    FileNotFoundError: There is no file; the message names one that is near.
    ValueError: It holds no vectors, or is damaged.
  """
  name = os.fspath(path)
  path, part = split_path(path)
  if max_vectors is not None and max_vectors < 1:
    raise ValueError(f"max_vectors must be at least 1, got {max_vectors}.")
  is_lance = lance_rows.is_lance(path)
  paths = None if is_lance else many_files.find(path, SUFFIXES)
  if is_lance:
    vectors = lance_rows.open_rows(path, part)
  elif paths is None:
    vectors = _open_file(path, part)
  else:
    open_fn = functools.partial(_open_file, part=part)
    vectors = many_files.open_rows(name, paths, open_fn)
  if role:
    vectors.name += f" ({role})"
  if isinstance(vectors, rows.Rows):
    return vectors.head(max_vectors or len(vectors))
  return vectors[:max_vectors]


def _open_file(path: pathlib.Path, part: str | None):
  suffix = _suffix(path)
  if not path.is_file():
    raise ValueError(f"{path} is not a regular file of vectors.")
  if path.stat().st_size == 0:
    raise ValueError(f"{path} is empty: expected vectors, got 0 bytes.")
  open_part_fn = _WITH_PARTS.get(suffix)
  if open_part_fn:
    return open_part_fn(path, part)
  if suffix == ".npy":
    return numpy_files.open_npy(path)
  if suffix == ".csv":
    return csv_files.open_rows(path)
  if suffix in _VECS:
    vectors = _open_vecs(path, np.dtype(_VECS[suffix]))
  else:
    vectors = _open_bin(path, np.dtype(_BIN[suffix]))
  return rows.mapped(vectors, str(path))


def split_path(path) -> tuple[pathlib.Path, str | None]:
  """Splits `file.hdf5#name`; a `#` anywhere else belongs to the file name.

  That is of a file with parts, or of a folder.
  """
  text = os.fspath(path)
  left, mark, part = text.rpartition("#")
  is_folder = bool(left and mark) and files.user_path(left).is_dir()
  if is_folder and not files.user_path(text).exists():
    return files.user_path(left), part
  found = list(_WITH_PART.finditer(text))
  if found and not files.user_path(text).exists():
    left, part = text[: found[-1].end() - 1], text[found[-1].end() :]
    return files.user_path(left), part
  return files.user_path(text), None


def paths_of(path) -> list[pathlib.Path]:
  """Returns the file of a path, or the files of a folder or pattern."""
  path = split_path(path)[0]
  if lance_rows.is_lance(path):
    return [path]
  return many_files.find(path, SUFFIXES) or [path]


def _suffix(path: pathlib.Path) -> str:
  """The suffix in small letters; raises unless a file can be of that kind."""
  suffix = path.suffix.lower()
  near = [] if path.exists() else _near(path)
  if suffix not in SUFFIXES and not near:
    packed = suffix in (".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz")
    raise ValueError(
      f"Unknown kind of vector file {path.name!r}: the suffix must be one of "
      f"{' '.join(SUFFIXES)}{'; unpack it first' if packed else ''}."
    )
  if not path.exists():
    hint = f"there is {', '.join(near)}" if near else "check the name"
    raise FileNotFoundError(f"There is no file {path}; {hint}.")
  return suffix


def _near(path: pathlib.Path) -> list[str]:
  """Files of vectors that a name without a file may have meant."""
  suffixes = [*SUFFIXES, *map(str.upper, SUFFIXES)]
  names = [path.stem + s for s in suffixes] + [path.name + s for s in suffixes]
  names = dict.fromkeys(names if path.name else [])
  return [name for name in names if path.with_name(name).is_file()]


def _check_size(path, what: str, wanted: int) -> None:
  size = path.stat().st_size
  if size != wanted:
    raise ValueError(
      f"{path} is truncated or damaged: its header says {what}, so expected "
      f"{wanted} bytes, got {size} bytes."
    )


def _open_vecs(path: pathlib.Path, dtype: np.dtype) -> np.memmap:
  size = path.stat().st_size
  with open(path, "rb") as f:
    head = f.read(4)
  dim = int.from_bytes(head, "little", signed=True)
  if len(head) < 4 or not 1 <= dim <= _MAX_DIM:
    raise ValueError(
      f"{path} is no {path.suffix} file: the first 4 bytes must give a "
      f"dimension of 1 to {_MAX_DIM}, got {dim} in {size} bytes."
    )
  row_bytes = 4 + dim * dtype.itemsize
  if size % row_bytes:
    raise ValueError(
      f"{path} is truncated or damaged: vectors of dimension {dim} take "
      f"{row_bytes} bytes each, so expected {size // row_bytes * row_bytes} "
      f"or another multiple of that, got {size} bytes."
    )
  raw_NB = np.memmap(path, np.uint8, "r", shape=(size // row_bytes, row_bytes))
  for row in np.unique(np.linspace(0, len(raw_NB) - 1, 9, dtype=np.int64)):
    row_dim = int.from_bytes(raw_NB[row, :4].tobytes(), "little", signed=True)
    if row_dim != dim:
      raise ValueError(
        f"{path} is damaged: expected dimension {dim} in every row as in row "
        f"0, got {row_dim} in row {row} ({row_bytes} bytes a row)."
      )
  return raw_NB[:, 4:].view(dtype)


def _open_bin(path: pathlib.Path, dtype: np.dtype) -> np.memmap:
  with open(path, "rb") as f:
    head = f.read(8)
  if len(head) < 8:
    raise ValueError(
      f"{path} is truncated: expected a header of 8 bytes, got {len(head)} "
      "bytes."
    )
  num, dim = (int(v) for v in np.frombuffer(head, "<u4"))
  if num < 1 or not 1 <= dim <= _MAX_DIM:
    raise ValueError(
      f"{path} must start with a positive number of vectors and a dimension "
      f"of 1 to {_MAX_DIM}, got {num} and {dim}."
    )
  wanted = 8 + num * dim * dtype.itemsize
  is_ids = path.suffix.lower() == ".ibin"
  if is_ids and path.stat().st_size == wanted + num * dim * 4:
    # Ids of 8 bytes, or ids and the float32 distances behind them.
    wide_ND = np.memmap(path, "<i8", "r", offset=8, shape=(num, dim))
    if _are_wide_ids(wide_ND):
      return wide_ND
  else:
    _check_size(path, f"{num} x {dim} {dtype}", wanted)
  return np.memmap(path, dtype, "r", offset=8, shape=(num, dim))


def _are_wide_ids(wide_ND) -> bool:
  """Whether numbers are ids of 8 bytes: -1 or below 2^32, all of a sample.

  Two ids of 4 bytes make such a number only if the second is 0, or both
  are -1.
  """
  at = np.linspace(0, len(wide_ND) - 1, min(len(wide_ND), 999), dtype=np.int64)
  ids_nD = np.asarray(wide_ND[at])
  return bool(((ids_nD >= -1) & (ids_nD < 1 << 32)).all())


def write_vectors(
  path,
  x,
  *,
  dtype=None,
  overwrite: bool = False,
  description: dict | None = None,
  ids_N=None,
) -> int:
  """Writes vectors `[N, D]` in the format of the suffix; returns `N`.

  `x` is an array, or an iterable of blocks `[n, D]` in order, which are written
  as they come. Only .npy, HDF5 and Parquet leave a choice of `dtype`; None
  takes the type of the first block. `ids_N` are ids of the rows, a column of
  a .parquet. See `files.atomic_output` for the others.
  """
  path, part = split_path(path)
  suffix = _output_suffix(path)
  fixed = _VECS.get(suffix) or _BIN.get(suffix)
  if fixed and dtype not in (None, np.dtype(fixed)):
    raise ValueError(
      f"{suffix} files hold {np.dtype(fixed)}, got dtype {np.dtype(dtype)}; "
      "leave it out or write .npy."
    )
  blocks = iter(_row_blocks(x) if hasattr(x, "shape") else x)
  first = next(blocks, None)
  if first is None:
    raise ValueError(f"There are no vectors to write to {path}.")
  first = np.asarray(first)
  rows.check_table("the first block", first.shape, first.dtype)
  dtype = np.dtype(fixed or dtype or first.dtype)
  cast = _cast_blocks(itertools.chain([first], blocks), dtype, path)
  with files.atomic_output(
    path, overwrite, description=description
  ) as temporary:
    if suffix in _HDF5:
      return hdf5.write_table(temporary, part, cast, first.shape[1], dtype)
    if suffix == ".parquet":
      return parquet.write_blocks(temporary, part or "vectors", cast, ids_N)
    return _write_flat(temporary, suffix, cast, first.shape[1], dtype)


def _output_suffix(path: pathlib.Path) -> str:
  """The suffix in small letters; raises unless such files are written."""
  suffixes = [s for s in SUFFIXES if s not in (".npz", ".csv")]
  if path.suffix.lower() not in suffixes:
    raise ValueError(
      f"{path.name!r} cannot be written: the suffix must be one of "
      f"{' '.join(suffixes)}."
    )
  return path.suffix.lower()


def _row_blocks(x):
  if len(x.shape) != 2:
    raise ValueError(
      f"Vectors to write must have shape (N, D), got {tuple(x.shape)}."
    )
  step = max(1, _BLOCK_BYTES // (8 * max(1, x.shape[1])))
  return (np.asarray(x[i : i + step]) for i in range(0, x.shape[0], step))


def _cast_blocks(blocks, dtype: np.dtype, path):
  """Yields the blocks as `dtype`; refuses numbers that do not fit."""
  first_row, dim = 0, None
  for block in blocks:
    block = np.asarray(block)
    dim = dim or block.shape[-1]
    if (
      block.ndim != 2 or block.shape[1] != dim or block.dtype.kind not in "iuf"
    ):
      raise ValueError(
        f"Blocks written to {path} must be numbers of shape (n, {dim}), got "
        f"{block.dtype} {block.shape} at row {first_row}."
      )
    out, good = _cast(block, dtype)
    if not good.all():
      row, column = np.argwhere(~good)[0]
      raise ValueError(
        f"{path} stores {dtype}, which cannot hold {block[row, column]} (row "
        f"{first_row + row}, column {column}); scale and round the vectors, "
        "or write .npy, which holds any type."
      )
    first_row += len(block)
    yield out


def _cast(block: np.ndarray, dtype: np.dtype):
  """The block as `dtype`, and which of its numbers came through."""
  if block.dtype == dtype:
    return np.ascontiguousarray(block), np.True_
  with np.errstate(all="ignore"):
    out = np.ascontiguousarray(block, dtype)
    if dtype.kind == "f" and block.dtype.kind == "f":
      return out, np.isfinite(out) | ~np.isfinite(block)
    if dtype.kind == "f":
      return out, _same_numbers(block, out)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    # In longdouble the ends of every integer type are exact.
    wide = block.astype(np.longdouble)
    return out, (wide >= low) & (wide <= high) & (np.rint(wide) == wide)


def _header(suffix: str, num: int, dim: int, dtype: np.dtype, f) -> None:
  if suffix in _BIN:
    if num > np.iinfo(np.uint32).max:
      raise ValueError(f"{suffix} files count in uint32, got {num} vectors.")
    f.write(np.array([num, dim], "<u4").tobytes())
  if suffix == ".npy":
    # numpy leaves room for growing N, so that a second header fits in place.
    descr = np.lib.format.dtype_to_descr(dtype)
    header = {"descr": descr, "fortran_order": False, "shape": (num, dim)}
    np.lib.format.write_array_header_1_0(f, header)


def _write_flat(path, suffix: str, blocks, dim: int, dtype: np.dtype) -> int:
  num = 0
  with open(path, "wb") as f:
    _header(suffix, 0, dim, dtype, f)
    for block in blocks:
      if suffix in _VECS:
        raw_NB = np.empty((len(block), 4 + dim * dtype.itemsize), np.uint8)
        raw_NB[:, :4] = np.frombuffer(
          np.int32(dim).astype("<i4").tobytes(), "u1"
        )
        raw_NB[:, 4:] = block.view(np.uint8)
        block = raw_NB
      f.write(block.data)
      num += len(block)
    f.seek(0)
    _header(suffix, num, dim, dtype, f)
  return num


def name_of(vectors, default: str = "vectors") -> str:
  """Returns what messages call these vectors: their file, if they have one."""
  return getattr(vectors, "name", None) or default


def check_vectors(
  x, *, dim: int | None = None, name="vectors", first_row: int = 0, rows=None
) -> None:
  """Raises ValueError unless host array `x` is `[N, dim]` finite numbers.

  The message calls the array `name`; `first_row` is the number of its first row
  in the file, or `rows` are the numbers `[N]` of all.
  """
  if x.ndim != 2:
    raise ValueError(f"{name} must have shape (N, D), got {tuple(x.shape)}.")
  if x.dtype.kind not in "iuf":
    raise ValueError(f"{name} must hold numbers, got {x.dtype}.")
  if dim is not None and x.shape[1] != dim:
    raise ValueError(f"{name} must have dimension {dim}, got {x.shape[1]}.")
  if x.dtype.kind != "f":
    return
  bad = np.flatnonzero(~np.isfinite(x).all(axis=1))
  if bad.size:
    number = first_row + bad if rows is None else np.asarray(rows)[bad]
    listed = ", ".join(str(n) for n in np.sort(number)[:5])
    raise ValueError(
      f"{name} must be finite, got NaN or Inf in {bad.size} of {len(x)} rows, "
      f"first in row {listed}; remove those vectors."
    )


def to_float32(
  x, *, name="vectors", first_row: int = 0, rows=None
) -> np.ndarray:
  """Host array `[N, D]` as float32, in C order.

  Raises ValueError if a number is not finite as float32 or too large to be
  squared, or an integer would become another. Args are as in
  `check_vectors`.
  """
  with np.errstate(over="ignore"):  # Becomes Inf, which is refused below.
    out = np.ascontiguousarray(x, np.float32)
  values.check_size(x, name=name, first_row=first_row, rows=rows)
  if x.dtype.kind == "f":
    check_vectors(out, name=name, first_row=first_row, rows=rows)
  elif not (good := _same_numbers(x, out)).all():
    row, column = np.argwhere(~good)[0]
    number = first_row + row if rows is None else np.asarray(rows)[row]
    raise ValueError(
      f"{name} must hold integers that float32 has, but {x[row, column]} in "
      f"row {number}, column {column} would become "
      f"{int(out[row, column])}; subtract a common offset or scale the "
      "numbers, and save them as floating point."
    )
  return out


def _same_numbers(x, out) -> np.ndarray:
  """Which integers `x` are the same numbers as `out`, their floats."""
  largest = 1 << (np.finfo(out.dtype).nmant + 1)  # All up to here are there.
  if not x.size or max(int(x.max()), -int(x.min())) <= largest:
    return np.True_
  return x.astype(np.longdouble) == out.astype(np.longdouble)
