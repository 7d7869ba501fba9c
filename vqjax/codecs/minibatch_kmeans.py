"""Mini-batch k-means: centroids of data that is drawn, or comes, in batches.

A step labels a batch by the centroids, adds its vectors to running sums, and
labels the batch of `history_size` steps ago again, which is moved to its new
labels; the centroids are the means. Nothing decays. The smoothed share of the
labels that changed, .95 of the last value and .05 of the new one from 1 on, is
the history; training stops when it falls below a tolerance. If the smallest
count is at most a share of the largest, the fullest cluster is halved, and the
emptiest takes that half.

All of it goes for M sub-vectors of S dimensions at once, each with centroids of
its own; plain k-means is M = 1. Distances are squared L2, or negative inner
products for the cosine, whose centroids are divided by their norm + 1e-5; the
vectors are taken as they are. Sums and counts are float32.

Batches are spread over the devices of the process; sums are reduced over them.

Reference: the rules are those of the FastIVF package,
github.com/kmkolasinski/fast-ivf; Sculley, Web-Scale K-Means Clustering, 2010.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from vqjax import devices
from vqjax.codecs import distances, kmeans
from vqjax.core import Array, check_range, check_shape

METRICS = ("cosine", "l2")
CHUNK = 16  # Steps of one compiled program.
_EPSILON = 1e-5  # Added to norms, and to counts of sub-vectors.
_SMOOTHING = 0.95


@dataclasses.dataclass(frozen=True)
class Rule:
  """What does not change from step to step."""

  metric: str = "cosine"
  num_subvectors: int = 1  # M
  history_size: int = 10  # H
  split_ratio: float = 0.005  # Smallest to largest count, at most, of a split.

  def __post_init__(self):
    """Raises ValueError if a value makes no sense."""
    if self.metric not in METRICS:
      raise ValueError(
        f"metric must be one of {', '.join(METRICS)}, got {self.metric!r}."
      )
    check_range("num_subvectors", self.num_subvectors, 1, 65536)
    check_range("history_size", self.history_size, 1, 100_000)

  @property
  def is_cosine(self) -> bool:
    """Whether vectors are compared by inner product."""
    return self.metric == "cosine"


@struct.dataclass
class State:
  """Centroids, and the sums and counts whose quotients they are."""

  words_MKS: Array
  sums_MKS: Array
  counts_MK: Array


@struct.dataclass
class Trace:
  """What happened in T steps."""

  num_changed_T: Array  # Labels that changed, over all sub-vectors.
  num_labels_T: Array  # Labels that were found anew.
  splits_TM2: Array  # Fullest and emptiest cluster, -1 without a split.


def start(rule: Rule, first_KD) -> State:
  """State of the initial centroids `[K, D]`: each is a cluster of one."""
  check_shape("centroids", first_KD, (None, None))
  m = rule.num_subvectors
  if first_KD.shape[1] % m:
    raise ValueError(
      f"Vectors of {first_KD.shape[1]} dimensions cannot be cut into {m} "
      "sub-vectors of equal length; choose a divisor of the dimensions."
    )
  sums_MKS = jnp.swapaxes(_cut(jnp.asarray(first_KD, jnp.float32), m), 0, 1)
  counts_MK = jnp.ones(sums_MKS.shape[:2], jnp.float32)
  words_MKS = _words(rule, sums_MKS, counts_MK, sums_MKS)
  return State(words_MKS, sums_MKS, counts_MK)


def step(
  rule: Rule, state: State, x_BD, old_BD, old_labels_BM, is_row_B2, reduce_fn
) -> tuple[State, Array, tuple]:
  """One step on a batch, and on the batch that waited: see above.

  `old_labels_BM` are the labels that `old_BD` was added under. `is_row_B2` says
  which rows of the two count. `reduce_fn` sums over devices.

  Returns the state, the labels `[B, M]` of `x_BD`, and a step of a `Trace`.
  """
  b = x_BD.shape[0]
  m, k, _ = state.words_MKS.shape
  x_NMS = _cut(jnp.concatenate([x_BD, old_BD]), m)
  labels_NM = label(rule, x_NMS, state.words_MKS)
  new_BM, again_BM = labels_NM[:b], labels_NM[b:]
  is_old_B1 = is_row_B2[:, 1:]
  has_changed_BM = (again_BM != old_labels_BM) & is_old_B1
  moved_BM = has_changed_BM.astype(jnp.float32)
  is_new_BM = jnp.broadcast_to(is_row_B2[:, :1], new_BM.shape)
  sums_MKS, counts_MK = _sums(
    jnp.concatenate([new_BM, old_labels_BM, again_BM]),
    jnp.concatenate([x_NMS, x_NMS[b:]]),
    jnp.concatenate([is_new_BM.astype(jnp.float32), -moved_BM, moved_BM]),
    k,
  )
  sums_MKS, counts_MK, num_changed, num_labels = reduce_fn(
    (
      sums_MKS,
      counts_MK,
      jnp.sum(has_changed_BM, dtype=jnp.int32),
      m * jnp.sum(is_old_B1, dtype=jnp.int32),
    )
  )
  sums_MKS, counts_MK, splits_M2 = _split(
    rule, state.sums_MKS + sums_MKS, state.counts_MK + counts_MK
  )
  words_MKS = _words(rule, sums_MKS, counts_MK, state.words_MKS)
  state = State(words_MKS, sums_MKS, counts_MK)
  return state, new_BM, (num_changed, num_labels, splits_M2)


class Queue(NamedTuple):
  """The last H batches on the devices, and their labels."""

  batches: tuple[Any, ...]  # Each [B, D].
  is_row_BH: Any
  labels_BHM: Any


def run_steps(
  rule: Rule, state: State, queue: Queue, batches, is_row_BT, num_steps
) -> tuple[State, Queue, Trace]:
  """Runs the first `num_steps` of T steps, one for each batch `[B, D]`.

  One compiled program for any `num_steps`. Entries of the trace behind them are
  zero.
  """
  rows = (
    (*queue.batches, *batches),
    np.concatenate([queue.is_row_BH, is_row_BT], axis=1),
    queue.labels_BHM,
  )
  copied = state, jnp.int32(num_steps)
  (state, trace), labels_BHM = _program(rule)(copied, rows)
  stop = num_steps + rule.history_size
  queue = Queue(rows[0][num_steps:stop], rows[1][:, num_steps:stop], labels_BHM)
  return state, queue, trace


@functools.lru_cache(maxsize=32)
def _program(rule: Rule):
  """One compiled program for each rule, shape and number of batches."""
  return devices.data_parallel_sums(functools.partial(_scan, rule))


def _scan(rule: Rule, copied, rows):
  """`run_steps` on one device's share of the rows."""
  state, num_steps = copied
  batches, is_row_BC, labels_BHM = rows
  x_CBD = jnp.stack(batches)
  h, m = rule.history_size, rule.num_subvectors
  num = len(batches) - h
  labels_CBM = jnp.zeros((len(batches), x_CBD.shape[1], m), jnp.int32)
  labels_CBM = labels_CBM.at[:h].set(jnp.swapaxes(labels_BHM, 0, 1))
  reduce_fn = lambda tree: lax.psum(tree, devices.DATA_AXIS)

  def run(carry, t):
    state, labels_CBM = carry
    is_row_B2 = jnp.stack([is_row_BC[:, t + h], is_row_BC[:, t]], axis=1)
    state, labels_BM, seen = step(
      rule, state, x_CBD[t + h], x_CBD[t], labels_CBM[t], is_row_B2, reduce_fn
    )
    return (state, labels_CBM.at[t + h].set(labels_BM)), seen

  def skip(carry, _):
    zero = jnp.int32(0)
    return carry, (zero, zero, jnp.full((m, 2), -1, jnp.int32))

  body = lambda carry, t: lax.cond(t < num_steps, run, skip, carry, t)
  (state, labels_CBM), seen = lax.scan(
    body, (state, labels_CBM), jnp.arange(num)
  )
  last_HBM = lax.dynamic_slice_in_dim(labels_CBM, num_steps, h)
  return (state, Trace(*seen)), jnp.swapaxes(last_HBM, 0, 1)


