"""Axis letters, the array alias and the checks that every layer uses.

Array names end in their axes, one letter each (`x_ND`, `codes_NM`):

  N vectors              Q queries               D dimensions
  E inner dimensions     H hidden width          J residual blocks
  U low-rank width       T steps with a network  M code positions
  K codewords per position                       S dims per sub-vector
  A candidates per hypothesis                    F beam width
  C candidates           R results               G true neighbours
  L lists                P probed lists          V codes of a centroid
  I tiles of a scan      W 32-bit words          B bits, bytes, slots in one
  Z entries of a table   Y parts of a vector     1 a kept axis
  X any shape

Inner dimensions are those that a map makes of D: a network, a reduction, a
rotation. Two modules use a letter for something else:

  G  features of a candidate, in `qinco_ranker`
  R  tables of the pairwise decoder, in `pairwise`: its files hold this name

A small letter is a part of an axis: `x_nD` is a block of `x_ND`.
"""

import jax
import jax.numpy as jnp

Array = jax.Array


def check_shape(name: str, x, want: tuple[int | None, ...]) -> None:
  """Raises ValueError unless `x` has shape `want`; None fits any size."""
  fits = [w in (None, size) for w, size in zip(want, x.shape, strict=False)]
  if len(want) != x.ndim or not all(fits):
    raise ValueError(f"{name} must have shape {want}, got {tuple(x.shape)}.")


def check_range(name: str, value, low, high, rule: str = "") -> None:
  """Raises ValueError unless `low <= value <= high`; `rule` says why."""
  if not low <= value <= high:
    why = f": {rule}" if rule else ""
    raise ValueError(
      f"{name} must lie between {low} and {high}, got {value}{why}."
    )


def add_exactly(total_2X: Array, x_X: Array) -> Array:
  """Adds to a sum `[2, ...]` that float32 alone would stop or drift in.

  Row 1 holds what row 0 rounds off; the total is the sum of both rows.
  Reference: Knuth, The Art of Computer Programming, volume 2, theorem B.
  """
  high_X, low_X = total_2X
  sum_X = high_X + x_X
  rest_X = sum_X - high_X
  low_X = low_X + ((high_X - (sum_X - rest_X)) + (x_X - rest_X))
  high_X = sum_X + low_X
  return jnp.stack([high_X, low_X - (high_X - sum_X)])


def check_codes(codes_NM, num_codes: int) -> None:
  """Raises unless `codes_NM` holds integers, at most `num_codes` a row."""
  if not jnp.issubdtype(codes_NM.dtype, jnp.integer):
    raise TypeError(f"codes must be integers, got {codes_NM.dtype}.")
  if codes_NM.ndim != 2 or not 1 <= codes_NM.shape[1] <= num_codes:
    raise ValueError(
      f"codes must have shape (N, 1 to {num_codes}), "
      f"got {tuple(codes_NM.shape)}."
    )


def check_key(name: str, key, x) -> None:
  """Raises TypeError unless `key` is a random key, and vectors follow it."""
  dtype = getattr(key, "dtype", None)
  is_key = dtype is not None and (
    jnp.issubdtype(dtype, jax.dtypes.prng_key)
    or (dtype == jnp.uint32 and key.shape == (2,))
  )
  if x is None or not is_key:
    raise TypeError(
      f"{name} takes a random key first, then the vectors: "
      f"{name}(jax.random.key(0), x, ...); got {type(key).__name__} as the key."
    )
