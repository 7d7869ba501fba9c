import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import fits
from vqjax.codecs import additive
from vqjax.codecs.additive import AdditiveParams


def _case(num=60, num_codes=3, num_codewords=4, dim=5, seed=0):
  """Codes that depend on each other, and targets that depend on them."""
  rng = np.random.default_rng(seed)
  codes_NM = rng.integers(num_codewords, size=(num, num_codes)).astype(np.int32)
  codes_NM[::2, 1] = codes_NM[::2, 0]
  books = rng.normal(size=(num_codes, num_codewords, dim))
  target_ND = sum(books[m][codes_NM[:, m]] for m in range(num_codes))
  target_ND += rng.normal(size=target_ND.shape)
  return codes_NM, target_ND.astype(np.float32)


def _one_hot(codes_NM, num_codewords):
  num, m = codes_NM.shape
  hot = np.zeros((num, m * num_codewords))
  for n in range(num):
    for i in range(m):
      hot[n, i * num_codewords + codes_NM[n, i]] = 1
  return hot


def test_decodes_what_dense_least_squares_does():
  codes_NM, target_ND = _case()
  hot = _one_hot(codes_NM, 4)
  words = np.linalg.lstsq(hot, target_ND.astype(np.float64))[0]
  params = fits.additive(codes_NM, target_ND, 4, ridge=1e-6)
  assert params.codebooks_MKD.dtype == jnp.float32
  np.testing.assert_allclose(
    additive.decode(params, codes_NM), hot @ words, atol=1e-4
  )


def test_the_ridge_is_a_vector_of_zeros_for_each_word():
  codes_NM, target_ND = _case()
  hot = np.concatenate([_one_hot(codes_NM, 4), np.sqrt(2.5) * np.eye(12)])
  zeros = np.zeros((12, target_ND.shape[1]))
  words = np.linalg.lstsq(hot, np.concatenate([target_ND, zeros]))[0]
  params = fits.additive(codes_NM, target_ND, 4, ridge=2.5)
  np.testing.assert_allclose(
    params.codebooks_MKD, words.reshape(3, 4, -1), atol=1e-5
  )


def test_blocks_change_nothing():
  codes_NM, target_ND = _case()
  whole = fits.additive(codes_NM, target_ND, 4)
  parts = fits.additive(codes_NM, target_ND, 4, block_size=7)
  one_by_one = ((codes_NM[i:][:1], target_ND[i:][:1]) for i in range(60))
  for params in (parts, additive.fit(one_by_one, 4)):
    np.testing.assert_allclose(
      params.codebooks_MKD, whole.codebooks_MKD, atol=1e-5
    )


def test_words_that_no_code_names_are_zero():
  codes_NM, target_ND = _case()
  params = fits.additive(codes_NM, target_ND, 6)
  books = np.asarray(params.codebooks_MKD)
  assert (books[:, 4:] == 0).all()
  assert (books[:, :4] != 0).all()


def test_decode_adds_words():
  rng = np.random.default_rng(0)
  books = rng.normal(size=(3, 4, 5)).astype(np.float32)
  params = AdditiveParams(jnp.asarray(books))
  codes_NM = rng.integers(4, size=(9, 3)).astype(np.int32)
  want = [sum(books[m, code[m]] for m in range(3)) for code in codes_NM]
  got = jax.jit(additive.decode)(params, codes_NM)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_refuses_what_does_not_fit():
  codes_NM, target_ND = _case()
  with pytest.raises(ValueError, match=r"target must have shape \(60, 5\)"):
    fits.additive(codes_NM, target_ND[:59], 4)
  late_NM = np.where(np.arange(60)[:, None] < 40, codes_NM % 3, 3)
  with pytest.raises(ValueError, match="Code 3 in row 40, column 0 must lie"):
    fits.additive(late_NM, target_ND, 3, block_size=16)
  with pytest.raises(ValueError, match="ridge must be positive, got 0"):
    fits.additive(codes_NM, target_ND, 4, ridge=0)
  with pytest.raises(ValueError, match="at least 1 vector, got 0"):
    additive.fit([], 4)
  with pytest.raises(ValueError, match="3 codes of 8000 codewords are 24000"):
    fits.additive(codes_NM, target_ND, 8000)
  with pytest.raises(ValueError, match=r"codes must have shape \(None, 3\)"):
    additive.decode(fits.additive(codes_NM, target_ND, 4), codes_NM[:, :2])
