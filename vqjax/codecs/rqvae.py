"""RQ-VAE: a residual quantiser between the two halves of an auto-encoder.

An encoder network takes a vector of `D` dimensions to `E`; the code is the
greedy residual code there, one codebook per level; a decoder network takes the
sum of the codewords back. The levels may have different numbers of codewords,
and any prefix of a code is a code. Without networks this is plain residual
quantisation with levels of different sizes.

References: TIGER, arXiv 2305.05065; LC-Rec, arXiv 2311.09049; the residual
quantiser in an auto-encoder, arXiv 2203.01941.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct

from vqjax.codecs import rq
from vqjax.codecs.codec import CodecSpec
from vqjax.codecs.rule import SearchRule
from vqjax.core import Array, check_codes, check_range, check_shape

MAX_LEVELS = 26  # One letter each in the tokens of an id.
NORM_EPSILON = 1e-5


@struct.dataclass
class Norm:
  """Batch norm: `(x - mean) / sqrt(var + 1e-5) * scale + bias`."""

  scale_H: Array
  bias_H: Array
  mean_H: Array  # Running mean and variance: statistics, not learned.
  var_H: Array


@struct.dataclass
class Mlp:
  """Linear layers with ReLU between them, batch norm before it if there is.

  `skip_DE` is a linear path beside them, added to their output. Without layers
  and path the network returns its input.
  """

  weights: tuple[Array, ...]  # `[in, out]` each.
  biases: tuple[Array, ...]
  norms: tuple[Norm, ...] = ()  # One per layer but the last, or none.
  skip_DE: Array | None = None


@struct.dataclass
class RQVAEParams:
  """Codeword k of level l is `codebooks[l][k]`, of `E` dimensions."""

  encoder: Mlp
  decoder: Mlp
  codebooks: tuple[Array, ...]


def dim(params: RQVAEParams) -> int:
  """Returns the number of dimensions of the vectors."""
  encoder = params.encoder
  if encoder.weights:
    return encoder.weights[0].shape[0]
  if encoder.skip_DE is not None:
    return encoder.skip_DE.shape[0]
  return params.codebooks[0].shape[1]


def codebook_sizes(params: RQVAEParams) -> tuple[int, ...]:
  """Returns the number of codewords of each level."""
  return tuple(words_KE.shape[0] for words_KE in params.codebooks)


def prepare(params: RQVAEParams) -> RQVAEParams:
  """Returns parameters whose batch norms are part of the layers before."""
  return params.replace(
    encoder=_fold(params.encoder), decoder=_fold(params.decoder)
  )


def _fold(mlp: Mlp) -> Mlp:
  """Multiplies running statistics into the weights."""
  weights, biases = list(mlp.weights), list(mlp.biases)
  for j, norm in enumerate(mlp.norms):
    gain_H = norm.scale_H / jnp.sqrt(norm.var_H + NORM_EPSILON)
    weights[j] = weights[j] * gain_H[None]
    biases[j] = (biases[j] - norm.mean_H) * gain_H + norm.bias_H
  return mlp.replace(weights=tuple(weights), biases=tuple(biases), norms=())


def run(
  mlp: Mlp,
  x_ND: Array,
  drop_fn: Callable = lambda layer, x_NH: x_NH,
  norm_fn: Callable | None = None,
) -> Array:
  """Runs a network over rows.

  Args:
    mlp: The network; its norms are folded unless there is a `norm_fn`.
    x_ND: Rows.
    drop_fn: `(layer, x_NH) -> x_NH`, before each linear layer.
    norm_fn: `(norm, x_NH) -> x_NH`, takes the place of the running statistics.
  """
  if norm_fn is None:
    mlp = _fold(mlp)
  y_NH = x_ND
  for j, (weight_HH, bias_H) in enumerate(
    zip(mlp.weights, mlp.biases, strict=True)
  ):
    if j:
      y_NH = norm_fn(mlp.norms[j - 1], y_NH) if mlp.norms else y_NH
      y_NH = jax.nn.relu(y_NH)
    y_NH = _matmul(drop_fn(j, y_NH), weight_HH) + bias_H[None]
  if mlp.skip_DE is None:
    return y_NH
  line_NE = _matmul(x_ND, mlp.skip_DE)
  return line_NE + y_NH if mlp.weights else line_NE


def _matmul(x_NH: Array, weight_HH: Array) -> Array:
  return jnp.matmul(x_NH, weight_HH, precision="highest")


def latent(params: RQVAEParams, x_ND: Array) -> Array:
  """What the quantiser codes: `[N, D]` vectors to `[N, E]`."""
  check_shape("x", x_ND, (None, dim(params)))
  return run(params.encoder, x_ND.astype(jnp.float32))


def encode(
  params: RQVAEParams,
  x_ND: Array,
  *,
  beam_size: int = 1,
  num_steps: int | None = None,
) -> Array:
  """Finds codes of vectors `[N, D]`: `[N, M]` int32.

  Args:
    params: Parameters or tables.
    x_ND: Vectors.
    beam_size: Hypotheses kept; 1 is the nearest codeword level by level. A
      beam finds codes nearer in the space of the latent vectors.
    num_steps: Levels to fill; None for all.
  """
  check_rule(params, SearchRule(beam_size=beam_size, num_steps=num_steps))
  codebooks = params.codebooks[:num_steps]
  return rq.encode_levels(codebooks, latent(params, x_ND), beam_size)


def check_rule(params: RQVAEParams, rule: SearchRule) -> None:
  """Raises ValueError unless the sizes of a search fit the codec."""
  check_range("beam_size", rule.beam_size, 1, 4096)
  if rule.num_steps is not None:
    num_levels = len(params.codebooks)
    check_range("num_steps", rule.num_steps, 1, num_levels, "code positions")


def decode(params: RQVAEParams, codes_NM: Array) -> Array:
  """Vectors `[N, D]` of codes `[N, <= M]`."""
  check_codes(codes_NM, len(params.codebooks))
  sum_NE = jnp.float32(0)
  for words_KE, ids_N in zip(params.codebooks, codes_NM.T, strict=False):
    sum_NE = sum_NE + words_KE[ids_N]
  return run(params.decoder, sum_NE)


CODEC = CodecSpec(
  name="rqvae",
  Params=RQVAEParams,
  prepare=prepare,
  dim=dim,
  codebook_sizes=codebook_sizes,
  encode=lambda tables, x_ND, lists_N, rule: encode(
    tables, x_ND, beam_size=rule.beam_size, num_steps=rule.num_steps
  ),
  decode=decode,
  knobs=("beam_size", "num_steps"),
  rule=SearchRule(beam_size=1),
  check_rule=check_rule,
  latent=latent,
  levels=lambda tables: tables.codebooks,
)
