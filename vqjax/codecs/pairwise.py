"""The pairwise decoder: a sum of table rows, each selected by two codes.

A table has a row for every pair of codewords of two code positions. Codes in
lists have a few positions more, for the list: the codes of its centroid under a
residual quantiser. Like the additive decoder, this one approximates the
residual of the centroid, or the vector itself without lists. If the additive
decoder has a centre (`additive.split_centre`), the tables are without it: their
float16 would round what is far from the origin.

  V  codes of a list      R  tables, and the pairs of positions they are for

Tables are found one after the other. Each round tries all pairs of positions,
keeps the one whose table leaves the least error, and continues with its
residuals. Two things differ from the paper, whose rounds start from the vectors
and a row is the mean of its vectors:

* Rounds start from the residuals of the additive decoder. Its codewords are
  then added to tables that have their codes, so that decoding sums only rows.
* A row is `sum / (count + shrinkage)`, with the shrinkage of least error when
  each vector is left out in turn. The same error decides between pairs. The
  next round gets the residuals that each vector would have had if it had been
  left out, so that noise is not fitted twice.

docs/ivf.md and CHANGELOG.md have figures.

References: arXiv 2501.03078, section 3.4; closed form of leaving one out,
Allen, Technometrics 1974 (PRESS).
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from vqjax.codecs import additive as additive_lib
from vqjax.codecs import kmeans
from vqjax.codecs.additive import AdditiveParams
from vqjax.codecs.distances import nearest, sq_norms
from vqjax.core import Array, check_codes, check_range, check_shape
from vqjax.data.codes import check_ids

NUM_LEVELS = 5  # V, of the residual quantiser of the centroids.
SHRINKAGES = tuple(2.0**power for power in range(-2, 13))
_LEAST_GAIN = 0.005  # Of the error held out, by each table.
_NUM_SCORED = 100_000  # Vectors that decide between pairs; all are fitted to.
MAX_WORDS = 1024  # A table of 1024 x 1024 rows of 128 numbers: 256 MiB.


@struct.dataclass
class PairwiseParams:
  """Row `[a, b]` of table r is `scale_R[r] * tables_RKKD[r, a, b]`.

  It is for code a at position `pairs_R2[r, 0]` and b at `pairs_R2[r, 1]`, out
  of the M of the vector followed by the V of its list.
  """

  pairs_R2: Array
  tables_RKKD: Array  # float16, the largest of each table 1.
  scale_R: Array
  list_codes_LV: Array | None  # None without lists.
  num_codes: int = struct.field(pytree_node=False)  # M.


def check_sizes(
  codebook_size: int,
  num_codes: int,
  num_lists: int = 0,
  num_tables: int | None = None,
) -> int:
  """Returns the number of tables, 2M for None or all pairs if there are fewer.

  Raises:
    ValueError: If there can be no such decoder; `num_lists` 0 is no lists.
  """
  check_range("The number of codewords", codebook_size, 1, MAX_WORDS)
  num_all = num_codes + _num_levels(num_lists, codebook_size)
  num_pairs = num_all * (num_all - 1) // 2
  if not num_pairs:
    raise ValueError(
      "A pair needs 2 codes, got 1 per vector and no lists; use the additive "
      "decoder alone."
    )
  if num_tables is None:
    return min(2 * num_codes, num_pairs)
  low = -(-num_codes // 2)
  rule = (
    f"each of {num_codes} codes is in a table, and there are {num_pairs} pairs"
  )
  check_range("num_tables", num_tables, low, num_pairs, rule)
  return num_tables


def _num_levels(num_lists: int, codebook_size: int) -> int:
  """V: few lists need no quantiser, their number is their code."""
  return NUM_LEVELS if num_lists > codebook_size else min(num_lists, 1)


def fit_list_codes(
  key: Array, centroids_LD: Array, sizes_L: Array, codebook_size: int
) -> Array:
  """Codes `[L, V]` of centroids by a residual quantiser, weighted by sizes.

  No more lists than codewords need no quantiser: the number of a list is its
  one code. A list without vectors counts a little, so that it has a code too.
  """
  check_shape("centroids", centroids_LD, (None, None))
  check_shape("sizes", sizes_L, centroids_LD.shape[:1])
  if _num_levels(centroids_LD.shape[0], codebook_size) == 1:
    return jnp.arange(centroids_LD.shape[0], dtype=jnp.int32)[:, None]
  left_LD = jnp.asarray(centroids_LD, jnp.float32)
  weights_L = jnp.asarray(sizes_L, jnp.float32) + 1
  codes = []
  for level in range(NUM_LEVELS):
    words_KD = kmeans.fit(
      jax.random.fold_in(key, level),
      left_LD,
      codebook_size,
      weights_N=weights_L,
    )
    codes.append(nearest(left_LD, words_KD))
    left_LD = left_LD - words_KD[codes[-1]]
  return jnp.stack(codes, axis=1)


def fit(
  additive: AdditiveParams,
  codes_NM,
  target_ND,
  *,
  lists_N=None,
  list_codes_LV=None,
  num_tables: int | None = None,
  held_out=None,
  progress=None,
) -> PairwiseParams | None:
  """Finds pairs and their tables for targets `[N, D]`, greedily.

  With vectors held out it ends when a further table would lower their squared
  error by less than half a percent, and returns None if tables do not pay.

  `additive` is the additive decoder of the same codes and targets, which are in
  data units. Codes are without list numbers, in an order that makes the first
  ones a fair sample. Lists and `list_codes_LV`, from `fit_list_codes`, are None
  without lists. `num_tables` None is 2M, or all pairs if there are fewer; with
  `held_out`, codes, targets and lists of other vectors, it is the most that
  there may be. `progress` is called with `(tables found, tables in all)`.

  Raises:
    ValueError: If shapes or sizes do not fit, or codes are out of range.
  """
  _, codewords = additive_lib.split_centre(additive)
  words_MKD = np.asarray(codewords.codebooks_MKD)
  m, k, _ = words_MKD.shape
  num_lists = 0 if list_codes_LV is None else len(list_codes_LV)
  num_tables = check_sizes(k, m, num_lists, num_tables)
  all_NM = _check_and_join(
    words_MKD.shape, codes_NM, target_ND, lists_N, list_codes_LV
  )
  left_ND = _subtract_words(additive, all_NM[:, :m], jnp.asarray(target_ND))
  judge = held_out and _Judge(additive, list_codes_LV, *held_out)
  pairs, tables, scales = _find_tables(
    words_MKD, all_NM, left_ND, judge, num_tables, progress
  )
  if judge and judge.total_gain() < max(len(pairs), 1) * _LEAST_GAIN:
    return None
  return PairwiseParams(
    pairs_R2=jnp.array(pairs, jnp.int32),
    tables_RKKD=jnp.asarray(np.stack(tables)),
    scale_R=jnp.array(scales, jnp.float32),
    list_codes_LV=list_codes_LV,
    num_codes=m,
  )


def _find_tables(words_MKD, all_NM, left_ND, judge, num_tables: int, progress):
  """Pairs, their tables and scales, one after the other."""
  m, k, _ = words_MKD.shape
  candidates = list(itertools.combinations(range(all_NM.shape[1]), 2))
  pairs, tables, scales, missing = [], [], [], set(range(m))
  is_enough = False
  while len(pairs) < num_tables and (missing or not is_enough):
    left_over = num_tables - len(pairs) - 1
    if is_enough:  # The rest is there for the additive codewords alone.
      left_over = min(left_over, -(-len(missing) // 2) - 1)
    # Every code must be in a table at last, to hold its additive codeword.
    is_allowed_R = [
      pair not in pairs and len(missing.difference(pair)) <= 2 * left_over
      for pair in candidates
    ]
    scored = all_NM[:_NUM_SCORED], left_ND[:_NUM_SCORED]
    errors_R = _errors(*scored, jnp.array(candidates), k)
    best = np.argmin(np.where(is_allowed_R, errors_R, np.inf))
    pairs.append(candidates[best])
    table_KKD, left_ND = _fit_table(all_NM, left_ND, jnp.array(pairs[-1]), k)
    if judge and judge.gain(table_KKD, pairs[-1]) < _LEAST_GAIN:
      if not missing or len(pairs) == 1:
        pairs.pop()
        break
      is_enough = True
    if judge:
      judge.keep()
    table_KKD = np.array(table_KKD)
    _add_words(table_KKD, pairs[-1], missing, words_MKD)
    missing.difference_update(pairs[-1])
    scales.append(np.abs(table_KKD).max() or np.float32(1))
    tables.append((table_KKD / scales[-1]).astype(np.float16))
    if progress is not None:
      progress(len(tables), num_tables)
  return pairs, tables, scales


def _check_and_join(sizes, codes_NM, target_ND, lists_N, list_codes_LV):
  """All codes of each vector, `[N, M + V]`; raises if shapes do not fit."""
  m, k, d = sizes
  check_shape("codes", codes_NM, (None, m))
  check_shape("target", target_ND, (codes_NM.shape[0], d))
  if list_codes_LV is not None:
    num_lists = len(list_codes_LV)
    want = (num_lists, _num_levels(num_lists, k))
    check_shape("list_codes", list_codes_LV, want)
    check_ids(np.asarray(lists_N)[:, None], [num_lists])
  all_NM = _join(jnp.asarray(codes_NM), lists_N, list_codes_LV)
  check_ids(np.asarray(all_NM), [k] * all_NM.shape[1])
  return all_NM


def _total(left_ND) -> float:
  return float(np.sum(np.asarray(sq_norms(left_ND)), dtype=np.float64))


class _Judge:
  """The squared error of vectors held out, as tables are added."""

  def __init__(self, additive, list_codes_LV, codes_NM, target_ND, lists_N):
    m = codes_NM.shape[1]
    self._all_NM = _join(jnp.asarray(codes_NM), lists_N, list_codes_LV)
    self._left_ND = _subtract_words(
      additive, self._all_NM[:, :m], jnp.asarray(target_ND)
    )
    self._first = self._error = _total(self._left_ND)

  def gain(self, table_KKD, pair) -> float:
    """Share of the error that a further table would take away."""
    cells_N = _cells(self._all_NM, jnp.array(pair), table_KKD.shape[0])
    rows_ZD = table_KKD.reshape(-1, table_KKD.shape[-1])
    self._next_ND = self._left_ND - rows_ZD[cells_N]
    error = _total(self._next_ND)
    return 1 - error / self._error if self._error else 0.0

  def keep(self) -> None:
    """Adds that table."""
    self._left_ND = self._next_ND
    self._error = _total(self._left_ND)

  def total_gain(self) -> float:
    """Share of the error of the additive decoder that is gone."""
    return 1 - self._error / self._first if self._first else 0.0


def _add_words(table_KKD, pair, missing: set[int], words_MKD) -> None:
  """Adds the additive codewords of those codes of a pair that lack them."""
  for axis, column in enumerate(pair):
    if column in missing:
      table_KKD += np.expand_dims(words_MKD[column], 1 - axis)


@jax.jit
def decode(
  params: PairwiseParams,
  codes_NM: Array,
  lists_N: Array | None = None,
  centroids_LD: Array | None = None,
) -> Array:
  """Sums table rows: `[N, D]` in data units, float32.

  Args:
    params: Tables.
    codes_NM: integers `[N, M]`, list numbers not among them.
    lists_N: list of each vector; used only if there are lists.
    centroids_LD: of the lists, to be added, or the centre without lists: the
      sum is then the vector, and else what these leave.
  """
  r, k, _, d = params.tables_RKKD.shape
  check_codes(codes_NM, params.num_codes)
  check_shape("codes", codes_NM, (None, params.num_codes))
  all_NM = _join(codes_NM, lists_N, params.list_codes_LV)
  rows_RN = jax.vmap(_cells, (None, 0, None))(all_NM, params.pairs_R2, k)
  rows_RN = rows_RN + jnp.arange(r)[:, None] * k**2
  table_ZD = params.tables_RKKD.reshape(-1, d)
  # One gather after the other: XLA makes a single loop of them. A scan takes
  # twice as long on CPUs, one gather of [N, R, D] many times as long.
  terms = [
    table_ZD[rows_N].astype(jnp.float32) * scale
    for rows_N, scale in zip(rows_RN, params.scale_R, strict=True)
  ]
  if centroids_LD is not None:
    terms.append(centroids_LD[lists_N])
  return sum(terms)


def _join(codes_NM: Array, lists_N, list_codes_LV) -> Array:
  """All codes of each vector: its own, then its list's, `[N, M + V]`."""
  if list_codes_LV is None:
    return codes_NM
  if lists_N is None:
    raise ValueError("These codes are in lists: give the list of each vector.")
  check_shape("lists", lists_N, codes_NM.shape[:1])
  codes_NV = jnp.asarray(list_codes_LV)[jnp.asarray(lists_N)]
  return jnp.concatenate([codes_NM, codes_NV], axis=1)


