"""The least-squares additive decoder: a sum of one codeword per code position.

Any codes can be decoded so, whatever codec made them; this is the fast and
rough reading of codes that a network decodes well. For codes in lists the sum
stands for what the centroid of the list leaves, otherwise for the vector.

With one-hot rows `h_n` of `M * K` numbers, the codewords solve

  (sum_n h_n h_n^T + ridge I) codewords = sum_n h_n target_n^T

where the first sum only counts how often two codes meet. One-hot rows are
never made: memory is `(M K)^2` float64 numbers and a block of vectors.

References: arXiv 1501.05030 (least squares for a fixed code),
arXiv 2401.14732, section 4.2 (as a decoder of QINCo codes).
"""

from collections.abc import Iterable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from vqjax.codecs import pq, rq
from vqjax.codecs.distances import centre_of
from vqjax.core import Array, check_codes, check_range, check_shape
from vqjax.data.codes import check_ids

MAX_UNKNOWNS = 16_384  # Of M * K; their square takes 2 GiB in float64.


@struct.dataclass
class AdditiveParams:
  """Codeword k of position m is `codebooks_MKD[m, k]`, in data units."""

  codebooks_MKD: Array


CODECS = ("pq", "rq")  # Of which a code stands for a sum of codewords.


def from_codec(params) -> AdditiveParams | None:
  """Codewords whose sums are what a codec decodes, `[M, K, D]`.

  Those of PQ are zero outside of their slice, rotated back where it has a
  rotation. None for a codec that is not additive.
  """
  if isinstance(params, rq.RQParams):
    return AdditiveParams(params.codebooks_MKD)
  if not isinstance(params, pq.PQParams):
    return None
  m, k, s = params.codebooks_MKS.shape
  words_MKMS = jnp.zeros((m, k, m, s), jnp.float32)
  at_M = jnp.arange(m)
  words_MKMS = words_MKMS.at[at_M, :, at_M].set(params.codebooks_MKS)
  words_MKD = words_MKMS.reshape(m, k, m * s)
  if params.rotation_DD is not None:
    words_MKD = jnp.matmul(words_MKD, params.rotation_DD.T, precision="highest")
  return AdditiveParams(words_MKD)


def fit(
  blocks: Iterable,
  codebook_size: int,
  *,
  ridge: float = 1.0,
  centre_D: Array | None = None,
) -> AdditiveParams:
  """Finds the codewords whose sums lie nearest to the targets `[N, D]`.

  Args:
    blocks: pairs `(codes_NM, target_ND)` that need not exist all at once:
      integers, list numbers not among them, and what the codewords add up to.
    codebook_size: K, codewords per position.
    ridge: pulls codewords to zero like this number of zero vectors, each with
      that codeword alone. It must be positive, as codewords are found up to
      constants that move from one position to another.
    centre_D: of the targets, None for zeros. It is fitted apart, so that the
      ridge does not pull it and sums do not cancel.

  Raises:
    ValueError: If shapes do not fit, or a code is no id of its codebook.
  """
  check_range("codebook_size", codebook_size, 1, MAX_UNKNOWNS)
  if not ridge > 0:
    raise ValueError(f"ridge must be positive, got {ridge}.")
  pairs_MKMK, sums_MKD, first_row = None, None, 0
  for codes_NM, target_ND in blocks:
    codes_NM = np.asarray(codes_NM)
    if pairs_MKMK is None:
      m, k, d = codes_NM.shape[1], codebook_size, target_ND.shape[1]
      check_unknowns(m, k)
      pairs_MKMK, sums_MKD = np.zeros((m, k, m, k)), np.zeros((m, k, d))
      centre_D = np.zeros(d) if centre_D is None else np.asarray(centre_D)
      centre_D = centre_D.astype(np.float32)
    check_shape("codes", codes_NM, (None, m))
    check_shape("target", target_ND, (len(codes_NM), d))
    check_ids(codes_NM, [k] * m, first_row)
    _count_pairs(pairs_MKMK, codes_NM)
    sums_MKD += _word_sums(
      jnp.asarray(codes_NM.T), target_ND, centre_D, codebook_size
    )
    first_row += len(codes_NM)
  if not first_row:
    raise ValueError("Fitting codewords needs at least 1 vector, got 0.")
  words_MKD = _solve(pairs_MKMK, sums_MKD, ridge)
  words_MKD[0] += centre_D
  return AdditiveParams(jnp.asarray(words_MKD))


