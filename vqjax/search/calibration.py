"""Exact scores of a few results, and from them estimated ones of all.

Codes give a distance to each result of a query. The straight line through some
of these and their exact scores turns all distances into scores. It changes
their scale, hardly their order.
"""

import numpy as np


def sample_ranks(k: int, num_samples: int) -> np.ndarray:
  """Ranks, equally far apart, of about so many of k results; or of all.

  The first is 0. The distance is k / `num_samples`, rounded down, at least 1:
  of 50 results 20 samples become 25. All, if `num_samples` is 0 or less.
  """
  if num_samples <= 0 or num_samples >= k:
    return np.arange(k)
  return np.arange(0, k, max(int(k * (1 / num_samples)), 1))


def fit_lines(
  distance_QR: np.ndarray, score_QR: np.ndarray, is_there_QR: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Slopes and intercepts `[Q]` of the lines by least squares, float64.

  What is not there is left out. A line through one point, or through points of
  one distance, is flat.
  """
  weight_QR = is_there_QR.astype(float)
  num_Q1 = np.maximum(weight_QR.sum(axis=1, keepdims=True), 1)
  x_QR = np.where(is_there_QR, distance_QR, 0).astype(float)
  y_QR = np.where(is_there_QR, score_QR, 0).astype(float)
  x_mean_Q1 = x_QR.sum(axis=1, keepdims=True) / num_Q1
  y_mean_Q1 = y_QR.sum(axis=1, keepdims=True) / num_Q1
  x_QR = (x_QR - x_mean_Q1) * weight_QR
  spread_Q = np.square(x_QR).sum(axis=1)
  slope_Q = (x_QR * (y_QR - y_mean_Q1)).sum(axis=1)
  slope_Q = slope_Q / np.where(spread_Q > 0, spread_Q, 1)
  return slope_Q, y_mean_Q1[:, 0] - slope_Q * x_mean_Q1[:, 0]
