"""Linear maps to fewer dimensions: scores are cosines of short vectors.

A vector x becomes y / |y| with y = x W + b. Two objectives learn W and b:

- `list_loss`: y, then a ReLU and a dense layer, tells the list of x, as the
  network of the FastIVF package does;
- `neighbour_loss`: the scores of short vectors order the neighbours of x as the
  inner products of whole ones do. This is the first term of HAKES.

Reference: arXiv 2505.12524, section 3.2 (HAKES).
"""

import jax
import jax.numpy as jnp
from flax import struct

from vqjax.core import Array, check_range, check_shape

_DROPOUT, _SMOOTHING = 0.2, 0.01


@struct.dataclass
class Compressor:
  """The map, and the layer that `list_loss` learns it with, or None."""

  weight_DE: Array
  bias_E: Array
  head_EL: Array | None = None
  head_bias_L: Array | None = None


def init(key: Array, dim: int, reduced_dim: int, num_lists: int) -> Compressor:
  """Returns random layers, uniform by the size of both sides (Glorot)."""
  check_range("reduced_dim", reduced_dim, 1, dim)
  keys = jax.random.split(key)
  uniform = jax.nn.initializers.glorot_uniform()
  return Compressor(
    uniform(keys[0], (dim, reduced_dim), jnp.float32),
    jnp.zeros(reduced_dim),
    uniform(keys[1], (reduced_dim, num_lists), jnp.float32),
    jnp.zeros(num_lists),
  )


def init_pca(x_ND: Array, reduced_dim: int) -> Compressor:
  """Returns the map to the first principal components of vectors."""
  check_shape("x", x_ND, (None, None))
  check_range("reduced_dim", reduced_dim, 1, x_ND.shape[1])
  # Not centred: inner products of vectors are to be kept, not covariances.
  second_DD = jnp.einsum("nd,ne->de", x_ND, x_ND, precision="highest")
  _, vectors_DD = jnp.linalg.eigh(second_DD / len(x_ND))
  return Compressor(
    vectors_DD[:, ::-1][:, :reduced_dim], jnp.zeros(reduced_dim)
  )


def project(params: Compressor, x_ND: Array) -> Array:
  """Returns `x W + b`, `[..., E]`."""
  y_NE = jnp.einsum(
    "...d,de->...e", x_ND, params.weight_DE, precision="highest"
  )
  return y_NE + params.bias_E.reshape(*[1] * (y_NE.ndim - 1), -1)


def compress(params: Compressor, x_ND: Array) -> Array:
  """Returns short vectors `[..., E]` of length 1, or 0 if `x W + b` is 0."""
  y_NE = project(params, x_ND)
  norm_N1 = jnp.linalg.norm(y_NE, axis=-1, keepdims=True)
  return y_NE / jnp.where(norm_N1 > 0, norm_N1, 1)


def list_loss(params: Compressor, key: Array, x_ND: Array, lists_N: Array):
  """Returns the mean cross-entropy of the lists, and the share told right.

  A fifth of the inputs is dropped; the right list is wanted at .99 of its
  weight, the rest at equal parts.
  """
  check_shape("lists", lists_N, (len(x_ND),))
  is_kept_ND = jax.random.bernoulli(key, 1 - _DROPOUT, x_ND.shape)
  y_NE = project(params, jnp.where(is_kept_ND, x_ND / (1 - _DROPOUT), 0))
  logits_NL = jnp.einsum("ne,el->nl", jax.nn.relu(y_NE), params.head_EL)
  logits_NL += params.head_bias_L[None]
  log_NL = jax.nn.log_softmax(logits_NL)
  right_N = jnp.take_along_axis(log_NL, lists_N[:, None], axis=1)[:, 0]
  loss_N = (1 - _SMOOTHING) * right_N + _SMOOTHING * log_NL.mean(axis=1)
  is_right_N = logits_NL.argmax(axis=1) == lists_N
  return -loss_N.mean(), is_right_N.astype(jnp.float32).mean()


def neighbour_loss(
  params: Compressor, queries_QD: Array, near_QGD: Array, temperature: float
) -> Array:
  """Returns the mean divergence of short scores from those of whole vectors.

  Both are softmaxes, over the neighbours of a query, of inner products over
  `temperature`; short vectors are of length 1.
  """
  whole_QG = jnp.einsum("qd,qgd->qg", queries_QD, near_QGD)
  short_QG = jnp.einsum(
    "qe,qge->qg", compress(params, queries_QD), compress(params, near_QGD)
  )
  want_QG = jax.nn.log_softmax(whole_QG / temperature)
  found_QG = jax.nn.log_softmax(short_QG / temperature)
  kl_Q = jnp.sum(jnp.exp(want_QG) * (want_QG - found_QG), axis=1)
  return kl_Q.mean()
