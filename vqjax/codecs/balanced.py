"""Balanced levels: every codeword gets N / K vectors, rounded up or down.

The labels are the cheapest of such sizes, a transport problem. A price is added
to the distances of each codeword, and each vector takes the codeword that is
cheapest then; prices at which all sizes fit make the cheapest labels. They are
found in two parts. Newton's method on transport with less and less noise brings
them near (Cuturi, arXiv 1306.0895). Then vectors move along the cheapest chains
from a codeword with too many to one with too few (Ahuja, Magnanti and Orlin,
Network Flows, 1993, section 9.7), those that cost the same together. Nothing is
drawn: equal vectors in equal order get equal labels.

A vector alone has no balanced label: labels are of a whole set. `rq.encode`
gives the nearest codewords, which new vectors get.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.codecs import kmeans
from vqjax.codecs.distances import centre_of, sq_distances
from vqjax.core import Array, check_range, check_shape
from vqjax.data import batches

_NOISES = 0.3 * 0.5 ** np.arange(9)  # Of the scale of the distances.
_STEP, _DAMPING = 4.0, 1e-3  # Longest step in noises; slope added to sizes.
_SLOPE_PAIRS = 1 << 26  # N x K numbers, of which slopes are taken.
_TIE = 1e-5  # Of the scale; costs that are as good as equal.
_FITTED_ROWS = 256  # Per codeword.
_SWEEPS = 2  # More gain less than a hundredth of the error.
_BLOCK_PAIRS = 1 << 22


def assign(x_ND, words_KD) -> np.ndarray:
  """Labels `[N]`, int32: the cheapest of which each codeword has N / K +- 1.

  Memory beside the vectors is 0.1 GB, 20 bytes a vector and 32 for each two
  codewords. A million vectors take 256 codewords in 20 s of processor time.
  """
  x_ND, words_KD = np.asarray(x_ND, np.float32), np.asarray(words_KD)
  check_shape("x", x_ND, (None, None))
  check_shape("codewords", words_KD, (None, x_ND.shape[1]))
  check_range("The number of vectors", len(x_ND), 1, 1 << 40)
  n, k = len(x_ND), len(words_KD)
  sample_nD = x_ND[batches.evenly_spaced_rows(n, max(_BLOCK_PAIRS // k, 1))]
  scale = max(float(_scale(sample_nD, words_KD)), 1e-30)
  prices_K = np.zeros(k)
  for noise in _NOISES * scale:
    prices_K = prices_K + _step(x_ND, words_KD, prices_K, noise)
  moves = _Moves(_make_distance_fn(x_ND, words_KD), n, prices_K, _TIE * scale)
  moves.run()
  return moves.labels_N


@jax.jit
def _scale(x_ND, words_KD) -> Array:
  """How much the distances of a vector differ: median of mean less least."""
  distance_NK = sq_distances(x_ND, words_KD)
  return jnp.median(distance_NK.mean(axis=1) - distance_NK.min(axis=1))


def _step(x_ND, words_KD, prices_K, noise: float) -> np.ndarray:
  """Newton's step `[K]` to prices at which shared vectors make even sizes."""
  n, k = len(x_ND), len(words_KD)
  stride = -(-n * k // _SLOPE_PAIRS)
  sizes_K, common_KK = np.zeros(k), np.zeros((k, k))
  for rows in _blocks(n, k):
    size_K, common_kK = _shares(
      x_ND[rows], words_KD, prices_K.astype(np.float32), noise, stride
    )
    sizes_K += size_K
    common_KK += common_kK
  common_KK *= stride
  # A price that rises by 1 drives away this much, and to whom.
  slope_KK = np.diag(common_KK.sum(axis=1) + _DAMPING * n / k) - common_KK
  step_K = np.linalg.solve(slope_KK, sizes_K - n / k)
  return noise * step_K.clip(-_STEP, _STEP)


def _blocks(n: int, k: int):
  """Slices of `n` rows, of which `k` distances each are in memory at once."""
  size = max(_BLOCK_PAIRS // k, 16)
  return (slice(start, start + size) for start in range(0, n, size))


@partial(jax.jit, static_argnames="stride")
def _shares(x_ND, words_KD, prices_K, noise, stride: int):
  """Sizes `[K]` of codewords that share out vectors at these prices.

  Also what two codewords have in common `[K, K]`, in every `stride`-th vector.
  """
  total_NK = sq_distances(x_ND, words_KD) + prices_K[None]
  share_NK = jax.nn.softmax(-total_NK / noise, axis=1)
  some_nK = share_NK[::stride]
  return share_NK.sum(axis=0), jnp.matmul(
    some_nK.T, some_nK, precision="highest"
  )


def _make_distance_fn(x_ND, words_KD):
  """Returns `(rows, words) -> [n, k]`, squared distances."""
  centre_1D = centre_of(words_KD)[None]
  near_KD = words_KD - centre_1D
  norms_K = (near_KD**2).sum(axis=1)

  def distance_fn(rows, words=slice(None)):
    x_nD = x_ND[rows] - centre_1D
    dot_nk = x_nD @ near_KD[words].T
    return (x_nD**2).sum(axis=1)[:, None] - 2 * dot_nk + norms_K[words][None]

  return distance_fn


class _Moves:
  """Labels that are cheapest at their prices, and moves that balance them."""

  def __init__(self, distance_fn, num: int, prices_K, tie: float):
    self._distance_fn, self._tie = distance_fn, tie
    self.prices_K = np.asarray(prices_K, np.float64)
    self.labels_N = np.empty(num, np.int32)
    k = len(self.prices_K)
    for rows in _blocks(num, k):
      total_nK = distance_fn(rows) + self.prices_K[None]
      self.labels_N[rows] = total_nK.argmin(axis=1)
    sizes_K = np.bincount(self.labels_N, minlength=k)
    # The largest get one more, if N is no multiple of K: the dearest would make
    # labels .05 % better, but k-means of them half a percent worse.
    wanted_K = np.full(k, num // k)
    wanted_K[np.argsort(-sizes_K, kind="stable")[: num % k]] += 1
    self._excess_K = sizes_K - wanted_K
    # Of the cheapest move from a codeword to another: its cost, its vector.
    self._cost_KK = np.full((k, k), np.inf)
    self._row_KK = np.full((k, k), -1)
    order_N = np.argsort(self.labels_N, kind="stable")
    for word, rows_n in enumerate(np.split(order_N, np.cumsum(sizes_K)[:-1])):
      self._compare(word, rows_n, np.arange(k))

  def _compare(self, word: int, rows_n, to_k) -> None:
    """Looks for cheaper moves of these rows from their codeword to others."""
    if not len(to_k):
      return
    for block in _blocks(len(rows_n), len(to_k)):
      cost_nk = self._costs(word, rows_n[block], to_k)
      least_k = cost_nk.argmin(axis=0)
      cost_k = cost_nk[least_k, np.arange(len(to_k))]
      is_less_k = cost_k < self._cost_KK[word, to_k]
      less_k = to_k[is_less_k]
      self._cost_KK[word, less_k] = cost_k[is_less_k]
      self._row_KK[word, less_k] = rows_n[block][least_k[is_less_k]]

  def _costs(self, word: int, rows_n, to_k) -> np.ndarray:
    """Costs `[n, k]` of moves from a codeword, without prices.

    A move alone costs something, so that chains are short.
    """
    own_n1 = self._distance_fn(rows_n, [word])
    return self._distance_fn(rows_n, to_k) - own_n1 + self._tie

  def run(self) -> None:
    """Moves vectors until all sizes are as wanted."""
    while self._excess_K.any():
      path = self._cheapest_path()
      edges = list(itertools.pairwise(path))
      moved = [self._alike(*edge) for edge in edges]
      num = min(self._excess_K[path[0]], -self._excess_K[path[-1]])
      num = min([num, *map(len, moved)])
      moved = [rows_n[:num] for rows_n in moved]
      for (_, to), rows_n in zip(edges, moved, strict=True):
        self.labels_N[rows_n] = to
      self._excess_K[path[0]] -= num
      self._excess_K[path[-1]] += num
      none = np.zeros(0, np.int64)
      for word, gone_n, came_n in zip(
        path, [*moved, none], [none, *moved], strict=True
      ):
        is_gone_K = np.isin(self._row_KK[word], gone_n)
        self._cost_KK[word, is_gone_K], self._row_KK[word, is_gone_K] = (
          np.inf,
          -1,
        )
        rows_n = np.flatnonzero(self.labels_N == word)
        self._compare(word, rows_n, np.flatnonzero(is_gone_K))
        self._compare(word, came_n, np.arange(len(self.prices_K)))

  def _alike(self, word: int, to: int) -> np.ndarray:
    """Rows of a codeword that another takes about as cheaply as the cheapest.

    That one comes last: it may be the cheapest to other codewords too.
    """
    rows_n = np.flatnonzero(self.labels_N == word)
    cost_n = self._costs(word, rows_n, [to])[:, 0]
    is_alike_n = cost_n <= self._cost_KK[word, to] + self._tie
    order_n = np.argsort(-cost_n[is_alike_n], kind="stable")
    rows_n = rows_n[is_alike_n][order_n]
    cheapest = self._row_KK[word, to]
    return np.append(rows_n[rows_n != cheapest], cheapest)

  def _cheapest_path(self) -> list[int]:
    """Codewords from one with too many to one with too few; sets prices.

    Dijkstra's algorithm; at the prices no move costs less than nothing.
    """
    cost_K = np.where(self._excess_K > 0, 0.0, np.inf)
    before_K = np.full(len(cost_K), -1)
    open_K = cost_K.copy()
    while True:
      at = int(open_K.argmin())
      if self._excess_K[at] < 0:
        break
      open_K[at] = np.inf
      step_K = self._cost_KK[at] + self.prices_K - self.prices_K[at]
      found_K = cost_K[at] + step_K.clip(0)  # Rounding may leave -1e-7.
      better = np.flatnonzero(found_K < cost_K)
      cost_K[better] = open_K[better] = found_K[better]
      before_K[better] = at
    self.prices_K -= np.minimum(cost_K, cost_K[at])
    path = [at]
    while before_K[path[-1]] >= 0:
      path.append(int(before_K[path[-1]]))
    return path[::-1]


def fit_level(
  key: Array, x_ND, num_codewords: int, *, num_iterations: int = 10
) -> tuple[np.ndarray, np.ndarray]:
  """k-means with balanced labels: codewords `[K, D]`, and labels `[N]`.

  Starts from plain k-means of as many iterations. The labels are as by
  `assign`.
  """
  x_ND = np.asarray(x_ND, np.float32)
  words_KD = np.asarray(
    kmeans.fit(key, x_ND, num_codewords, num_iterations=num_iterations)
  )
  for _ in range(num_iterations):
    words_KD = _means(x_ND, assign(x_ND, words_KD), num_codewords)
  return words_KD, assign(x_ND, words_KD)


def _means(x_ND, labels_N, num_codewords: int) -> np.ndarray:
  """Means `[K, D]` of the vectors of each label, all of which have some."""
  order_N = np.argsort(labels_N, kind="stable")
  sizes_K = np.bincount(labels_N, minlength=num_codewords)
  firsts_K = np.cumsum(sizes_K) - sizes_K
  sums_KD = np.add.reduceat(x_ND[order_N], firsts_K, dtype=np.float64)
  return (sums_KD / sizes_K[:, None]).astype(np.float32)


def fit(
  key: Array,
  x_ND,
  *,
  num_codes: int,
  codebook_size: int,
  num_iterations: int = 10,
) -> Array:
  """Codebooks `[M, K, D]` of balanced levels.

  First level by level, on what is left over. Then each level again, twice, on
  what all others leave over. Of more than 256 vectors per codeword an even
  sample is taken.
  """
  rows = batches.evenly_spaced_rows(len(x_ND), _FITTED_ROWS * codebook_size)
  residual_ND = np.asarray(x_ND, np.float32)[rows]
  codebooks, codes = [], []
  for m in range(num_codes):
    words_KD, labels_N = fit_level(
      jax.random.fold_in(key, m),
      residual_ND,
      codebook_size,
      num_iterations=num_iterations,
    )
    codebooks.append(words_KD)
    codes.append(labels_N)
    residual_ND = residual_ND - words_KD[labels_N]
  for m in list(range(num_codes)) * _SWEEPS:
    residual_ND += codebooks[m][codes[m]]
    codes[m] = assign(residual_ND, codebooks[m])
    codebooks[m] = _means(residual_ND, codes[m], codebook_size)
    residual_ND -= codebooks[m][codes[m]]
  return jnp.stack(codebooks)


def encode_all(codebooks_MKD, x_ND, *, progress=None) -> np.ndarray:
  """Codes `[N, M]`, int32, of a whole set, balanced level by level.

  Args:
    codebooks_MKD: An array, or a list of codebooks of different sizes.
    x_ND: Vectors in the space of the codebooks.
    progress: Called with `(levels done, levels in all)`.
  """
  residual_ND = np.array(x_ND, np.float32)
  codes = []
  for words_KD in map(np.asarray, codebooks_MKD):
    codes.append(assign(residual_ND, words_KD))
    residual_ND -= words_KD[codes[-1]]
    if progress:
      progress(len(codes), len(codebooks_MKD))
  return np.stack(codes, axis=1)