def label(rule: Rule, x_NMS: Array, words_MKS: Array) -> Array:
  """Nearest centroids, `[N, M]` int32; ties go to the lower one."""
  m, k, _ = words_MKS.shape
  rows, num_at_once = kmeans.block_of(k, m)

  def one(x_NS, words_KS):
    nearest_fn = distances.make_nearest_fn(
      words_KS, num_at_once, by_product=rule.is_cosine
    )
    body = lambda _, x_NS: (None, nearest_fn(x_NS))
    return distances.scan_blocks(body, None, x_NS, block_size=rows)[1]

  if m == 1:
    return one(x_NMS[:, 0], words_MKS[0])[:, None]
  return jax.vmap(one, in_axes=(1, 0), out_axes=1)(x_NMS, words_MKS)


def assign(rule: Rule, x_ND: Array, words_MKS: Array) -> tuple[Array, Array]:
  """Nearest centroids `[N, M]`, int32, and squared distances to them."""
  m = words_MKS.shape[0]
  x_NMS = _cut(x_ND, m)
  labels_NM = label(rule, x_NMS, words_MKS)
  chosen_NMS = words_MKS[jnp.arange(m)[None], labels_NM]
  return labels_NM, distances.sq_norms(x_NMS - chosen_NMS)


def smoothed(last: float, share: float) -> float:
  """The next number of the history, of a share of changed labels."""
  return _SMOOTHING * last + (1 - _SMOOTHING) * share


