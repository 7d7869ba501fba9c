"""Residual quantisation: each step codes what the steps before it left over.

A vector is the sum of one codeword per step, in data units. Codes are found by
beam search; one hypothesis is the greedy code. Any prefix of a code is a code
of lower rate.

References: Chen et al., Sensors 2010; beam search, arXiv 1509.05195.
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from vqjax.codecs import balanced, kmeans
from vqjax.codecs import beam as beam_lib
from vqjax.codecs.codec import CodecSpec
from vqjax.codecs.distances import centre_of, nearest, scan_blocks, sq_norms
from vqjax.codecs.rule import SearchRule
from vqjax.core import Array, check_codes, check_key, check_range, check_shape


@struct.dataclass
class RQParams:
  """Codeword k of step m is `codebooks_MKD[m, k]`, in data units."""

  codebooks_MKD: Array


def dim(params: RQParams) -> int:
  """Returns the number of dimensions of the vectors."""
  return params.codebooks_MKD.shape[2]


def codebook_sizes(params: RQParams) -> tuple[int, ...]:
  """Returns the number of codewords at each code position."""
  m, k, _ = params.codebooks_MKD.shape
  return (k,) * m


def prepare(params: RQParams) -> RQParams:
  """Returns what encode and decode take: the parameters themselves."""
  return params


def fit(
  key: Array,
  x_ND: Array | None = None,
  *,
  num_codes: int,
  codebook_size: int = 256,
  num_iterations: int = 10,
  beam_size: int = 1,
  is_balanced: bool = False,
  is_rising: bool = True,
  block_size: int = 4096,
) -> RQParams:
  """Runs k-means on the residuals of `[N, D]`, step after step.

  It works in more and more principal dimensions (`kmeans.fit_rising`) unless
  `is_rising` is False.

  With a beam, a step is fitted to the residuals of all hypotheses so far;
  memory is then `N * beam_size * D` numbers. Balanced levels have no beam: each
  codeword is the mean of equally many vectors, see `balanced.fit`.
  """
  check_key("rq.fit", key, x_ND)
  check_shape("x", x_ND, (None, None))
  check_range("num_codes", num_codes, 1, 4096)
  check_range("beam_size", beam_size, 1, 4096)
  if is_balanced:
    return RQParams(
      balanced.fit(
        key,
        x_ND,
        num_codes=num_codes,
        codebook_size=codebook_size,
        num_iterations=num_iterations,
      )
    )
  x_ND = jnp.asarray(x_ND, jnp.float32)
  residual_ND, weights_N, codebooks = x_ND, None, []
  fit_fn = kmeans.fit_rising if is_rising else kmeans.fit
  beam = None if beam_size == 1 else _start(x_ND, beam_size)
  for m in range(num_codes):
    words_KD = fit_fn(
      jax.random.fold_in(key, m),
      residual_ND,
      codebook_size,
      num_iterations=num_iterations,
      weights_N=weights_N,
      block_size=block_size,
    )
    codebooks.append(words_KD)
    if m == num_codes - 1:
      break
    if beam is None:
      residual_ND = _subtract(residual_ND, words_KD, block_size=block_size)
    else:
      size = max(1, block_size // beam_size)
      beam = _grow(words_KD, x_ND, beam, block_size=size)
      residual_NFD = x_ND[:, None] - beam.xhat_NFD
      residual_ND = residual_NFD.reshape(-1, x_ND.shape[1])
      # An empty slot counts for nothing.
      weights_N = jnp.isfinite(beam.error_NF).astype(jnp.float32).reshape(-1)
  return RQParams(jnp.stack(codebooks))


def encode(
  params: RQParams,
  x_ND: Array,
  *,
  beam_size: int = 1,
  num_steps: int | None = None,
  block_size: int | None = None,
) -> Array:
  """Finds codes of vectors `[N, D]` in data units: `[N, M]` int32.

  Args:
    params: Codebooks.
    x_ND: Vectors.
    beam_size: Hypotheses kept; more than there are codewords is allowed.
    num_steps: Code positions to fill; None for all.
    block_size: Rows coded at a time; memory is `block_size * beam_size * K`
      numbers. None takes all rows at once.
  """
  check_shape("x", x_ND, (None, dim(params)))
  check_rule(params, SearchRule(beam_size=beam_size, num_steps=num_steps))
  codebooks_MKD = params.codebooks_MKD[:num_steps]
  encode_fn = _encode_greedy if beam_size == 1 else _encode_beam
  body = lambda _, x_ND: (None, encode_fn(codebooks_MKD, x_ND, beam_size))
  size = block_size if block_size is not None else max(1, x_ND.shape[0])
  x_ND = x_ND.astype(jnp.float32)
  return scan_blocks(body, None, x_ND, block_size=size)[1]


def check_rule(params: RQParams, rule: SearchRule) -> None:
  """Raises ValueError unless the sizes of a search fit the codec."""
  check_range("beam_size", rule.beam_size, 1, 4096)
  if rule.num_steps is not None:
    m = params.codebooks_MKD.shape[0]
    check_range("num_steps", rule.num_steps, 1, m, "code positions")


def decode(params: RQParams, codes_NM: Array) -> Array:
  """Vectors `[N, D]` in data units of codes `[N, <= M]`."""
  check_codes(codes_NM, params.codebooks_MKD.shape[0])
  codebooks_MKD = params.codebooks_MKD[: codes_NM.shape[1]]

  def body(xhat_ND, step):
    words_KD, ids_N = step
    return xhat_ND + words_KD[ids_N], None

  start_ND = jnp.zeros((codes_NM.shape[0], dim(params)), jnp.float32)
  return lax.scan(body, start_ND, (codebooks_MKD, codes_NM.T))[0]


def encode_levels(
  codebooks: Sequence[Array], x_ND: Array, beam_size: int = 1
) -> Array:
  """Codes `[N, M]`, int32, by codebooks `[K, D]` that may differ in size."""
  steps, residual_ND = [], x_ND
  if beam_size == 1:
    for words_KD in codebooks:
      steps.append(nearest(residual_ND, words_KD))
      residual_ND = residual_ND - words_KD[steps[-1]]
    return jnp.stack(steps, axis=1)
  beam = _start(x_ND, beam_size)
  for words_KD in codebooks:
    beam, step = beam_lib.advance(
      _propose, words_KD, x_ND, beam, beam_size=beam_size
    )
    steps.append(step)
  parents_MNF, ids_MNF = (jnp.stack(x) for x in zip(*steps, strict=True))
  best_N = jnp.zeros(x_ND.shape[0], jnp.int32)
  return beam_lib.backtrack(parents_MNF, ids_MNF, best_N)[0].T.astype(jnp.int32)


def _encode_greedy(codebooks_MKD: Array, x_ND: Array, _) -> Array:
  """`_encode_beam` with one hypothesis, several times faster."""

  def body(residual_ND, words_KD):
    ids_N = nearest(residual_ND, words_KD)
    return residual_ND - words_KD[ids_N], ids_N

  return lax.scan(body, x_ND, codebooks_MKD)[1].T


def _encode_beam(codebooks_MKD: Array, x_ND: Array, beam_size: int) -> Array:
  """Codes of the best hypothesis after the last step."""
  start = _start(x_ND, beam_size)
  _, steps = beam_lib.advance_all(_propose, codebooks_MKD, x_ND, start)
  best_N = jnp.zeros(x_ND.shape[0], jnp.int32)
  return beam_lib.backtrack(*steps, best_N)[0].T.astype(jnp.int32)


def _start(x_ND: Array, beam_size: int) -> beam_lib.Beam:
  """One empty hypothesis in a beam that has its final width already."""
  beam = beam_lib.start(x_ND)
  n, d = x_ND.shape
  empty_NF = jnp.full((n, beam_size - 1), jnp.inf, jnp.float32)
  return beam_lib.Beam(
    xhat_NFD=jnp.zeros((n, beam_size, d), jnp.float32),
    error_NF=jnp.concatenate([beam.error_NF, empty_NF], axis=1),
  )


def _propose(words_KD: Array, x_ND: Array, beam: beam_lib.Beam):
  """Offers every codeword to every hypothesis, see `beam.py`."""
  # Nothing but a codebook far from the origin has a centre; see `distances`.
  centre_D = centre_of(words_KD)
  residual_NFD = x_ND[:, None] - beam.xhat_NFD - centre_D[None, None]
  near_KD = words_KD - centre_D[None]
  n, f, d = residual_NFD.shape
  k = words_KD.shape[0]
  dot_NFK = jnp.matmul(
    residual_NFD.reshape(n * f, d), near_KD.T, precision="highest"
  ).reshape(n, f, k)
  # The residual's norm is computed anew: carried along, its rounding errors
  # would add up over the steps.
  error_NF = jnp.where(
    jnp.isinf(beam.error_NF), jnp.inf, sq_norms(residual_NFD)
  )
  error_NFK = error_NF[..., None] + (
    sq_norms(near_KD)[None, None] - 2 * dot_NFK
  )
  slots_C = jnp.arange(f * k, dtype=jnp.int32)
  spread = lambda x_C: jnp.broadcast_to(x_C[None], (n, f * k))
  return beam_lib.Candidates(
    parents_NC=spread(slots_C // k),
    ids_NC=spread(slots_C % k),
    error_NC=error_NFK.reshape(n, f * k),
    words_fn=lambda slots_NF: words_KD[slots_NF % k],
  )


@partial(jax.jit, static_argnames="block_size")
def _subtract(residual_ND, words_KD, *, block_size):
  """What the nearest codewords leave over."""
  ids_N = nearest(residual_ND, words_KD, block_size=block_size)
  return residual_ND - words_KD[ids_N]


@partial(jax.jit, static_argnames="block_size", donate_argnames="beam")
def _grow(words_KD, x_ND, beam, *, block_size):
  """One step of the beam search over all vectors, in blocks."""

  def body(_, block):
    x_ND, beam = block
    width = beam.error_NF.shape[1]
    grown, _ = beam_lib.advance(_propose, words_KD, x_ND, beam, beam_size=width)
    return None, grown

  return scan_blocks(body, None, (x_ND, beam), block_size=block_size)[1]


CODEC = CodecSpec(
  name="rq",
  Params=RQParams,
  prepare=prepare,
  dim=dim,
  codebook_sizes=codebook_sizes,
  encode=lambda params, x_ND, lists_N, rule: encode(
    params, x_ND, beam_size=rule.beam_size, num_steps=rule.num_steps
  ),
  decode=decode,
  knobs=("beam_size", "num_steps"),
  rule=SearchRule(beam_size=1),
  check_rule=check_rule,
  fit=fit,
  latent=lambda params, x_ND: x_ND,
  levels=lambda params: tuple(params.codebooks_MKD),
)
