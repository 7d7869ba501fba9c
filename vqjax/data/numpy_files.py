"""NumPy's own files: .npy memory-mapped, .npz read whole when first used.

Pickled content is never loaded. A .npy of raw pairs of bytes (`'<V2'`) is what
JAX's bfloat16 becomes, as NumPy has no name for it: it is read as that, in
float32. Other raw types, such as float8, are refused.
"""

import contextlib
import math
import os
import pathlib
import threading
import zipfile

import numpy as np

from vqjax.data import rows

_RAW_BFLOAT16 = np.dtype("V2")


def open_npy(path: pathlib.Path):
  """Opens a .npy of vectors `[N, D]`, in either order of storage."""
  array, dtype = _map(path, rows.check_table)
  if dtype == _RAW_BFLOAT16:
    read = lambda at: _from_bfloat16(array[at])
    return rows.Rows(read, array.shape, np.float32, array.name)
  return array


def open_array(path: pathlib.Path) -> rows.MappedRows:
  """Opens a .npy of numbers of any shape, such as list numbers `[N]`."""

  def check(name, shape, dtype):
    if dtype.kind not in "iuf" or 0 in shape or not shape:
      raise ValueError(f"{name} must hold numbers, got {dtype} {shape}.")

  return _map(path, check)[0]


def read_ids(path: pathlib.Path) -> np.ndarray:
  """Reads ids of a .npy: int64 `[N]`, or text as str objects."""

  def check(name, shape, dtype):
    if dtype.kind not in "iuUS" or len(shape) != 1:
      raise ValueError(
        f"{name} must hold ids, integers or text of shape (N,), got {dtype} "
        f"{shape}: save np.array(ids), a list of Python's int or str."
      )

  ids_N = np.array(_map(path, check)[0])
  if ids_N.dtype.kind == "S":
    ids_N = np.strings.decode(ids_N, "utf-8")
  if ids_N.dtype.kind == "U":
    return ids_N.astype(object)
  if ids_N.size and int(ids_N.max()) >= 1 << 63:
    raise ValueError(f"{path} must hold ids below 2^63, got {ids_N.max()}.")
  return ids_N.astype(np.int64)


def open_npz(path: pathlib.Path, part: str | None, keep_fn=None) -> rows.Rows:
  """Opens array `part` of a .npz, the only one for None.

  The whole array is read into memory when its first rows are asked for, and
  stays there. `keep_fn` is from `keep_latest`, if it need not.
  """
  with _damage_in_words(path), zipfile.ZipFile(path) as archive:
    member = _member(archive, part, path)
    name = f"{path}#{member.filename.removesuffix('.npy')}"
    with archive.open(member) as f:
      shape, _, dtype = _read_header(f, name, rows.check_table)
      _check_size(name, member.file_size, f.tell(), shape, dtype)
    _check_memory(name, member.file_size)

  def load():
    with (
      _damage_in_words(path),
      zipfile.ZipFile(path) as archive,
      archive.open(member) as f,
    ):
      return np.lib.format.read_array(f, allow_pickle=False)

  load = (keep_fn or _once)(load)
  if dtype == _RAW_BFLOAT16:
    read = lambda at: _from_bfloat16(load().view(_stored(dtype))[at])
    return rows.Rows(read, shape, np.float32, name)
  return rows.Rows(lambda at: load()[at], shape, dtype, name)


def _once(fn):
  """Returns `fn` so that it is called once, whichever thread is first."""
  lock, found = threading.Lock(), []

  def get():
    with lock:
      if not found:
        found.append(fn())
    return found[0]

  return get


def keep_latest():
  """Returns a `keep_fn`: of the arrays of all that get it, one is in memory."""
  lock, found = threading.Lock(), {}

  def keep(fn):
    def get():
      with lock:
        if fn not in found:
          found.clear()
          found[fn] = fn()
        return found[fn]

    return get

  return keep