def _cells(all_NM: Array, pair_2: Array, codebook_size: int) -> Array:
  """Row `[N]` of a table that the codes at two positions name."""
  return all_NM[:, pair_2[0]] * codebook_size + all_NM[:, pair_2[1]]


def _sums(cells_N: Array, left_ND: Array, num_cells: int):
  """Sum, count and sum of squared norms of the vectors of each row."""
  add_fn = partial(
    jax.ops.segment_sum, segment_ids=cells_N, num_segments=num_cells
  )
  return (
    add_fn(left_ND),
    add_fn(jnp.ones(len(cells_N), jnp.float32)),
    add_fn(sq_norms(left_ND)),
  )


def _left_out_errors(sums_ZD, counts_Z, squares_Z) -> Array:
  """Squared error of all vectors, each left out, for each shrinkage `[S]`.

  A vector's error with its own share in the row is `1 - 1 / (n + shrinkage)`
  of its error without.
  """
  sums_Z = sq_norms(sums_ZD)

  def error(shrinkage):
    weight_Z = counts_Z + shrinkage
    inside_Z = squares_Z - (2 - counts_Z / weight_Z) * sums_Z / weight_Z
    outside_Z = inside_Z * (weight_Z / (weight_Z - 1)) ** 2
    return jnp.sum(jnp.where(counts_Z > 0, outside_Z, 0))

  return lax.map(error, jnp.array(SHRINKAGES, jnp.float32))


