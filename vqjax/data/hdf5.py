"""Tables of HDF5 files as rows of vectors; h5py is an optional dependency."""

import numpy as np

_ROWS_PER_READ = 512


def _import_h5py():
  try:
    import h5py
  except ImportError as e:
    raise ImportError(
      "HDF5 files need h5py, which is not installed; run "
      "pip install vqjax[hdf5]."
    ) from e
  return h5py


def open_table(path, part: str):
  """Opens data set `part` of the HDF5 file at `path`, as h5py gives it."""
  h5py = _import_h5py()
  try:
    file = h5py.File(path, "r")
  except OSError as e:
    raise ValueError(f"{path} is truncated or no HDF5 file: {e}.") from e
  table = file.get(part)
  if not isinstance(table, h5py.Dataset):
    raise ValueError(
      f"{path} has no data set {part!r}, it has {sorted(file)}; choose one "
      f"with {path.name}#name."
    )
  return table


def table_rows(table, path, max_vectors: int | None = None):
  """Row-sliceable `[N, D]` view of a 2-D h5py `table` of the file `path`.

  A table stored in one uncompressed piece, as in the ann-benchmarks files, is
  memory-mapped: h5py is slow at picking rows. Others become `Hdf5Rows`.
  """
  offset = table.id.get_offset()
  strange = table.is_virtual or table.external or table.file.userblock_size
  if offset is None or strange:
    return Hdf5Rows(table, max_vectors)
  vectors_ND = np.memmap(path, table.dtype, "r", offset, table.shape)
  return vectors_ND[:max_vectors]


class Hdf5Rows:
  """Rows of a chunked HDF5 data set; `rows[i]` reads only what is asked for."""

  def __init__(self, table, max_vectors: int | None = None):
    """Shows the first `max_vectors` rows (all for None) of `table`."""
    num = min(table.shape[0], max_vectors or table.shape[0])
    self._table, self.dtype, self.ndim = table, table.dtype, 2
    self.shape = (num, table.shape[1])
    self.nbytes = num * table.shape[1] * table.dtype.itemsize

  def __len__(self) -> int:
    """Number of rows."""
    return self.shape[0]

  def __getitem__(self, rows) -> np.ndarray:
    """Reads a slice, an integer or an array of integers, in any order."""
    at = np.arange(len(self))[rows]
    if isinstance(rows, slice) and at.size and rows.step in (None, 1):
      return self._table[int(at[0]) : int(at[-1]) + 1]
    out = np.empty((*at.shape, self.shape[1]), self.dtype)
    # h5py takes increasing unique rows only, and is slow at long lists.
    unique, back = np.unique(at, return_inverse=True)
    step = _ROWS_PER_READ
    picked = [
      self._table[unique[i : i + step]] for i in range(0, len(unique), step)
    ]
    if picked:
      out[...] = np.concatenate(picked)[back.reshape(at.shape)]
    return out


def write_table(path, part: str, blocks, dim: int, dtype: np.dtype) -> int:
  """Writes blocks `[n, dim]` as data set `part` of a new file; returns `N`."""
  num = 0
  with _import_h5py().File(path, "w") as file:
    table = file.create_dataset(
      part, (0, dim), dtype, maxshape=(None, dim), chunks=(1024, dim)
    )
    for block in blocks:
      table.resize(num + len(block), axis=0)
      table[num:] = block
      num += len(block)
  return num
