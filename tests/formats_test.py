import errno
import os

import numpy as np
import pytest

from vqjax.data import batches, files, formats

FLAT = {
  ".bvecs": np.uint8,
  ".fvecs": np.float32,
  ".ivecs": np.int32,
  ".fbin": np.float32,
  ".u8bin": np.uint8,
  ".i8bin": np.int8,
  ".ibin": np.int32,
  ".npy": np.float32,
}


def some_vectors(n=37, d=5, dtype=np.float32):
  x = np.random.default_rng(0).integers(-100, 100, size=(n, d))
  return np.abs(x).astype(dtype) if dtype == np.uint8 else x.astype(dtype)


def oracle_read(path, dtype):
  """Rows by struct arithmetic over the whole file."""
  raw = path.read_bytes()
  if path.suffix == ".npy":
    return np.load(path)
  if path.suffix.endswith("bin"):
    n, d = np.frombuffer(raw[:8], "<i4")
    return np.frombuffer(raw[8:], dtype).reshape(n, d)
  d = int(np.frombuffer(raw[:4], "<i4")[0])
  step = 4 + d * np.dtype(dtype).itemsize
  rows = [raw[i + 4 : i + step] for i in range(0, len(raw), step)]
  return np.stack([np.frombuffer(r, dtype) for r in rows])


@pytest.mark.parametrize("suffix", FLAT)
@pytest.mark.parametrize("stream", [False, True])
def test_round_trip(tmp_path, suffix, stream):
  x = some_vectors(dtype=FLAT[suffix])
  path = tmp_path / f"x{suffix}"
  blocks = (x[i : i + 10] for i in range(0, len(x), 10))
  assert formats.write_vectors(path, blocks if stream else x) == len(x)
  np.testing.assert_array_equal(oracle_read(path, FLAT[suffix]), x)
  got = formats.open_vectors(path)
  assert isinstance(got, np.memmap)
  assert got.dtype == FLAT[suffix]
  assert not got.flags.writeable
  rows = np.array([36, 0, 7, 7, 3])
  np.testing.assert_array_equal(got, x)
  np.testing.assert_array_equal(got[rows], x[rows])
  np.testing.assert_array_equal(got[5:9], x[5:9])
  assert formats.open_vectors(path, max_vectors=4).shape == (4, 5)
  assert formats.open_vectors(path, max_vectors=400).shape == (37, 5)
  assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("dtype", ["f2", "f8", "u1", "i2", "u4", "i8", ">f4"])
def test_npy_types(tmp_path, dtype):
  x = some_vectors(dtype=dtype)
  np.save(tmp_path / "x.npy", x)
  got = formats.open_vectors(tmp_path / "x.npy")
  assert got.dtype == x.dtype
  np.testing.assert_array_equal(got, x)
  formats.write_vectors(tmp_path / "y.npy", x)
  np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), x)


def test_faiss_reads_what_is_written(tmp_path):
  vecs_io = pytest.importorskip("faiss.contrib.vecs_io")
  x = some_vectors()
  formats.write_vectors(tmp_path / "x.fvecs", x)
  got = vecs_io.fvecs_read(os.fspath(tmp_path / "x.fvecs"))
  np.testing.assert_array_equal(got, x)


def test_ibin_with_distances(tmp_path):
  ids = some_vectors(4, 3, np.int32)
  raw = np.array([4, 3], "<i4").tobytes() + ids.tobytes()
  (tmp_path / "gt.ibin").write_bytes(raw + np.ones((4, 3), "<f4").tobytes())
  np.testing.assert_array_equal(formats.open_vectors(tmp_path / "gt.ibin"), ids)


def wide_ids(tmp_path, ids):
  raw = np.array(ids.shape, "<u4").tobytes() + ids.tobytes()
  (tmp_path / "gt.ibin").write_bytes(raw)
  return formats.open_vectors(tmp_path / "gt.ibin")


@pytest.mark.parametrize("padding", [7, -1, 0xFFFFFFFF])
def test_ibin_of_int64_ids(tmp_path, padding):
  ids = some_vectors(400, 3, np.int64) + 100
  ids[1, 2] = ids[399, 1] = padding
  got = wide_ids(tmp_path, ids)
  assert got.dtype == np.int64
  np.testing.assert_array_equal(got, ids)


