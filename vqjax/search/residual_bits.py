"""One-bit residual codes (RaBitQ): better distances for D more bits a vector.

The codewords that a scan adds up (`ivf.py`) leave a residual e = x - xhat. Kept
of it are the signs s of its coordinates after a random rotation R, and two
bytes. With the scale f = |e|^2 / <Re, s>, which makes <e, y> about f <s, Ry>
for any y, and exact for y = e,

  |q - x|^2  =  |q - xhat|^2 - 2 <q - xhat, e> + |e|^2
            about  |q - xhat|^2 - 2 f <Rq, s> + (|e|^2 + 2 f <R xhat, s>)

The first term is what the scan has found, the bracket is kept with the code, as
is f, each as a byte. So a shortlist is re-ordered by a few additions, without a
network.

Reference: the estimator of RaBitQ (arXiv 2405.12497), applied to the residual
of all codewords instead of the residual of the centroid.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from vqjax.core import Array, check_range, check_shape

WORD = 32  # Bits that are kept in one number.
_CUT = 1e-4  # Of scales and offsets on either side, out of the byte's range.
_LEAST_STEP = float(np.finfo(np.float32).tiny)  # Data may be of any scale.
_PLACE_11B = np.arange(WORD, dtype=np.uint32)[None, None]


@struct.dataclass
class ResidualBits:
  """Residual bits of the vectors in `ivf.Lists`, in the order of its rows."""

  bits_NW: Array  # uint32; lowest bits first, 1 for a positive coordinate.
  scale_N: Array  # uint8, f.
  offset_N: Array  # uint8, the bracket.
  range_22: Array  # What byte 0 of scale and offset stands for, and the steps.
  rotation_DE: Array  # R, `E = 32 W` columns; its rows are orthonormal.


def random_rotation(dim: int, seed: int = 0) -> np.ndarray:
  """An orthonormal map `[D, E]` to the next multiple of 32 dimensions."""
  check_range("dim", dim, 1, 1 << 16)
  num = num_numbers(dim) * WORD
  gauss_EE = np.random.default_rng(seed).normal(size=(num, num))
  q_EE, r_EE = np.linalg.qr(gauss_EE)
  # Without the signs the rotation would not be drawn evenly from all.
  q_EE = q_EE * np.where(np.diag(r_EE) < 0, -1, 1)
  return q_EE[:dim].astype(np.float32)


def num_numbers(dim: int) -> int:
  """Numbers of 32 bits that hold the bits of a vector."""
  return -(-dim // WORD)


@jax.jit
def describe(
  x_ND: Array, xhat_ND: Array, scanned_N: Array, rotation_DE: Array
) -> tuple[Array, Array, Array]:
  """Bits, scales f and offsets of vectors.

  Args:
    x_ND: The vectors.
    xhat_ND: The sums of their codewords.
    scanned_N: What the scan assumes for |xhat|^2; the offset corrects it.
    rotation_DE: From `random_rotation`.

  Returns:
    uint32 `[N, W]`, float32 `[N]` and `[N]`; see `make_bits`.
  """
  turn = lambda y_ND: jnp.matmul(y_ND, rotation_DE, precision="highest")
  left_ND = x_ND - xhat_ND
  left_NE = turn(left_ND)
  is_up_NE = left_NE > 0
  sq_N = jnp.sum(left_ND**2, axis=1)
  sum_N = jnp.sum(jnp.abs(left_NE), axis=1)
  scale_N = jnp.where(sum_N > 0, sq_N / jnp.where(sum_N > 0, sum_N, 1), 0)
  turned_NE = turn(xhat_ND)
  along_N = jnp.sum(jnp.where(is_up_NE, turned_NE, -turned_NE), axis=1)
  norm_N = jnp.sum(xhat_ND**2, axis=1)
  offset_N = sq_N + 2 * scale_N * along_N + norm_N - scanned_N
  bit_NWB = is_up_NE.reshape(len(x_ND), -1, WORD).astype(jnp.uint32)
  bits_NW = jnp.sum(bit_NWB << _PLACE_11B, axis=2, dtype=jnp.uint32)
  return bits_NW, scale_N, offset_N


def make_bits(bits_NW, scale_N, offset_N, rotation_DE) -> ResidualBits:
  """Puts together the results of `describe` for all vectors, numpy arrays."""
  n, e = len(scale_N), rotation_DE.shape[1]
  check_range("the number of vectors", n, 1, 2**31 - 1, "rows are int32")
  check_shape("bits", bits_NW, (n, e // WORD))
  check_shape("offsets", offset_N, (n,))
  values, ranges = zip(*map(_to_bytes, (scale_N, offset_N)), strict=True)
  return ResidualBits(
    np.asarray(bits_NW, np.uint32),
    *values,
    np.array(ranges, np.float32),
    np.asarray(rotation_DE, np.float32),
  )


def insert(
  bits: ResidualBits, old_N, new_N, bits_NW, scale_N, offset_N
) -> ResidualBits:
  """Joins residual bits with what `describe` found of more vectors.

  `old_N` are its rows in the result, `new_N` the rows of the new vectors, whose
  bits, scales and offsets follow.
  """
  num = len(old_N) + len(new_N)
  joined_NW = np.empty((num, bits_NW.shape[1]), np.uint32)
  joined_NW[old_N], joined_NW[new_N] = bits.bits_NW, bits_NW
  columns, ranges = [], []
  for byte_N, value_N, (low, step) in zip(
    (bits.scale_N, bits.offset_N),
    (scale_N, offset_N),
    np.asarray(bits.range_22, float),
    strict=True,
  ):
    byte_N = np.asarray(byte_N)
    high = low + 255 * step
    if len(value_N) and (value_N.min() < low or value_N.max() > high):
      values = low + step * byte_N.astype(float)
      low = min(low, float(value_N.min()))
      step = max((max(high, float(value_N.max())) - low) / 255, _LEAST_STEP)
      byte_N = np.rint((values - low) / step).astype(np.uint8)
    column_N = np.empty(num, np.uint8)
    steps_n = np.clip(np.rint((value_N - low) / step), 0, 255)
    column_N[old_N], column_N[new_N] = byte_N, steps_n.astype(np.uint8)
    columns.append(column_N)
    ranges.append((low, step))
  return bits.replace(
    bits_NW=joined_NW,
    scale_N=columns[0],
    offset_N=columns[1],
    range_22=np.array(ranges, np.float32),
  )


def _to_bytes(value_N) -> tuple[np.ndarray, tuple]:
  """Bytes, and what byte 0 stands for and the step; the extremes are cut."""
  stride = -(-len(value_N) // 1_000_000)
  low, high = np.quantile(value_N[::stride], (_CUT, 1 - _CUT))
  step = max((high - low) / 255, _LEAST_STEP)
  with np.errstate(over="ignore"):  # Is cut.
    steps_N = np.clip(np.rint((value_N - low) / step), 0, 255)
  return steps_N.astype(np.uint8), (low, step)


def distances(
  bits: ResidualBits, queries_QD: Array, rows_QC: Array, scanned_QC: Array
) -> Array:
  """Squared distances `[Q, C]` of rows of the lists, better than the scan's.

  Args:
    bits: On the device.
    queries_QD: Queries.
    rows_QC: Rows from `ivf.scan`, -1 for none.
    scanned_QC: Their distances from there.
  """
  turned_QE = jnp.matmul(queries_QD, bits.rotation_DE, precision="highest")
  at = lambda x_N: x_N[jnp.maximum(rows_QC, 0)]
  is_up_QCWB = (at(bits.bits_NW)[..., None] >> _PLACE_11B[None]) & 1 == 1
  is_up_QCE = is_up_QCWB.reshape(*rows_QC.shape, -1)
  turned_Q1E = turned_QE[:, None]
  along_QC = jnp.sum(jnp.where(is_up_QCE, turned_Q1E, -turned_Q1E), axis=-1)
  scale_QC, offset_QC = (
    low + step * at(x_N).astype(jnp.float32)
    for (low, step), x_N in zip(
      bits.range_22, (bits.scale_N, bits.offset_N), strict=True
    )
  )
  found_QC = scanned_QC + offset_QC - 2 * scale_QC * along_QC
  return jnp.where(rows_QC < 0, jnp.inf, found_QC)
