"""Vectors far from the origin: the same answers as near it, in float64.

Every distance that is expanded cancels there, unless a centre is subtracted
first (`distances.centre_of`). At 10,000 a float32 is rounded to steps of 0.001,
so that the vectors, read back from float32, are what the oracles get.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import fits, oracles
from vqjax.codecs import additive, distances, kmeans, pairwise, pq, rq
from vqjax.interop import faiss_io, faiss_ivf, searchers
from vqjax.search import ivf

OFFSETS = (0.0, 1e3, 1e4)
KEY = jax.random.key(0)
pytestmark = pytest.mark.parametrize("offset", OFFSETS)


def _clusters(num, seed, dim=8):
  """Vectors around 12 means."""
  means_KD = np.random.default_rng(99).normal(size=(12, dim))
  rng = np.random.default_rng(seed)
  noise_ND = 0.3 * rng.normal(size=(num, dim))
  return means_KD[rng.integers(0, 12, num)] + noise_ND


def _pair(offset, num=400, num_codewords=16):
  # From 2,560 numbers on faiss expands distances.
  x_ND = (_clusters(num, 1) + offset).astype(np.float32)
  y_KD = (_clusters(num_codewords, 2) + offset).astype(np.float32)
  return x_ND, y_KD


def _error(x_ND, xhat_ND):
  """Mean squared error in float64."""
  left_ND = np.asarray(x_ND, np.float64) - np.asarray(xhat_ND, np.float64)
  return np.mean(np.sum(left_ND**2, axis=1))


def test_nearest_and_distances(offset):
  x_ND, y_KD = _pair(offset)
  want_NK = oracles.sq_distances(x_ND, y_KD)
  got_NK = distances.sq_distances(jnp.asarray(x_ND), jnp.asarray(y_KD))
  np.testing.assert_allclose(got_NK, want_NK, rtol=1e-5, atol=1e-5)
  ids_N = distances.nearest(jnp.asarray(x_ND), jnp.asarray(y_KD))
  np.testing.assert_array_equal(ids_N, want_NK.argmin(axis=1))


@pytest.mark.parametrize("num_at_once", [None, 5])
def test_assign(offset, num_at_once):
  x_ND, y_KD = _pair(offset)
  want_NK = oracles.sq_distances(x_ND, y_KD)
  ids_N, error_N = kmeans.assign(
    x_ND, y_KD, block_size=64, num_at_once=num_at_once
  )
  np.testing.assert_array_equal(ids_N, want_NK.argmin(axis=1))
  np.testing.assert_allclose(error_N, want_NK.min(axis=1), rtol=1e-5)


def test_kmeans_step(offset):
  x_ND, y_KD = _pair(offset)
  weights_N = np.random.default_rng(3).uniform(0, 2, len(x_ND))
  weights_N = weights_N.astype(np.float32)
  got = jax.jit(kmeans.lloyd_step)(x_ND, weights_N, y_KD)
  words, counts, objective = oracles.kmeans_step(x_ND, weights_N, y_KD)
  # A float32 near 10,000 has steps of 0.001.
  np.testing.assert_allclose(got.words_KD, words, rtol=2e-7, atol=1e-5)
  np.testing.assert_allclose(got.counts_K, counts, rtol=1e-5)
  np.testing.assert_allclose(got.objectives[0], objective, rtol=1e-5)


def test_kmeans_fit_reports_what_its_words_leave(offset):
  x_ND, _ = _pair(offset)
  near = kmeans.fit(KEY, x_ND - np.float32(offset), 16)
  words_KD = kmeans.fit(KEY, x_ND, 16)
  want = oracles.sq_distances(x_ND, words_KD).min(axis=1).sum()
  report = jax.jit(kmeans.lloyd_step)(x_ND, jnp.ones(400), words_KD)
  np.testing.assert_allclose(report.objectives[0], want, rtol=1e-5)
  reached = oracles.sq_distances(x_ND - np.float32(offset), near)
  assert want < 1.05 * reached.min(axis=1).sum()


def test_pass_over(offset):
  x_ND, y_KD = _pair(offset)
  assign_fn = kmeans.make_assign_fn(y_KD)
  got = kmeans.pass_over(x_ND, y_KD, assign_fn, block_size=128)
  words, _, objective = oracles.kmeans_step(x_ND, np.ones(400), y_KD)
  np.testing.assert_allclose(got.words_KD, words, rtol=2e-7, atol=1e-5)
  np.testing.assert_allclose(got.objectives[0], objective, rtol=1e-5)


@pytest.mark.parametrize("is_turned", [False, True])
def test_pq(offset, is_turned):
  x_ND, _ = _pair(offset)
  rotation = None
  if is_turned:
    rotation = np.linalg.qr(np.random.default_rng(4).normal(size=(8, 8)))[0]
    rotation = jnp.asarray(rotation, jnp.float32)
  fit = lambda x_ND: pq.fit(
    KEY, x_ND, num_codes=2, codebook_size=16, rotation=rotation
  )
  params = fit(x_ND)
  codes_NM = pq.encode(params, jnp.asarray(x_ND))
  error = _error(x_ND, pq.decode(params, codes_NM))
  if not is_turned:
    for m, words_KS in enumerate(params.codebooks_MKS):
      part_NS = x_ND[:, m * 4 : m * 4 + 4]
      np.testing.assert_array_equal(
        codes_NM[:, m], oracles.nearest(part_NS, words_KS)
      )
  near_ND = jnp.asarray(x_ND - np.float32(offset))
  near = fit(near_ND)
  reached = _error(near_ND, pq.decode(near, pq.encode(near, near_ND)))
  assert error < 1.05 * reached


@pytest.mark.parametrize("beam_size", [1, 4])
def test_rq(offset, beam_size):
  x_ND, _ = _pair(offset)
  fit = lambda x_ND: rq.fit(
    KEY, x_ND, num_codes=3, codebook_size=8, beam_size=beam_size
  )
  error_of = lambda params, x_ND: _error(
    x_ND,
    rq.decode(params, rq.encode(params, jnp.asarray(x_ND), beam_size=4)),
  )
  params = fit(x_ND)
  near_ND = x_ND - np.float32(offset)
  assert error_of(params, x_ND) < 1.05 * error_of(fit(near_ND), near_ND)
  want = oracles.beam(params.codebooks_MKD, x_ND[:40], 4)
  got = rq.encode(params, jnp.asarray(x_ND[:40]), beam_size=4)
  # Near ties of whole codes are decided by rounding.
  assert np.mean(np.asarray(got) == want) > 0.95


@pytest.mark.parametrize("coarse", faiss_ivf.faiss_lists.COARSE)
def test_list_assignment(offset, coarse):
  x_ND, y_KD = _pair(offset)
  want_NK = oracles.sq_distances(x_ND, y_KD)
  index = faiss_ivf.make_coarse(y_KD, coarse)
  lists_N = faiss_ivf.assign_lists(index, x_ND)
  np.testing.assert_array_equal(lists_N, want_NK.argmin(axis=1))
  _, distances_NP = faiss_ivf.faiss_lists.nearest(index, x_ND, 3, 64)
  np.testing.assert_allclose(
    distances_NP, np.sort(want_NK, axis=1)[:, :3], rtol=1e-5
  )


def test_knn(offset):
  x_ND, y_KD = _pair(offset, num_codewords=200)
  want_QN = oracles.sq_distances(x_ND, y_KD)
  near_QR, ids_QR = faiss_io.knn(x_ND, [y_KD[:70], y_KD[70:]], 5)
  np.testing.assert_array_equal(ids_QR, np.argsort(want_QN, axis=1)[:, :5])
  np.testing.assert_allclose(
    near_QR, np.sort(want_QN, axis=1)[:, :5], rtol=1e-4
  )


def test_kmeans_and_codecs_of_faiss(offset):
  x_ND, _ = _pair(offset)
  near_ND = x_ND - np.float32(offset)
  words_KD = faiss_io.fit_kmeans(x_ND, 12)
  near_KD = faiss_io.fit_kmeans(near_ND, 12)
  np.testing.assert_allclose(words_KD - np.float32(offset), near_KD, atol=0.01)
  for name in ("PQ", "OPQ", "RQ"):
    error, reached = (
      _error(x, codec.decode(codec.encode(x)))
      for x in (x_ND, near_ND)
      for codec in [faiss_io.fit_additive(name, x, 2, 4)]
    )
    assert error < 1.05 * reached, name


def test_additive_and_pairwise_decoders(offset):
  x_ND, _ = _pair(offset)
  codes_NM = np.random.default_rng(5).integers(0, 8, (400, 3))
  fit = lambda x_ND: fits.additive(codes_NM, x_ND, 8)
  params = fit(x_ND)
  near_ND = x_ND - np.float32(offset)
  want = _error(near_ND, additive.decode(fit(near_ND), codes_NM))
  assert _error(x_ND, additive.decode(params, codes_NM)) < 1.01 * want
  centre_D, words = additive.split_centre(params)
  if not offset:
    assert not np.any(centre_D)
  assert np.abs(np.asarray(words.codebooks_MKD)).max() < 10
  found = pairwise.fit(params, codes_NM, x_ND, num_tables=2)
  decoded_ND = pairwise.decode(found, jnp.asarray(codes_NM)) + centre_D[None]
  assert _error(x_ND, decoded_ND) < 1.01 * want


@pytest.mark.parametrize(
  ("num_lists", "by_residual"), [(1, True), (12, True), (12, False)]
)
def test_scan(offset, num_lists, by_residual):
  """The best of the scan are those of the sums of words, in float64."""
  x_ND = (_clusters(400, 1) + offset).astype(np.float32)
  centroids_LD = np.zeros((1, 8), np.float32)
  if num_lists > 1:
    centroids_LD = (_clusters(num_lists, 2) + offset).astype(np.float32)
  lists_N = oracles.nearest(x_ND, centroids_LD).astype(np.int32)
  of_list_ND = centroids_LD[lists_N] * by_residual
  left_ND = x_ND - of_list_ND
  books = rq.fit(KEY, left_ND, num_codes=3, codebook_size=16)
  codes_NM = np.asarray(rq.encode(books, jnp.asarray(left_ND), beam_size=4))
  index = faiss_ivf.make_index(
    centroids_LD,
    np.asarray(books.codebooks_MKD),
    coarse="flat",
    by_residual=by_residual,
  )
  faiss_ivf.add_codes(index, lists_N, codes_NM, np.arange(len(codes_NM)))
  faiss_ivf.fit_norms(index)
  xq_QD = (_clusters(20, 3) + offset).astype(np.float32)
  xhat_ND = of_list_ND.astype(float) + sum(
    np.asarray(book, float)[codes_NM[:, m]]
    for m, book in enumerate(books.codebooks_MKD)
  )
  want_QN = oracles.sq_distances(xq_QD, xhat_ND)
  found = _scan(index, xq_QD, num_lists)
  searches = [(*found, 0.06)]
  if by_residual or not offset:  # faiss has no centre for whole vectors.
    stock = fits.stock_search(index, xq_QD, 10, nprobe=num_lists)
    searches.append((*stock, 0.3))
  for near_QR, ids_QR, most in searches:
    true_QR = np.take_along_axis(want_QN, ids_QR.astype(int), axis=1)
    # A byte holds the norm.
    assert np.abs(near_QR - true_QR).max() < most
    assert np.all(true_QR[:, 0] < want_QN.min(axis=1) + 2 * most)


def _scan(index, xq_QD, nprobe):
  """Distances and ids of our own scan."""
  found = faiss_ivf.contents(index)
  lists = ivf.make_lists(
    found.starts,
    found.codes_NM,
    found.norm_N,
    found.low_L,
    found.step_L,
    found.codebooks_MKD,
    found.centre_D,
  )
  coarse_fn = searchers._make_coarse_fn(index, "l2", found.centre_D)
  probes = coarse_fn(xq_QD, nprobe, None)
  num_tiles = int(ivf.count_tiles(np.diff(found.starts)).sum())
  rows_QR, _, near_QR = ivf.scan(
    lists, xq_QD, *probes, num_tiles=num_tiles, num_best=10
  )
  return np.asarray(near_QR), found.ids_N[np.asarray(rows_QR)]
