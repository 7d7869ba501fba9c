"""Vectors of length 1, for the cosine: divided by their norm when read.

The cosine of two vectors is the inner product of both at length 1, and their
squared distance is 2 - 2 cosines, so that the order of neighbours is the same
by either. A vector of zeros has no direction and is refused by its row.
"""

import numpy as np


def normalise(x_ND, *, name="vectors", rows=None) -> np.ndarray:
  """Vectors `[N, D]` divided by their norms, float32.

  `rows` are their numbers `[N]` in the file, for the message; None for 0, 1,
  ...

  Raises:
    ValueError: A vector is zero.
  """
  x_ND = np.asarray(x_ND, float)
  # The largest number first: squares of float32 fit, of float64 they may not.
  most_N1 = np.abs(x_ND).max(axis=1, keepdims=True)
  refuse_zeros(most_N1[:, 0] == 0, name=name, rows=rows)
  with np.errstate(invalid="ignore"):  # NaN and Inf are refused by readers.
    x_ND = x_ND / most_N1
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
  return x_ND.astype(np.float32)


def scale(x_ND) -> np.ndarray:
  """Decoded vectors `[N, D]` divided by their norms; zeros stay zeros.

  Codes of vectors of length 1 stand for shorter ones. What is searched are
  cosines, so that only their directions count.
  """
  norm_N1 = np.linalg.norm(x_ND, axis=1, keepdims=True)
  return x_ND / np.maximum(norm_N1, np.finfo(np.float32).tiny)


def refuse_zeros(is_zero_N, *, name="vectors", rows=None) -> None:
  """Raises ValueError if a vector is zero; args are as in `normalise`."""
  bad = np.flatnonzero(is_zero_N)
  if bad.size:
    row = int(bad[0] if rows is None else np.asarray(rows)[bad[0]])
    more = f", and {bad.size - 1} more of those read" if bad.size > 1 else ""
    raise ValueError(
      f"{name}: row {row}{more} is a vector of zeros, which has no cosine with "
      "any other; remove it, or take another metric."
    )


class UnitVectors:
  """Open vectors `[N, D]` that are of length 1 when read, float32."""

  def __init__(self, vectors):
    """Takes an open file, or an array; nothing is read yet."""
    self.vectors = vectors
    self.name = getattr(vectors, "name", None) or "vectors"
    self.first_row = getattr(vectors, "first_row", 0)
    self.shape, self.ndim = tuple(vectors.shape), 2
    self.dtype = np.dtype(np.float32)

  def __len__(self) -> int:
    """Number of rows."""
    return self.shape[0]

  def __getitem__(self, rows) -> np.ndarray:
    """Reads a slice or an array of rows."""
    if isinstance(rows, slice):
      rows = np.arange(*rows.indices(len(self)))
    numbers = self.first_row + np.asarray(rows)
    return normalise(self.vectors[rows], name=self.name, rows=numbers)


def raw(vectors):
  """The vectors as the file has them."""
  return vectors.vectors if isinstance(vectors, UnitVectors) else vectors
