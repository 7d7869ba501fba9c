import builtins

import numpy as np
import pytest

from vqjax.data import batches, formats, parquet

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def _vectors(n=37, d=5):
  x = np.random.default_rng(0).integers(-100, 100, size=(n, d))
  return x.astype(np.float32)


def _column(x, make=pa.list_, kind=None):
  kind = kind or pa.from_numpy_dtype(x.dtype)
  if make == pa.list_ or make == pa.large_list:
    return pa.array(list(x), make(kind))
  return pa.FixedSizeListArray.from_arrays(
    pa.array(x.ravel(), kind), x.shape[1]
  )


def _write(path, columns, **knobs):
  pq.write_table(pa.table(columns), path, **knobs)
  return path


@pytest.mark.parametrize(
  ("make", "dtype", "compression"),
  [
    (pa.list_, "f4", "snappy"),
    (pa.large_list, "f8", "none"),
    (None, "f2", "zstd"),
    (None, "i1", "gzip"),
  ],
)
def test_rows_come_as_an_array_has_them(
  tmp_path, monkeypatch, make, dtype, compression
):
  x = _vectors(150).astype(dtype)
  # Pieces of 7 rows, row groups of 40, 2 pieces kept.
  monkeypatch.setattr(parquet, "_PIECE_BYTES", 7 * x[0].nbytes)
  monkeypatch.setattr(parquet, "_FEW_BYTES", 14 * x[0].nbytes)
  path = _write(
    tmp_path / "a.parquet",
    {"id": list(range(150)), "v": _column(x, make)},
    row_group_size=40,
    compression=compression,
  )
  got = formats.open_vectors(path)
  assert (got.shape, got.dtype) == ((150, 5), np.dtype(dtype))
  rows = np.random.default_rng(0).integers(-150, 150, size=120)
  np.testing.assert_array_equal(got[rows], x[rows])
  np.testing.assert_array_equal(got[7], x[7])
  np.testing.assert_array_equal(got[-9:], x[-9:])
  np.testing.assert_array_equal(got[10:140:7], x[10:140:7])
  assert got[[]].shape == (0, 5)
  np.testing.assert_array_equal(got, x)
  short = formats.open_vectors(f"{path}#v", max_vectors=10)
  np.testing.assert_array_equal(short[5:], x[5:10])
  seen = list(batches.map_blocks(lambda x_ND: x_ND, got, block_size=11))
  np.testing.assert_array_equal(np.concatenate([b for _, b in seen]), x)


def test_in_order_each_row_is_decoded_once(tmp_path, monkeypatch):
  x = _vectors(100)
  monkeypatch.setattr(parquet, "_PIECE_BYTES", 10 * x[0].nbytes)
  monkeypatch.setattr(parquet, "_FEW_BYTES", 40 * x[0].nbytes)
  path = _write(tmp_path / "a.parquet", {"v": _column(x)}, row_group_size=50)
  numbers = []
  real = parquet._Reader._to_numpy
  spy = lambda self, column, first: (
    numbers.append(first) or real(self, column, first)
  )
  monkeypatch.setattr(parquet._Reader, "_to_numpy", spy)
  got = formats.open_vectors(path)
  for start in (7, 0, 14, 28, 21, 35, 49, 42, 56, 63, 70, 77, 84, 91):
    got[start : start + 7]  # Threads may come in another order.
  assert numbers == list(range(0, 100, 10))


def test_random_rows_are_kept_or_warned_of(tmp_path, monkeypatch, caplog):
  x = _vectors(100)
  monkeypatch.setattr(parquet, "_PIECE_BYTES", 10 * x[0].nbytes)
  monkeypatch.setattr(parquet, "_FEW_BYTES", 20 * x[0].nbytes)
  path = _write(tmp_path / "a.parquet", {"v": _column(x)}, row_group_size=50)
  counts = []
  for most in (1 << 20, 10):
    monkeypatch.setattr(parquet, "_MOST_BYTES", most)
    reader = parquet.open_rows(path, "v")._read_fn.__self__
    for step in range(9):
      reader.read(np.random.default_rng(step).integers(0, 100, 64))
    counts.append(reader._num_read)
  assert counts[0] <= 30 < counts[1]
  assert caplog.text.count("too much to keep in memory") == 1
  assert f"open_vectors('{path}#v')" in caplog.text


