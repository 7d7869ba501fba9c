"""What the FastIVF package has in its module of this name."""

import numpy as np

_LEAST = 1e-5


def normalize(v: np.ndarray) -> np.ndarray:
  """Returns vectors `[N, D]` divided by their norms plus 1e-5.

  Zeros stay zeros. The indexes make vectors exactly of length 1 by themselves,
  if their metric is the cosine.
  """
  v = np.asarray(v)
  return v / (np.linalg.norm(v, axis=-1, keepdims=True) + _LEAST)
