"""Codes of items that are told apart; what `vqjax.semantic_ids` is made of."""

import dataclasses
from functools import partial

import jax
import numpy as np

from vqjax import progress as progress_lib
from vqjax.codecs import balanced
from vqjax.data import batches
from vqjax.ids import duplicates, groups, resolve
from vqjax.ids import errors as errors_lib

_BLOCK = 8192  # Vectors at once.


@dataclasses.dataclass(frozen=True)
class Made:
  """Codes of all items, published ones first, and how they came about."""

  codes_NL: np.ndarray  # With the token more, if there is one.
  sizes: tuple[int, ...]
  checksums_N: np.ndarray
  num_published: int
  raw_NL: np.ndarray  # Of the new items alone, as are the errors.
  raw_errors_N: np.ndarray
  errors_N: np.ndarray
  variance: float
  found: dict  # Of the resolver.


def make(codec, vectors, resolver, settings, published, progress) -> Made:
  """Gives items codes that are told apart.

  Args:
    codec: A `Codec`.
    vectors: Open, of the items.
    resolver: `vqjax.ids.resolver.Resolver`.
    settings: Of encoding.
    published: `SemanticIds` that stay and come first, or None.
    progress: Whether to show progress lines.
  """
  raw_NL = _encode(codec, vectors, settings, published, progress)
  raw_errors_N, checksums_N, variance = _look(codec, vectors, raw_NL, progress)
  num_fixed, num_levels = 0, raw_NL.shape[1]
  codes_NL, old_FL = raw_NL, None
  if published is not None:
    num_fixed, old_FL = len(published), published.codes
    codes_NL = np.concatenate([old_FL[:, :num_levels], raw_NL])
    checksums_N = np.concatenate([published.checksums, checksums_N])
  rows_U = unit_N = np.arange(len(codes_NL))
  if resolver.merges_duplicates:
    rows_U, unit_N = duplicates.units(checksums_N, old_FL)
  codes_UL, found = _resolve(
    codec, vectors, codes_NL[rows_U], rows_U, resolver, num_fixed, progress
  )
  codes_NL = codes_UL[unit_N]
  codes_NL[:num_fixed] = 0 if old_FL is None else old_FL[:, :num_levels]
  new_NL = codes_NL[num_fixed:]
  errors_N = raw_errors_N.copy()
  rows_n = np.flatnonzero((new_NL != raw_NL).any(axis=1))
  errors_N[rows_n] = _errors(codec, vectors, new_NL, rows_n)
  found["moved"] = len(rows_n)
  sizes = tuple(codec.codebook_sizes[:num_levels])
  if resolver.adds_token:
    token_N = _tokens(codes_NL, checksums_N, resolver, old_FL)
    codes_NL = np.column_stack([codes_NL, token_N]).astype(np.int32)
    sizes = (*sizes, int(token_N.max()) + 1)
    found["with_token"] = int((token_N[num_fixed:] >= 0).sum())
  return Made(
    *(codes_NL, sizes, checksums_N, num_fixed, raw_NL, raw_errors_N),
    *(errors_N, variance, found),
  )


def settings_of(codec, is_balanced: bool | None, settings: dict) -> dict:
  """Returns settings of encoding, with `is_balanced` if levels are.

  Raises ValueError if a codec has no levels that can be.
  """
  if is_balanced is None:
    is_balanced = codec.info.get("is_balanced") and not settings
  if not is_balanced:
    return settings
  if codec.spec.latent is None:
    raise ValueError(
      "Balanced ids need a codec that quantises residuals, rq or rqvae, got "
      f"{codec.name}; leave is_balanced out (--balanced)."
    )
  if settings:
    raise ValueError(
      "Balanced levels are assigned as a whole, without a beam: leave "
      f"{', '.join(settings)} out."
    )
  return {"is_balanced": True}


def _encode(codec, vectors, settings: dict, published, progress) -> np.ndarray:
  """Codes of the codec `[N, L]`; behind published ids they are the nearest."""
  settings = dict(settings)
  if not settings.pop("is_balanced", False) or published is not None:
    codes_NL = codec.encode(vectors, progress=progress, **settings)
    return codes_NL.astype(np.int32)
  tables = codec.tables
  latent_fn = jax.jit(partial(codec.spec.latent, tables))
  blocks = batches.map_blocks(latent_fn, vectors, block_size=_BLOCK)
  z_NE = np.concatenate([z_nE for _, z_nE in blocks])
  levels = codec.spec.levels(tables)
  with progress_lib.progress(
    len(levels), "balance", unit="level", is_shown=progress
  ) as done:
    return balanced.encode_all(levels, z_NE, progress=done)


