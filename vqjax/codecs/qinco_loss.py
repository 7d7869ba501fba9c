"""How QINCo and QINCo2 learn: start from RQ, loss, redraw of idle codewords.

Codes are chosen without gradient by the encoder; decoding them step by step
is differentiated. References: arXiv 2401.14732 section 3.2, arXiv 2501.03078
section 3 and appendix.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from vqjax.codecs import kmeans, qinco, qinco_search, rq
from vqjax.codecs.distances import nearest
from vqjax.codecs.qinco import QincoParams
from vqjax.codecs.rule import PUBLISHED, SearchRule
from vqjax.core import Array, check_range, check_shape

REDRAWS = ("split", "none")
# Steps written out in the gradient, and their weights and tables, in floats.
_MAX_UNROLLED, _MAX_WEIGHTS = 32, 1 << 24


@struct.dataclass
class WordStats:
  """What `end_epoch` needs to know of the epoch, per learned codebook.

  `M` leaves out the frozen list centroids of an IVF model.
  """

  used_MK: Array  # Vectors that chose the word, int32: float32 ends at 2^24.


def init(
  key: Array,
  xt_ND: Array,
  *,
  num_steps: int = 8,
  codebook_size: int = 256,
  network_dim: int | None = None,
  hidden_dim: int = 256,
  num_blocks: int = 2,
  low_rank: int | None = None,
  is_qinco1: bool = False,
  noise: float = 0.1,
  zero_output: bool = True,
  centroids_LD: Array | None = None,
  lists_N: Array | None = None,
  num_iterations: int = 10,
) -> QincoParams:
  """Returns a codec that starts as the residual quantiser of `xt_ND`.

  Args:
    key: Random key.
    xt_ND: Training vectors in data units, float32.
    num_steps: M, code positions, the list number not counted.
    codebook_size: K.
    network_dim: E, width of the network; None for D.
    hidden_dim: H, width inside a residual block.
    num_blocks: J, residual blocks.
    low_rank: U, rank of the concatenation; None for a full one with bias.
    is_qinco1: QINCo1: no pre-selection, no outer sum, scale but no mean.
    noise: Gaussian noise on the codewords, in standard deviations of the
      codewords.
    zero_output: Starts `W_out` at zero, so that the model is RQ at first;
      False is the released start, which kills most codewords.
    centroids_LD: Centroids of the lists in data units, for an IVF model.
    lists_N: Lists of the training vectors; None for the nearest centroids.
    num_iterations: k-means iterations per level.

  Raises:
    ValueError: If a size breaks a rule of the method.
  """
  d = xt_ND.shape[1]
  e = d if network_dim is None else network_dim
  _check_sizes(
    d, e, num_steps, codebook_size, hidden_dim, num_blocks, low_rank, is_qinco1
  )
  mean_D, std = _scale(xt_ND, is_qinco1)
  z_ND = (xt_ND - mean_D[None]) / std
  kmeans_key, noise_key, network_key = jax.random.split(key, 3)
  first_KD = None
  if centroids_LD is not None:
    check_shape("centroids", centroids_LD, (None, d))
    first_KD = (centroids_LD - mean_D[None]) / std
    z_ND = (
      z_ND - first_KD[nearest(z_ND, first_KD) if lists_N is None else lists_N]
    )
  words_MKD = rq.fit(
    kmeans_key,
    z_ND,
    num_codes=num_steps,
    codebook_size=codebook_size,
    num_iterations=num_iterations,
    is_rising=False,  # A closer start learns few vectors by heart sooner.
  ).codebooks_MKD
  if noise and not is_qinco1:
    spread_M1D = jnp.std(words_MKD, axis=1, keepdims=True)
    draw_MKD = jax.random.normal(noise_key, words_MKD.shape, jnp.float32)
    words_MKD = words_MKD + noise * spread_M1D * draw_MKD
  if first_KD is None:
    first_KD, words_MKD = words_MKD[0], words_MKD[1:]
  has_projection = e != d
  network = _init_networks(
    network_key,
    (words_MKD.shape[0], d, e, hidden_dim, num_blocks, low_rank or 0),
    zero_output=zero_output,
  )
  return QincoParams(
    mean_D=mean_D,
    std=std,
    first_KD=first_KD,
    codebooks_TKD=words_MKD / _gain(not is_qinco1, has_projection),
    preselect_TKD=None if is_qinco1 else jnp.array(words_MKD),
    add_word=not is_qinco1,
    is_ivf=centroids_LD is not None,
    **network,
  )


def loss(
  params: QincoParams,
  key: Array,
  x_ND: Array,
  lists_N: Array | None = None,
  *,
  rule: SearchRule = PUBLISHED,
) -> tuple[Array, dict]:
  """Training loss of vectors `[N, D]` in data units, coded by `rule`.

  `lists_N` are those of an IVF model, the nearest if left out.
  Returns the loss and `{"metrics": scalars, "stats": WordStats}` of the batch.
  Reference: the sum over steps of the mean squared error in normalised units,
  plus the error of the pre-selection codebooks, arXiv 2501.03078.
  """
  del key
  qinco.check_lists(params, x_ND, lists_N)
  tables = qinco.prepare(params)
  z_ND = qinco.normalise(params, x_ND)
  codes_NM = qinco_search.encode_normalised(
    lax.stop_gradient(tables), z_ND, lists_N, rule=rule
  )
  errors_M, preselect_T = decode_losses(tables, z_ND, codes_NM, rule.dtype)
  num_codewords = params.codebooks_TKD.shape[1]
  used_MK = jax.vmap(partial(jnp.bincount, length=num_codewords))(codes_NM.T)
  if params.is_ivf:
    errors_M, used_MK = errors_M[1:], used_MK[1:]
  stats = WordStats(used_MK.astype(jnp.int32))
  metrics = {
    "mse": errors_M[-1] * x_ND.shape[1] * params.std**2,
    "mse_loss": errors_M.sum(),
    "preselect_loss": preselect_T.sum(),
  }
  total = metrics["mse_loss"] + metrics["preselect_loss"]
  return total, {"metrics": metrics, "stats": lax.stop_gradient(stats)}


def empty_stats(params: QincoParams) -> WordStats:
  """Returns the `WordStats` before the first step."""
  t, k, _ = params.codebooks_TKD.shape
  m = t if params.is_ivf else t + 1
  return WordStats(jnp.zeros((m, k), jnp.int32))


def merge_stats(old: WordStats, new: WordStats) -> WordStats:
  """Adds the `WordStats` of one more batch."""
  return WordStats(old.used_MK + new.used_MK)


def join_stats(stats: WordStats, axis_name: str) -> WordStats:
  """Joins the `WordStats` of the parts of a batch, under `shard_map`."""
  return WordStats(lax.psum(stats.used_MK, axis_name))


def check_redraw(redraw: str, name: str = "redraw") -> None:
  """Raises ValueError unless `redraw`, called `name`, is one of `REDRAWS`."""
  if redraw == "published":
    raise ValueError(
      f'{name}="published" is gone: its codewords are too long, and most of '
      'them die again; take "split", which copies used ones.'
    )
  if redraw not in REDRAWS:
    raise ValueError(
      f"{name} must be one of {', '.join(REDRAWS)}; got {redraw!r}."
    )


def end_epoch(
  params: QincoParams,
  key: Array,
  stats: WordStats,
  *,
  redraw: str = "split",
  noise: float = 0.1,
  min_share: float = 0.05,
) -> tuple[QincoParams, WordStats, dict]:
  """Gives the codewords that the epoch hardly used another chance.

  `split`: a codeword used less than `min_share` of the mean becomes a copy of
  another one, drawn in proportion to its use, plus `noise` standard deviations
  of the codewords. `none` keeps all.

  Returns the parameters, the statistics for the next epoch and the report of
  `usage`.
  """
  check_redraw(redraw)
  fresh = stats.replace(used_MK=jnp.zeros_like(stats.used_MK))
  if redraw == "split":
    params = _split_words(params, key, stats.used_MK, noise, min_share)
  return params, fresh, usage(stats)


def _split_words(params, key, used_MK, noise, min_share):
  """Replaces codewords that are hardly used by copies of codewords that are."""
  parent_key, noise_key = jax.random.split(key)
  used_MK = used_MK.astype(jnp.float32)
  mean_M1 = used_MK.mean(axis=1, keepdims=True)
  is_dead_MK = used_MK <= min_share * mean_M1
  logits_MK = jnp.log(jnp.where(is_dead_MK, 0, used_MK))
  parents_MK = jax.random.categorical(
    parent_key, logits_MK[:, None], axis=-1, shape=used_MK.shape
  )
  shape = used_MK.shape + params.mean_D.shape
  draw_MKD = noise * jax.random.normal(noise_key, shape, jnp.float32)

  t = params.codebooks_TKD.shape[0]
  new = (is_dead_MK, parents_MK, draw_MKD)
  last = jax.tree.map(lambda x_MK: x_MK[-t:], new)
  params = params.replace(
    codebooks_TKD=jax.vmap(kmeans.replace_dead)(params.codebooks_TKD, *last)
  )
  if params.preselect_TKD is not None:
    params = params.replace(
      preselect_TKD=jax.vmap(kmeans.replace_dead)(params.preselect_TKD, *last)
    )
  if not params.is_ivf:
    first = jax.tree.map(lambda x_MK: x_MK[0], new)
    params = params.replace(
      first_KD=kmeans.replace_dead(params.first_KD, *first)
    )
  return params


def usage(stats: WordStats) -> dict:
  """Returns idle codewords, and per step share in use and entropy in bits."""
  used_MK = stats.used_MK.astype(jnp.float32)  # Whose sum may pass 2^31.
  share_MK = used_MK / jnp.maximum(used_MK.sum(axis=1, keepdims=True), 1)
  bits_MK = jnp.where(share_MK > 0, -share_MK * jnp.log2(share_MK), 0)
  return {
    "dead_words": jnp.sum(stats.used_MK == 0),
    "usage_M": jnp.mean(stats.used_MK > 0, axis=1),
    "entropy_M": bits_MK.sum(axis=1),
  }


def frozen(params: QincoParams) -> QincoParams:
  """Returns a tree of bools like `params`: True if nothing is learned."""
  is_frozen = jax.tree.map(lambda leaf: False, params)
  return is_frozen.replace(mean_D=True, std=True, first_KD=params.is_ivf)


def decode_losses(tables, z_ND, codes_NM, dtype):
  """Returns what `loss` differentiates, for vectors and codes of its encode.

  Losses `[M]` of the steps and `[T]` of the pre-selection, in normalised units
  as `z_ND`.
  """
  mse = lambda xhat_ND: jnp.mean((xhat_ND - z_ND) ** 2)

  def body(xhat_ND, step):
    weights, ids_N = step
    target_ND = z_ND - lax.stop_gradient(xhat_ND)
    preselect = jnp.float32(0)
    if weights.preselect_TKD is not None:
      plain_ND = weights.preselect_TKD[ids_N]
      preselect = jnp.mean((plain_ND - target_ND) ** 2)
    xhat_ND = xhat_ND + qinco_search.words_at(weights, ids_N, xhat_ND, dtype)
    return xhat_ND, (mse(xhat_ND), preselect)

  xhat_ND = tables.first_KD[codes_NM[:, 0]]
  _, (errors_T, preselect_T) = lax.scan(
    body,
    xhat_ND,
    (tables.steps, codes_NM[:, 1:].T),
    unroll=_num_unrolled(tables.steps),
  )
  errors_M = jnp.concatenate([mse(xhat_ND)[None], errors_T])
  return errors_M, preselect_T


def _num_unrolled(stacked) -> int:
  """How many steps of a scan with a gradient to write out.

  A scan keeps what the gradient needs in arrays over the steps, which XLA
  fills with zeros first: a fifth of a training step of S. If weights are
  large (L), joining the gradients of steps written out costs more, and many
  steps take long to compile.
  """
  leaves = jax.tree.leaves(stacked)
  num_steps, num_weights = len(leaves[0]), sum(leaf.size for leaf in leaves)
  is_small = num_steps <= _MAX_UNROLLED and num_weights <= _MAX_WEIGHTS
  return num_steps if is_small else 1


def _gain(add_word: bool, has_projection: bool) -> int:
  """Multiple of its codeword that an untrained network returns.

  Without projections e starts as the codeword itself and the codeword is added
  again.
  """
  return 2 if add_word and not has_projection else 1


def _scale(xt_ND, is_qinco1):
  """Mean and scale of the data: QINCo1 maps it to [-1, 1]."""
  if is_qinco1:
    return jnp.zeros(xt_ND.shape[1], jnp.float32), jnp.max(jnp.abs(xt_ND))
  return _moments(xt_ND)


@jax.jit
def _moments(x_ND):
  """Mean `[D]`, and the standard deviation over all numbers."""
  mean_D = _mean(x_ND)
  squares_N1 = jnp.mean((x_ND - mean_D[None]) ** 2, axis=1, keepdims=True)
  return mean_D, jnp.sqrt(_mean(squares_N1)[0])


def _mean(x_ND):
  """Mean `[D]` of the rows; a second pass adds what float32 lost in the sum."""
  mean_D = x_ND.mean(axis=0)
  return mean_D + (x_ND - mean_D[None]).mean(axis=0)


def _init_networks(key, sizes, *, zero_output):
  """Weights of `T` networks that add nothing to their codeword at first."""
  t, d, e, h, j, u = sizes
  in_key, up_key, out_key, word_key, state_key = jax.random.split(key, 5)

  def kaiming(key, *shape):
    bound = (6 / shape[-2]) ** 0.5
    return jax.random.uniform(
      key, shape, jnp.float32, minval=-bound, maxval=bound
    )

  low_rank = {}
  if u:
    # The product must be zero, but not both factors: nothing would learn.
    low_rank = dict(
      word_TEU=kaiming(word_key, t, e, u),
      state_TDU=kaiming(state_key, t, d, u),
      mix_TUE=jnp.zeros((t, u, e), jnp.float32),
      bias_TE=None,
    )
  full = dict(
    word_TEU=jnp.zeros((t, e, e), jnp.float32),
    state_TDU=jnp.zeros((t, d, e), jnp.float32),
    mix_TUE=None,
    bias_TE=jnp.zeros((t, e), jnp.float32),
  )
  out_TED = kaiming(out_key, t, e, d) * (not zero_output)
  return dict(
    in_TDE=None if e == d else kaiming(in_key, t, d, e),
    up_TJEH=kaiming(up_key, t, j, e, h),
    down_TJHE=jnp.zeros((t, j, h, e), jnp.float32),
    out_TED=None if e == d else out_TED,
    **(low_rank or full),
  )


def _check_sizes(
  d, e, num_steps, codebook_size, hidden_dim, num_blocks, low_rank, is_qinco1
):
  """Raises ValueError with the rule that a size breaks."""
  check_range(
    "num_steps", num_steps, 2, 256, "M code positions; one alone is k-means"
  )
  check_range(
    "codebook_size", codebook_size, 2, 65536, "K codewords per position"
  )
  check_range("hidden_dim", hidden_dim, 1, 65536)
  check_range("num_blocks", num_blocks, 1, 256, "residual blocks L")
  check_range("network_dim", e, 1, 65536, "d_e, or None for the data's")
  if is_qinco1 and e != d:
    raise ValueError(
      f"QINCo1 works in the dimension of the data: network_dim must be None "
      f"or {d}, got {e}."
    )
  if low_rank is not None:
    check_range("low_rank", low_rank, 1, d + e, "a larger rank saves nothing")
