"""Decoders of codes that need no network, fitted to vectors and their codes.

A search reads codes three times: all of the lists it visits by the additive
decoder, the best of those by the pairwise decoder, and few by the network. Both
decoders are least squares on residuals: vectors without the centroids of their
lists, or whole vectors for a codec without lists.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from vqjax.codecs import additive, pairwise
from vqjax.codecs.additive import AdditiveParams
from vqjax.codecs.distances import centre_of
from vqjax.codecs.pairwise import PairwiseParams

_BLOCK = 65_536  # Codes gone through at a time.
_ROWS_PER_VECTOR = 8  # Of all tables, at most, unless asked for.


class Sample(NamedTuple):
  """Residuals of vectors and their codes, list numbers not among them."""

  target_ND: np.ndarray
  codes_NM: np.ndarray
  lists_N: np.ndarray | None  # None for a codec without lists.

  def cut(self, rows: slice) -> "Sample":
    """Takes some of the rows."""
    return Sample(*(x if x is None else x[rows] for x in self))


def check_sizes(sizes, name: str = "") -> None:
  """Raises ValueError unless decoders can be fitted to codes of these sizes.

  `sizes` are the codewords at each code position, without the list number; the
  codec has this `name` in the message.
  """
  if len(set(sizes)) != 1:
    raise ValueError(
      "The decoders need codebooks of one size at all positions, this "
      f"{name} codec has {', '.join(map(str, sizes))} codewords."
    )
  additive.check_unknowns(len(sizes), sizes[0])


def fit_additive(
  params, sizes, train: Sample, progress: Callable | None = None
) -> AdditiveParams:
  """Fits codewords whose sums lie near the targets.

  `params` of a codec that is additive bring their own codewords; `sizes` are
  codewords at each code position, without the list number. `progress` is called
  with `(vectors done, vectors in all)`.
  """
  own = additive.from_codec(params)
  if own is not None:
    return own
  num = len(train.target_ND)

  def blocks():
    for start in range(0, num, _BLOCK):
      part = train.cut(slice(start, start + _BLOCK))
      yield part.codes_NM, part.target_ND
      if progress is not None:
        progress(start + len(part.target_ND), num)

  return additive.fit(blocks(), sizes[0], centre_D=centre_of(train.target_ND))


def most_tables(
  sizes, num_lists: int, num_train: int, num_tables: int | None
) -> int:
  """Returns how many tables of the pairwise decoder to make, at most.

  `num_tables` None is 2M, and at most as many that they have 8 rows for each
  training vector. `num_lists` is 0 for a codec without lists.

  Returns:
    0 if there are too few vectors for any.
  """
  is_one_code = len(sizes) == 1 and not num_lists
  if num_tables == 0 or (num_tables is None and is_one_code):
    return 0
  num = pairwise.check_sizes(sizes[0], len(sizes), num_lists, num_tables)
  if num_tables is not None:
    return num
  num = min(num, _ROWS_PER_VECTOR * num_train // sizes[0] ** 2)
  return num if num >= least_tables(sizes) else 0


def least_tables(sizes) -> int:
  """Returns how many tables it takes to see every code position."""
  return -(-len(sizes) // 2)


def table_bytes(sizes, dim: int) -> int:
  """Returns the bytes of one table of the pairwise decoder, float16."""
  return 2 * sizes[0] ** 2 * dim


def fit_pairwise(
  words: AdditiveParams,
  sizes,
  train: Sample,
  held_out: Sample | None,
  *,
  num_tables: int,
  centroids_LD: np.ndarray | None = None,
  progress: Callable | None = None,
) -> PairwiseParams | None:
  """Fits tables over pairs of codes; None if they do not pay.

  `held_out` vectors decide how many tables pay; None makes `num_tables`, which
  is from `most_tables`. `centroids_LD` are for a codec with lists, `progress`
  is called with `(tables made, tables in all)`.
  """
  list_codes_LV = None
  if train.lists_N is not None:
    sizes_L = np.bincount(train.lists_N, minlength=len(centroids_LD))
    list_codes_LV = pairwise.fit_list_codes(
      jax.random.key(0), centroids_LD, sizes_L, sizes[0]
    )
  held = held_out and (held_out.codes_NM, held_out.target_ND, held_out.lists_N)
  return pairwise.fit(
    words,
    train.codes_NM,
    train.target_ND,
    lists_N=train.lists_N,
    list_codes_LV=list_codes_LV,
    num_tables=num_tables,
    held_out=held,
    progress=progress,
  )