@partial(jax.jit, static_argnames="codebook_size")
def _errors(all_NM, left_ND, pairs_R2, codebook_size: int) -> Array:
  """Least error, vectors left out, that a table of each pair has: `[R]`."""

  def error(pair_2):
    cells_N = _cells(all_NM, pair_2, codebook_size)
    return jnp.min(_left_out_errors(*_sums(cells_N, left_ND, codebook_size**2)))

  return lax.map(error, pairs_R2)


@partial(jax.jit, static_argnames="codebook_size", donate_argnames="left_ND")
def _fit_table(all_NM, left_ND, pair_2, codebook_size: int):
  """Rows `[K, K, D]` of a pair, and what vectors leave when left out."""
  cells_N = _cells(all_NM, pair_2, codebook_size)
  sums_ZD, counts_Z, squares_Z = _sums(cells_N, left_ND, codebook_size**2)
  errors = _left_out_errors(sums_ZD, counts_Z, squares_Z)
  weight_Z = counts_Z + jnp.array(SHRINKAGES, jnp.float32)[errors.argmin()]
  rows_ZD = sums_ZD / weight_Z[:, None]
  outside_Z = weight_Z / (weight_Z - 1)
  left_ND = (left_ND - rows_ZD[cells_N]) * outside_Z[cells_N][:, None]
  shape = (codebook_size, codebook_size, -1)
  return rows_ZD.reshape(shape), left_ND


@jax.jit
def _subtract_words(additive, codes_NM, target_ND) -> Array:
  """What the additive decoder leaves, float32."""
  decoded_ND = additive_lib.decode(additive, codes_NM)
  return target_ND.astype(jnp.float32) - decoded_ND