def scores(rule: Rule, x_ND: Array, words_MKS: Array) -> Array:
  """Inner products, or squared L2 distances, of all pairs: `[M, N, K]`."""
  x_NMS = _cut(x_ND, words_MKS.shape[0])
  if rule.is_cosine:
    return jnp.einsum("nms,mks->mnk", x_NMS, words_MKS, precision="highest")
  one = jax.vmap(distances.sq_distances, in_axes=(1, 0))
  return one(x_NMS, words_MKS)


def as_centroids(rule: Rule, means_MKS) -> np.ndarray:
  """Means of clusters as centroids: of the cosine divided by their norms."""
  means_MKS = np.asarray(means_MKS, np.float32)
  return np.asarray(_unit(means_MKS)) if rule.is_cosine else means_MKS


def _cut(x_ND, num_subvectors: int):
  return x_ND.reshape(x_ND.shape[0], num_subvectors, -1)


def _unit(words_MKS):
  norms_MK1 = jnp.linalg.norm(words_MKS, axis=-1, keepdims=True)
  return words_MKS / (norms_MK1 + _EPSILON)


def _words(rule: Rule, sums_MKS, counts_MK, last_MKS) -> Array:
  """Means of the clusters; one that lost all of its vectors stays."""
  if rule.num_subvectors > 1:
    counts_MK = counts_MK + _EPSILON
  is_full_MK1 = (counts_MK > 0)[..., None]
  safe_MK1 = jnp.where(is_full_MK1, counts_MK[..., None], 1)
  words_MKS = sums_MKS / safe_MK1
  if rule.is_cosine:
    words_MKS = _unit(words_MKS)
  return jnp.where(is_full_MK1, words_MKS, last_MKS)


def _sums(labels_NM, x_NMS, weights_NM, k: int):
  """Weighted sums `[M, K, S]` and weights `[M, K]` of the clusters."""
  n, m = labels_NM.shape
  flat_NM = labels_NM + k * jnp.arange(m, dtype=jnp.int32)[None]
  sums_FS, weights_F = kmeans.sums_of(
    flat_NM.reshape(-1), x_NMS.reshape(n * m, -1), weights_NM.reshape(-1), m * k
  )
  return sums_FS.reshape(m, k, -1), weights_F.reshape(m, k)


def _split(rule: Rule, sums_MKS, counts_MK):
  """Gives half of the fullest cluster to the emptiest, where that is due."""
  m = jnp.arange(counts_MK.shape[0])
  full_M, empty_M = counts_MK.argmax(axis=1), counts_MK.argmin(axis=1)
  least_M, most_M = counts_MK.min(axis=1), counts_MK.max(axis=1)
  is_due_M = least_M / most_M <= rule.split_ratio
  half_M = jnp.where(is_due_M, 0.5, 0.0)

  def move(x_MKX, half_MX):
    part_MX = x_MKX[m, full_M] * half_MX
    return x_MKX.at[m, full_M].add(-part_MX).at[m, empty_M].add(part_MX)

  splits_M2 = jnp.stack([full_M, empty_M], axis=1).astype(jnp.int32)
  return (
    move(sums_MKS, half_M[:, None]),
    move(counts_MK, half_M),
    jnp.where(is_due_M[:, None], splits_M2, -1),
  )