def split_centre(params: AdditiveParams) -> tuple[Array, AdditiveParams]:
  """Takes the centre `[D]` of what is decoded out of the codewords.

  It is zero unless that lies far from the origin (`distances.centre_of`). A sum
  of the codewords that are returned, plus the centre, is the same vector;
  products with these codewords are smaller, and so exacter.
  """
  words_MKD = jnp.asarray(params.codebooks_MKD)
  is_far = jnp.any(centre_of(words_MKD.sum(axis=0)) != 0)
  mean_MD = words_MKD[:, 0] + jnp.mean(words_MKD - words_MKD[:, :1], axis=1)
  mean_MD = jnp.where(is_far, mean_MD, 0)
  return mean_MD.sum(axis=0), AdditiveParams(words_MKD - mean_MD[:, None])


def decode(params: AdditiveParams, codes_NM: Array) -> Array:
  """Adds the codewords: codes `[N, M]` to `[N, D]` in data units.

  A prefix of a code is none: the codewords of all positions are fitted
  together.
  """
  check_codes(codes_NM, params.codebooks_MKD.shape[0])
  check_shape("codes", codes_NM, (None, params.codebooks_MKD.shape[0]))
  return rq.decode(rq.RQParams(params.codebooks_MKD), codes_NM)


def check_unknowns(num_codes: int, codebook_size: int) -> None:
  """Raises ValueError if there are too many codewords to solve for."""
  if num_codes * codebook_size > MAX_UNKNOWNS:
    raise ValueError(
      f"{num_codes} codes of {codebook_size} codewords are "
      f"{num_codes * codebook_size} unknowns; least squares takes at most "
      f"{MAX_UNKNOWNS}. Use a codec of fewer or smaller codebooks."
    )


def _count_pairs(pairs_MKMK: np.ndarray, codes_NM: np.ndarray) -> None:
  """Adds how often the codes of two positions meet, for pairs `i >= j`."""
  m, k = pairs_MKMK.shape[:2]
  codes_MN = np.ascontiguousarray(codes_NM.T, np.int64)
  for i in range(m):
    at_N = codes_MN[i] * k
    for j in range(i + 1):
      count = np.bincount(at_N + codes_MN[j], minlength=k * k)
      pairs_MKMK[i, :, j] += count.reshape(k, k)


@partial(jax.jit, static_argnames="codebook_size")
def _word_sums(
  codes_MN: Array, target_ND: Array, centre_D: Array, codebook_size: int
) -> Array:
  """Sums of the targets less the centre that have a codeword, `[M, K, D]`."""
  target_ND = target_ND.astype(jnp.float32) - centre_D[None]
  add_fn = lambda ids_N: jax.ops.segment_sum(
    target_ND, ids_N, num_segments=codebook_size
  )
  return lax.map(add_fn, codes_MN)


def _solve(pairs_MKMK, sums_MKD, ridge: float) -> np.ndarray:
  """Codewords `[M, K, D]` of the normal equations, float32."""
  m, k, d = sums_MKD.shape
  gram = pairs_MKMK.reshape(m * k, m * k)
  for i in range(m):  # The half above the diagonal is still empty.
    rows = slice(i * k, (i + 1) * k)
    gram[rows, rows.stop :] = gram[rows.stop :, rows].T
  gram.flat[:: m * k + 1] += ridge
  words = np.linalg.solve(gram, sums_MKD.reshape(m * k, d))
  return words.reshape(m, k, d).astype(np.float32)
