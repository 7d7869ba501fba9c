import hashlib
import pathlib

import numpy as np
import pytest

from vqjax.data import datasets, formats

SHAPES = {
  "sample_sift": dict(
    train=(60_000, 128),
    base=(20_000, 128),
    queries=(1_000, 128),
    groundtruth=(1_000, 100),
  ),
  "sample_text": dict(
    train=(12_000, 384),
    base=(12_000, 384),
    queries=(500, 384),
    groundtruth=(500, 100),
  ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_samples(name):
  dataset = datasets.get_dataset(name)
  for split, shape in SHAPES[name].items():
    assert datasets.open_split(dataset, split).shape == shape
  base = np.asarray(datasets.open_split(dataset, "base"), np.float64)
  query = datasets.open_split(dataset, "queries")[:20].astype(np.float64)
  ids = datasets.open_split(dataset, "groundtruth")[:20]
  for x, want in zip(query, ids, strict=True):
    score = ((base - x) ** 2).sum(1) if dataset.metric == "l2" else -base @ x
    np.testing.assert_array_equal(np.argsort(score, kind="stable")[:100], want)


def test_sample_bytes():
  """What make_samples.py wrote on 2026-11-21, with numpy 2.4.6."""
  folder = pathlib.Path(datasets.get_dataset("sample_sift").train).parent
  digest = hashlib.sha256((folder / "learn.bvecs").read_bytes()).hexdigest()
  assert digest.startswith("aeae66fd8a119b3c")
  for readme in (folder / "README.md", folder.parent / "README.md"):
    assert readme.exists()


def test_sample_without_a_clone(monkeypatch, tmp_path):
  monkeypatch.setattr(datasets, "_bundled_root", lambda: tmp_path)
  dataset = datasets.get_dataset("sample_sift")
  with pytest.raises(FileNotFoundError, match="clone of the vqjax repository"):
    datasets.open_split(dataset, "train")


def fake_bigann(root):
  folder = root / "bigann"
  rng = np.random.default_rng(0)
  for part, n in (("learn", 30), ("base", 20), ("query", 4)):
    x = rng.integers(0, 256, size=(n, 128))
    formats.write_vectors(folder / f"bigann_{part}.bvecs", x)
  ids = rng.integers(0, 20, size=(4, 10))
  formats.write_vectors(folder / "gnd" / "idx_10M.ivecs", ids)
  return ids


def test_named_from_root(tmp_path, monkeypatch):
  ids = fake_bigann(tmp_path)
  monkeypatch.setenv("VQJAX_DATA", str(tmp_path))
  dataset = datasets.get_dataset("bigann10M")
  assert (dataset.num_base, dataset.scale) == (10_000_000, 1e-4)
  assert datasets.open_split(dataset, "train").shape == (30, 128)
  got = datasets.open_split(dataset, "train", max_vectors=7)
  assert got.shape == (7, 128)
  np.testing.assert_array_equal(
    datasets.open_split(dataset, "groundtruth", max_vectors=3), ids[:3]
  )
  limited = datasets.resolve("bigann10M", num_base=5, scale=1.0)
  assert datasets.open_split(limited, "base").shape == (5, 128)


@pytest.mark.parametrize("name", datasets.NAMES[2:])
def test_missing_file_says_how_to_get_it(name, tmp_path, monkeypatch):
  dataset = datasets.get_dataset(name, tmp_path)
  for split in datasets.SPLITS:
    path = pathlib.Path(getattr(dataset, split))
    with pytest.raises(FileNotFoundError) as e:
      datasets.open_split(dataset, split)
    for part in (path.name, str(path.parent), dataset.how_to_get):
      assert part in str(e.value)
    command = f"vqjax download {name} --data_root={tmp_path}"
    assert command in str(e.value)
  monkeypatch.delenv("VQJAX_DATA", raising=False)
  with pytest.raises(ValueError, match="VQJAX_DATA"):
    datasets.get_dataset(name)


def test_files_of_other_programs_serve(tmp_path):
  """Folders of the benchmark's own files, or made by the released scripts."""
  for file in ("deep1B_queries.fvecs", "base.fvecs", "base.1B.fbin"):
    formats.write_vectors(tmp_path / "deep1b" / file, np.ones((3, 96), "f4"))
  of_million = datasets.get_dataset("deep1M", tmp_path)
  of_billion = datasets.get_dataset("deep1B", tmp_path)
  name = lambda path: pathlib.Path(path).name
  assert name(of_million.queries) == "deep1B_queries.fvecs"
  assert name(of_million.base) == "base.fvecs"
  assert name(of_billion.base) == "base.1B.fbin"
  assert name(of_billion.train) == "learn.350M.fbin"  # Missing.


def test_the_folder_data_is_the_default_root(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.delenv("VQJAX_DATA", raising=False)
  with pytest.raises(ValueError, match="VQJAX_DATA. vqjax download deep1M"):
    datasets.get_dataset("deep1M")
  (tmp_path / "data").mkdir()
  assert datasets.get_dataset("deep1M").base == "data/deep1b/base.fvecs"


def test_wrong_dimension(tmp_path):
  fake_bigann(tmp_path)
  path = tmp_path / "bigann" / "bigann_base.bvecs"
  formats.write_vectors(path, np.zeros((3, 64), np.uint8), overwrite=True)
  with pytest.raises(ValueError, match="dimension 128 .*got 64"):
    datasets.open_split(datasets.get_dataset("bigann1M", tmp_path), "base")


def own_files(folder):
  x = np.ones((20, 6), np.float32)
  ids = np.tile(np.arange(20, dtype=np.int32), (5, 1))
  paths = dict(
    train=folder / "t.fvecs",
    base=folder / "b.npy",
    queries=folder / "q.npy",
    groundtruth=folder / "g.npy",
  )
  for part, array in zip(paths, (x, x, x[:5], ids), strict=True):
    formats.write_vectors(paths[part], array)
  return paths


def test_own_dataset(tmp_path):
  paths = own_files(tmp_path)
  dataset = datasets.resolve("sample_sift", **paths, num_train=7)
  assert (dataset.dim, dataset.metric, dataset.scale) == (6, "l2", 1.0)
  assert datasets.open_split(dataset, "train").shape == (7, 6)
  assert datasets.open_split(dataset, "groundtruth").shape == (5, 20)
  dataset = datasets.resolve(**paths, num_queries=2)
  assert datasets.open_split(dataset, "groundtruth").shape == (2, 20)
  only_train = datasets.resolve("sample_sift", train=paths["train"])
  with pytest.raises(ValueError, match="no base file"):
    datasets.open_split(only_train, "base")


def test_own_dataset_refused(tmp_path):
  paths = own_files(tmp_path)
  formats.write_vectors(tmp_path / "w.npy", np.ones((3, 7)))
  with pytest.raises(ValueError, match="t.fvecs has 6, .*w.npy has 7"):
    datasets.resolve(train=paths["train"], base=tmp_path / "w.npy")
  with pytest.raises(FileNotFoundError, match="nope.npy"):
    datasets.resolve(train=tmp_path / "nope.npy")
  with pytest.raises(ValueError, match="metric .*got 'hamming'"):
    datasets.resolve(train=paths["train"], metric="hamming")
  with pytest.raises(ValueError, match="at least one of train"):
    datasets.resolve(groundtruth=paths["groundtruth"])


def test_unknown_names(tmp_path):
  with pytest.raises(ValueError, match="'sift1m'.*sample_sift, .*bigann1M"):
    datasets.get_dataset("sift1m")
  with pytest.raises(ValueError, match="No data"):
    datasets.resolve()
  with pytest.raises(ValueError, match="metric .*got 'hamming'"):
    datasets.resolve("sample_sift", metric="hamming")
  with pytest.raises(ValueError, match="split .*got 'test'"):
    datasets.open_split(datasets.get_dataset("sample_sift"), "test")


@pytest.mark.parametrize("scale", [-1.0, 0.0, float("nan"), float("inf")])
def test_a_scale_that_is_none_is_refused(scale):
  with pytest.raises(ValueError, match="--config.data.scale.* positive"):
    datasets.resolve("sample_sift", scale=scale)


def test_load_dataset_opens_all_parts_of_a_sample():
  xt, xb, xq, gt = datasets.load_dataset("sample_text")
  assert xt.shape == xb.shape == (12000, 384)
  scores_N = np.asarray(xb, np.float64) @ np.asarray(xq[0], np.float64)
  assert np.asarray(xq).shape == (500, 384)
  assert gt[0][0] == np.argmax(scores_N)


def test_load_dataset_says_what_a_missing_set_needs(tmp_path):
  with pytest.raises(FileNotFoundError, match="bigann1M lacks"):
    datasets.load_dataset("bigann1M", tmp_path)
