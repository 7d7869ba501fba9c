"""Balanced levels: every codeword gets N / K vectors, rounded up or down.

The labels are the cheapest of such sizes, a transport problem. A price is added
to the distances of each codeword, and each vector takes the codeword that is
cheapest then; prices at which all sizes fit make the cheapest labels. They are
found in two parts. Transport with less and less noise brings them near (Cuturi,
arXiv 1306.0895). Then vectors move one by one, along the cheapest chain from a
codeword with too many to one with too few (Ahuja, Magnanti and Orlin, Network
Flows, 1993, section 9.7). Nothing is drawn: equal vectors in equal order get
equal labels.

A vector alone has no balanced label: labels are of a whole set. `rq.encode`
gives the nearest codewords, which new vectors get.
"""

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.codecs import kmeans
from vqjax.codecs.distances import centre_of, sq_distances
from vqjax.core import Array, check_range, check_shape
from vqjax.data import batches

_NOISES = 0.3 * 0.5 ** np.arange(
  9
)  # Of the median of mean less least distance.
_LAST_NOISES = _NOISES[-4:]  # For prices that are near already.
# Of all vectors, after a sample: one round each.
_WHOLE_NOISES = np.concatenate([np.repeat(_NOISES[2:6], 3), _NOISES[6:]])
_ROUNDS = 6  # Of prices at each noise.
_PRICED_PAIRS, _PRICED_ROWS = 1 << 24, 16  # Sample: N x K numbers, rows a word.
_FITTED_ROWS = 256  # Per codeword.
_SWEEPS = 2  # More gain less than a hundredth of the error.
_KEPT_PAIRS = 1 << 26  # Distances in memory; of more vectors computed anew.
_BLOCK = 16_384


def assign(x_ND, words_KD) -> np.ndarray:
  """Labels `[N]`, int32: the cheapest of which each codeword has N / K +- 1.

  Memory beside the vectors is at most 0.5 GB, and 12 bytes a vector.
  """
  return _solve(x_ND, words_KD, None)[0]


