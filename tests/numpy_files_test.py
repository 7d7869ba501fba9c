import time

import ml_dtypes
import numpy as np
import pytest

from vqjax.data import batches, files, formats, numpy_files


def _vectors(n=37, d=5, dtype=np.float32):
  x = np.random.default_rng(0).integers(-100, 100, size=(n, d))
  return x.astype(dtype)


def _check(got, x, num=None):
  """All ways to read give what `x` has."""
  x = x[:num]
  assert got.shape == x.shape
  rows = np.array([30, 0, -1, 7, 7, 3]) % len(x)
  np.testing.assert_array_equal(np.asarray(got), x)
  np.testing.assert_array_equal(got[2:9], x[2:9])
  np.testing.assert_array_equal(got[::-2], x[::-2])
  np.testing.assert_array_equal(got[rows], x[rows])
  np.testing.assert_array_equal(got[x[:, 0] > 0], x[x[:, 0] > 0])
  np.testing.assert_array_equal(batches.read_rows(got, rows), x[rows])
  blocks = batches.map_blocks(lambda x_ND: x_ND, got, block_size=10)
  np.testing.assert_array_equal(np.concatenate([b for _, b in blocks]), x)
  assert (
    files.identify(got)["checksum_of_sample"]
    == (files.identify(np.asarray(x, np.float32))["checksum_of_sample"])
  )


@pytest.mark.parametrize("dtype", ["f2", "f4", ">f8", "u1", "i8"])
@pytest.mark.parametrize("max_vectors", [None, 11])
def test_fortran_order_is_read(tmp_path, dtype, max_vectors):
  x = np.abs(_vectors()).astype(dtype)
  np.save(tmp_path / "x.npy", np.asfortranarray(x))
  got = formats.open_vectors(tmp_path / "x.npy", max_vectors=max_vectors)
  assert isinstance(got, np.memmap)
  _check(got, x, max_vectors)
  assert batches.read_rows(got, range(5)).flags.c_contiguous


@pytest.mark.parametrize("order", ["C", "F"])
def test_bfloat16_is_read_as_float32(tmp_path, order):
  x = np.random.default_rng(0).normal(size=(37, 5)) * [1e-30, 1, 7, 1e9, 1e13]
  x = x.astype(ml_dtypes.bfloat16)
  np.save(tmp_path / "x.npy", np.asarray(x, order=order))
  got = formats.open_vectors(tmp_path / "x.npy")
  assert got.dtype == np.float32
  _check(got, x.astype(np.float32))
  x[20, 3] = np.nan
  np.savez(tmp_path / "x.npz", x)
  got = formats.open_vectors(tmp_path / "x.npz")
  with pytest.raises(ValueError, match="x.npz#arr_0 .* first in row 20;"):
    batches.read_rows(got, range(37))


def test_other_raw_types_are_refused(tmp_path):
  np.save(tmp_path / "x.npy", np.ones((3, 2), ml_dtypes.float8_e4m3fn))
  with pytest.raises(
    ValueError, match=r"x.npy must hold .* got \|V1: save x.astype"
  ):
    formats.open_vectors(tmp_path / "x.npy")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_is_read(tmp_path, save):
  x, path = _vectors(), tmp_path / "x.NPZ"
  with open(path, "wb") as f:
    save(f, base=x, queries=np.asfortranarray(x[:9]))
  _check(formats.open_vectors(f"{path}#base", max_vectors=30), x, 30)
  _check(formats.open_vectors(f"{path}#queries"), x[:9])
  for part in ("", "#nope"):
    with pytest.raises(
      ValueError, match="2 arrays, .*'base', 'queries'.*x.NPZ#name"
    ):
      formats.open_vectors(f"{path}{part}")
  with open(path, "wb") as f:
    save(f, x)
  _check(formats.open_vectors(path), x)


def test_npz_is_read_once_and_only_where_rows_are_asked_for(
  tmp_path, monkeypatch
):
  reads, read_array = [], np.lib.format.read_array

  def counted(*args, **kwargs):
    reads.append(args)
    time.sleep(0.05)  # The second thread asks meanwhile.
    return read_array(*args, **kwargs)

  monkeypatch.setattr(np.lib.format, "read_array", counted)
  np.savez(tmp_path / "x.npz", _vectors())
  vectors = formats.open_vectors(tmp_path / "x.npz")
  assert vectors.shape == (37, 5)
  assert not reads
  list(batches.map_blocks(np.sin, vectors, block_size=5))
  batches.read_rows(vectors, [3])
  assert len(reads) == 1


def test_npz_larger_than_memory_is_refused(tmp_path, monkeypatch):
  np.savez(tmp_path / "x.npz", _vectors())
  monkeypatch.setattr(numpy_files.os, "sysconf", lambda name: 30)
  with pytest.raises(ValueError, match="takes 868 bytes, more than half"):
    formats.open_vectors(tmp_path / "x.npz")


