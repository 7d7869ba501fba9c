"""Vector files: opens them memory-mapped, writes them whole or not at all.

A file holds `N` vectors of `D` numbers. The suffix tells its layout:

  .bvecs .fvecs .ivecs   per vector an int32 `D`, then uint8/float32/int32
  .fbin .u8bin .i8bin    int32 `N` and `D` once, then all the numbers
  .ibin                  the same for int32 ids; their distances may follow
  .npy                   numpy's own: any integer or floating type
  .hdf5 .h5              `file.hdf5#name` picks a data set, else "train"

Nothing here reads a whole file: `open_vectors` costs the same for a thousand
vectors as for a billion.
"""

import itertools
import math
import mmap
import os
import pathlib

import numpy as np

from vqjax.data import files, hdf5

_VECS = {".bvecs": "<u1", ".fvecs": "<f4", ".ivecs": "<i4"}
_BIN = {".fbin": "<f4", ".u8bin": "<u1", ".i8bin": "<i1", ".ibin": "<i4"}
_HDF5 = (".hdf5", ".h5")
SUFFIXES = (*_VECS, *_BIN, ".npy", *_HDF5)
_MAX_DIM = 1_000_000
_BLOCK_BYTES = 1 << 24


def open_vectors(path, *, max_vectors: int | None = None):
  """Opens a file of vectors as an array `[N, D]` that reads on demand.

  Slices and integer arrays pick rows. The flat formats come as read-only
  `np.memmap` in the type of the file; chunked HDF5 as `hdf5.Hdf5Rows`.

  Args:
    path: the file; its suffix tells the format.
    max_vectors: shows only the first so many; a shorter file is no error.
  """
  path, part = _split_path(path)
  suffix = _suffix(path)
  if max_vectors is not None and max_vectors < 1:
    raise ValueError(f"max_vectors must be at least 1, got {max_vectors}.")
  if not path.exists():
    raise FileNotFoundError(f"There is no file {path}; check the name.")
  if not path.is_file():
    raise ValueError(f"{path} is not a regular file of vectors.")
  if suffix in _HDF5:
    table = hdf5.open_table(path, part)
    _check_table(f"{path}#{part}", table.shape, table.dtype)
    return hdf5.table_rows(table, path, max_vectors)
  if path.stat().st_size == 0:
    raise ValueError(f"{path} is empty: expected vectors, got 0 bytes.")
  if suffix in _VECS:
    vectors = _open_vecs(path, np.dtype(_VECS[suffix]))
  elif suffix in _BIN:
    vectors = _open_bin(path, np.dtype(_BIN[suffix]))
  else:
    vectors = _open_npy(path)
  return vectors[:max_vectors]


def _split_path(path) -> tuple[pathlib.Path, str]:
  """Splits `file.hdf5#name`; a `#` anywhere else belongs to the file name."""
  left, mark, part = os.fspath(path).rpartition("#")
  if mark and left.lower().endswith(_HDF5):
    return pathlib.Path(left), part
  return pathlib.Path(path), "train"


def _suffix(path: pathlib.Path) -> str:
  suffix = path.suffix.lower()
  if path.is_dir():
    raise ValueError(f"{path} is a folder; name a file of vectors in it.")
  if suffix not in SUFFIXES:
    raise ValueError(
      f"Unknown kind of vector file {path.name!r}: the suffix must be one of "
      f"{' '.join(SUFFIXES)}."
    )
  return suffix


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
  num, dim = (int(v) for v in np.frombuffer(head, "<i4"))
  if num < 1 or not 1 <= dim <= _MAX_DIM:
    raise ValueError(
      f"{path} must start with a positive number of vectors and a dimension "
      f"of 1 to {_MAX_DIM}, got {num} and {dim}."
    )
  wanted = 8 + num * dim * dtype.itemsize
  # Published ground truth has the float32 distances behind the int32 ids.
  with_distances = wanted + num * dim * 4
  if path.suffix.lower() != ".ibin" or path.stat().st_size != with_distances:
    _check_size(path, f"{num} x {dim} {dtype}", wanted)
  return np.memmap(path, dtype, "r", offset=8, shape=(num, dim))