def _resolve(codec, vectors, codes_UL, rows_U, resolver, num_fixed, progress):
  """Codes `[U, L]` that are told apart, and what was found on the way.

  Items before `num_fixed` are published; `rows_U` counts them too.
  """
  name, capacity = resolver.resolve, resolver.capacity
  if name in ("token", "none"):
    return codes_UL, {}
  fixed = int(np.searchsorted(rows_U, num_fixed))
  errors = errors_lib.make_errors(
    *(codec.spec, codec.tables, vectors, codec.decoder("float32")),
    rows_N=rows_U - num_fixed,
    num_levels=codes_UL.shape[1],
  )
  if name == "sinkhorn":
    codes_UL, rounds = resolve.sinkhorn(
      codes_UL,
      errors,
      epsilon=resolver.sk_epsilon,
      num_iterations=resolver.sk_iters,
      max_rounds=resolver.max_rounds,
      capacity=capacity,
    )
    return codes_UL, {"rounds": rounds}
  num_over = int(resolve.over_full(codes_UL, capacity, fixed).sum())
  settle_fn = resolve.nearest if name == "nearest" else resolve.backtrack
  with progress_lib.progress(
    num_over, name, unit="item", is_shown=progress
  ) as done:
    codes_UL, num_early = settle_fn(
      codes_UL, errors, capacity=capacity, num_fixed=fixed, progress=done
    )
  left = int(resolve.over_full(codes_UL, capacity, fixed).sum())
  return codes_UL, {"moved_before_last": num_early, "left": left}


def _tokens(codes_NL, checksums_N, resolver, old_FL) -> np.ndarray:
  """The token more of each item, -1 for none; published ones stay."""
  if resolver.resolve == "token":
    label_N, capacity = groups.labels(codes_NL)[0], resolver.capacity
  else:  # Only equal vectors are told apart.
    label_N = groups.labels(codes_NL)[0]
    vector_N = np.unique(checksums_N, return_inverse=True)[1]
    label_N = np.unique(
      label_N * (int(vector_N.max()) + 1) + vector_N, return_inverse=True
    )[1]
    capacity = 1
  is_every = resolver.resolve == "token" and resolver.token_for == "all"
  token_N = resolve.token(label_N, capacity=capacity, every=is_every)
  if old_FL is not None:
    token_N[: len(old_FL)] = old_FL[:, -1]
  return token_N


def _look(codec, vectors, codes_NL, progress):
  """Squared errors and checksums `[N]`, and the variance, in one pass."""
  num = len(vectors)
  errors_N, checksums_N = np.empty(num), np.empty(num, np.uint64)
  first_D = batches.read_rows(vectors, [0])[0].astype(np.float64)
  sum_D, squares = np.zeros_like(first_D), 0.0
  decode_fn = codec.decoder("float32")
  with progress_lib.progress(num, "errors", is_shown=progress) as done:
    for at in range(0, num, _BLOCK):
      rows_n = np.arange(at, min(at + _BLOCK, num))
      x_nD = batches.read_rows(vectors, rows_n)
      errors_N[rows_n] = _sq_sums(x_nD - decode_fn(codes_NL[rows_n]))
      checksums_N[rows_n] = duplicates.checksums(x_nD)
      x_nD = x_nD - first_D
      sum_D += x_nD.sum(axis=0)
      squares += float(_sq_sums(x_nD).sum())
      if done:
        done(at + len(rows_n), num)
  variance = squares / num - float(((sum_D / num) ** 2).sum())
  return errors_N, checksums_N, variance


def _errors(codec, vectors, codes_NL, rows_n) -> np.ndarray:
  """Squared errors `[n]` of these rows."""
  decode_fn, parts = codec.decoder("float32"), [np.zeros(0)]
  for at in range(0, len(rows_n), _BLOCK):
    here = rows_n[at : at + _BLOCK]
    x_nD = batches.read_rows(vectors, here)
    parts.append(_sq_sums(x_nD - decode_fn(codes_NL[here])))
  return np.concatenate(parts)


def _sq_sums(x_ND) -> np.ndarray:
  x_ND = np.asarray(x_ND)
  return np.einsum("nd,nd->n", x_ND, x_ND, dtype=np.float64)
