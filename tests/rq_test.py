import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles
from vqjax.codecs import kmeans, rq
from vqjax.data import datasets

KEY = jax.random.key(0)


def _vectors(n=150, d=6):
  rng = np.random.default_rng(0)
  return jnp.asarray(rng.normal(size=(n, d)), jnp.float32)


def _mse(params, x_ND, **knobs):
  xhat_ND = rq.decode(params, rq.encode(params, x_ND, **knobs))
  return float(jnp.mean(jnp.sum((x_ND - xhat_ND) ** 2, axis=-1)))


@pytest.mark.parametrize("beam_size", [1, 3, 12])
def test_encode_matches_exhaustive_beam(beam_size):
  # 12 hypotheses are more than the 8 words: the second beam is not full.
  rng = np.random.default_rng(0)
  books, x = rng.normal(size=(4, 8, 6)), rng.normal(size=(20, 6))
  params = rq.RQParams(jnp.asarray(books, jnp.float32))
  codes_NM = rq.encode(params, jnp.asarray(x, jnp.float32), beam_size=beam_size)
  assert codes_NM.dtype == jnp.int32
  np.testing.assert_array_equal(codes_NM, oracles.beam(books, x, beam_size))


@pytest.mark.parametrize("beam_size", [1, 3])
def test_levels_may_differ_in_size(beam_size):
  rng = np.random.default_rng(0)
  books = [rng.normal(size=(size, 6)) for size in (8, 5, 7)]
  x = rng.normal(size=(20, 6))
  codes_NM = jax.jit(rq.encode_levels, static_argnums=2)(
    [jnp.asarray(book, jnp.float32) for book in books],
    jnp.asarray(x, jnp.float32),
    beam_size,
  )
  np.testing.assert_array_equal(codes_NM, oracles.beam(books, x, beam_size))


def test_decode_sums_the_words_of_a_prefix():
  params = rq.RQParams(_vectors(24).reshape(3, 8, 6))
  codes = np.array([[0, 7, 3], [5, 5, 5]], np.int32)
  books = np.asarray(params.codebooks_MKD, np.float64)
  for num_codes in (1, 2, 3):
    want = [
      sum(books[m, k] for m, k in enumerate(code[:num_codes])) for code in codes
    ]
    got_ND = rq.decode(params, jnp.asarray(codes[:, :num_codes]))
    np.testing.assert_allclose(got_ND, want, rtol=1e-5, atol=1e-6)


def test_fit_is_rising_kmeans_of_the_residuals():
  x_ND = _vectors()
  params = rq.fit(KEY, x_ND, num_codes=3, codebook_size=8)
  residual = np.asarray(x_ND, np.float64)
  for m in range(3):
    want_KD = kmeans.fit_rising(
      jax.random.fold_in(KEY, m), jnp.asarray(residual, jnp.float32), 8
    )
    # The residuals differ by rounding.
    np.testing.assert_allclose(
      params.codebooks_MKD[m], want_KD, rtol=1e-4, atol=1e-5
    )
    ids = oracles.nearest(residual, want_KD)
    residual = residual - np.asarray(want_KD, np.float64)[ids]


@pytest.mark.slow
def test_fit_with_a_beam_leaves_less_of_real_vectors():
  # Of vectors it was not fitted to; residuals of real vectors have a shape.
  x_ND = datasets.open_split(datasets.get_dataset("sample_sift"), "train")[
    :6000
  ]
  x_ND = jnp.asarray(x_ND.astype(np.float32))
  fit = lambda size: rq.fit(
    KEY, x_ND[:4000], num_codes=4, codebook_size=128, beam_size=size
  )
  error = lambda size: _mse(fit(size), x_ND[4000:], beam_size=4)
  assert error(4) < 0.98 * error(1)


def test_fit_with_a_beam_does_not_depend_on_blocks():
  x_ND = _vectors()
  fit = lambda size: (
    rq.fit(
      KEY, x_ND, num_codes=3, codebook_size=8, beam_size=4, block_size=size
    ).codebooks_MKD
  )
  # Sums of k-means are taken in another order.
  np.testing.assert_allclose(fit(28), fit(4096), rtol=1e-4, atol=1e-5)


def test_all_steps_share_one_compiled_program(monkeypatch):
  traces = []
  step_fn = kmeans.lloyd_step
  spy = lambda *args, **kwargs: traces.append(1) or step_fn(*args, **kwargs)
  monkeypatch.setattr(kmeans, "lloyd_step", spy)
  counts = []
  for num_codes, n in ((1, 61), (5, 62)):  # New shapes: nothing is cached.
    traces.clear()
    rq.fit(KEY, _vectors(n), num_codes=num_codes, codebook_size=4)
    counts.append(len(traces))
  assert counts[0] == counts[1] > 0


def test_sizes():
  params = rq.RQParams(_vectors(24).reshape(3, 8, 6))
  assert rq.codebook_sizes(params) == (8, 8, 8)
  assert rq.dim(params) == 6


def test_senseless_arguments_are_refused():
  x_ND = _vectors()
  params = rq.RQParams(_vectors(24).reshape(3, 8, 6))
  with pytest.raises(ValueError, match="150 vectors cannot fill 256 codewords"):
    rq.fit(KEY, x_ND, num_codes=2)
  with pytest.raises(ValueError, match="num_codes .* got 0"):
    rq.fit(KEY, x_ND, num_codes=0, codebook_size=8)
  with pytest.raises(ValueError, match="beam_size .* got 0"):
    rq.encode(params, x_ND, beam_size=0)
  with pytest.raises(ValueError, match="num_steps .* 1 and 3, got 4"):
    rq.encode(params, x_ND, num_steps=4)
  with pytest.raises(ValueError, match=r"\(None, 6\), got \(150, 5\)"):
    rq.encode(params, x_ND[:, :5])
  with pytest.raises(ValueError, match=r"\(N, 1 to 3\), got \(2, 4\)"):
    rq.decode(params, jnp.zeros((2, 4), jnp.int32))