@pytest.mark.parametrize("suffix", [".npy", ".npz"])
@pytest.mark.parametrize(
  ("x", "message"),
  [
    (np.float32(3), r"shape \(\): it is a single number"),
    (np.zeros(7), r"shape \(7,\): one vector is saved as x\[None\]"),
    (np.zeros((2, 3, 4)), r"shape \(2, 3, 4\): join the axes"),
    (np.zeros((0, 7)), r"shape \(0, 7\): it is empty"),
    (np.zeros((7, 0)), r"shape \(7, 0\): it is empty"),
    (np.zeros((2, 2), bool), "got bool: save x.astype"),
    (np.zeros((2, 2), "c8"), "got complex64: save real"),
    (np.zeros((2, 2), "U3"), "got <U3"),
    (np.zeros((2, 2), "M8[s]"), "got datetime64"),
    (np.zeros((2, 2), [("a", "f4"), ("b", "i4")]), "one of its fields a, b"),
    (np.array([[print]]), "got object: Python objects are never loaded"),
  ],
)
def test_arrays_that_are_no_vectors(tmp_path, suffix, x, message):
  path = tmp_path / f"x{suffix}"
  if suffix == ".npz":
    np.savez(path, x)
  else:
    np.save(path, x, allow_pickle=True)
  with pytest.raises(ValueError, match=rf"x{suffix}.* must hold .*{message}"):
    formats.open_vectors(path)


class Bomb:
  """Leaves a mark where it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return (open, (self.path, "w"))


def test_pickles_are_never_loaded(tmp_path):
  x = np.array([[Bomb(str(tmp_path / "mark"))]])
  np.save(tmp_path / "x.npy", x, allow_pickle=True)
  np.savez(tmp_path / "x.npz", x)
  for suffix in (".npy", ".npz"):
    with pytest.raises(ValueError, match="got object"):
      formats.open_vectors(tmp_path / f"x{suffix}")
  assert not (tmp_path / "mark").exists()


def _npy(text: str, version) -> bytes:
  header = text.encode() + b"\n"
  size = len(header).to_bytes(2 if version == (1, 0) else 4, "little")
  return b"\x93NUMPY" + bytes(version) + size + header + _vectors().tobytes()


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_headers_of_all_versions(tmp_path, version):
  text = "{'descr': '<f4', 'fortran_order': False, 'shape': (37, 5), }"
  (tmp_path / "x.npy").write_bytes(_npy(text, version))
  got = formats.open_vectors(tmp_path / "x.npy")
  np.testing.assert_array_equal(got, _vectors())


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0), (9, 0)])
@pytest.mark.parametrize(
  "text",
  [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (37, 5), ",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (37, 5",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (37, 'a')}",
    "{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 5)}",
    "{'descr': '<f999999', 'fortran_order': False, 'shape': (37, 5)}",
    "{'descr': [(1, 2, 3)], 'fortran_order': False, 'shape': (37, 5)}",
    "(" * 3000,
    "[" * 9000 + "]" * 9000,
    "  " + 3 * "'",
    "",
  ],
)
def test_damaged_headers_are_one_line(tmp_path, text, version):
  (tmp_path / "x.npy").write_bytes(_npy(text, version))
  with pytest.raises(ValueError, match="x.npy (has no valid|must)") as error:
    formats.open_vectors(tmp_path / "x.npy")
  assert "\n" not in str(error.value)
  assert len(str(error.value)) < 500


def test_arrays_of_any_shape(tmp_path):
  np.save(tmp_path / "lists.npy", np.arange(9))
  got = numpy_files.open_array(tmp_path / "lists.npy")
  np.testing.assert_array_equal(got, np.arange(9))
  assert got[2:5].first_row == 2
  np.save(tmp_path / "lists.npy", np.array("a"))
  with pytest.raises(ValueError, match="lists.npy must hold numbers, got <U1"):
    numpy_files.open_array(tmp_path / "lists.npy")


def test_damaged_archives_of_arrays_are_one_line(tmp_path):
  path = tmp_path / "samples.npz"
  np.savez(path, a=_vectors(), b=np.int64(3))
  got = numpy_files.load_npz(path)
  assert (got["b"], got["a"].shape) == (3, (37, 5))
  raw = path.read_bytes()
  harmed = [raw[:size] for size in range(0, len(raw), 37)]
  harmed += [raw[:400] + b"\x07" + raw[401:], b"x" * 99]
  for part in harmed:
    path.write_bytes(part)
    with pytest.raises(ValueError, match="samples.npz is truncated") as error:
      numpy_files.load_npz(path)
    assert "\n" not in str(error.value)
