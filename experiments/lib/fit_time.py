"""How long PQ, OPQ or RQ takes to fit, measured on few vectors and codes."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict
from scipy import linalg

from experiments.lib import cli
from vqjax import fitting

_FEW = 800  # Vectors of the first fit: one block with a beam of 5.
_WISH = 1.0  # Seconds of the second fit.
_MOST = 64  # Times as many vectors as in the first.
_COMPILING = 10.0  # Seconds of RQ at a size that was not compiled before.
_OPQ_ITERATIONS, _OPQ_VECTORS = 50, 65_536  # Those of `faiss_io.train_opq`.


class Estimate(NamedTuple):
  """Seconds of a fit, and parameters of the shapes that it makes."""

  seconds: float
  params: Any


def estimate(config, xt_ND, num_rows: int) -> Estimate:
  """Fits few vectors, and RQ only the first codes; time grows by a line."""
  small = config_dict.ConfigDict(config.to_dict())
  if "opq" in small.model:
    small.model.opq = False
  codes = config.model.num_codes
  times, compiling = 1.0, []
  if config.codec == "rq" and codes > 2:  # Later codes take what code 2 takes.
    small.model.num_codes = 2
    is_balanced = config.model.is_balanced
    beam = 1 if is_balanced else config.model.beam_size
    times = (1 + (codes - 1) * beam) / (1 + beam)
  made = []

  def fit(num):
    small.init.max_vectors = num
    params = fitting.fit_closed(small, xt_ND, num_rows)
    made.append(jax.block_until_ready(params))

  def warm(num):
    cold, second = _time(fit, num), _time(fit, num)
    compiling.append(max(cold - second, 0.0))
    return second

  total = min(num_rows, config.init.max_vectors)
  few = max(_FEW, 2 * config.model.codebook_size)
  with cli.elapsed(f"measure {config.codec} on few vectors"):
    if config.codec == "rq":  # To compile a second size takes too long.
      few = min(few, total)
      seconds = times * warm(few) * total / few
      seconds += max(compiling[-1], _COMPILING)
    else:
      seconds = by_line(warm, few, total) + compiling[-1]
    if config.model.get("opq", False):
      seconds += _opq_seconds(config, xt_ND.shape[1], total)
  params = made[-1]
  if times > 1:
    words_MKD = params.codebooks_MKD
    params = params.replace(
      codebooks_MKD=jnp.resize(words_MKD, (codes, *words_MKD.shape[1:]))
    )
  return Estimate(seconds, params)


def by_line(seconds_fn, few: int, total: int) -> float:
  """Returns the seconds of `total` vectors, of a line through two fits."""
  if total <= 2 * few:
    return seconds_fn(total)
  one = seconds_fn(few)
  growth = min(max(2, int(_WISH / max(one, 1e-6))), _MOST)
  more = min(growth * few, total)
  slope = max(seconds_fn(more) - one, 0.0) / (more - few)
  return one + slope * (total - few)


def _opq_seconds(config, dim: int, num: int) -> float:
  """Seconds of the rotation, of one decomposition and one product.

  A round of training decomposes `[D, D]`, turns the vectors twice and compares
  them with the codewords four times, which takes about four times as long as
  large products do.
  """
  x_DD = np.random.default_rng(0).normal(size=(dim, dim)).astype(np.float32)
  decompose = _time(lambda: linalg.svd(x_DD, lapack_driver="gesvd"))
  row = min(_time(lambda: x_DD @ x_DD) for _ in range(3)) / dim
  products = 8 + 16 * config.model.codebook_size / dim
  num = min(num, _OPQ_VECTORS)
  return _OPQ_ITERATIONS * (decompose + products * num * row)


def _time(fn, *args) -> float:
  began = time.perf_counter()
  fn(*args)
  return time.perf_counter() - began
