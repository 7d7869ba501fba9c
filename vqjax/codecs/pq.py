"""Product quantisation: a codebook for each slice of the vector.

With a rotation it is optimised product quantisation (OPQ): vectors are rotated
before they are cut, decoded vectors are rotated back. Errors are in squared
data units either way. Vectors far from the origin are rotated about their
centre (`distances.centre_of`), as a rotation rounds in steps of their length.

References: Jegou et al., TPAMI 2011 (PQ); Ge et al., TPAMI 2014 (OPQ).
"""

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from vqjax.codecs import kmeans
from vqjax.codecs.codec import CodecSpec
from vqjax.codecs.distances import centre_of, nearest
from vqjax.core import Array, check_codes, check_key, check_shape


@struct.dataclass
class PQParams:
  """`codebooks_MKS[m]` are the codewords of slice m of `x_D @ rotation_DD`."""

  codebooks_MKS: Array
  rotation_DD: Array | None = None  # Orthonormal; None for none.


def dim(params: PQParams) -> int:
  """Returns the number of dimensions of the vectors."""
  m, _, s = params.codebooks_MKS.shape
  return m * s


def codebook_sizes(params: PQParams) -> tuple[int, ...]:
  """Returns the number of codewords at each code position."""
  m, k, _ = params.codebooks_MKS.shape
  return (k,) * m


def prepare(params: PQParams) -> PQParams:
  """Returns what encode and decode take: the parameters themselves."""
  return params


def fit(
  key: Array,
  x_ND: Array | None = None,
  *,
  num_codes: int,
  codebook_size: int = 256,
  num_iterations: int = 25,
  rotation: Array | None = None,
  block_size: int = 4096,
) -> PQParams:
  """Runs k-means on each of `num_codes` equal slices of `[N, D]`.

  `rotation`, `[D, D]` and orthonormal, is applied first as `x_ND @ rotation`;
  `vqjax.interop.faiss_io.train_opq` makes one.
  """
  check_key("pq.fit", key, x_ND)
  check_shape("x", x_ND, (None, None))
  n, d = x_ND.shape
  if num_codes < 1 or d % num_codes:
    raise ValueError(
      f"num_codes must divide the {d} dimensions of the vectors, "
      f"got {num_codes}."
    )
  if rotation is not None:
    check_shape("rotation", rotation, (d, d))
    rotation = jnp.asarray(rotation, jnp.float32)
  x_ND = jnp.asarray(x_ND, jnp.float32)
  if rotation is not None:
    centre_1D = centre_of(x_ND)[None]
    x_ND = _rotate(x_ND - centre_1D, rotation)
  x_NMS = x_ND.reshape(n, num_codes, -1)
  codebooks = [
    kmeans.fit(
      jax.random.fold_in(key, m),
      x_NMS[:, m],
      codebook_size,
      num_iterations=num_iterations,
      block_size=block_size,
    )
    for m in range(num_codes)
  ]
  codebooks_MKS = jnp.stack(codebooks)
  if rotation is not None:
    centre_MS = _rotate(centre_1D, rotation).reshape(num_codes, -1)
    codebooks_MKS = codebooks_MKS + centre_MS[:, None]
  return PQParams(codebooks_MKS, rotation)


def encode(
  params: PQParams,
  x_ND: Array,
  *,
  num_steps: int | None = None,
  block_size: int = 4096,
) -> Array:
  """Nearest codeword of each slice: `[N, D]` data units to `[N, M]` int32.

  `num_steps` must be None or M: a prefix of this code leaves dimensions out.
  """
  check_shape("x", x_ND, (None, dim(params)))
  m, _, s = params.codebooks_MKS.shape
  _check_steps(params, num_steps)
  words_MKS, centre_1D = _near_words(params)
  x_ND = _turned(params, x_ND, centre_1D)
  x_MNS = x_ND.reshape(-1, m, s).swapaxes(0, 1)
  slice_fn = lambda args: nearest(*args, block_size=block_size)
  return lax.map(slice_fn, (x_MNS, words_MKS)).T


def _check_steps(params: PQParams, num_steps: int | None) -> None:
  m = params.codebooks_MKS.shape[0]
  if num_steps not in (None, m):
    raise ValueError(
      f"num_steps must be None or {m} for a product quantiser, whose codes "
      f"have no usable prefix; got {num_steps}."
    )


def decode(params: PQParams, codes_NM: Array) -> Array:
  """Vectors `[N, D]` in data units of codes `[N, M]`."""
  m = params.codebooks_MKS.shape[0]
  check_codes(codes_NM, m)
  check_shape("codes", codes_NM, (None, m))
  pick = jax.vmap(lambda book_KS, code_N: book_KS[code_N])
  words_MKS, centre_1D = _near_words(params)
  x_MNS = pick(words_MKS, codes_NM.T)
  x_ND = x_MNS.swapaxes(0, 1).reshape(codes_NM.shape[0], dim(params))
  if params.rotation_DD is None:
    return x_ND
  return _rotate(x_ND, params.rotation_DD.T) + centre_1D


def _near_words(params: PQParams) -> tuple[Array, Array | None]:
  """Codewords less the centre of all, and that centre before the rotation.

  Without a rotation the codewords as they are: each slice has a centre of its
  own.
  """
  words_MKS, rotation_DD = params.codebooks_MKS, params.rotation_DD
  if rotation_DD is None:
    return words_MKS, None
  m, k, s = words_MKS.shape
  centre_D = centre_of(words_MKS.swapaxes(0, 1).reshape(k, m * s))
  centre_1D = _rotate(centre_D[None], rotation_DD.T)
  return words_MKS - centre_D.reshape(m, 1, s), centre_1D


def _turned(params: PQParams, x_ND: Array, centre_1D: Array | None) -> Array:
  """Vectors as `_near_words` has the codewords."""
  x_ND = x_ND.astype(jnp.float32)
  if params.rotation_DD is None:
    return x_ND
  return _rotate(x_ND - centre_1D, params.rotation_DD)


def _rotate(x_ND: Array, rotation_DD: Array) -> Array:
  return jnp.matmul(x_ND, rotation_DD, precision="highest")


CODEC = CodecSpec(
  name="pq",
  Params=PQParams,
  prepare=prepare,
  dim=dim,
  codebook_sizes=codebook_sizes,
  encode=lambda params, x_ND, lists_N, rule: encode(
    params, x_ND, num_steps=rule.num_steps
  ),
  decode=decode,
  knobs=("num_steps",),
  check_rule=lambda params, rule: _check_steps(params, rule.num_steps),
  fit=fit,
)
