import concurrent.futures
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles
from vqjax import devices
from vqjax.codecs import kmeans

KEY = jax.random.key(0)
lloyd_step = jax.jit(kmeans.lloyd_step, static_argnames="block_size")


def _vectors(n=120, d=4):
  rng = np.random.default_rng(1)
  return jnp.asarray(rng.normal(size=(n, d)), jnp.float32)


@pytest.mark.parametrize("block_size", [7, 4096])
def test_step_matches_loops_with_weights_and_empty_words(block_size):
  x_ND = _vectors()
  weights_N = jnp.asarray(np.random.default_rng(2).uniform(0, 3, 120))
  # Nobody chooses the two far words.
  words_KD = jnp.concatenate([x_ND[:5], jnp.full((2, 4), 1e3)])
  got = lloyd_step(x_ND, weights_N, words_KD, block_size=block_size)
  words, counts, objective = oracles.kmeans_step(x_ND, weights_N, words_KD)
  # Sums of some 30 float32 numbers.
  np.testing.assert_allclose(got.words_KD, words, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(got.counts_K, counts, rtol=1e-5)
  np.testing.assert_allclose(got.objectives[0], objective, rtol=1e-5)
  assert int(got.num_refilled) == 2


def test_zero_iterations_return_distinct_rows():
  x_ND = _vectors()
  words_KD = kmeans.fit(KEY, x_ND, 20, num_iterations=0)
  rows = {tuple(row) for row in np.asarray(x_ND).tolist()}
  found = {tuple(row) for row in np.asarray(words_KD).tolist()}
  assert len(found) == 20
  assert found <= rows


def test_objective_never_grows():
  report = kmeans.fit_report(KEY, _vectors(), 40, num_iterations=8)
  objectives = np.asarray(report.objectives)
  # Rounding of a float32 sum.
  assert (np.diff(objectives) <= 1e-5 * objectives[0]).all()
  assert objectives[-1] < 0.9 * objectives[0]


def test_objective_never_grows_where_words_are_refilled():
  # Few distinct rows: a random start takes the same one more than once.
  x_ND = jnp.repeat(_vectors(12), jnp.array([40] + [1] * 11), axis=0)
  report = kmeans.fit_report(KEY, x_ND, 10, num_iterations=6)
  assert int(report.num_refilled) > 0
  assert (np.diff(np.asarray(report.objectives)) <= 1e-4).all()


def test_as_many_words_as_distinct_rows_leave_nothing():
  x_ND = jnp.tile(_vectors(8), (5, 1))
  report = kmeans.fit_report(KEY, x_ND, 8, num_iterations=10)
  assert float(report.objectives[-1]) < 1e-4
  assert float(report.counts_K.min()) > 0


def test_rows_of_no_weight_leave_no_trace():
  x_ND = _vectors()
  far_ND = x_ND.at[60:].add(1e3)
  weights_N = jnp.where(jnp.arange(120) < 60, 1.0, 0.0)
  for num_iterations in (0, 5):
    words_KD = kmeans.fit(
      KEY,
      far_ND,
      9,
      weights_N=weights_N,
      num_iterations=num_iterations,
    )
    assert float(jnp.abs(words_KD).max()) < 10


def test_weight_two_is_a_row_twice():
  x_ND, words_KD = _vectors(), _vectors(9)
  weights_N = jnp.ones(120).at[:30].set(2)
  twice_ND = jnp.concatenate([x_ND, x_ND[:30]])
  weighted = lloyd_step(x_ND, weights_N, words_KD)
  repeated = lloyd_step(twice_ND, jnp.ones(150), words_KD)
  np.testing.assert_allclose(
    weighted.words_KD, repeated.words_KD, rtol=1e-4, atol=1e-5
  )


def test_blocks_do_not_change_the_result():
  x_ND = _vectors()
  whole, blocks = (
    kmeans.fit(KEY, x_ND, 9, block_size=size) for size in (4096, 7)
  )
  # Sums are taken in another order.
  np.testing.assert_allclose(whole, blocks, rtol=1e-4, atol=1e-5)


def test_product_and_scatter_sum_alike():
  x_ND, weights_N = _vectors(), jnp.arange(120.0)
  ids_N = jnp.arange(120, dtype=jnp.int32) % 7
  scatter = kmeans.sums_by_scatter(ids_N, x_ND, weights_N, 9)
  product = kmeans.sums_by_product(ids_N, x_ND, weights_N, 9)
  for got, want in zip(scatter, product, strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-3)


def test_senseless_sizes_are_refused():
  x_ND = _vectors()
  with pytest.raises(ValueError, match="120 vectors cannot fill 121 codewords"):
    kmeans.fit(KEY, x_ND, 121)
  with pytest.raises(ValueError, match="between 1 and 120, got 0"):
    kmeans.fit(KEY, x_ND, 0)
  with pytest.raises(ValueError, match=r"\(120,\), got \(119,\)"):
    kmeans.fit(KEY, x_ND, 4, weights_N=jnp.ones(119))


@pytest.mark.parametrize("num_at_once", [None, 1, 5, 7, 23, 40])
@pytest.mark.parametrize("block_size", [1, 6, 64])
def test_words_in_blocks_are_compared_as_in_loops(block_size, num_at_once):
  rng = np.random.default_rng(0)
  x_ND = rng.integers(-3, 4, (31, 2)).astype(np.float32)  # Many ties.
  words_KD = rng.integers(-3, 4, (23, 2)).astype(np.float32)
  ids_N, error_N = kmeans.assign(
    x_ND, words_KD, block_size=block_size, num_at_once=num_at_once
  )
  for x_D, found, error in zip(x_ND, ids_N, error_N, strict=True):
    nearest, least = 0, np.inf
    for k, word_D in enumerate(words_KD):
      sq = ((x_D - word_D) ** 2).sum()
      if sq < least:
        nearest, least = k, sq
    assert (int(found), float(error)) == (nearest, least)


def test_shares_of_processes_give_the_codewords_of_one(monkeypatch):
  """Three threads stand for processes; codewords far away are refilled."""
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(101, 5)).astype(np.float32) + 7
  far_KD = np.full((4, 5), 99, np.float32)
  words_KD = np.concatenate([x_ND[:6] + 0.01, far_KD])
  own, meeting, told = threading.local(), threading.Barrier(3), [None] * 3

  def exchange(x):
    told[own.index] = x
    meeting.wait()
    all_told = list(told)
    meeting.wait()
    return all_told

  monkeypatch.setattr(
    devices, "process_rows",
    lambda n: range(n * own.index // 3, n * (own.index + 1) // 3),
  )  # fmt: skip
  monkeypatch.setattr(devices, "gather", lambda x: np.stack(exchange(x)))
  monkeypatch.setattr(
    devices, "sum_over_processes",
    lambda tree: jax.tree.map(lambda *xs: sum(xs), *exchange(tree)),
  )  # fmt: skip
  assign_fn = kmeans.make_assign_fn(words_KD)

  def run(index):
    own.index = index
    return kmeans.pass_over(
      x_ND, words_KD, assign_fn, block_size=10, is_shared=True
    )

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    found = list(pool.map(run, range(3)))
  whole = kmeans.pass_over(x_ND, words_KD, assign_fn)
  assert whole.num_refilled == 4
  for one in found:
    np.testing.assert_array_equal(one.counts_K, whole.counts_K)
    np.testing.assert_array_equal(one.words_KD[6:], whole.words_KD[6:])
    np.testing.assert_allclose(one.words_KD, whole.words_KD, rtol=1e-6)
    np.testing.assert_allclose(one.objectives, whole.objectives, rtol=1e-6)


def test_rising_dimensions_are_stages_of_kmeans():
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(90, 40)) @ rng.normal(size=(40, 40)) + 3
  weights_N = rng.uniform(0.5, 2, 90)
  mean_D = np.average(x_ND, axis=0, weights=weights_N)
  away_ND = x_ND - mean_D
  _, axes_DD = np.linalg.eigh((weights_N[:, None] * away_ND).T @ away_ND)
  turned_ND = away_ND @ axes_DD[:, ::-1]
  words = None
  for size in (2, 4, 9, 19, 40):
    y_Nd = turned_ND[:, :size]
    if words is None:
      words = kmeans.fit(
        KEY,
        jnp.asarray(y_Nd, jnp.float32),
        6,
        num_iterations=0,
        weights_N=jnp.asarray(weights_N, jnp.float32),
      )
    words = np.pad(words, ((0, 0), (0, size - words.shape[1])))
    for _ in range(4):
      words, counts_K, _ = oracles.kmeans_step(y_Nd, weights_N, words)
      assert np.all(np.asarray(counts_K) > 0)
  got_KD = kmeans.fit_rising(
    KEY,
    jnp.asarray(x_ND, jnp.float32),
    6,
    num_iterations=4,
    weights_N=jnp.asarray(weights_N, jnp.float32),
  )
  want_KD = words @ axes_DD[:, ::-1].T + mean_D
  np.testing.assert_allclose(got_KD, want_KD, rtol=1e-3, atol=1e-3)


def test_rising_dimensions_without_iterations_are_the_start():
  x_ND = _vectors()
  words_KD = kmeans.fit_rising(KEY, x_ND, 5, num_iterations=0)
  for word_D in np.asarray(words_KD):  # Rows, turned and turned back.
    assert np.abs(np.asarray(x_ND) - word_D).max(axis=1).min() < 1e-5


def test_the_farthest_of_a_share_are_rows_of_it():
  """More are asked for than there are; errors are negative by rounding."""
  error_N = np.array([-5.0, -3.0], np.float32)
  far = kmeans._farthest(error_N, 4, first=10, is_shared=True)
  np.testing.assert_array_equal(far, [11, 10])
