import numpy as np
import pytest

from vqjax.data import batches, formats, values
from vqjax.interop import faiss_io


def _vectors(num=50):
  return np.random.default_rng(0).normal(size=(num, 4)).astype(np.float32)


def test_usual_vectors_pass():
  for x_ND in (_vectors(), _vectors() * 1e12, _vectors() * 1e-12):
    values.check_size(x_ND)
    values.check_spread(x_ND)
  for dtype in (np.uint8, np.int8, np.int64, np.float16, np.float64):
    values.check_size((10 * np.abs(_vectors())).astype(dtype))
  values.check_spread(np.full((1, 4), 3.0))
  values.check_size(np.zeros((0, 4), np.float32))


@pytest.mark.parametrize("value", [2e15, -1e20])
def test_large_numbers_are_refused_by_row(value):
  x_ND = _vectors()
  x_ND[31, 2] = value
  with pytest.raises(
    ValueError, match="in row 131, column 2; numbers must lie"
  ):
    values.check_size(x_ND, first_row=100)
  with pytest.raises(ValueError, match="Divide all vectors by a constant"):
    formats.to_float32(x_ND)
  with pytest.raises(ValueError, match="in row 31, column 2"):
    batches.read_rows(x_ND, [4, 31])
  with pytest.raises(ValueError, match="in row 31, column 2"):
    list(batches.map_blocks(lambda x: x, x_ND, block_size=20))


def test_numbers_beyond_float32_are_no_inf():
  x_ND = _vectors().astype(np.float64)
  x_ND[3] = 1e300
  with pytest.raises(ValueError, match=r"has 1e\+300 in row 3, column 0"):
    formats.to_float32(x_ND)
  x_ND[3] = np.inf
  with pytest.raises(ValueError, match="got NaN or Inf"):
    formats.to_float32(x_ND)


@pytest.mark.parametrize("value", [0.0, 3.0, -1e8])
def test_equal_vectors_teach_nothing(value):
  with pytest.raises(ValueError, match="all of the 50 vectors looked at are"):
    batches.check_training(np.full((50, 4), value, np.float32))


def test_tiny_differences_are_refused():
  with pytest.raises(
    ValueError, match="differ by no more than .*e-20; float32"
  ):
    batches.check_training(_vectors() * np.float32(1e-20))


def test_differences_that_float32_rounds_away_are_refused():
  x_ND = _vectors().astype(np.float64)
  batches.check_training(x_ND + 1e4)
  with pytest.raises(ValueError, match="keeps steps of 64 there. Subtract"):
    batches.check_training(x_ND + 1e9)


def test_training_vectors_are_checked_by_row():
  x_ND = _vectors(5000)  # More than are compared with each other.
  x_ND[4321] = 1e20
  batches.check_training(x_ND, 4000)
  with pytest.raises(ValueError, match="in row 4321, column 0"):
    batches.check_training(x_ND)


@pytest.mark.parametrize(
  "fit_fn",
  [
    lambda x_ND: faiss_io.fit_kmeans(x_ND, 4),
    lambda x_ND: faiss_io.fit_additive("PQ", x_ND, 2, 2),
    lambda x_ND: faiss_io.train_opq(x_ND, 2, 2),
    lambda x_ND: faiss_io.knn(x_ND, x_ND, 3),
  ],
)
def test_faiss_never_sees_what_would_end_the_program(fit_fn):
  with pytest.raises(ValueError, match="as float32 holds no squared distances"):
    fit_fn(_vectors() * np.float32(1e20))
