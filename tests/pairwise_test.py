import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import fits
from vqjax.codecs import additive, pairwise
from vqjax.codecs.pairwise import SHRINKAGES, PairwiseParams

NUM, M, K, D, LISTS = 80, 3, 4, 2, 9


def _case(num=NUM, seed=0):
  """Codes, lists and targets in which pairs of codes mean something."""
  rng = np.random.default_rng(seed)
  codes_NM = rng.integers(K, size=(num, M)).astype(np.int32)
  lists_N = rng.integers(LISTS, size=num).astype(np.int32)
  table = np.random.default_rng(9).normal(size=(2, K, K, D))
  target_ND = 0.3 * rng.normal(size=(num, D))
  target_ND += 2 * table[0, codes_NM[:, 0], codes_NM[:, 2]]
  target_ND += table[1, codes_NM[:, 1], lists_N % K]
  return codes_NM, target_ND.astype(np.float32), lists_N


LIST_CODES = np.stack([np.arange(LISTS) % K] + [np.arange(LISTS) // K] * 4, 1)


def _rows_of(all_NM, pair):
  """Numbers of the vectors in each row of the table of a pair."""
  rows = {}
  for n, code in enumerate(all_NM):
    rows.setdefault((code[pair[0]], code[pair[1]]), []).append(n)
  return rows


def _left_out_error(rows, left_ND, shrinkage):
  """Squared error where each vector is decoded by the rows of all others."""
  error = 0.0
  for members in rows.values():
    for n in members:
      others = sum(left_ND[i] for i in members if i != n)
      row = others / (len(members) - 1 + shrinkage)
      error += ((left_ND[n] - row) ** 2).sum()
  return error


def _oracle(words, codes_NM, target_ND, more_NV, num_tables):
  """Greedy rounds in loops: pairs, and tables with the additive words."""
  all_NM = np.concatenate([codes_NM, more_NV], axis=1)
  left_ND = target_ND.astype(np.float64)
  left_ND = left_ND - sum(words[m][codes_NM[:, m]] for m in range(M))
  pairs, tables, missing = [], [], set(range(M))
  for number in range(num_tables):
    best = (np.inf,)
    for pair in itertools.combinations(range(all_NM.shape[1]), 2):
      rest = 2 * (num_tables - number - 1)
      if pair in pairs or len(missing - set(pair)) > rest:
        continue
      for shrinkage in SHRINKAGES:
        error = _left_out_error(_rows_of(all_NM, pair), left_ND, shrinkage)
        best = min(best, (error, pair, shrinkage))
    _, pair, shrinkage = best
    table, after_ND = np.zeros((K, K, D)), left_ND.copy()
    for (a, b), members in _rows_of(all_NM, pair).items():
      total = sum(left_ND[n] for n in members)
      table[a, b] = total / (len(members) + shrinkage)
      for n in members:
        others = (total - left_ND[n]) / (len(members) - 1 + shrinkage)
        after_ND[n] -= others
    left_ND = after_ND
    for a, b in itertools.product(range(K), repeat=2):
      if pair[0] in missing:
        table[a, b] += words[pair[0]][a]
      if pair[1] in missing:
        table[a, b] += words[pair[1]][b]
    missing -= set(pair)
    pairs.append(pair)
    tables.append(table)
  return pairs, np.array(tables)


@pytest.mark.parametrize(
  ("has_lists", "num_tables"), [(True, 4), (True, 2), (False, 3), (False, 2)]
)
def test_pairs_and_tables_are_those_of_greedy_loops(has_lists, num_tables):
  codes_NM, target_ND, lists_N = _case()
  start = fits.additive(codes_NM, target_ND, K)
  options, more_NV = {}, np.zeros((NUM, 0), int)
  if has_lists:
    options = dict(lists_N=lists_N, list_codes_LV=LIST_CODES)
    more_NV = LIST_CODES[lists_N]
  params = pairwise.fit(
    start, codes_NM, target_ND, num_tables=num_tables, **options
  )
  words = np.asarray(start.codebooks_MKD, np.float64)
  pairs, tables = _oracle(words, codes_NM, target_ND, more_NV, num_tables)
  assert params.pairs_R2.tolist() == [list(pair) for pair in pairs]
  got = np.asarray(params.tables_RKKD, np.float32)
  got *= np.asarray(params.scale_R)[:, None, None, None]
  np.testing.assert_allclose(got, tables, atol=3e-3)  # float16.


def test_decode_sums_rows_in_float32():
  rng = np.random.default_rng(0)
  tables = rng.normal(size=(3, K, K, D)).astype(np.float16)
  pairs = np.array([[0, 1], [1, 3], [2, 4]], np.int32)
  scale = np.array([1.0, 2000.0, 0.5], np.float32)
  params = PairwiseParams(pairs, tables, scale, jnp.asarray(LIST_CODES), M)
  codes_NM, _, lists_N = _case()
  centroids_LD = rng.normal(size=(LISTS, D)).astype(np.float32)
  want = []
  for code, at in zip(codes_NM, lists_N, strict=True):
    code = [*code, *LIST_CODES[at]]
    rows = [tables[r, code[a], code[b]] for r, (a, b) in enumerate(pairs)]
    want.append(
      sum(np.float64(s) * row for s, row in zip(scale, rows, strict=True))
    )
  got = pairwise.decode(params, codes_NM, lists_N)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
  whole = pairwise.decode(params, codes_NM, lists_N, centroids_LD)
  np.testing.assert_allclose(whole, want + centroids_LD[lists_N], atol=1e-3)


def test_other_vectors_are_decoded_better_than_by_words():
  codes_NM, target_ND, lists_N = _case(600)
  start = fits.additive(codes_NM, target_ND, K)
  params = pairwise.fit(
    start, codes_NM, target_ND, lists_N=lists_N, list_codes_LV=LIST_CODES
  )
  assert params.tables_RKKD.shape == (2 * M, K, K, D)
  codes_NM, target_ND, lists_N = _case(seed=1)
  mse = lambda x_ND: ((target_ND - np.asarray(x_ND)) ** 2).sum(1).mean()
  better = mse(pairwise.decode(params, codes_NM, lists_N))
  assert better < 0.3 < 1 < mse(additive.decode(start, codes_NM))


def test_pairs_that_mean_nothing_decode_like_words():
  """With 256 rows for 200 vectors, plain means would be all noise."""
  rng = np.random.default_rng(0)
  codes_NM = rng.integers(16, size=(400, 3)).astype(np.int32)
  books = rng.normal(size=(3, 16, 5))
  x_ND = sum(books[m][codes_NM[:, m]] for m in range(3))
  x_ND = (x_ND + rng.normal(size=x_ND.shape)).astype(np.float32)
  start = fits.additive(codes_NM[:200], x_ND[:200], 16)
  params = pairwise.fit(start, codes_NM[:200], x_ND[:200])
  mse = lambda xhat_ND: ((x_ND[200:] - np.asarray(xhat_ND)) ** 2).sum(1).mean()
  words = mse(additive.decode(start, codes_NM[200:]))
  assert mse(pairwise.decode(params, codes_NM[200:])) < 1.02 * words


def test_every_code_is_in_a_table():
  """Even where the best pairs are others, here those of code 0."""
  rng = np.random.default_rng(0)
  codes_NM = rng.integers(K, size=(300, 4)).astype(np.int32)
  table = 5 * rng.normal(size=(2, K, K, D))
  words = rng.normal(size=(4, K, D))
  x_ND = sum(words[m, codes_NM[:, m]] for m in range(4))
  for i in range(2):
    x_ND += table[i, codes_NM[:, 0], codes_NM[:, 1 + i]]
  start = fits.additive(codes_NM, x_ND, K)
  pairs = lambda r: pairwise.fit(
    start, codes_NM, x_ND, num_tables=r
  ).pairs_R2.tolist()
  assert sorted(pairs(3)[:2]) == [[0, 1], [0, 2]]
  assert sorted(sum(pairs(2), [])) == [0, 1, 2, 3]


def test_large_and_small_vectors_keep_their_precision():
  codes_NM, target_ND, _ = _case()
  decoded = []
  for factor in (1, 2.0**24, 2.0**-24):
    start = fits.additive(codes_NM, factor * target_ND, K)
    params = pairwise.fit(start, codes_NM, factor * target_ND)
    decoded.append(pairwise.decode(params, codes_NM) / factor)
  np.testing.assert_array_equal(decoded[1], decoded[0])
  np.testing.assert_array_equal(decoded[2], decoded[0])


def test_list_codes_describe_the_centroids():
  rng = np.random.default_rng(0)
  centroids_LD = rng.normal(size=(40, 6)).astype(np.float32)
  fit = lambda sizes_L: pairwise.fit_list_codes(
    jax.random.key(0), centroids_LD, sizes_L, 8
  )
  sizes_L = np.where(np.arange(40) < 8, 10_000, 0)
  codes_LV = np.asarray(fit(sizes_L))
  assert codes_LV.shape == (40, 5)
  assert codes_LV.dtype == np.int32
  assert (codes_LV.min(), codes_LV.max()) == (0, 7)
  assert len(np.unique(codes_LV[:8, 0])) == 8  # Large lists have their own.
  assert len(np.unique(codes_LV, axis=0)) == 40
  few = pairwise.fit_list_codes(
    jax.random.key(0), centroids_LD[:8], sizes_L[:8], 8
  )
  assert few.tolist() == [[i] for i in range(8)]


def test_numbers_of_tables():
  assert pairwise.check_sizes(256, 8) == 16
  assert pairwise.check_sizes(256, 8, 1000) == 16
  assert pairwise.check_sizes(256, 2) == 1
  assert pairwise.check_sizes(256, 1, 16) == 1
  assert pairwise.check_sizes(256, 2, 1000) == 4
  assert pairwise.check_sizes(256, 8, 1000, 78) == 78
  with pytest.raises(ValueError, match="between 4 and 28, got 3: each of 8"):
    pairwise.check_sizes(256, 8, 0, 3)
  with pytest.raises(ValueError, match="between 4 and 28, got 29"):
    pairwise.check_sizes(256, 8, 0, 29)
  with pytest.raises(ValueError, match="A pair needs 2 codes, got 1"):
    pairwise.check_sizes(256, 1)
  with pytest.raises(ValueError, match="number of codewords .* 1024, got 4096"):
    pairwise.check_sizes(4096, 8)


def test_progress_counts_tables():
  codes_NM, target_ND, _ = _case()
  start, seen = fits.additive(codes_NM, target_ND, K), []
  pairwise.fit(
    start, codes_NM, target_ND, progress=lambda *args: seen.append(args)
  )
  assert seen == [(1, 3), (2, 3), (3, 3)]


def test_refuses_what_does_not_fit():
  codes_NM, target_ND, lists_N = _case()
  start = fits.additive(codes_NM, target_ND, K)
  fit = lambda *args, **options: pairwise.fit(start, *args, **options)
  with pytest.raises(ValueError, match=r"target must have shape \(80, 2\)"):
    fit(codes_NM, target_ND[:5])
  with pytest.raises(ValueError, match="Code 7 in row 0, column 0 must lie"):
    fit(codes_NM * 0 + 7, target_ND)
  with pytest.raises(ValueError, match=r"list_codes must have shape \(9, 5\)"):
    fit(codes_NM, target_ND, lists_N=lists_N, list_codes_LV=LIST_CODES[:, :2])
  wrong_N = np.where(np.arange(NUM) == 3, 9, lists_N)
  with pytest.raises(ValueError, match="Code 9 in row 3, column 0 must lie"):
    fit(codes_NM, target_ND, lists_N=wrong_N, list_codes_LV=LIST_CODES)
  params = fit(codes_NM, target_ND)
  in_lists = params.replace(list_codes_LV=LIST_CODES)
  with pytest.raises(ValueError, match="in lists: give the list of each vec"):
    pairwise.decode(in_lists, codes_NM)
  with pytest.raises(ValueError, match=r"codes must have shape \(None, 3\)"):
    pairwise.decode(params, codes_NM[:, :2])


def test_tables_end_where_they_do_not_pay():
  rng = np.random.default_rng(0)
  k, books_MKD = 4, rng.normal(size=(4, 4, 6))
  table_KKD = rng.normal(size=(k, k, 6))
  codes_NM = rng.integers(0, k, (2000, 4)).astype(np.int32)
  noise_ND = 0.3 * rng.normal(size=(2000, 6))
  plain_ND = sum(books_MKD[m][codes_NM[:, m]] for m in range(4)) + noise_ND
  paired_ND = plain_ND + table_KKD[codes_NM[:, 1], codes_NM[:, 2]]
  held = slice(1500, None)

  def fit(target_ND):
    x_ND = target_ND.astype(np.float32)
    words = fits.additive(codes_NM[:1500], x_ND[:1500], k)
    return x_ND, pairwise.fit(
      words,
      codes_NM[:1500],
      x_ND[:1500],
      held_out=(codes_NM[held], x_ND[held], None),
      num_tables=6,
    )

  assert fit(plain_ND)[1] is None
  x_ND, params = fit(paired_ND)
  # The pair that pays, and one for the words of the other two positions.
  assert np.asarray(params.pairs_R2).tolist() == [[1, 2], [0, 3]]
  left_ND = x_ND[held] - pairwise.decode(params, codes_NM[held])
  assert np.mean(np.square(left_ND)) < 0.3**2 * 1.1
