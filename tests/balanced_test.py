import pathlib

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from vqjax.codecs import balanced, rq

KEY = jax.random.key(0)
GOLDEN = pathlib.Path(__file__).parents[1] / "third_party/golden/rqvae"


def _vectors(n=100, d=4, seed=0):
  x = np.random.default_rng(seed).normal(size=(n, d))
  x[: n // 3] *= 0.1  # Most are near the first words.
  return x.astype(np.float32)


def _cost(x, words, labels):
  return float(((x - words[labels]) ** 2).sum())


def _sizes(labels, k):
  return np.bincount(labels, minlength=k)


@pytest.mark.parametrize(("n", "k"), [(180, 6), (101, 7), (10, 16), (5, 1)])
@pytest.mark.parametrize("is_easy", [True, False])
def test_labels_are_the_cheapest_of_their_sizes(monkeypatch, n, k, is_easy):
  if not is_easy:  # All by moves, compared a few at a time.
    monkeypatch.setattr(balanced, "_BLOCK_PAIRS", 16)
    monkeypatch.setattr(balanced, "_NOISES", np.zeros(0))
  x, words = _vectors(n), _vectors(k, seed=1)
  labels = balanced.assign(x, words)
  sizes = _sizes(labels, k)
  assert sizes.sum() == n
  assert {n // k, -(-n // k)} >= set(sizes)
  # A column for each place of a codeword; the larger sizes may be others.
  columns = np.repeat(np.arange(k), sizes)
  cost = ((x[:, None] - words[columns][None]) ** 2).sum(axis=-1)
  best = cost[linear_sum_assignment(cost)].sum()
  np.testing.assert_allclose(_cost(x, words, labels), best, rtol=1e-5)


def test_equal_vectors_are_shared_out():
  x = np.repeat(_vectors(3), [40, 5, 3], axis=0)
  words = _vectors(8, seed=1)
  assert set(_sizes(balanced.assign(x, words), 8)) == {6}
  assert set(_sizes(balanced.assign(np.ones_like(x), words), 8)) == {6}


def test_vectors_that_cost_the_same_move_together(monkeypatch):
  num, find = [], balanced._Moves._cheapest_path
  counted = lambda self: num.append(1) or find(self)
  monkeypatch.setattr(balanced._Moves, "_cheapest_path", counted)
  labels = balanced.assign(np.ones((800, 4)), _vectors(8, seed=1))
  assert set(_sizes(labels, 8)) == {100}
  assert len(num) == 7


@pytest.mark.parametrize("pairs", [1 << 24, 1 << 12])
def test_prices_alone_come_near(monkeypatch, pairs):
  monkeypatch.setattr(balanced, "_SLOPE_PAIRS", pairs)  # Or of a sample.
  x, words = _vectors(2000), _vectors(16, seed=1)
  monkeypatch.setattr(balanced._Moves, "run", lambda self: None)
  sizes = _sizes(balanced.assign(x, words), 16)
  assert np.abs(sizes - 125).sum() < 60  # By nearest words alone: 1,362.


def test_levels_are_as_good_as_those_of_another_program():
  golden = np.load(GOLDEN / "rqkmeans_constrained.npz")
  x, books = golden["x"], [golden[f"codebook_{i}"] for i in range(2)]
  # Its sizes are 9 to 11.
  theirs = x - sum(b[c] for b, c in zip(books, golden["codes"].T, strict=True))
  params = rq.fit(
    KEY, x, num_codes=2, codebook_size=6, num_iterations=8, is_balanced=True
  )
  codes = balanced.encode_all(params.codebooks_MKD, x)
  assert codes.dtype == np.int32
  assert [set(_sizes(c, 6)) for c in codes.T] == [{10}, {10}]
  assert ((x - rq.decode(params, codes)) ** 2).mean() < (theirs**2).mean()
  # Of codebooks of different sizes, the second level by what is left over.
  books[1] = books[1][:5]
  codes = balanced.encode_all(books, x)
  np.testing.assert_array_equal(codes[:, 0], balanced.assign(x, books[0]))
  residual = x - books[0][codes[:, 0]]
  np.testing.assert_array_equal(
    codes[:, 1], balanced.assign(residual, books[1])
  )


def test_senseless_arguments_are_refused():
  with pytest.raises(ValueError, match="150 vectors cannot fill 256 codewords"):
    rq.fit(KEY, _vectors(150), num_codes=2, is_balanced=True)
  with pytest.raises(ValueError, match=r"\(None, 4\), got \(8, 3\)"):
    balanced.assign(_vectors(), _vectors(8, 3))
