"""One-bit residual codes, against loops."""

import numpy as np
import pytest

from tests.ivf_test import CENTROIDS_LD, _distance, _random_lists
from vqjax.search import refiners, residual_bits
from vqjax.storage import refiner_file


def _case(dim=5, num=90, seed=0):
  """Vectors, what their codes add up to, and what a scan takes for it."""
  rng = np.random.default_rng(seed)
  xhat_ND = rng.normal(size=(num, dim)).astype(np.float32)
  x_ND = xhat_ND + 0.3 * rng.normal(size=(num, dim)).astype(np.float32)
  scanned_N = np.sum(xhat_ND**2, axis=1) + 0.1 * rng.normal(size=num)
  return x_ND, xhat_ND, scanned_N.astype(np.float32)


def _make(x_ND, xhat_ND, scanned_N):
  rotation_DE = residual_bits.random_rotation(x_ND.shape[1])
  found = residual_bits.describe(x_ND, xhat_ND, scanned_N, rotation_DE)
  return residual_bits.make_bits(*map(np.asarray, found), rotation_DE)


def _expected(x_D, xhat_D, scanned, rotation_DE):
  """Signs as +-1, scale and offset of one vector, sum by sum."""
  left_D, rotated = x_D - xhat_D, []
  for e in range(rotation_DE.shape[1]):
    rotated.append(sum(left_D * rotation_DE[:, e]))
  sign_E = [1 if value > 0 else -1 for value in rotated]
  scale = sum(left_D**2) / sum(abs(value) for value in rotated)
  turned_E = xhat_D @ rotation_DE
  along = sum(s * value for s, value in zip(sign_E, turned_E, strict=True))
  offset = sum(left_D**2) + 2 * scale * along + sum(xhat_D**2) - scanned
  return np.array(sign_E), scale, offset


@pytest.mark.parametrize("dim", [5, 32, 40])
def test_a_rotation_keeps_lengths(dim):
  rotation_DE = residual_bits.random_rotation(dim, seed=3)
  assert rotation_DE.shape == (dim, 32 * residual_bits.num_numbers(dim))
  np.testing.assert_allclose(
    rotation_DE @ rotation_DE.T, np.eye(dim), atol=1e-6
  )
  assert not np.allclose(
    rotation_DE, residual_bits.random_rotation(dim, seed=4)
  )


