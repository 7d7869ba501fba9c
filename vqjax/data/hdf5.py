"""Tables of HDF5 files as rows of vectors; h5py is an optional dependency.

What lies outside of the file is refused: external links, external storage and
virtual data sets would let it show any other file as vectors.
"""

import contextlib
import os
import re

import numpy as np

from vqjax.data import rows

DEFAULT_PART = "train"
_ROWS_PER_READ = 512
_MOST_LINKS = 16  # Soft links on the way to a table.
_MOST_LISTED = 20


def _import_h5py():
  try:
    import h5py
  except ImportError as e:
    raise ImportError(
      "HDF5 files need h5py, which is not installed; run "
      "pip install 'vqjax[hdf5]'."
    ) from e
  return h5py


def open_rows(path, part: str | None):
  """Opens data set `part` of the HDF5 file at `path` as rows `[N, D]`.

  None is "train", or else the only data set. A table stored in one uncompressed
  piece, as in the ann-benchmarks files, is memory-mapped: h5py is slow at
  picking rows.
  """
  h5py = _import_h5py()
  file = _ask(path, lambda: h5py.File(path, "r", locking="best-effort"))
  if part is None:
    part = _choose_part(file)
  table = _find(h5py, file, path, part)
  name = f"{path}#{part}"
  shape, dtype = _ask(name, lambda: (table.shape, table.dtype))
  rows.check_table(name, shape or (), dtype)
  if _ask(name, lambda: table.is_virtual or table.external):
    raise ValueError(
      f"{name} is put together of other files or data sets, which are not "
      "read; copy it into one data set of its own file."
    )
  offset = _ask(name, lambda: _offset(h5py, table))
  if offset is None:
    read = lambda at: _ask(name, lambda: _read(table, at))
    return rows.Rows(read, shape, dtype, name)
  size = path.stat().st_size
  end = offset + int(np.prod(shape, dtype=object)) * dtype.itemsize
  if end > size:
    raise ValueError(
      f"{name} is truncated or damaged: {shape} {dtype} end at byte {end}, but "
      f"the file has {size} bytes."
    )
  return rows.mapped(np.memmap(path, dtype, "r", offset, shape), name)


def describe(path) -> tuple[list[str], str | None]:
  """Returns names of data sets, and the attribute "distance" of the file."""
  h5py = _import_h5py()
  file = _ask(path, lambda: h5py.File(path, "r", locking="best-effort"))
  with file:
    distance = _ask(path, lambda: file.attrs.get("distance"))
    is_bytes = isinstance(distance, bytes)
    distance = distance.decode(errors="replace") if is_bytes else distance
    return _tables(file), distance if isinstance(distance, str) else None


def _ask(name, fn):
  """Returns `fn()`; an error of HDF5 becomes one that names the file."""
  try:
    return fn()
  except MemoryError:
    raise
  except Exception as e:  # h5py has an exception for each way to be damaged.
    reason = " ".join(str(e).split())[:300] or type(e).__name__
    raise ValueError(
      f"{name} cannot be read, it is truncated, damaged, no HDF5 file, or "
      f"compressed by a filter that is not installed: {reason}."
    ) from e


def _tables(file) -> list[str]:
  """Names of data sets in the file, those behind soft links left out."""
  found = []

  def visit(name, item):
    if hasattr(item, "chunks"):
      is_text = isinstance(name, str)  # Else bytes that are no UTF-8.
      found.append(name if is_text else name.decode("utf-8", "replace"))
    return True if len(found) > _MOST_LISTED else None

  with contextlib.suppress(Exception):  # Damaged: those before it.
    file.visititems(visit)
  return found


def _choose_part(file) -> str:
  names = _tables(file)
  has_default = DEFAULT_PART in names or len(names) != 1
  return DEFAULT_PART if has_default else names[0]


def _find(h5py, file, path, part: str):
  """The data set of this name; raises if the way to it leaves the file."""
  where, choose = f"{path}#{part}", f"choose one with {path.name}#name"
  at, names, num_links = file, part.split("/"), 0
  while names:
    name = names.pop(0)
    if name in ("", "."):
      continue
    link = _link(h5py, where, at, name)
    if link is None:
      raise ValueError(
        f"{path} has no data set {part!r}, it has {_tables(file)}; {choose}."
      )
    if not isinstance(link, h5py.SoftLink):
      at = _ask(where, lambda at=at, name=name: at[name])
      continue
    num_links += 1
    if num_links > _MOST_LINKS:
      raise ValueError(f"{where} is a link that leads in a circle.")
    at = file if link.path.startswith("/") else at
    names = link.path.split("/") + names
  if not isinstance(at, h5py.Dataset):
    raise ValueError(
      f"{where} is no data set; the file has {_tables(file)}: {choose}."
    )
  return at


def _link(h5py, where: str, at, name: str):
  """What `name` is in `at`: None, a soft link, or a part of the file itself."""
  if not isinstance(at, h5py.Group):
    return None
  try:
    link = at.get(name, getlink=True)
  except TypeError:  # Of a user's own kind.
    link = h5py.ExternalLink("?", name)
  except Exception:  # The group is damaged, which opening says.
    return _ask(where, lambda: at[name])
  if isinstance(link, h5py.ExternalLink):
    raise ValueError(
      f"{where} is a link to another file, {link.filename!r}, which is not "
      "followed; open that file itself."
    )
  return link


def _offset(h5py, table) -> int | None:
  """Where the numbers begin, None unless they lie in one piece as they are."""
  is_plain = table.id.get_type().equal(h5py.h5t.py_create(table.dtype))
  if not is_plain or table.file.userblock_size:
    return None
  return table.id.get_offset()


def _read(table, at) -> np.ndarray:
  if isinstance(at, slice):
    return table[at]
  if not len(at):
    return np.empty((0, table.shape[1]), table.dtype)
  # h5py takes increasing unique rows only, and is slow at long lists.
  unique, back = np.unique(at, return_inverse=True)
  step = _ROWS_PER_READ
  picked = [table[unique[i : i + step]] for i in range(0, len(unique), step)]
  return np.concatenate(picked)[back]


def write_table(
  path, part: str | None, blocks, dim: int, dtype: np.dtype
) -> int:
  """Writes blocks `[n, dim]` as data set `part` of a new file; returns `N`.

  Raises OSError with its number, as of a full disk.
  """
  try:
    # Without a cache of chunks: HDF5 2.0 crashes if it cannot write that.
    with _import_h5py().File(path, "w", rdcc_nbytes=0) as file:
      table = file.create_dataset(
        part or DEFAULT_PART,
        (0, dim),
        dtype,
        maxshape=(None, dim),
        chunks=(1024, dim),
      )
      num = 0
      for block in blocks:
        table.resize(num + len(block), axis=0)
        table[num:] = block
        num += len(block)
      return num
  except (OSError, RuntimeError) as e:
    number = re.search(r"errno = (\d+)", str(e))
    if number is None:
      raise
    number = int(number[1])
    raise OSError(number, os.strerror(number), os.fspath(path)) from e