def _solve(x_ND, words_KD, prices_K):
  """Labels as of `assign`, and prices `[K]` that make them.

  Starts from prices of other codewords that are near, None for none.
  """
  x_ND, words_KD = np.asarray(x_ND, np.float32), np.asarray(words_KD)
  check_shape("x", x_ND, (None, None))
  check_shape("codewords", words_KD, (None, x_ND.shape[1]))
  check_range("The number of vectors", len(x_ND), 1, 1 << 40)
  num = max(_PRICED_PAIRS // len(words_KD), _PRICED_ROWS * len(words_KD))
  sample_nD = x_ND[batches.evenly_spaced_rows(len(x_ND), num)]
  noises = _NOISES if prices_K is None else _LAST_NOISES
  if prices_K is None:
    prices_K = np.zeros(len(words_KD))
  noises = jnp.asarray(np.repeat(noises, _ROUNDS), jnp.float32)
  prices_K, scale = _find_prices(
    sample_nD, words_KD, jnp.asarray(prices_K, jnp.float32), noises
  )
  if len(sample_nD) < len(x_ND):
    for noise in _WHOLE_NOISES * float(scale):
      sizes_K = sum(
        np.asarray(_soft_sizes(x_ND[i : i + _BLOCK], words_KD, prices_K, noise))
        for i in range(0, len(x_ND), _BLOCK)
      )
      prices_K = prices_K + noise * np.log(sizes_K * len(sizes_K) / len(x_ND))
  moves = _Moves(_make_distance_fn(x_ND, words_KD), len(x_ND), prices_K)
  moves.run()
  return moves.labels_N, moves.prices_K


@jax.jit
def _find_prices(x_ND, words_KD, prices_K, noises) -> Array:
  """Prices `[K]` at which the sizes are nearly balanced, and their scale."""
  distance_NK = sq_distances(x_ND, words_KD)
  scale = jnp.median(distance_NK.mean(axis=1) - distance_NK.min(axis=1))
  n, k = distance_NK.shape

  def body(prices_K, noise):
    # Vectors that are all equal have no scale.
    noise = jnp.maximum(noise * scale, 1e-30)
    score_NK = -(distance_NK + prices_K[None]) / noise
    score_NK -= jax.nn.logsumexp(score_NK, axis=1, keepdims=True)
    size_K = jax.nn.logsumexp(score_NK, axis=0) - jnp.log(n / k)
    prices_K = prices_K + noise * size_K
    return prices_K - prices_K.mean(), None

  return jax.lax.scan(body, prices_K, noises)[0], scale


@jax.jit
def _soft_sizes(x_ND, words_KD, prices_K, noise) -> Array:
  """Sizes `[K]` of codewords that share out vectors at these prices."""
  total_NK = sq_distances(x_ND, words_KD) + prices_K[None]
  return jax.nn.softmax(-total_NK / noise, axis=1).sum(axis=0)


def _make_distance_fn(x_ND, words_KD):
  """Returns `(rows, words) -> [n, k]`, squared distances; None: all words."""
  centre_1D = centre_of(words_KD)[None]
  near_KD = words_KD - centre_1D
  norms_K = (near_KD**2).sum(axis=1)

  def distance_fn(rows, words=None):
    words = slice(None) if words is None else words
    x_nD = x_ND[rows] - centre_1D
    dot_nk = x_nD @ near_KD[words].T
    return (x_nD**2).sum(axis=1)[:, None] - 2 * dot_nk + norms_K[words][None]

  if len(x_ND) * len(words_KD) > _KEPT_PAIRS:
    return distance_fn
  kept_NK = distance_fn(slice(None))

  def look_up(rows, words=None):
    return kept_NK[rows] if words is None else kept_NK[np.ix_(rows, words)]

  return look_up


class _Moves:
  """Labels that are cheapest at their prices, and moves that balance them."""

  def __init__(self, distance_fn, num: int, prices_K):
    self._distance_fn = distance_fn
    self.prices_K = np.asarray(prices_K, np.float64)
    self.labels_N = np.empty(num, np.int32)
    for start in range(0, num, _BLOCK):
      rows = slice(start, start + _BLOCK)
      total_nK = distance_fn(rows) + self.prices_K[None]
      self.labels_N[rows] = total_nK.argmin(axis=1)
    k = len(self.prices_K)
    sizes_K = np.bincount(self.labels_N, minlength=k)
    # The largest get one more, if N is no multiple of K.
    wanted_K = np.full(k, num // k)
    wanted_K[np.argsort(-sizes_K, kind="stable")[: num % k]] += 1
    self._excess_K = sizes_K - wanted_K
    # Of the cheapest move from a codeword to another: its cost, its vector.
    self._cost_KK, self._row_KK = np.empty((k, k)), np.empty((k, k), np.int64)
    order_N = np.argsort(self.labels_N, kind="stable")
    for word, rows_n in enumerate(np.split(order_N, np.cumsum(sizes_K)[:-1])):
      self._compare(word, rows_n, np.arange(k))

  def _compare(self, word: int, rows_n, to_k) -> None:
    """Finds the cheapest moves from a codeword, which has these rows."""
    if not len(rows_n):
      self._cost_KK[word, to_k], self._row_KK[word, to_k] = np.inf, -1
      return
    own_n1 = self._distance_fn(rows_n, [word])
    cost_nk = self._distance_fn(rows_n, to_k) - own_n1
    least_k = cost_nk.argmin(axis=0)
    self._cost_KK[word, to_k] = cost_nk[least_k, np.arange(len(to_k))]
    self._row_KK[word, to_k] = rows_n[least_k]

  def run(self) -> None:
    """Moves vectors until all sizes are as wanted."""
    for _ in range(int(self._excess_K.clip(0).sum())):
      path = self._cheapest_path()
      moved = [
        (self._row_KK[a, b], b) for a, b in zip(path, path[1:], strict=False)
      ]
      for row, word in moved:
        self.labels_N[row] = word
      self._excess_K[path[0]] -= 1
      self._excess_K[path[-1]] += 1
      rows = [row for row, _ in moved]
      for word in path:
        rows_n = np.flatnonzero(self.labels_N == word)
        self._compare_again(word, rows_n, rows)

  def _compare_again(self, word: int, rows_n, moved: list) -> None:
    """As `_compare`, after these rows have moved."""
    is_gone_K = np.isin(self._row_KK[word], [*moved, -1])
    self._compare(word, rows_n, np.flatnonzero(is_gone_K))
    came_n = rows_n[np.isin(rows_n, moved)]
    if not len(came_n):
      return
    cost_nK = self._distance_fn(came_n)
    cost_K = (cost_nK - cost_nK[:, [word]]).min(axis=0)
    better_K = cost_K < self._cost_KK[word]
    self._cost_KK[word, better_K] = cost_K[better_K]
    self._row_KK[word, better_K] = came_n[0]

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
  prices_K = None
  for _ in range(num_iterations):
    labels_N, prices_K = _solve(x_ND, words_KD, prices_K)
    words_KD = _means(x_ND, labels_N, num_codewords)
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
