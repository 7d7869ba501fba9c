"""The codebook network of a step, from tables of `qinco.prepare`.

Weights are the slice of one step, see `per_step`.
"""

import jax
import jax.numpy as jnp
from flax import struct

from vqjax.core import Array


@struct.dataclass
class Scout:
  """What a scout makes of the first hidden layer; see `qinco_scout`.

  Everything is within `basis_TDU`, the directions in which the words of a
  network differ most from those that pre-select them.
  """

  basis_TDU: Array  # Orthonormal columns.
  plain_TKU: Array  # The pre-selecting words.
  words_TKU: Array  # What is added to them: a share of the word alone,
  state_TDU: Array  # one of xhat,
  hidden_THU: Array  # and one of the first hidden layer.


def per_step(tables) -> dict[str, Array | None]:
  """The leaves of `qinco.QincoTables` that are stacked over the steps."""
  return {
    name: getattr(tables, name)
    for name in (
      "words_TKD",
      "preselect_TKD",
      "base_TKE",
      "base_up_TKH",
      "state_TDE",
      "state_up_TDH",
      "first_down_THE",
      "up_TJEH",
      "down_TJHE",
      "out_TED",
      "scout",
    )
  }


def matmul(x: Array, w: Array, dtype: str) -> Array:
  """Product with float32 sums; `dtype` is the type of the factors."""
  if dtype == "float32":
    return jnp.matmul(x, w, precision="highest")
  return jnp.matmul(
    x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32
  )


def network(weights, base_E: Array, hidden_H: Array, dtype: str) -> Array:
  """What follows the first up-projection; leading axes are batch axes.

  `base_E` is e after the concatenation and `hidden_H` its up-projection.
  Returns `e W_out`, with D at the end.
  """
  e = base_E + matmul(jax.nn.relu(hidden_H), weights["first_down_THE"], dtype)
  for up_EH, down_HE in zip(
    weights["up_TJEH"], weights["down_TJHE"], strict=True
  ):
    hidden = jax.nn.relu(matmul(e, up_EH, dtype))
    e = e + matmul(hidden, down_HE, dtype)
  out_ED = weights["out_TED"]
  return e if out_ED is None else matmul(e, out_ED, dtype)


def words_at(weights, ids_N: Array, xhat_ND: Array, dtype: str) -> Array:
  """Words f(c, xhat) of one id per vector: `[N, D]`."""
  base_NE = weights["base_TKE"][ids_N] + matmul(
    xhat_ND, weights["state_TDE"], dtype
  )
  hidden_NH = weights["base_up_TKH"][ids_N] + matmul(
    xhat_ND, weights["state_up_TDH"], dtype
  )
  words_ND = network(weights, base_NE, hidden_NH, dtype)
  if weights["words_TKD"] is None:
    return words_ND
  return words_ND + weights["words_TKD"][ids_N]