def test_bin_counts_are_unsigned(tmp_path):
  path, num = tmp_path / "x.u8bin", (1 << 31) + 5
  with open(path, "wb") as f:  # A sparse file takes no space.
    f.write(np.array([num, 1], "<u4").tobytes())
    f.truncate(8 + num)
    f.seek(-1, os.SEEK_END)
    f.write(b"\x09")
  got = formats.open_vectors(path)
  assert got.shape == (num, 1)
  assert got[-1, 0] == 9


@pytest.mark.parametrize(
  ("suffix", "cut", "message"),
  [
    (".fvecs", 3, "24 bytes each, so expected 864 .*got 885 bytes"),
    (".bvecs", 1, "9 bytes each, so expected 324 .*got 332 bytes"),
    (".fbin", 3, "expected 748 bytes, got 745 bytes"),
    (".u8bin", -1, "expected 193 bytes, got 194 bytes"),
    (".npy", 8, "expected 868 bytes, got 860 bytes"),
  ],
)
def test_truncated(tmp_path, suffix, cut, message):
  path = tmp_path / f"x{suffix}"
  formats.write_vectors(path, some_vectors(dtype=FLAT[suffix]))
  raw = path.read_bytes()
  path.write_bytes(raw[:-cut] if cut > 0 else raw + b"x")
  with pytest.raises(ValueError, match=message):
    formats.open_vectors(path)


@pytest.mark.parametrize("suffix", [*FLAT, ".hdf5"])
def test_damaged_headers(tmp_path, suffix):
  path = tmp_path / f"x{suffix}"
  if suffix != ".hdf5":
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="empty.*0 bytes"):
      formats.open_vectors(path)
  else:
    pytest.importorskip("h5py")
  for raw in (b"\xff" * 40, b"\x01\x00"):
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="x" + suffix):
      formats.open_vectors(path)


def test_row_with_other_dimension(tmp_path):
  x = some_vectors()
  path = tmp_path / "x.fvecs"
  formats.write_vectors(path, x)
  raw = bytearray(path.read_bytes())
  raw[36 * 24 : 36 * 24 + 4] = np.int32(6).tobytes()
  path.write_bytes(raw)
  with pytest.raises(ValueError, match="dimension 5 .*got 6 in row 36"):
    formats.open_vectors(path)


def test_npy_refused(tmp_path):
  path = tmp_path / "x.npy"
  np.save(path, np.zeros(7))
  with pytest.raises(ValueError, match=r"\(N, D\), got shape \(7,\)"):
    formats.open_vectors(path)
  np.save(path, np.zeros((0, 7)))
  with pytest.raises(ValueError, match=r"got shape \(0, 7\)"):
    formats.open_vectors(path)
  np.save(path, np.zeros((2, 2), np.complex64))
  with pytest.raises(ValueError, match="got complex64"):
    formats.open_vectors(path)
  np.save(path, np.array([[print]]), allow_pickle=True)
  with pytest.raises(ValueError, match="got object"):
    formats.open_vectors(path)


def test_names_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match="nothere.fvecs"):
    formats.open_vectors(tmp_path / "nothere.fvecs")
  with pytest.raises(ValueError, match=r"x\.txt.*\.bvecs .*\.npy \.csv"):
    formats.open_vectors(tmp_path / "x.txt")
  with pytest.raises(ValueError, match="at least 1, got 0"):
    formats.open_vectors(tmp_path / "e.npy", max_vectors=0)
  os.mkfifo(tmp_path / "pipe.npy")
  with pytest.raises(ValueError, match="pipe.npy is not a regular file"):
    formats.open_vectors(tmp_path / "pipe.npy")


def test_messages_name_what_is_near(tmp_path):
  formats.write_vectors(tmp_path / "x.fvecs", some_vectors())
  for name in ("x.npy", "x", "x.FVECS", "x.csv"):
    with pytest.raises(FileNotFoundError, match=f"{name}; there is x.fvecs[.]"):
      formats.open_vectors(tmp_path / name)
  (tmp_path / "y.fvecs.gz").touch()
  with pytest.raises(ValueError, match="y.fvecs.gz.*unpack it first"):
    formats.open_vectors(tmp_path / "y.fvecs.gz")