def names_in_npz(path: pathlib.Path) -> list[str]:
  """Returns the names of the arrays of a .npz."""
  with _damage_in_words(path), zipfile.ZipFile(path) as archive:
    return [name.removesuffix(".npy") for name in archive.namelist()]


def load_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads all arrays of a .npz, of any shape."""
  with _damage_in_words(path), np.load(path) as file:
    return {name: file[name] for name in file}


@contextlib.contextmanager
def _damage_in_words(path):
  """Makes any error of reading a .npz one that names the file."""
  try:
    yield
  except (
    rows.VectorFileError,
    MemoryError,
    FileNotFoundError,
    PermissionError,
  ):
    raise
  except Exception as e:  # Of zipfile, zlib, struct, NumPy's parser.
    reason = (str(e).splitlines() or [type(e).__name__])[0][:200]
    raise ValueError(
      f"{path} is truncated, damaged or no .npz: {reason.rstrip('.')}."
    ) from e


def _member(archive, part: str | None, path) -> zipfile.ZipInfo:
  members = {
    info.filename.removesuffix(".npy"): info
    for info in archive.infolist()
    if info.filename.endswith(".npy")
  }
  if part is None and len(members) == 1:
    return next(iter(members.values()))
  if part not in members:
    missing = "" if part is None else f"no array {part!r}, but "
    raise rows.VectorFileError(
      f"{path} has {missing}{len(members)} arrays, {sorted(members)[:20]}; "
      f"choose one with {path.name}#name."
    )
  return members[part]


def _map(path: pathlib.Path, check_fn):
  """The array of a .npy as mapped, and the type that its header says."""
  name = str(path)
  with open(path, "rb") as f:
    shape, fortran, dtype = _read_header(f, name, check_fn)
    offset = f.tell()
  _check_size(name, path.stat().st_size, offset, shape, dtype)
  array = np.memmap(
    path, _stored(dtype), "r", offset, shape, order="F" if fortran else "C"
  )
  return rows.mapped(array, name), dtype


def _read_header(f, name: str, check_fn):
  """Shape, order and type of the array that begins in `f`."""
  try:
    version = np.lib.format.read_magic(f)
    if version not in ((1, 0), (2, 0), (3, 0)):
      raise ValueError(f"version {version} is none of 1, 2 and 3")
    # Version 3 differs from 2 in the letters of field names alone.
    read = getattr(np.lib.format, f"read_array_header_{min(version[0], 2)}_0")
    shape, fortran, dtype = read(f)
  except Exception as e:  # NumPy parses Python: any error may come of damage.
    reason = str(e).splitlines()[0][:200] if str(e) else type(e).__name__
    raise rows.VectorFileError(
      f"{name} has no valid .npy header: {reason}"
    ) from e
  try:
    check_fn(name, shape, _stored(dtype))
  except ValueError as e:
    raise rows.VectorFileError(str(e)) from e
  return shape, fortran, dtype


def _stored(dtype: np.dtype) -> np.dtype:
  """The type that NumPy can read the numbers as."""
  return np.dtype("<u2") if dtype == _RAW_BFLOAT16 else dtype


def _from_bfloat16(raw_ND) -> np.ndarray:
  """Bits of bfloat16 as float32, of which they are the upper half."""
  return (np.asarray(raw_ND).astype(np.uint32) << 16).view(np.float32)


def _check_size(name: str, size: int, offset: int, shape, dtype) -> None:
  wanted = offset + math.prod(shape) * dtype.itemsize
  if size != wanted:
    raise rows.VectorFileError(
      f"{name} is truncated or damaged: its header says {shape} {dtype}, so "
      f"expected {wanted} bytes, got {size} bytes."
    )


def _check_memory(name: str, num_bytes: int) -> None:
  """Raises ValueError if an array would fill half of the memory."""
  memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
  if num_bytes > memory // 2:
    raise rows.VectorFileError(
      f"{name} takes {num_bytes} bytes, more than half of the memory of this "
      "machine, and an array in a .npz is read whole; save it as .npy."
    )