def test_a_large_row_group_is_not_read_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(parquet, "_PIECE_BYTES", 1 << 18)
  monkeypatch.setattr(parquet, "_FEW_BYTES", 1 << 20)
  x = np.random.default_rng(0).normal(size=(100_000, 32)).astype("f4")
  path = tmp_path / "a.parquet"
  _write(path, {"v": _column(x, None)}, row_group_size=100_000)
  pool = pa.default_memory_pool()
  got = formats.open_vectors(path)
  before, peak = pool.bytes_allocated(), 0
  for start in range(0, 100_000, 5000):
    got[start : start + 5000]
    peak = max(peak, pool.bytes_allocated() - before)
  assert peak < 8e6  # All of it takes 17 MB.


def test_columns_are_chosen_by_name(tmp_path):
  x = _vectors(3)
  columns = {"id": [1, 2, 3], "a": _column(x), "b": _column(-x)}
  path = _write(tmp_path / "x.parquet", columns)
  np.testing.assert_array_equal(formats.open_vectors(f"{path}#b"), -x)
  assert formats.open_vectors(f"{path}#b").name == f"{path}#b"
  for name, message in {
    "": r"2 columns of vectors, a, b; choose one with x\.parquet#name",
    "#nope": r"no column 'nope'; its columns are id \(int64\), a \(list",
    "#id": "must hold a list of numbers per row, got int64; choose .*: a, b",
  }.items():
    with pytest.raises(ValueError, match=message):
      formats.open_vectors(f"{path}{name}")
  path = _write(tmp_path / "y.parquet", {"id": [1], "t": [["text"]]})
  with pytest.raises(ValueError, match="no column of lists of numbers.*id"):
    formats.open_vectors(path)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ([[1.0, 2.0], None], "v has no value in row 1; remove"),
    ([None, [1.0, 2.0]], "v has no value in row 0; remove"),
    ([[1.0, 2.0], [3.0]], "v has 1 numbers in row 1, but 2 in row 0"),
    ([[1.0, 2.0], [3.0, None]], "v has no number in row 1, dimension 1"),
    ([[1.0, 2.0], [3.0, np.nan]], "v must be finite.* first in row 1"),
    ([[], []], "v must hold vectors.* got shape .2, 0.: it is empty"),
  ],
)
def test_rows_that_are_no_vectors(tmp_path, values, message):
  column = pa.array(values, pa.list_(pa.float32()))
  path = _write(tmp_path / "x.parquet", {"v": column})
  with pytest.raises(ValueError, match=f"x.parquet#{message}"):
    batches.read_rows(formats.open_vectors(path), [0, 1])


def test_rows_of_later_pieces_are_named_by_their_number(tmp_path):
  values = [[1.0, 2.0]] * 50 + [[3.0]]
  column = pa.array(values, pa.list_(pa.float32()))
  path = _write(tmp_path / "x.parquet", {"v": column}, row_group_size=20)
  with pytest.raises(ValueError, match="1 numbers in row 50, but 2"):
    formats.open_vectors(path)[:]


def test_files_that_are_no_parquet(tmp_path):
  path = _write(tmp_path / "x.parquet", {"v": _column(_vectors(900))})
  raw = path.read_bytes()
  path.write_bytes(raw[:-30])
  with pytest.raises(ValueError, match="x.parquet cannot be read.*truncated"):
    formats.open_vectors(path)
  path.write_bytes(b"\xff" * 5000 + raw[5000:])  # The footer is whole.
  with pytest.raises(ValueError, match="x.parquet.* cannot be read.*damaged"):
    formats.open_vectors(path)[:]
  _write(path, {"v": pa.array([], pa.list_(pa.float32()))})
  with pytest.raises(ValueError, match="x.parquet#v .*has no rows"):
    formats.open_vectors(path)


def test_without_pyarrow(tmp_path, monkeypatch):
  (tmp_path / "a.parquet").write_bytes(b"x")
  real = builtins.__import__

  def no_pyarrow(name, *args, **kwargs):
    if name.startswith("pyarrow"):
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", no_pyarrow)
  with pytest.raises(ImportError, match=r"pip install 'vqjax\[parquet\]'"):
    formats.open_vectors(tmp_path / "a.parquet")
