"""What a codeword costs that is not the one an encoder chose.

An `errors` object has `sizes`, codewords per level, and three functions:

  read(rows_n) -> data_nX       what it needs to know of these items
  own(data_nX, codes_nL) -> error_n
  children(data_nX, at_B, codes_BL, level) -> error_BK

where `error_BK[b, k]` is the squared error of item `at_B[b]` with the codes
before `level` as in `codes_BL[b]` and codeword k at `level`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import numpy as np

from vqjax.codecs.codec import CodecSpec
from vqjax.data import batches

_TABLE = 1 << 24  # Entries of products between two codebooks that are kept.
_ROWS, _VARIANTS = 1024, 2048  # Latents, and decoded codes, at once.


def make_errors(
  spec: CodecSpec,
  tables,
  vectors,
  decode_fn: Callable,
  *,
  rows_N=None,
  num_levels: int | None = None,
):
  """Returns the errors of a codec over open vectors.

  Args:
    spec: The codec. One with `levels` is a sum of codewords, whose residuals
      are compared where it quantises them, in its latent space. Others decode
      every variant of a code: slower, and in data units.
    tables: From its `prepare`.
    vectors: `[R, D]`.
    decode_fn: `codes_NL -> x_ND` for any number of rows.
    rows_N: Row of each item; None for one item a row, in order.
    num_levels: Of the codes; None for all of the codec.
  """
  x_fn = lambda rows_n: batches.read_rows(
    vectors, rows_n if rows_N is None else rows_N[rows_n]
  )
  if spec.latent is None or spec.levels is None:
    sizes = tuple(spec.codebook_sizes(tables))[:num_levels]
    return DecodedErrors(sizes, vectors.shape[1], x_fn, decode_fn)
  latent_fn = jax.jit(spec.latent)
  in_blocks_fn = batches.in_blocks(
    lambda x_ND: np.asarray(latent_fn(tables, x_ND)), _ROWS
  )

  def read_fn(rows_n):
    x_nD = x_fn(rows_n)
    # One program for all: at least a block, padded with its last row.
    missing = max(_ROWS - len(x_nD), 0)
    return in_blocks_fn(np.pad(x_nD, ((0, missing), (0, 0)), "edge"))[
      : len(x_nD)
    ]

  books = spec.levels(tables)[:num_levels]
  return LevelErrors(
    read_fn, tuple(np.asarray(book, np.float64) for book in books)
  )


@dataclasses.dataclass(frozen=True, eq=False)
class LevelErrors:
  """Of sums of codewords: squared lengths of residuals, from float64 tables.

  |z - sum_l w_l|^2 is made of |z|^2, of products of z with codewords, and of
  those between codewords. The codes after `level` are not looked at.
  """

  latent_fn: Callable  # rows_n -> z_nE
  books: tuple[np.ndarray, ...]  # [K, E] of each level.

  @functools.cached_property
  def sizes(self) -> tuple[int, ...]:
    """Codewords of each level."""
    return tuple(len(book) for book in self.books)

  @functools.cached_property
  def width(self) -> int:
    """Numbers that `read` returns for an item."""
    return 1 + sum(self.sizes)

  @functools.cached_property
  def _norms(self):
    return [np.einsum("ke,ke->k", book, book) for book in self.books]

  @functools.cached_property
  def _kept(self) -> dict:
    return {}

  def _products(self, level: int, other: int) -> np.ndarray | None:
    """Products `[K, K]` of all codewords of two levels; None if too many."""
    a, b = self.books[level], self.books[other]
    if len(a) * len(b) > _TABLE:
      return None
    if (level, other) not in self._kept:
      self._kept[level, other] = a @ b.T
    return self._kept[level, other]

  def _with_all(self, level: int, code_B, other: int) -> np.ndarray:
    """Products `[B, K]` of codewords with all those of another level."""
    table_KK = self._products(level, other)
    if table_KK is None:
      return self.books[level][code_B] @ self.books[other].T
    return table_KK[code_B]

  def _with_one(self, level: int, code_B, other: int, other_B) -> np.ndarray:
    """Products `[B]` of codewords with one each of another level."""
    table_KK = self._products(level, other)
    if table_KK is None:
      a_BE, b_BE = self.books[level][code_B], self.books[other][other_B]
      return np.einsum("be,be->b", a_BE, b_BE)
    return table_KK[code_B, other_B]

  def read(self, rows_n) -> np.ndarray:
    """Squared lengths and products with all codewords: `[n, 1 + sum K]`."""
    z_nE = np.asarray(self.latent_fn(rows_n), np.float64)
    norm_n1 = np.einsum("ne,ne->n", z_nE, z_nE)[:, None]
    return np.hstack([norm_n1, *(z_nE @ book.T for book in self.books)])

  def own(self, data_nX, codes_nL) -> np.ndarray:
    """Squared length of what a whole code leaves: `[n]`."""
    at_n, level = np.arange(len(codes_nL)), len(self.books) - 1
    error_nK = self.children(data_nX, at_n, codes_nL, level)
    return error_nK[at_n, codes_nL[:, level]]

  def children(self, data_nX, at_B, codes_BL, level: int) -> np.ndarray:
    """Squared length of what is left after `level`: `[B, K]`."""
    starts, at_B = 1 + np.cumsum((0, *self.sizes)), np.asarray(at_B)
    own = slice(starts[level], starts[level + 1])
    error_B = data_nX[at_B, 0]
    error_BK = self._norms[level] - 2 * data_nX[at_B, own]
    for l in range(level):
      code_B = codes_BL[:, l]
      dot_B = data_nX[at_B, starts[l] + code_B]
      error_B = error_B + self._norms[l][code_B] - 2 * dot_B
      for m in range(l):
        error_B = error_B + 2 * self._with_one(m, codes_BL[:, m], l, code_B)
      error_BK = error_BK + 2 * self._with_all(l, code_B, level)
    return error_B[:, None] + error_BK


@dataclasses.dataclass(frozen=True, eq=False)
class DecodedErrors:
  """Of any codec: every variant is decoded, the other codes as they are."""

  sizes: tuple[int, ...]
  width: int  # D, numbers that `read` returns for an item.
  vectors_fn: Callable  # rows_n -> x_nD
  decode_fn: Callable

  def read(self, rows_n) -> np.ndarray:
    """The vectors `[n, D]`."""
    return self.vectors_fn(rows_n)

  def own(self, data_nX, codes_nL) -> np.ndarray:
    """Squared errors of codes: `[n]`."""
    error_n = np.empty(len(codes_nL))
    for start in range(0, len(codes_nL), _VARIANTS):
      here = slice(start, start + _VARIANTS)
      codes_bL = codes_nL[here].astype(np.int32)
      count = len(codes_bL)  # One program for all sizes.
      codes_bL = np.pad(codes_bL, ((0, _VARIANTS - count), (0, 0)), "edge")
      xhat_bD = np.asarray(self.decode_fn(codes_bL), np.float64)[:count]
      error_n[here] = ((data_nX[here] - xhat_bD) ** 2).sum(axis=1)
    return error_n

  def children(self, data_nX, at_B, codes_BL, level: int) -> np.ndarray:
    """Squared errors of codes with codeword k at `level`: `[B, K]`."""
    num, size = len(codes_BL), self.sizes[level]
    error_BK = np.empty((num, size))
    step = max(_VARIANTS // size, 1)
    for start in range(0, num, step):
      here = slice(start, start + step)
      codes_bL = np.repeat(codes_BL[here], size, axis=0)
      codes_bL[:, level] = np.tile(np.arange(size), len(codes_bL) // size)
      data_bX = np.repeat(data_nX[np.asarray(at_B)[here]], size, axis=0)
      error_BK[here] = self.own(data_bX, codes_bL).reshape(-1, size)
    return error_BK
