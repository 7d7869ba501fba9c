"""Sinkhorn assignment: codewords shared out evenly among the rows of a batch.

Every row has the same weight and every codeword the same share of the rows;
the plan that costs least, blurred by `epsilon`, is found by scaling rows and
columns in turn, and a row takes the codeword with most of its weight. All in
logarithms: at epsilon 0.003 the weights themselves leave the range of float32.

The functions take JAX arrays (float32, under `jit`, in training) and NumPy
arrays (float64, on the host) alike. They look at the batch as a whole: a row
gets another codeword in another batch.

References: Cuturi, arXiv 1306.0895; in quantisers, LC-Rec, arXiv 2311.09049.
"""

import jax.numpy as jnp
import numpy as np
from jax import lax


def centre(sq_NK):
  """Maps distances to about [-1, 1] by their least and greatest."""
  middle = (sq_NK.max() + sq_NK.min()) / 2
  return (sq_NK - middle) / (sq_NK.max() - middle + 1e-5)


def log_plan(sq_NK, epsilon: float, num_iterations: int = 50):
  """Logarithm `[N, K]` of the plan whose columns sum to `N / K`.

  Args:
    sq_NK: Squared distances of the rows of a batch to the codewords.
    epsilon: Blur, in units of half the range of the distances; above 0.
    num_iterations: Scalings of rows, then columns, at least 1. In the limit
      the rows sum to 1.

  Raises:
    ValueError: A number is out of range.
  """
  if not (epsilon > 0 and num_iterations >= 1):
    raise ValueError(
      "Sinkhorn needs an epsilon above 0 and at least 1 iteration, got "
      f"{epsilon} and {num_iterations}."
    )
  is_host = isinstance(sq_NK, np.ndarray)
  xp = np if is_host else jnp
  n, k = sq_NK.shape
  log_n, log_k = float(np.log(max(n, 1))), float(np.log(k))
  cost_NK = centre(sq_NK).astype("float64" if is_host else "float32")
  log_NK = cost_NK / -epsilon

  def log_sum(x_NK, axis):
    top = x_NK.max(axis=axis, keepdims=True)
    return top + xp.log(xp.exp(x_NK - top).sum(axis=axis, keepdims=True))

  def scale(_, factors):
    row_N1 = -log_sum(log_NK + factors[1], 1) - log_n
    return row_N1, -log_sum(log_NK + row_N1, 0) - log_k

  factors = tuple(xp.zeros(s, log_NK.dtype) for s in ((n, 1), (1, k)))
  if is_host:
    for step in range(num_iterations):
      factors = scale(step, factors)
  else:
    factors = lax.fori_loop(0, num_iterations, scale, factors)
  return log_NK + factors[0] + factors[1] + log_n


def assign(sq_NK, epsilon: float, num_iterations: int = 50):
  """Codewords `[N]`, int32, of the rows; the lower of equal ones wins."""
  plan_NK = log_plan(sq_NK, epsilon, num_iterations)
  return plan_NK.argmax(axis=1).astype("int32")
