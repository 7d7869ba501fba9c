import builtins
import errno
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from vqjax.data import batches, formats

h5py = pytest.importorskip("h5py")


def _vectors(n=37, d=5):
  x = np.random.default_rng(0).integers(-100, 100, size=(n, d))
  return x.astype(np.float32)


@pytest.mark.parametrize("compressed", [False, True])
def test_rows_come_as_an_array_has_them(tmp_path, compressed):
  x = _vectors(1500)
  path = tmp_path / "a.hdf5"
  with h5py.File(path, "w") as f:
    f.create_dataset(
      "train", data=x, compression="gzip" if compressed else None
    )
    f.create_dataset("test", data=x[:3])
    f.create_dataset("flat", data=x[0])
  got = formats.open_vectors(path)
  assert isinstance(got, np.memmap) != compressed
  rows = np.random.default_rng(0).integers(-1500, 1500, size=1200)
  np.testing.assert_array_equal(got[rows], x[rows])
  np.testing.assert_array_equal(got[[3]], x[[3]])
  np.testing.assert_array_equal(got[7], x[7])
  np.testing.assert_array_equal(got[-9:], x[-9:])
  np.testing.assert_array_equal(got[10:1400:7], x[10:1400:7])
  assert got[[]].shape == (0, 5)
  np.testing.assert_array_equal(got, x)
  assert formats.open_vectors(f"{path}#test").shape == (3, 5)
  short = formats.open_vectors(path, max_vectors=10)
  assert short.shape == (10, 5)
  np.testing.assert_array_equal(short[5:], x[5:10])
  with pytest.raises(ValueError, match="no data set 'nope'.*train"):
    formats.open_vectors(f"{path}#nope")
  with pytest.raises(ValueError, match=r"shape \(5,\)"):
    formats.open_vectors(f"{path}#flat")


def test_what_is_written_h5py_reads(tmp_path):
  x = _vectors(2100)
  path = tmp_path / "b.h5"
  formats.write_vectors(f"{path}#base", (x[:2000], x[2000:]))
  with h5py.File(path) as f:
    np.testing.assert_array_equal(f["base"], x)


