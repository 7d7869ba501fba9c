import numpy as np
import pytest

from vqjax.data import batches, datasets, files, formats, unit


@pytest.fixture(name="path")
def _path(tmp_path):
  x_ND = np.random.default_rng(0).normal(size=(50, 6)).astype(np.float32)
  np.save(tmp_path / "x.npy", x_ND * 1e5)
  return tmp_path / "x.npy"


def _oracle(x_ND):
  x_ND = np.asarray(x_ND, float)
  return x_ND / np.sqrt((x_ND**2).sum(axis=1, keepdims=True))


@pytest.mark.parametrize("split", ["train", "base", "queries"])
def test_vectors_of_a_cosine_are_of_length_1(split, path):
  dataset = datasets.resolve(metric="cosine", **{split: path})
  opened, want_ND = datasets.open_split(dataset, split), _oracle(np.load(path))
  assert (len(opened), opened.shape, opened.dtype) == (50, (50, 6), np.float32)
  for rows in (slice(3, 20), slice(None), slice(40, None, 3), [7, 2, 7]):
    np.testing.assert_allclose(opened[rows], want_ND[rows], rtol=1e-6)
  got_ND = batches.read_rows(opened, [9, 3])
  np.testing.assert_allclose(got_ND, want_ND[[9, 3]], rtol=1e-6)
  blocks = batches.map_blocks(lambda x_ND: x_ND, opened, block_size=7)
  got_ND = np.concatenate([block for _, block in blocks])
  np.testing.assert_allclose(got_ND, want_ND, rtol=1e-6)


def test_another_metric_leaves_them_as_they_are(path):
  dataset = datasets.resolve(metric="ip", base=path)
  opened = datasets.open_split(dataset, "base")
  np.testing.assert_array_equal(opened[:], np.load(path))


def test_sizes_beyond_float32_are_no_matter():
  x_ND = np.array([[3e200, 4e200], [3e-200, 4e-200], [3, -4]])
  want_ND = [[0.6, 0.8], [0.6, 0.8], [0.6, -0.8]]
  np.testing.assert_allclose(unit.normalise(x_ND), want_ND, rtol=1e-6)


def test_zeros_are_refused_by_their_row(path):
  x_ND = np.load(path)
  x_ND[[31, 44]] = 0
  np.save(path, x_ND)
  opened = unit.UnitVectors(formats.open_vectors(path))
  match = r"x\.npy: row 31.* is a vector of zeros"
  for rows in (slice(30, 35), [44, 31][::-1], [2, 31]):
    with pytest.raises(ValueError, match=match):
      opened[rows]
  with pytest.raises(ValueError, match=match):
    batches.read_rows(opened, np.arange(50))
  with pytest.raises(ValueError, match=match):
    list(batches.map_blocks(lambda x: x, opened, block_size=8))
  assert opened[32:40].shape == (8, 6)


def test_nan_is_refused_by_its_row(path):
  x_ND = np.load(path)
  x_ND[31, 2] = np.nan
  np.save(path, x_ND)
  opened = unit.UnitVectors(formats.open_vectors(path))
  with pytest.raises(ValueError, match="NaN or Inf .*row 31"):
    batches.read_rows(opened, [3, 31])


def test_normalised_vectors_are_told_from_the_file(path):
  raw = formats.open_vectors(path)
  of_raw, of_unit = files.identify(raw), files.identify(unit.UnitVectors(raw))
  assert of_unit == of_raw | {"is_unit": True}


def test_decoded_vectors_get_length_1_and_zeros_stay():
  x_ND = np.array([[3, -4], [0, 0], [1e-12, 0]], np.float32)
  want_ND = [[0.6, -0.8], [0, 0], [1, 0]]
  np.testing.assert_allclose(unit.scale(x_ND), want_ND, rtol=1e-6)
