"""Lloyd's k-means with weights, in bounded memory.

The objective is the weighted sum of squared distances to the nearest codeword,
in squared data units. It never grows from one iteration to the next. Distances
are compared, and means are taken, after the subtraction of a centre (see
`distances.centre_of`); errors are sums of squared differences.

A codeword that no vector chose is refilled: the e-th such codeword moves to the
vector with the e-th largest weighted squared distance to its codeword. Nothing
is drawn, and as an empty codeword adds nothing to the objective, refilling
cannot raise it.

`fit` takes vectors in memory, as one program; `pass_over` makes one iteration
over a file, and sums in float64 on the host.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax
from scipy import sparse

from vqjax import devices
from vqjax.codecs.distances import (
  centre_of,
  make_nearest_fn,
  scan_blocks,
  sq_norms,
)
from vqjax.core import Array, add_exactly, check_range, check_shape
from vqjax.data import batches

NUM_STAGES = 5  # Of `fit_rising`; 10 gain half a percent more.
_ROWS_ADDED = 4096  # At a time, in float64 on the host.
_CPU_BUDGET, _DEVICE_BUDGET = 1 << 20, 4 << 30  # Bytes of distances at once.
_WORDS_AT_ONCE = 1024  # On CPUs, so that these distances stay in the caches.


@struct.dataclass
class KMeans:
  """Codewords, and how the iterations went.

  Entry i of `objectives` and the counts belong to the assignment that
  iteration i started with, thus of the codewords before its update.
  """

  words_KD: Array
  counts_K: Array  # Weight of the vectors of each codeword, last assignment.
  objectives: Array  # One number per iteration.
  num_refilled: Array  # Empty codewords refilled, over all iterations; int32.


def fit(key: Array, x_ND: Array, num_codewords: int, **knobs) -> Array:
  """Codewords `[K, D]` that lie near the vectors `[N, D]`; see `fit_report`."""
  return fit_report(key, x_ND, num_codewords, **knobs).words_KD


def fit_rising(
  key: Array,
  x_ND: Array,
  num_codewords: int,
  *,
  num_iterations: int = 10,
  weights_N: Array | None = None,
  **knobs,
) -> Array:
  """Codewords `[K, D]` by k-means in more and more principal dimensions.

  The codewords of one stage, with zeros for the dimensions that are added, are
  the start of the next; the last has all. Each of the `NUM_STAGES` has
  `num_iterations`. If D is large and vectors are few, as the residuals of text
  embeddings, the codewords are nearer to vectors that were not seen than those
  of `fit`. Takes what `fit_report` takes.
  """
  d = x_ND.shape[1]
  if weights_N is None:
    weights_N = jnp.ones(x_ND.shape[0], jnp.float32)
  mean_D, axes_DD = _principal_axes(x_ND, weights_N)
  turned_ND = _turn(x_ND - mean_D[None], axes_DD)
  stages = range(1, NUM_STAGES + 1) if num_iterations else [NUM_STAGES]
  sizes = sorted({round(d ** (i / NUM_STAGES)) for i in stages})
  words = None
  for size in sizes:
    if words is not None:
      words = jnp.pad(words, ((0, 0), (0, size - words.shape[1])))
    words = fit_report(
      key,
      turned_ND[:, :size],
      num_codewords,
      num_iterations=num_iterations,
      weights_N=weights_N,
      start_KD=words,
      **knobs,
    ).words_KD
  return _turn(words, axes_DD.T) + mean_D[None]


@jax.jit
def _principal_axes(x_ND: Array, weights_N: Array):
  """Weighted mean `[D]`, and orthogonal axes `[D, D]`, the widest first."""
  share_N1 = (weights_N / weights_N.sum())[:, None]
  mean_D = jnp.sum(share_N1 * x_ND, axis=0)
  away_ND = x_ND - mean_D[None]
  wide_DD = jnp.matmul((share_N1 * away_ND).T, away_ND, precision="highest")
  return mean_D, jnp.linalg.eigh(wide_DD)[1][:, ::-1]


@jax.jit
def _turn(x_ND: Array, axes_DE: Array) -> Array:
  return jnp.matmul(x_ND, axes_DE, precision="highest")


def fit_report(
  key: Array,
  x_ND: Array,
  num_codewords: int,
  *,
  num_iterations: int = 10,
  weights_N: Array | None = None,
  start_KD: Array | None = None,
  block_size: int = 4096,
) -> KMeans:
  """Runs k-means on finite vectors `[N, D]` and reports on it.

  Calls with equal shapes and knobs share one compiled program.

  The key draws the start, nothing else; `num_iterations` 0 returns the start.
  Weights are not negative, at least K of them positive; None for all equal.
  `start_KD` is a start of your own. `block_size` rows are compared with all
  codewords at a time.

  Raises:
    ValueError: If a size or a name makes no sense.
  """
  check_shape("x", x_ND, (None, None))
  n = x_ND.shape[0]
  check_range(
    "num_codewords",
    num_codewords,
    1,
    n,
    f"{n} vectors cannot fill {num_codewords} codewords",
  )
  check_range("num_iterations", num_iterations, 0, 100_000)
  if weights_N is None:
    weights_N = jnp.ones(n, jnp.float32)
  check_shape("weights", weights_N, (n,))
  if start_KD is not None:
    check_shape("start", start_KD, (num_codewords, x_ND.shape[1]))
  return _fit(
    key,
    jnp.asarray(x_ND, jnp.float32),
    jnp.asarray(weights_N, jnp.float32),
    start_KD,
    num_codewords=num_codewords,
    num_iterations=num_iterations,
    block_size=block_size,
  )


def lloyd_step(
  x_ND: Array, weights_N: Array, words_KD: Array, *, block_size: int = 4096
) -> KMeans:
  """One assignment to `words_KD` and one update, as a report of length 1."""
  nearest_fn = make_nearest_fn(words_KD)
  num_codewords = words_KD.shape[0]
  centre_1D = centre_of(words_KD)[None]

  def body(carry, block):
    sums_KD, counts_2K = carry
    x_ND, weights_N = block
    ids_N = nearest_fn(x_ND)
    error_N = sq_norms(x_ND - words_KD[ids_N])
    more_KD, more_K = sums_of(ids_N, x_ND - centre_1D, weights_N, num_codewords)
    counts_2K = add_exactly(counts_2K, more_K)
    return (sums_KD + more_KD, counts_2K), error_N * weights_N

  zeros = jnp.zeros_like(words_KD), jnp.zeros((2, num_codewords), jnp.float32)
  (sums_KD, counts_2K), error_N = scan_blocks(
    body, zeros, (x_ND, weights_N), block_size=block_size
  )
  counts_K = counts_2K.sum(axis=0)
  is_empty_K = counts_K == 0
  safe_K = jnp.where(is_empty_K, 1, counts_K)
  means_KD = sums_KD / safe_K[:, None] + centre_1D
  means_KD = jnp.where(is_empty_K[:, None], words_KD, means_KD)
  return KMeans(
    words_KD=_refill(means_KD, is_empty_K, x_ND, error_N),
    counts_K=counts_K,
    objectives=jnp.sum(error_N)[None],
    num_refilled=jnp.sum(is_empty_K, dtype=jnp.int32),
  )


def assign(
  x_ND: Array,
  words_KD: Array,
  *,
  block_size: int = 4096,
  num_at_once: int | None = None,
) -> tuple[Array, Array]:
  """Nearest codewords `[N]`, int32, and squared distances to them `[N]`.

  The lower of two codewords that are equally near wins. `block_size` vectors
  are compared with `num_at_once` codewords, None for all: memory is as many
  numbers; few of both stay in the caches.
  """
  check_shape("x", x_ND, (None, None))
  check_shape("codewords", words_KD, (None, x_ND.shape[1]))
  words_KD = jnp.asarray(words_KD)
  nearest_fn = make_nearest_fn(words_KD, num_at_once)

  def body(_, x_ND):
    ids_N = nearest_fn(x_ND)
    return None, (ids_N, sq_norms(x_ND - words_KD[ids_N]))

  return scan_blocks(body, None, x_ND, block_size=block_size)[1]


def block_of(num_codewords: int, num_subvectors: int = 1) -> tuple[int, int]:
  """Returns how many vectors, and codewords, to compare with each other."""
  is_cpu = jax.default_backend() == "cpu"
  words = min(_WORDS_AT_ONCE, num_codewords) if is_cpu else num_codewords
  budget = _CPU_BUDGET if is_cpu else _DEVICE_BUDGET
  rows = int(np.clip(budget // (4 * words * num_subvectors), 128, 65536))
  return rows, words


def make_assign_fn(words_KD):
  """Returns `x_ND -> (ids_N, squared distances_N)` over the own devices."""
  rows, words = block_of(len(words_KD))
  return partial(_assign_fn(rows, words), devices.to_local_devices(words_KD))


@cache
def _assign_fn(block_size: int, num_at_once: int):
  """One compiled program for all iterations."""
  return devices.data_parallel(
    lambda words_KD, x_ND: assign(
      x_ND, words_KD, block_size=block_size, num_at_once=num_at_once
    )
  )


def pass_over(
  vectors,
  words,
  assign_fn,
  *,
  block_size: int = 65536,
  progress=None,
  labels_NM: np.ndarray | None = None,
  is_shared: bool = False,
) -> KMeans:
  """One assignment and update over an open file `[N, D]`, on the host.

  Codewords are `[K, D]`, or `[M, K, S]` of M sub-vectors, and so are the new
  ones. Sums are float64 in the order of the rows: equal ids give equal
  codewords. Keeps 16 bytes of each number of a codeword, and 4 M of each
  vector.

  `assign_fn` takes float32 `[n, D]` and returns what `assign` does, or that of
  each sub-vector, `[n, M]`; of vectors `WithLists` it takes these. `progress`
  is called with `(rows done, rows in all)`. Ids are written to `labels_NM`,
  int32, if it is given. NaN is refused by its row.

  If it `is_shared`, every process passes over its share of the rows, and all
  get the same codewords: those of one process up to rounding.
  """
  x_all, _ = batches.split_lists(vectors)
  rows = devices.process_rows(len(vectors)) if is_shared else None
  num, first = (len(rows), rows.start) if is_shared else (len(vectors), 0)
  m = words.shape[0] if words.ndim == 3 else 1
  k, s = words.shape[-2:]
  check_shape("codewords", words, (*words.shape[:-1], x_all.shape[1] // m))
  sums_MKS, counts_MK = np.zeros((m, k, s)), np.zeros((m, k), np.int64)
  error_NM = np.empty((num, m), np.float32)
  fn = lambda rows: (batches.split_lists(rows)[0], *assign_fn(rows))
  for start, (x_ND, ids_N, error_N) in batches.map_blocks(
    fn, vectors, block_size=block_size, rows=rows, progress=progress
  ):
    ids_NM = ids_N.reshape(-1, m)
    if labels_NM is not None:
      labels_NM[start : start + len(ids_NM)] = ids_NM
    start -= first
    error_NM[start : start + len(ids_NM)] = error_N.reshape(-1, m)
    for i, ids_N in enumerate(ids_NM.T):
      _add_rows(sums_MKS[i], ids_N, x_ND[:, i * s : (i + 1) * s])
      counts_MK[i] += np.bincount(ids_N, minlength=k)
  error = np.sum(error_NM, dtype=np.float64)
  if is_shared:
    sums_MKS, counts_MK = _over_processes(sums_MKS, counts_MK, words)
    error = devices.gather(error).sum()
  means_MKS = sums_MKS / np.maximum(counts_MK, 1)[..., None]
  means_MKS = means_MKS.astype(np.float32)
  for i, counts_K in enumerate(counts_MK):
    empty = np.flatnonzero(counts_K == 0)
    if len(empty):
      far = _farthest(error_NM[:, i], len(empty), first, is_shared)
      far_ND = batches.read_rows(x_all, far)
      means_MKS[i, empty[: len(far)]] = far_ND[:, i * s : (i + 1) * s]
  return KMeans(
    means_MKS.reshape(words.shape),
    counts_MK.reshape(words.shape[:-1]),
    error[None],
    np.int32((counts_MK == 0).sum()),
  )


def _over_processes(sums_MKS, counts_MK, words):
  """Sums and counts of all processes, by one all-reduce.

  What is summed in float32 is the way from the codewords, which is short.
  """
  words_MKS = words.reshape(sums_MKS.shape).astype(np.float64)
  away_MKS = sums_MKS - counts_MK[..., None] * words_MKS
  away_MKS, counts_MK = devices.sum_over_processes(
    (away_MKS.astype(np.float32), counts_MK.astype(np.int32))
  )
  counts_MK = counts_MK.astype(np.int64)
  return away_MKS + counts_MK[..., None] * words_MKS, counts_MK


def _farthest(error_N, num: int, first: int, is_shared: bool) -> np.ndarray:
  """The `num` rows of the largest errors; ties go to the lower row."""
  at = np.argsort(-error_N, kind="stable")[:num]
  if not is_shared:
    return at
  found = np.full((2, num), -np.inf)  # Rows and errors, exact in float64.
  found[:, : len(at)] = first + at, error_N[at]
  rows, errors = devices.gather(found).transpose(1, 0, 2).reshape(2, -1)
  rows = rows[np.argsort(-errors, kind="stable")[:num]]
  return rows[np.isfinite(rows)].astype(np.int64)


def _add_rows(sums_KD, ids_N, x_ND) -> None:
  """Adds each row to the sum of its codeword, in float64."""
  for start in range(0, len(ids_N), _ROWS_ADDED):
    x_nD = x_ND[start : start + _ROWS_ADDED].astype(np.float64)
    # Sums of those that are chosen alone: there may be a million codewords.
    chosen, at_n = np.unique(
      ids_N[start : start + _ROWS_ADDED], return_inverse=True
    )
    hot = (np.ones(len(at_n)), at_n, np.arange(len(at_n) + 1))
    shape = len(chosen), len(at_n)
    sums_KD[chosen] += sparse.csc_array(hot, shape=shape) @ x_nD


@partial(
  jax.jit,
  static_argnames=("num_codewords", "num_iterations", "block_size"),
)
def _fit(
  key, x_ND, weights_N, start_KD, *, num_codewords, num_iterations, block_size
) -> KMeans:
  """`fit_report` after its checks."""
  words_KD = start_KD
  if words_KD is None:
    words_KD = _start(key, x_ND, weights_N, num_codewords)

  def body(state, _):
    words_KD, _, num_refilled = state
    step = lloyd_step(x_ND, weights_N, words_KD, block_size=block_size)
    num_refilled = num_refilled + step.num_refilled
    state = step.words_KD, step.counts_K, num_refilled
    return state, step.objectives[0]

  state = (
    words_KD,
    jnp.zeros(num_codewords, jnp.float32),
    jnp.zeros((), jnp.int32),
  )
  state, objectives = lax.scan(body, state, length=num_iterations)
  words_KD, counts_K, num_refilled = state
  return KMeans(words_KD, counts_K, objectives, num_refilled)


def sums_by_scatter(ids_N, x_ND, weights_N, num_codewords: int):
  """Weighted sum `[K, D]` and weight `[K]` of the rows of each codeword."""
  add = partial(jax.ops.segment_sum, num_segments=num_codewords)
  return add(x_ND * weights_N[:, None], ids_N), add(weights_N, ids_N)


def sums_by_product(ids_N, x_ND, weights_N, num_codewords: int):
  """The same as a product with one-hot rows."""
  is_word_KN = jnp.arange(num_codewords)[:, None] == ids_N[None]
  hot_KN = is_word_KN.astype(jnp.float32) * weights_N[None]
  sums_KD = jnp.matmul(hot_KN, x_ND, precision="highest")
  return sums_KD, jnp.sum(hot_KN, axis=1)


def sums_of(ids_N, x_ND, weights_N, num_codewords: int):
  """The faster one on a CPU, by a factor of 2 to 4; elsewhere the product.

  On a GPU the order in which a scatter adds, and with it the result, changes
  from run to run.
  """
  return lax.platform_dependent(
    ids_N,
    x_ND,
    weights_N,
    cpu=partial(sums_by_scatter, num_codewords=num_codewords),
    default=partial(sums_by_product, num_codewords=num_codewords),
  )


def _refill(words_KD, is_empty_K, x_ND, error_N):
  """Moves empty codewords to the vectors that are worst off."""

  def refill():
    _, far_K = lax.top_k(error_N, words_KD.shape[0])
    rank_K = jnp.cumsum(is_empty_K) - 1  # The e-th empty codeword takes row e.
    taken_KD = x_ND[far_K[jnp.maximum(rank_K, 0)]]
    return jnp.where(is_empty_K[:, None], taken_KD, words_KD)

  return lax.cond(jnp.any(is_empty_K), refill, lambda: words_KD)


def _start(key, x_ND, weights_N, num_codewords):
  """Distinct rows, drawn one after another in proportion to their weight."""
  # Reference: the Gumbel-top-k trick, arXiv 1903.06059.
  noise_N = jax.random.gumbel(key, weights_N.shape)
  _, rows_K = lax.top_k(jnp.log(weights_N) + noise_N, num_codewords)
  return x_ND[rows_K]


def replace_dead(words_KD, is_dead_K, parents_K, draw_KD) -> Array:
  """Replaces dead codewords by copies of their parents.

  `draw_KD` is added to the copies, in standard deviations of the codewords.
  """
  spread_1D = jnp.std(words_KD, axis=0, keepdims=True)
  copies_KD = words_KD[parents_K] + draw_KD * spread_1D
  return jnp.where(is_dead_K[:, None], copies_KD, words_KD)
