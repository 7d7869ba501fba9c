import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles
from vqjax.codecs import pq

KEY = jax.random.key(0)


def _vectors(n=150, d=6):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(n, d)), jnp.float32)


def _rotation(d=6):
  rng = np.random.default_rng(3)
  return jnp.asarray(np.linalg.qr(rng.normal(size=(d, d)))[0], jnp.float32)


def _fit(x_ND, **kwargs):
  return pq.fit(
    KEY, x_ND, num_codes=3, codebook_size=8, num_iterations=5, **kwargs
  )


def test_encode_takes_the_nearest_word_of_each_slice():
  x_ND = _vectors()
  params = _fit(x_ND)
  codes_NM = pq.encode(params, x_ND)
  for m in range(3):
    part = np.asarray(x_ND)[:, 2 * m : 2 * m + 2]
    want_N = oracles.nearest(part, params.codebooks_MKS[m])
    np.testing.assert_array_equal(codes_NM[:, m], want_N)


@pytest.mark.parametrize("rotation", [None, _rotation()])
def test_decode_joins_the_words_of_a_code(rotation):
  params = _fit(_vectors(), rotation=rotation)
  codes_NM = jnp.asarray([[0, 7, 3], [5, 5, 5]], jnp.int32)
  books = np.asarray(params.codebooks_MKS, np.float64)
  want = np.stack(
    [
      np.concatenate([books[m, k] for m, k in enumerate(c)])
      for c in np.asarray(codes_NM)
    ]
  )
  if rotation is not None:
    want = want @ np.asarray(rotation, np.float64).T
  np.testing.assert_allclose(
    pq.decode(params, codes_NM), want, rtol=1e-5, atol=1e-6
  )


def test_a_rotation_is_undone_by_a_rotation():
  x_ND, rotation = _vectors(), _rotation()
  # Coding x behind the rotation is coding the rotated x without it.
  with_it = _fit(x_ND, rotation=rotation)
  rotated_ND = jnp.matmul(x_ND, rotation, precision="highest")
  without = _fit(rotated_ND)
  np.testing.assert_array_equal(
    pq.encode(with_it, x_ND), pq.encode(without, rotated_ND)
  )


def test_more_words_lower_the_error():
  x_ND = _vectors()
  errors = []
  for size in (2, 8, 32):
    params = pq.fit(
      KEY, x_ND, num_codes=2, codebook_size=size, num_iterations=4
    )
    xhat_ND = pq.decode(params, pq.encode(params, x_ND))
    errors.append(float(jnp.sum((x_ND - xhat_ND) ** 2)))
  assert errors[0] > 1.3 * errors[1] > 1.3 * errors[2]


def test_sizes():
  params = _fit(_vectors())
  assert pq.codebook_sizes(params) == (8, 8, 8)
  assert pq.dim(params) == 6


def test_senseless_arguments_are_refused():
  x_ND = _vectors()
  params = _fit(x_ND)
  with pytest.raises(ValueError, match="divide the 6 dimensions .* got 4"):
    pq.fit(KEY, x_ND, num_codes=4)
  with pytest.raises(ValueError, match="150 vectors cannot fill 256 codewords"):
    pq.fit(KEY, x_ND, num_codes=3)
  with pytest.raises(ValueError, match=r"\(6, 6\), got \(5, 5\)"):
    pq.fit(KEY, x_ND, num_codes=3, rotation=jnp.eye(5))
  with pytest.raises(ValueError, match="None or 3 .* got 2"):
    pq.encode(params, x_ND, num_steps=2)
  with pytest.raises(ValueError, match=r"\(None, 6\), got \(150, 5\)"):
    pq.encode(params, x_ND[:, :5])
  with pytest.raises(ValueError, match=r"\(None, 3\), got \(2, 2\)"):
    pq.decode(params, jnp.zeros((2, 2), jnp.int32))
  with pytest.raises(TypeError, match="integers, got float32"):
    pq.decode(params, jnp.zeros((2, 3)))