def test_names_in_capitals_with_hash_and_tilde(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  x = some_vectors()
  for name in ("X.FVECS", "X.Npy", "a#b.fvecs", "c.npz.d.npy"):
    formats.write_vectors(f"~/{name}", x)
    assert (tmp_path / name).is_file()
    np.testing.assert_array_equal(formats.open_vectors(f"~/{name}"), x)


def test_npz_is_not_written(tmp_path):
  with pytest.raises(ValueError, match="'x.npz' cannot be written: .*npy"):
    formats.write_vectors(tmp_path / "x.npz", some_vectors())


@pytest.mark.parametrize("suffix", [".bvecs", ".u8bin", ".npy"])
def test_a_file_that_shrinks_is_an_error_not_a_signal(tmp_path, suffix):
  path = tmp_path / f"x{suffix}"
  formats.write_vectors(path, some_vectors(2000, 100, np.uint8))
  vectors = formats.open_vectors(path, role="queries")
  size = path.stat().st_size
  os.truncate(path, 100)
  for read in (
    lambda: batches.read_rows(vectors, [1999]),
    lambda: batches.subsample(vectors, 10, 0),
    lambda: list(batches.map_blocks(np.sin, vectors, block_size=100)),
    lambda: vectors[1000:][:3],
  ):
    with pytest.raises(
      OSError, match=rf"x{suffix} \(queries\) shrank from {size} to 100 bytes"
    ):
      read()


@pytest.mark.parametrize("suffix", [".fvecs", ".npy", ".npz", ".hdf5"])
def test_bad_rows_are_named_with_file_and_role(tmp_path, suffix):
  x, path = some_vectors(), tmp_path / f"x{suffix}"
  x[[17, 30], 1] = np.nan, np.inf
  if suffix == ".npz":
    np.savez(path, x)
  else:
    formats.write_vectors(path, x)
  vectors = formats.open_vectors(path, max_vectors=35, role="--data")
  name = rf"x{suffix}(#train|#arr_0)? \(--data\)"
  for read in (
    lambda: batches.read_rows(vectors, np.arange(10, 35)),
    lambda: list(batches.map_blocks(np.sin, vectors, block_size=35)),
    lambda: batches.subsample(vectors, 35, 0),
  ):
    with pytest.raises(
      ValueError, match=rf"{name} must be .* in 2 of .* first in row 17, 30;"
    ):
      read()


@pytest.mark.parametrize("dtype", [np.int32, np.uint32, np.int64, np.uint64])
def test_integers_that_float32_lacks_are_refused_by_row(tmp_path, dtype):
  x = np.full((9, 3), 1 << 24, dtype)
  x[5, 1] = (1 << 30) + 128  # 24 bits from the first to the last: exact.
  np.save(tmp_path / "x.npy", x)
  vectors = formats.open_vectors(tmp_path / "x.npy")
  np.testing.assert_array_equal(batches.read_rows(vectors, [5, 0]), x[[5, 0]])
  x[7, 2] = (1 << 24) + 1
  np.save(tmp_path / "x.npy", x)
  vectors = formats.open_vectors(tmp_path / "x.npy")
  for read in (
    lambda: batches.read_rows(vectors, [8, 7, 3]),
    lambda: list(batches.map_blocks(np.sin, vectors, block_size=4)),
  ):
    with pytest.raises(
      ValueError,
      match="x.npy .* 16777217 in row 7, column 2 would become 16777216; ",
    ):
      read()
  with pytest.raises(ValueError, match="float32, which cannot hold 16777217 "):
    formats.write_vectors(tmp_path / "x.fvecs", x)
  with pytest.raises(ValueError, match="float16, which cannot hold"):
    formats.write_vectors(tmp_path / "y.npy", x, dtype=np.float16)
  formats.write_vectors(tmp_path / "y.npy", x, dtype=np.float64)


@pytest.mark.parametrize(
  ("suffix", "value", "message"),
  [
    (".bvecs", 256, "uint8, which cannot hold 256"),
    (".bvecs", -1, r"-1 \(row 3, column 2\)"),
    (".u8bin", 1.5, "cannot hold 1.5"),
    (".i8bin", 128.0, "cannot hold 128.0"),
    (".ivecs", 2.0**31, "int32, which cannot hold 2147483648.0"),
    (".ibin", np.nan, "cannot hold nan"),
    (".fvecs", 1e39, r"float32, which cannot hold 1e\+39"),
  ],
)
def test_numbers_that_do_not_fit(tmp_path, suffix, value, message):
  x = np.ones((5, 4))
  x[3, 2] = value
  if float(value).is_integer() and value < 1000:
    x = x.astype(np.int64) if isinstance(value, int) else x
  with pytest.raises(ValueError, match=message):
    formats.write_vectors(tmp_path / f"x{suffix}", iter([x[:2], x[2:]]))
  assert os.listdir(tmp_path) == []


def test_whole_floats_fit(tmp_path):
  x = some_vectors(dtype=np.uint8)
  formats.write_vectors(tmp_path / "x.bvecs", x.astype(np.float64))
  np.testing.assert_array_equal(formats.open_vectors(tmp_path / "x.bvecs"), x)


def test_write_refused(tmp_path):
  path = tmp_path / "x.fvecs"
  formats.write_vectors(path, some_vectors())
  before = path.read_bytes()
  with pytest.raises(FileExistsError, match="overwrite=True"):
    formats.write_vectors(path, some_vectors(3))
  with pytest.raises(ValueError, match=r"numbers of shape \(n, 5\)"):
    formats.write_vectors(
      path, [some_vectors(), some_vectors(d=4)], overwrite=True
    )
  with pytest.raises(ValueError, match="hold float32, got dtype float64"):
    formats.write_vectors(path, some_vectors(), dtype=np.float64)
  with pytest.raises(ValueError, match="no vectors to write"):
    formats.write_vectors(path, [])
  with pytest.raises(ValueError, match=r"got \(7,\)"):
    formats.write_vectors(path, np.zeros(7))
  assert path.read_bytes() == before
  assert formats.write_vectors(path, some_vectors(3), overwrite=True) == 3
  assert os.listdir(tmp_path) == ["x.fvecs"]


def fail_while_writing(path, error):
  with files.atomic_output(path, overwrite=True) as temporary:
    temporary.write_bytes(b"abc")
    raise error


def test_atomic_output(tmp_path):
  path = tmp_path / "new" / "folder" / "a.json"
  with files.atomic_output(path) as temporary:
    temporary.write_text("1")
    assert temporary.suffix == ".json"
    assert not path.exists()
    inode = temporary.stat().st_ino
  assert path.read_text() == "1"
  assert path.stat().st_ino == inode  # Renamed, not copied.
  with pytest.raises(RuntimeError):
    fail_while_writing(path, RuntimeError())
  assert path.read_text() == "1"
  assert os.listdir(path.parent) == ["a.json"]
  with (
    pytest.raises(ValueError, match="not a folder"),
    files.atomic_output(path.parent),
  ):
    pass


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_permissions_are_those_of_the_umask(umask, mode, tmp_path):
  before = os.umask(umask)
  try:
    with files.atomic_output(tmp_path / "a.json") as temporary:
      os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
  finally:
    os.umask(before)
  assert (tmp_path / "a.json").stat().st_mode & 0o777 == mode


def test_full_disk(tmp_path):
  path = tmp_path / "a.npy"
  with pytest.raises(OSError, match="full.*a.npy.*after 3 bytes") as e:
    fail_while_writing(path, OSError(errno.ENOSPC, "no space"))
  assert e.value.errno == errno.ENOSPC
  assert os.listdir(tmp_path) == []


def test_check_vectors():
  x = np.zeros((9, 4), np.float32)
  formats.check_vectors(x, dim=4)
  x[[2, 7], 1] = np.nan, np.inf
  with pytest.raises(ValueError, match="queries .*2 of 9 rows.* 102, 107;"):
    formats.check_vectors(x, name="queries", first_row=100)
  with pytest.raises(ValueError, match="row 3, 30;"):
    formats.check_vectors(x, rows=np.array([0, 1, 30, 0, 0, 0, 0, 3, 8]))
  with pytest.raises(ValueError, match="dimension 5, got 4"):
    formats.check_vectors(x, dim=5)
  with pytest.raises(ValueError, match=r"\(N, D\), got \(4,\)"):
    formats.check_vectors(x[0])
  with pytest.raises(ValueError, match="numbers, got <U1"):
    formats.check_vectors(np.array([["a"]]))


def test_arithmetic_with_mapped_rows_is_plain(tmp_path):
  x = some_vectors()
  formats.write_vectors(tmp_path / "x.fvecs", x)
  got = formats.open_vectors(tmp_path / "x.fvecs")
  for value, want in (
    (got.max(), x.max()),
    (np.max(got[:9]), x[:9].max()),
    (got.mean(), x.mean()),
    (got[3, 2], x[3, 2]),
  ):
    assert isinstance(value, np.generic)
    assert value == want
  for value in (got + 1, got.sum(axis=0), np.sqrt(np.abs(got)), got[[3, 1]]):
    assert type(value) is np.ndarray
  assert got[3].name.endswith("x.fvecs")
  assert got[5:, :2][4:].first_row == 9