def _open_npy(path: pathlib.Path) -> np.memmap:
  with open(path, "rb") as f:
    try:
      major, _ = np.lib.format.read_magic(f)
      read = getattr(np.lib.format, f"read_array_header_{min(major, 2)}_0")
      shape, fortran, dtype = read(f)
    except ValueError as e:
      size = path.stat().st_size
      raise ValueError(
        f"{path} has no valid .npy header in its {size} bytes: {e}"
      ) from e
    offset = f.tell()
  _check_table(path, shape, dtype)
  _check_size(
    path, f"{shape} {dtype}", offset + math.prod(shape) * dtype.itemsize
  )
  if fortran:
    raise ValueError(
      f"{path} is stored column by column (Fortran order), which makes reading "
      "rows slow; save it with np.save(path, np.ascontiguousarray(x))."
    )
  return np.memmap(path, dtype, "r", offset=offset, shape=shape)


def _check_table(name, shape, dtype) -> None:
  if len(shape) != 2 or min(shape) < 1:
    raise ValueError(
      f"{name} must hold vectors of shape (N, D), got shape {tuple(shape)}."
    )
  if np.dtype(dtype).kind not in "iuf":
    raise ValueError(
      f"{name} must hold integers or floating point numbers, got {dtype}."
    )


def write_vectors(path, x, *, dtype=None, overwrite: bool = False) -> int:
  """Writes vectors `[N, D]` in the format of the suffix; returns `N`.

  Args:
    path: the file; written under a temporary name, then renamed.
    x: an array `[N, D]`, or an iterable of blocks `[n, D]` in order, which are
      written as they come.
    dtype: type of the numbers; only .npy and HDF5 leave a choice, None takes
      that of the first block.
    overwrite: replaces an existing file instead of refusing.
  """
  path, part = _split_path(path)
  suffix = _suffix(path)
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
  _check_table("the first block", first.shape, first.dtype)
  dtype = np.dtype(fixed or dtype or first.dtype)
  cast = _cast_blocks(itertools.chain([first], blocks), dtype, path)
  with files.atomic_output(path, overwrite) as temporary:
    if suffix in _HDF5:
      return hdf5.write_table(temporary, part, cast, first.shape[1], dtype)
    return _write_flat(temporary, suffix, cast, first.shape[1], dtype)


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
        "or write a floating format."
      )
    first_row += len(block)
    yield out


def _cast(block: np.ndarray, dtype: np.dtype):
  """The block as `dtype`, and which of its numbers came through."""
  if block.dtype == dtype:
    return np.ascontiguousarray(block), np.True_
  with np.errstate(all="ignore"):
    out = np.ascontiguousarray(block, dtype)
    if dtype.kind == "f":
      return out, np.isfinite(out) | ~np.isfinite(block)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    # In longdouble the ends of every integer type are exact.
    wide = block.astype(np.longdouble)
    return out, (wide >= low) & (wide <= high) & (np.rint(wide) == wide)


def _header(suffix: str, num: int, dim: int, dtype: np.dtype, f) -> None:
  if suffix in _BIN:
    if num > np.iinfo(np.int32).max:
      raise ValueError(f"{suffix} files count in int32, got {num} vectors.")
    f.write(np.array([num, dim], "<i4").tobytes())
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


def release_pages(vectors) -> None:
  """Drops the resident pages of a memory-mapped array; the data stays.

  Keeps the memory of a process that walks over a file larger than memory
  bounded: pages are read again when needed. Does nothing for other arrays.
  """
  vectors = getattr(vectors, "vectors", vectors)  # Of `batches.WithColumn`.
  if not isinstance(vectors, np.ndarray) or vectors.flags.writeable:
    return  # A writeable private map would lose its changes.
  base = vectors
  while isinstance(base, np.ndarray):
    base = base.base
  if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
    base.madvise(mmap.MADV_DONTNEED)


def check_vectors(
  x, *, dim: int | None = None, name="vectors", first_row: int = 0, rows=None
) -> None:
  """Raises ValueError unless host array `x` is `[N, dim]` finite numbers.

  Args:
    x: a numpy array.
    dim: wanted number of dimensions; None takes any.
    name: what the message calls the array.
    first_row: number, in the file, of the first row of `x`.
    rows: numbers `[N]` of all rows, where they are not consecutive.
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
