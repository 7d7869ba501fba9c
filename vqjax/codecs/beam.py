"""Beam search over sums of codewords, wherever these come from.

A hypothesis is a partial reconstruction. Every step a codec proposes codewords
that would extend the hypotheses, and the `F` extensions nearest to the vector
are kept. What differs between codecs is `propose` alone:

  propose(weights, x_ND, beam) -> Candidates

`weights` is the codec's slice for this step. A candidate names its parent
hypothesis, so a codec may offer the same number of codewords to each hypothesis
or divide its candidates between them. Codewords that are not kept are never
gathered: `Candidates.words_fn` is asked for the kept ones only.

Residual quantisation with a beam: Liu et al., arXiv 1509.05195; for codebook
networks: QINCo2, arXiv 2501.03078, section 3.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from vqjax.core import Array


@struct.dataclass
class Beam:
  """The `F` best hypotheses per vector, best first.

  An empty slot has error `inf`.
  """

  xhat_NFD: Array  # Partial reconstructions.
  error_NF: Array  # Squared distance to the vector.


class Candidates(NamedTuple):
  """Possible extensions; `error_NC` is the squared distance after them."""

  parents_NC: Array  # Hypothesis that is extended.
  ids_NC: Array  # Codeword that extends it.
  error_NC: Array
  words_fn: Callable[[Array], Array]  # Slots `[N, F]` to codewords `[N, F, D]`.


Propose = Callable[[Any, Array, Beam], Candidates]


def start(x_ND: Array) -> Beam:
  """Returns the beam of one empty hypothesis, at the origin."""
  xhat_N1D = jnp.zeros_like(x_ND)[:, None]
  return Beam(xhat_N1D, jnp.sum(x_ND**2, axis=-1)[:, None])


def advance(
  propose: Propose, weights: Any, x_ND: Array, beam: Beam, *, beam_size: int
) -> tuple[Beam, tuple[Array, Array]]:
  """Extends the hypotheses and keeps the `beam_size` best.

  Returns the new beam and, for `backtrack`, the `(parents, ids)` of its
  hypotheses, both `[N, F]`. Ties go to the lower slot. If fewer candidates
  than `beam_size` are offered, the rest of the beam is empty.
  """
  found = propose(weights, x_ND, beam)
  num_kept = min(beam_size, found.error_NC.shape[1])
  negative_NF, slots_NF = lax.top_k(-found.error_NC, num_kept)
  pick = lambda x_NC: jnp.take_along_axis(x_NC, slots_NF, axis=1)
  parents_NF, ids_NF = pick(found.parents_NC), pick(found.ids_NC)
  xhat_NFD = rows(beam.xhat_NFD, parents_NF) + found.words_fn(slots_NF)
  grown = Beam(xhat_NFD, -negative_NF)
  missing = beam_size - num_kept
  if missing:
    widen = lambda x, value: jnp.pad(
      x,
      [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2),
      constant_values=value,
    )
    grown = Beam(widen(grown.xhat_NFD, 0), widen(grown.error_NF, jnp.inf))
    parents_NF, ids_NF = widen(parents_NF, 0), widen(ids_NF, 0)
  return grown, (parents_NF, ids_NF)


def advance_all(
  propose: Propose,
  stacked: Any,
  x_ND: Array,
  beam: Beam,
  steps: range | None = None,
) -> tuple[Beam, tuple[Array, Array]]:
  """Runs `advance` over the leading axis of `stacked`, at constant width.

  `steps` are the places on that axis; None for all. (A slice of `stacked`
  would be a copy of it, for every block of vectors.)
  Returns the last beam and the stacked `(parents, ids)`, `[T, N, F]`.
  """
  beam_size = beam.error_NF.shape[1]
  if steps is None:
    steps = range(jax.tree.leaves(stacked)[0].shape[0])

  def body(beam, t):
    weights = at_step(stacked, t)
    return advance(propose, weights, x_ND, beam, beam_size=beam_size)

  return lax.scan(body, beam, jnp.asarray(steps, jnp.int32))


def at_step(stacked: Any, t) -> Any:
  """The part of place `t` on the leading axis of every leaf."""
  at_fn = partial(lax.dynamic_index_in_dim, index=t, keepdims=False)
  return jax.tree.map(at_fn, stacked)


def backtrack(
  parents_TNF: Array, ids_TNF: Array, slot_N: Array
) -> tuple[Array, Array]:
  """Follows hypotheses back to the first step.

  Returns the codewords `[T, N]` chosen on the way and the slot `[N]` of the
  beam from which the first of these steps started.
  """
  at = lambda x_NF, slot_N: jnp.take_along_axis(x_NF, slot_N[:, None], 1)[:, 0]

  def body(slot_N, step):
    parents_NF, ids_NF = step
    return at(parents_NF, slot_N), at(ids_NF, slot_N)

  slot_N, ids_TN = lax.scan(body, slot_N, (parents_TNF, ids_TNF), reverse=True)
  return ids_TN, slot_N


def rows(x_NFD: Array, at_NC: Array) -> Array:
  """Picks rows `x_NFD[n, at_NC[n, c]]`, giving `[N, C, D]`."""
  if x_NFD.shape[1] == 1:
    n, _, d = x_NFD.shape
    return jnp.broadcast_to(x_NFD, (n, at_NC.shape[1], d))
  return jax.vmap(lambda x_FD, at_C: x_FD[at_C])(x_NFD, at_NC)


def top_k_smallest(x_NC: Array, k: int) -> tuple[Array, Array]:
  """The `k` smallest entries per row, ascending, and where they are.

  Exact in two levels: the `k` smallest entries lie in the `k` groups with the
  smallest minima, so `lax.top_k` sees only the minima and those groups, which
  takes 6 to 8 % of the time off encoding by QINCo2-S. Ties go to the group with
  the smaller minimum, then to the lower place.
  """
  n, c = x_NC.shape
  group_size = _group_size(c, k)
  if group_size == 1:
    negative_NR, at_NR = lax.top_k(-x_NC, k)
    return -negative_NR, at_NR
  x_NGB = x_NC.reshape(n, c // group_size, group_size)
  _, groups_NR = lax.top_k(-x_NGB.min(axis=-1), k)
  kept_NC = rows(x_NGB, groups_NR).reshape(n, k * group_size)
  negative_NR, slots_NR = lax.top_k(-kept_NC, k)
  rank_NR, place_NR = jnp.divmod(slots_NR, group_size)
  at_NR = jnp.take_along_axis(groups_NR, rank_NR, axis=1)
  return -negative_NR, at_NR * group_size + place_NR


def _group_size(c: int, k: int) -> int:
  """Divisor of `c` that leaves two levels the fewest entries to rank."""
  cost = lambda g: c if g == 1 else c // g + k * g + c // 16
  sizes = [g for g in range(1, 65) if c % g == 0 and c // g >= k]
  return min(sizes, key=cost, default=1)