@pytest.mark.parametrize("dim", [5, 40])
def test_signs_are_what_loops_find(dim):
  x_ND, xhat_ND, scanned_N = _case(dim)
  made = _make(x_ND, xhat_ND, scanned_N)
  (low_f, step_f), (low_o, step_o) = made.range_22
  scales, offsets = [], []
  for n, bits_W in enumerate(made.bits_NW):
    sign_E, scale, offset = _expected(
      x_ND[n], xhat_ND[n], scanned_N[n], made.rotation_DE
    )
    found = [1 if int(bits_W[e // 32]) >> e % 32 & 1 else -1
             for e in range(len(sign_E))]  # fmt: skip
    np.testing.assert_array_equal(found, sign_E)
    scales.append(scale)
    offsets.append(offset)
  # The bytes cut off next to nothing of the extremes.
  for byte_N, low, step, want in (
    (made.scale_N, low_f, step_f, scales),
    (made.offset_N, low_o, step_o, offsets),
  ):
    np.testing.assert_allclose(low + step * byte_N, want, atol=2 * step)
    assert len(np.unique(byte_N)) > 40


def test_distances_are_what_loops_find():
  x_ND, xhat_ND, scanned_N = _case()
  made = _make(x_ND, xhat_ND, scanned_N)
  xq_QD = np.random.default_rng(5).normal(size=(4, 5)).astype(np.float32)
  rows_QC = np.array([[3, 8, 7], [0, 89, -1], [5, 5, 2], [-1, 1, -1]], np.int32)
  given_QC = np.arange(12, dtype=np.float32).reshape(4, 3)
  found_QC = np.asarray(residual_bits.distances(made, xq_QD, rows_QC, given_QC))
  (low_f, step_f), (low_o, step_o) = made.range_22
  for q, x_D in enumerate(xq_QD):
    turned_E = x_D @ made.rotation_DE
    for s, row in enumerate(rows_QC[q]):
      if row < 0:
        assert found_QC[q, s] == np.inf
        continue
      sign_E, _, _ = _expected(
        x_ND[row], xhat_ND[row], scanned_N[row], made.rotation_DE
      )
      scale = low_f + step_f * made.scale_N[row]
      offset = low_o + step_o * made.offset_N[row]
      want = given_QC[q, s] + offset - 2 * scale * (sign_E @ turned_E)
      assert found_QC[q, s] == pytest.approx(want, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_bytes_are_the_same_at_every_scale(scale):
  x_ND, xhat_ND, scanned_N = _case()
  made = _make(x_ND, xhat_ND, scanned_N)
  scaled = _make(*(scale * a for a in (x_ND, xhat_ND, scale * scanned_N)))
  for name in ("bits_NW", "scale_N", "offset_N"):
    np.testing.assert_array_equal(getattr(scaled, name), getattr(made, name))


def test_the_distance_of_a_vector_to_itself_is_zero():
  """Towards what the words leave the estimate is exact, but for bytes."""
  x_ND, xhat_ND, scanned_N = _case(dim=40)
  made = _make(x_ND, xhat_ND, scanned_N)
  of_scan_N = np.sum(x_ND**2, 1) - 2 * np.sum(x_ND * xhat_ND, 1) + scanned_N
  rows_NS = np.arange(len(x_ND), dtype=np.int32)[:, None]
  found_NS = residual_bits.distances(made, x_ND, rows_NS, of_scan_N[:, None])
  far = np.mean(np.sum((x_ND - xhat_ND) ** 2, axis=1))
  assert np.abs(np.asarray(found_NS)).mean() < 0.05 * far


def test_a_vector_that_words_meet_exactly():
  x_ND, _, _ = _case(num=3)
  made = _make(x_ND, x_ND, np.sum(x_ND**2, axis=1))
  np.testing.assert_array_equal(made.bits_NW, 0)
  given_QC = np.array([[1.0, 2.0]], np.float32)
  found_QC = residual_bits.distances(
    made, x_ND[:1], np.array([[0, 2]]), given_QC
  )
  np.testing.assert_allclose(found_QC, given_QC, atol=1e-5)


def _signs_of(arrays, seed=0):
  """Signs of vectors near what the codes of `_random_lists` add up to."""
  words = [
    book[codes_N]
    for book, codes_N in zip(
      arrays["codebooks_MKD"], arrays["codes_NM"].T, strict=True
    )
  ]
  list_N = np.repeat(np.arange(6), np.diff(arrays["starts_L1"]))
  xhat_ND = CENTROIDS_LD[list_N] + sum(words)
  rng = np.random.default_rng(seed)
  x_ND = xhat_ND + 0.5 * rng.normal(size=xhat_ND.shape).astype(np.float32)
  scanned_N = np.sum(xhat_ND**2, axis=1)
  return _make(x_ND.astype(np.float32), xhat_ND.astype(np.float32), scanned_N)


def test_a_refiner_takes_any_number_of_queries():
  x_ND, xhat_ND, scanned_N = _case()
  made = _make(x_ND, xhat_ND, scanned_N)
  refiner = refiners.rabitq(made)
  rng = np.random.default_rng(5)
  xq_QD = rng.normal(size=(5, 5)).astype(np.float32)
  rows_QC = rng.integers(-1, 90, size=(5, 4)).astype(np.int32)
  given_QC = rng.random((5, 4)).astype(np.float32)
  want_QC = residual_bits.distances(made, xq_QD, rows_QC, given_QC)
  for num in range(1, 6):
    found_QC = refiner.distances_fn(xq_QD[:num], rows_QC[:num], given_QC[:num])
    assert found_QC.shape == (num, 4)
    np.testing.assert_allclose(found_QC, want_QC[:num], rtol=1e-5, atol=1e-5)


def test_signs_come_nearer_to_the_truth():
  """On average over codes of which the scan knows half of the distance."""
  x_ND, xhat_ND, _ = _case(dim=64, num=400)
  scanned_N = np.sum(xhat_ND**2, axis=1)
  made = _make(x_ND, xhat_ND, scanned_N)
  x_D = np.random.default_rng(9).normal(size=64).astype(np.float32)
  rows_1S = np.arange(400, dtype=np.int32)[None]
  of_scan_1S = ((x_D - xhat_ND) ** 2).sum(axis=1)[None]
  true_S = ((x_D - x_ND) ** 2).sum(axis=1)
  found_1S = residual_bits.distances(made, x_D[None], rows_1S, of_scan_1S)
  error = lambda d_S: np.mean((np.asarray(d_S) - true_S) ** 2)
  assert error(found_1S[0]) < 0.5 * error(of_scan_1S[0])


def test_distances_take_the_terms_of_a_scan():
  """The distance that `ivf_test` computes is the one that signs correct."""
  arrays = _random_lists(np.random.default_rng(0))
  made = _signs_of(arrays)
  x_D = np.zeros(5, np.float32)
  want = _distance(arrays, x_D, 0, 0)
  found = residual_bits.distances(
    made, x_D[None], np.array([[0]]), np.array([[want]])
  )
  offset = made.range_22[1, 0] + made.range_22[1, 1] * made.offset_N[0]
  assert float(found[0, 0]) == pytest.approx(want + offset, rel=1e-5)


@pytest.fixture(name="saved")
def _saved(tmp_path):
  made = _make(*_case())
  path = tmp_path / "refiner.safetensors"
  refiner_file.save(path, made, of_index="abc", info={"seed": 0})
  return path, made, {"sha256": "abc", "num_vectors": 90, "dim": 5}


def test_signs_come_back(saved):
  path, made, info = saved
  found = refiner_file.load(path, info)
  for name in ("bits_NW", "scale_N", "offset_N", "range_22", "rotation_DE"):
    value = np.asarray(getattr(found, name))
    np.testing.assert_array_equal(value, getattr(made, name))
    assert value.dtype == getattr(made, name).dtype
  assert made.bits_NW.shape[1] * 4 + 2 == refiner_file.num_bytes(5)


def test_signs_of_something_else_are_refused(saved, tmp_path):
  path, made, info = saved
  with pytest.raises(
    FileNotFoundError, match="vqjax refiner --kind=rabitq makes"
  ):
    refiner_file.load(tmp_path / "none.safetensors", info)
  with pytest.raises(ValueError, match="checksum abc, but this index has xyz"):
    refiner_file.load(path, info | {"sha256": "xyz"})
  with pytest.raises(FileExistsError):
    refiner_file.save(path, made, of_index="abc", info={})
  with pytest.raises(ValueError, match=r"file \*.safetensors, got bits.npz"):
    refiner_file.save("bits.npz", made, of_index="abc", info={})
  whole = path.read_bytes()
  path.write_bytes(whole[:-10])
  with pytest.raises(ValueError, match="truncated"):
    refiner_file.load(path, info)
  path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  with pytest.raises(ValueError, match="changed after it was written"):
    refiner_file.load(path, info)


def test_arrays_that_do_not_fit_are_refused():
  rotation_DE = residual_bits.random_rotation(5)
  bits_NW, values_N = np.zeros((4, 1), np.uint32), np.zeros(4, np.float32)
  with pytest.raises(ValueError, match="bits must have shape"):
    residual_bits.make_bits(bits_NW[:3], values_N, values_N, rotation_DE)
  with pytest.raises(ValueError, match="offsets must have shape"):
    residual_bits.make_bits(bits_NW, values_N, values_N[:3], rotation_DE)
  with pytest.raises(ValueError, match="number of vectors"):
    residual_bits.make_bits(
      bits_NW[:0], values_N[:0], values_N[:0], rotation_DE
    )
