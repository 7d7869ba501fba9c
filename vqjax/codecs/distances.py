"""Squared L2 distances, and the nearest of many words in bounded memory.

Distances are in squared data units and computed from float32 products at full
precision: the default of JAX may be TF32 or bfloat16 on accelerators.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from vqjax.core import Array, check_shape


def sq_norms(x_D: Array) -> Array:
  """Squared L2 norms over the last axis: `[..., D]` to `[...]`."""
  return jnp.sum(x_D**2, axis=-1)


def sq_distances(x_ND: Array, y_KD: Array) -> Array:
  """Squared L2 distances between all pairs: `[N, K]`, never negative."""
  check_shape("x", x_ND, (None, None))
  check_shape("y", y_KD, (None, x_ND.shape[1]))
  dot_NK = jnp.matmul(x_ND, y_KD.T, precision="highest")
  # Cancellation can leave -1e-7 between equal rows; clip it.
  return jnp.maximum(
    sq_norms(x_ND)[:, None] - 2 * dot_NK + sq_norms(y_KD)[None], 0
  )


def nearest(
  x_ND: Array, y_KD: Array, *, block_size: int | None = None
) -> Array:
  """Row of `y_KD` closest to each row of `x_ND`: `[N]` int32.

  Ties go to the lower row. Memory is `block_size * K` numbers; None takes
  4,096 rows at once, or as many as make 2^26 numbers.
  """
  check_shape("x", x_ND, (None, None))
  check_shape("y", y_KD, (None, x_ND.shape[1]))
  half_K = sq_norms(y_KD) / 2
  if block_size is None:
    block_size = min(4096, max((1 << 26) // y_KD.shape[0], 8))

  def body(_, x_ND):
    return None, least(half_scores(x_ND, y_KD, half_K))[0]

  return scan_blocks(body, None, x_ND, block_size=block_size)[1]


def half_scores(x_ND: Array, y_KD: Array, half_K: Array) -> Array:
  """Half of the squared distances, less `|x|^2 / 2`: `[N, K]`.

  That term is the same for all words, so the order is that of the distances.
  `half_K` is `sq_norms(y_KD) / 2`.
  """
  return half_K[None] - jnp.matmul(x_ND, y_KD.T, precision="highest")


def least(score_NK: Array) -> tuple[Array, Array]:
  """Column `[N]` of the least entry of each row, and that entry `[N]`.

  The lower of equal columns wins. Two plain reductions vectorise where the
  paired one of `jnp.argmin` does not: 25 against 83 ms for 61,440 x 256 with
  the product of 128 dimensions included, on 2 CPU cores.
  """
  k = score_NK.shape[1]
  best_N = jnp.min(score_NK, axis=1)
  column_1K = jnp.arange(k, dtype=jnp.int32)[None]
  ids_N = jnp.min(jnp.where(score_NK <= best_N[:, None], column_1K, k), axis=1)
  # A row of NaN equals nothing; keep its id in range.
  return jnp.minimum(ids_N, k - 1), best_N


def scan_blocks(
  body: Callable[[Any, Any], tuple[Any, Any]],
  carry: Any,
  rows: Any,
  *,
  block_size: int,
) -> tuple[Any, Any]:
  """Runs `body(carry, block) -> (carry, out)` over blocks of rows.

  `rows` is an array or a pytree of arrays with the same first axis; the last
  block may be smaller. Returns the last carry and the outputs, joined along
  their first axis.
  """
  n = jax.tree.leaves(rows)[0].shape[0]
  if block_size < 1:
    raise ValueError(f"block_size must be at least 1, got {block_size}.")
  if n <= block_size:
    return body(carry, rows)
  # Slices are cut inside of the loop: a reshape would copy all rows.
  cut = lambda start, size: jax.tree.map(
    lambda x: lax.dynamic_slice_in_dim(x, start, size), rows
  )
  starts = jnp.arange(n // block_size) * block_size
  carry, outs = lax.scan(
    lambda carry, start: body(carry, cut(start, block_size)), carry, starts
  )
  outs = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), outs)
  tail = n % block_size
  if not tail:
    return carry, outs
  carry, last = body(carry, cut(n - tail, tail))
  join = lambda x, y: jnp.concatenate([x, y])
  return carry, jax.tree.map(join, outs, last)