def test_without_h5py(tmp_path, monkeypatch):
  (tmp_path / "a.hdf5").write_bytes(b"x")
  real = builtins.__import__

  def no_h5py(name, *args, **kwargs):
    if name == "h5py":
      raise ImportError(name)
    return real(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", no_h5py)
  with pytest.raises(ImportError, match=r"pip install 'vqjax\[hdf5\]'"):
    formats.open_vectors(tmp_path / "a.hdf5")


def _outside(folder):
  """A file with a way out of each kind, and what it holds itself."""
  x = _vectors()
  np.save(folder / "secret.npy", x)
  with h5py.File(folder / "other.h5", "w") as file:
    file.create_dataset("train", data=x)
    file.create_group("group")["x"] = x
  layout = h5py.VirtualLayout(x.shape, x.dtype)
  layout[:] = h5py.VirtualSource(folder / "other.h5", "train", x.shape)
  with h5py.File(folder / "x.h5", "w") as file:
    file["external"] = h5py.ExternalLink("other.h5", "train")
    file["mounted"] = h5py.ExternalLink("other.h5", "/group")
    file["soft"] = h5py.SoftLink("/mounted/x")
    file["circle"] = h5py.SoftLink("circle")
    file.create_virtual_dataset("virtual", layout)
    file.create_dataset(
      "storage", x.shape, x.dtype, external=[(folder / "secret.npy", 128, 740)]
    )
    file.create_group("a/b")["good"] = x
    file["a/inside"] = h5py.SoftLink("b/good")
    file["absolute"] = h5py.SoftLink("/a/./b/good")
  return folder / "x.h5", x


@pytest.mark.parametrize(
  ("part", "message"),
  [
    ("external", "is a link to another file, 'other.h5'"),
    ("mounted/x", "is a link to another file, 'other.h5'"),
    ("soft", "is a link to another file, 'other.h5'"),
    ("circle", "is a link that leads in a circle"),
    ("virtual", "is put together of other files"),
    ("storage", "is put together of other files"),
  ],
)
def test_what_lies_outside_of_the_file_is_refused(tmp_path, part, message):
  path, _ = _outside(tmp_path)
  with pytest.raises(ValueError, match=f"x.h5#{part} {message}"):
    formats.open_vectors(f"{path}#{part}")


@pytest.mark.parametrize(
  "part", ["a/b/good", "/a/b/good", "a/inside", "absolute"]
)
def test_paths_through_groups_and_soft_links(tmp_path, part):
  path, x = _outside(tmp_path)
  np.testing.assert_array_equal(formats.open_vectors(f"{path}#{part}"), x)


def test_unknown_names_list_what_there_is(tmp_path):
  path, _ = _outside(tmp_path)
  for part in ("nope", "a/nope", "a/b/good/nope"):
    with pytest.raises(ValueError, match=f"no data set '{part}'.*'a/b/good'"):
      formats.open_vectors(f"{path}#{part}")
  with pytest.raises(ValueError, match="x.h5#a/b is no data set.*'a/b/good'"):
    formats.open_vectors(f"{path}#a/b")
  with pytest.raises(ValueError, match="no data set 'train'"):
    formats.open_vectors(path)


def test_the_only_data_set_needs_no_name(tmp_path):
  with h5py.File(tmp_path / "x.h5", "w") as file:
    file.create_group("group")["name"] = _vectors()
  got = formats.open_vectors(tmp_path / "x.h5")
  np.testing.assert_array_equal(got, _vectors())
  assert got.name.endswith("x.h5#group/name")


def test_links_of_a_users_own_kind_are_refused(tmp_path, monkeypatch):
  path, _ = _outside(tmp_path)

  def get(self, name, default=None, getclass=False, getlink=False):
    raise TypeError("Unknown link type")

  monkeypatch.setattr(h5py.Group, "get", get)
  with pytest.raises(ValueError, match="x.h5#absolute is a link"):
    formats.open_vectors(f"{path}#absolute")


def test_a_read_costs_what_it_reads(tmp_path):
  path, num = tmp_path / "x.h5", 100_000_000
  with h5py.File(path, "w") as file:  # Chunks that nobody wrote are zeros.
    table = file.create_dataset("train", (num, 4), "u1", chunks=(1000, 4))
    table[num - 3 :] = 7
  vectors = formats.open_vectors(path)
  tracemalloc.start()
  got = batches.read_rows(vectors, [num - 1, 5, 70_000_000, num - 3, 2])
  assert got[:, 0].tolist() == [7, 0, 0, 7, 0]
  assert vectors[-5:].sum() == 3 * 4 * 7
  assert vectors[num - 9 :: 2].shape == (5, 4)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 4_000_000  # A byte for each row would be 100,000,000.
  with pytest.raises(IndexError, match="between 0 and 99999999, got 7 to"):
    vectors[[num, 7]]


def test_damaged_chunks_name_file_and_data_set(tmp_path):
  path = tmp_path / "x.h5"
  with h5py.File(path, "w") as file:
    file.create_dataset(
      "g/t", data=_vectors(900), chunks=(100, 5), compression="gzip"
    )
    chunk = file["g/t"].id.get_chunk_info(4)
  raw = bytearray(path.read_bytes())
  raw[chunk.byte_offset : chunk.byte_offset + 40] = b"\xff" * 40
  path.write_bytes(raw)
  vectors = formats.open_vectors(path)
  batches.read_rows(vectors, range(50))
  for read in (
    lambda: list(batches.map_blocks(np.sin, vectors, block_size=300)),
    lambda: batches.read_rows(vectors, [450]),
  ):
    with pytest.raises(ValueError, match="x.h5#g/t cannot be read.* damaged"):
      read()


def test_tables_that_are_no_vectors(tmp_path):
  with h5py.File(tmp_path / "x.h5", "w") as file:
    file["null"] = h5py.Empty("f")
    file["text"] = np.array([[b"a", b"b"]])
    file["pair"] = np.zeros((2, 2), [("a", "f4"), ("b", "f4")])
    file["one"] = 3.0
  for part, message in {
    "null": "shape \\(\\)",
    "text": "got .S1",
    "pair": "one of its fields a, b",
    "one": "a single number",
  }.items():
    with pytest.raises(ValueError, match=f"x.h5#{part} .*{message}"):
      formats.open_vectors(f"{tmp_path}/x.h5#{part}")


def test_a_table_that_ends_behind_its_file(tmp_path):
  path = tmp_path / "x.h5"
  with h5py.File(path, "w") as file:
    file.create_dataset("train", data=_vectors(900))
  raw = path.read_bytes().replace(
    np.array([900, 5], "<u8").tobytes(), np.array([9000, 5], "<u8").tobytes()
  )
  path.write_bytes(raw)
  with pytest.raises(ValueError, match="x.h5#train cannot be read.*trunca"):
    formats.open_vectors(path)


_FILL = """
import resource, signal, sys
import numpy as np
from vqjax.data import hdf5
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
x = np.zeros((1000, 20), "f4")
try:
  hdf5.write_table(sys.argv[1], None, [x] * 9, 20, x.dtype)
except OSError as error:
  print(error.errno, error.filename)
"""


@pytest.mark.parametrize("size", [100, 200_000])
def test_a_full_disk_is_an_error_with_its_number(tmp_path, size):
  path = tmp_path / "x.h5"
  run = subprocess.run(
    [sys.executable, "-c", _FILL, path, str(size)],
    capture_output=True,
    text=True,
    check=True,  # HDF5 must not crash.
  )
  assert run.stdout == f"{errno.EFBIG} {path}\n"
