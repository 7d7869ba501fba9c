"""Ids of the rows of an index: in a file, of which a search reads k per query.

Lists keep their vectors one after the other, so a row, a place in this order,
tells a vector, and no id has to be in memory beside its code. The ids of all
rows are an array on disk: `index.faiss.order.npy` beside an `index.faiss`, 4
bytes per vector (8 if an id is 2^32 or more), memory-mapped.

  row_ids.save_beside("index.faiss", ids_N)        # ids_N[row], any integers
  ids_N = row_ids.open_beside("index.faiss", ids_N)  # mapped, to be kept
  ids_QR = row_ids.pick(ids_N, rows_QR)            # of the results alone

The file repeats what the index file says, so it may be missing: the ids are
kept in memory then, in 4 bytes.
"""

import mmap
import pathlib

import numpy as np

from vqjax.core import check_range
from vqjax.data import files, numpy_files

KIND = ("vqjax order of an index", 1)
_BLOCK = 1 << 20  # Ids that are compared at a time.


def narrow(ids_N: np.ndarray) -> np.ndarray:
  """Returns ids from 0 to 2^63 - 1 as uint32 if they fit, else as int64."""
  ids_N = np.asarray(ids_N)
  if not len(ids_N):
    return ids_N.astype(np.uint32)
  check_range("The least id", int(ids_N.min()), 0, 2**63 - 1)
  largest = int(ids_N.max())
  check_range("The largest id", largest, 0, 2**63 - 1)
  return ids_N.astype("<u4" if largest < 1 << 32 else "<i8", copy=False)


def path_beside(path) -> pathlib.Path:
  """Returns where the ids of the rows of an index file lie."""
  path = files.user_path(path)
  return path.parent / f"{path.name}.order.npy"


def save_beside(path, ids_N: np.ndarray, *, overwrite: bool = False) -> None:
  """Writes the ids of the rows of an index file, in list order.

  To be called before the index is written. A file that says the same stays; one
  of ours that was left behind by a stopped command is replaced.

  Raises:
    FileExistsError: There is a file that we have not made, or the index is
      there and not `overwrite`.
  """
  files.check_output(path, overwrite)
  if not isinstance(open_beside(path, ids_N), np.memmap):
    save(path_beside(path), ids_N, overwrite=True)


def save(path, ids_N: np.ndarray, *, overwrite: bool = False) -> None:
  """Writes ids as `narrow` makes them, to a .npy with a description."""
  info = {"format": KIND[0], "version": KIND[1]}
  path = files.user_path(path)
  if path.exists() and not files.description_path(path).is_file():
    overwrite = False  # Of someone else.
  with (
    files.atomic_output(path, overwrite, description=info) as temporary,
    open(temporary, "wb") as f,  # NumPy would append .npy to the name.
  ):
    np.save(f, narrow(ids_N))


def open_beside(path, ids_N: np.ndarray) -> np.ndarray:
  """Returns the ids of all rows, memory-mapped if their file lies beside.

  Args:
    path: Of the index file.
    ids_N: What the index says they are; kept in memory, narrow, if the file is
      missing or says anything else.
  """
  beside = path_beside(path)
  if not beside.is_file():
    return narrow(ids_N)
  try:
    mapped_N = open_ids(beside)
  except ValueError:
    return narrow(ids_N)
  return mapped_N if _are_equal(beside, mapped_N, ids_N) else narrow(ids_N)


def open_ids(path) -> np.ndarray:
  """Maps the ids of a file of `save`; nothing is read ahead.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is damaged, or no such file.
  """
  mapped_N = numpy_files.open_array(files.user_path(path))
  if mapped_N.ndim != 1 or mapped_N.dtype.str not in ("<u4", "<i8"):
    raise ValueError(
      f"{path} must hold uint32 or int64 ids of shape (N,), got "
      f"{mapped_N.dtype} {mapped_N.shape}."
    )
  if hasattr(mmap, "MADV_RANDOM"):
    mapped_N._mmap.madvise(mmap.MADV_RANDOM)
  return mapped_N


def _are_equal(path, mapped_N, ids_N) -> bool:
  """Compares by reading the file, or all of the map would be in memory."""
  if len(mapped_N) != len(ids_N):
    return False
  with open(path, "rb") as f:
    f.seek(mapped_N.offset)
    for i in range(0, len(ids_N), _BLOCK):
      part = ids_N[i : i + _BLOCK]
      if not np.array_equal(np.fromfile(f, mapped_N.dtype, len(part)), part):
        return False
  return True


def pick(ids_N: np.ndarray, rows_X: np.ndarray) -> np.ndarray:
  """Ids int64 `[...]` of rows `[...]`; row -1 has id -1."""
  found_X = np.asarray(ids_N[np.maximum(rows_X, 0)]).astype(np.int64)
  return np.where(rows_X < 0, -1, found_X)


def num_bytes(ids_N: np.ndarray) -> dict[str, int]:
  """Returns the bytes that these ids take in memory and on disk."""
  is_mapped = isinstance(ids_N, np.memmap)
  name = "disk" if is_mapped else "ram"
  return {"ram": 0, "disk": 0} | {name: ids_N.nbytes}
