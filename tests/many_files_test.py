import numpy as np
import pytest
from absl import logging

from vqjax.data import datasets, formats, item_ids, many_files, parquet

pq = pytest.importorskip("pyarrow.parquet")
h5py = pytest.importorskip("h5py")
X = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32)


def _write(folder, suffix, x=X, num=12):
  """Files part-0 to part-11, in which rows follow each other."""
  folder.mkdir(exist_ok=True)
  for i, x_nD in enumerate(np.array_split(x, num)):
    path = folder / f"part-{i}{suffix}"
    if suffix == ".parquet":
      parquet.write(path, {"v": x_nD, "price": np.full(len(x_nD), i)})
    elif suffix == ".csv":
      np.savetxt(path, x_nD, "%.9g", ",")
    else:
      formats.write_vectors(path, x_nD)
  return folder


@pytest.mark.parametrize("suffix", [".npy", ".fvecs", ".parquet", ".csv"])
@pytest.mark.parametrize("is_small", [True, False])
def test_a_folder_is_its_files_in_order(
  tmp_path, monkeypatch, suffix, is_small
):
  if not is_small:
    monkeypatch.setattr(many_files, "_SMALL_BYTES", 0)
  folder = _write(tmp_path / "a", suffix)
  (folder / "README.txt").touch()
  (folder / f".hidden{suffix}").write_bytes(b"?")
  rows = np.random.default_rng(1).integers(-50, 50, size=200)
  for path in (folder, folder / f"part-*{suffix}", folder / "part-*[0-9].*"):
    got = formats.open_vectors(path, role="queries")
    assert (got.shape, got.dtype) == (X.shape, X.dtype)
    assert got.name == f"{path} (queries)"
    np.testing.assert_array_equal(got[rows], X[rows])
    for part in (slice(3, 41), slice(7, 7), slice(-9, None), slice(0, 50, 7)):
      np.testing.assert_array_equal(got[part], X[part])
  short = formats.open_vectors(folder, max_vectors=7)
  np.testing.assert_array_equal(np.asarray(short), X[:7])


def test_few_readers_stay_open(tmp_path, monkeypatch):
  monkeypatch.setattr(many_files, "_SMALL_BYTES", 0)
  folder, opened = _write(tmp_path / "a", ".parquet"), []
  warned = []
  monkeypatch.setattr(logging, "warning", lambda *words: warned.append(words))
  real = parquet.open_rows
  spy = lambda path, part: opened.append(path.name) or real(path, part)
  monkeypatch.setitem(formats._WITH_PARTS, ".parquet", spy)
  got = formats.open_vectors(f"{folder}#v")
  opened.clear()
  for start in range(0, 50, 3):
    got[start : start + 3]
  assert opened == [f"part-{i}.parquet" for i in range(12)]
  for _ in range(3):  # Random rows touch all files each time.
    got[np.arange(49, -1, -1)]
  assert len(warned) == 1
  assert "too much to keep in memory" in warned[0][0]


def test_ids_are_a_column_of_all_files(tmp_path):
  folder = tmp_path / "a"
  folder.mkdir()
  names = np.array([f"item {row}" for row in range(50)], object)
  for i, rows in enumerate(np.array_split(np.arange(50), 11)):
    columns = {"item": names[rows], "v": X[rows]}
    parquet.write(folder / f"{i}.parquet", columns)
  pattern = folder / "*.parquet"
  for data in (folder, f"{folder}#v", pattern, f"{pattern}#v"):
    got = item_ids.read("item", 50, data=data)
    np.testing.assert_array_equal(got, names)
  parquet.write(folder / "9.parquet", {"item": np.arange(5), "v": X[:5]})
  with pytest.raises(ValueError, match="9.parquet#item holds integers"):
    item_ids.read("item", 50, data=folder)


def test_a_parquet_file_has_its_ids_itself(tmp_path):
  path, ids = tmp_path / "codes.parquet", np.array(["b", "a", "c"], object)
  codes = np.arange(6).reshape(3, 2)
  blocks = (codes[i : i + 2] for i in (0, 2))
  item_ids.save_beside(path, ids)
  formats.write_vectors(f"{path}#codes", blocks, dtype=np.int32, ids_N=ids)
  assert [p.name for p in tmp_path.iterdir()] == ["codes.parquet"]
  got = formats.open_vectors(path)
  assert got.dtype == np.int32
  np.testing.assert_array_equal(np.asarray(got), codes)
  info = item_ids.describe(ids)
  np.testing.assert_array_equal(item_ids.load_beside(path, info, 3), ids)
  with pytest.raises(ValueError, match="other item ids"):
    item_ids.load_beside(path, item_ids.describe(ids[::-1]), 3)


def test_what_is_no_set_of_files_is_refused(tmp_path):
  for path in (tmp_path, tmp_path / "*.npy"):
    with pytest.raises(FileNotFoundError, match="no (vectors|files); their su"):
      formats.open_vectors(path)
  _write(tmp_path, ".npy", num=2)
  np.save(tmp_path / "part-2.npy", X[:, :3])
  with pytest.raises(ValueError, match=r"2.npy has dimension 3, but .* has 4"):
    formats.open_vectors(tmp_path)
  formats.write_vectors(tmp_path / "x.fvecs", X)
  with pytest.raises(ValueError, match=r"kinds, x.fvecs and .* as .*\.fvecs"):
    formats.open_vectors(tmp_path)


def _benchmark(path, distance, **parts):
  with h5py.File(path, "w") as file:
    for name, x in parts.items():
      file[name] = x
    if distance:
      file.attrs["distance"] = distance


@pytest.mark.parametrize(
  ("name", "distance", "metric"),
  [
    ("glove-4-angular", None, "cosine"),
    ("sift-4-euclidean", "euclidean", "l2"),
    ("text-4-x", "ip", "ip"),
    ("text-4-x.hdf5", "cosine", "cosine"),
  ],
)
def test_benchmark_sets_by_name(tmp_path, name, distance, metric):
  path = tmp_path / f"{name.removesuffix('.hdf5')}.hdf5"
  truth = np.zeros((9, 3), np.int32)
  _benchmark(path, distance, train=X, test=X[:9], neighbors=truth)
  got = datasets.resolve(name, tmp_path)
  assert (got.metric, got.dim, got.name) == (metric, 4, name)
  base, queries = (datasets.open_split(got, p) for p in ("base", "queries"))
  assert base.shape == (50, 4)
  assert queries.shape == (9, 4)
  assert datasets.open_split(got, "groundtruth").shape == (9, 3)


def test_other_benchmark_sets_are_refused(tmp_path):
  with pytest.raises(ValueError, match="NAME.hdf5 of ann-benchmarks"):
    datasets.get_dataset("glove", tmp_path)
  _benchmark(tmp_path / "kosarak-jaccard.hdf5", None, train=X, test=X)
  with pytest.raises(ValueError, match="the distance 'jaccard', expected one"):
    datasets.get_dataset("kosarak-jaccard", tmp_path)
  _benchmark(tmp_path / "a.h5", b"angular", train=X)
  with pytest.raises(ValueError, match="has no test; it has train"):
    datasets.get_dataset("a.h5", tmp_path)
