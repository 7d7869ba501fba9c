"""How an RQ-VAE learns: loss, revival of dead codewords, statistics.

The gradient of the reconstruction passes the quantiser as if it were not there
(straight-through); the codewords learn to lie at the residuals that chose them,
and the encoder to stay near its first codeword. Residuals carry no gradient, so
later levels move their own codewords alone.

`separation` is ours: it pushes the latent vectors of a batch apart until they
are a cell of the quantiser away from each other. Items that differ little, as
variants of one product do, else have one code, for the reconstruction gains
next to nothing from telling them apart.

References: TIGER, arXiv 2305.05065, section 3.1; the losses of a codebook, van
den Oord et al., arXiv 1711.00937, equation 3.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from vqjax.codecs import kmeans, rqvae, sinkhorn
from vqjax.codecs.distances import nearest, sq_distances, sq_norms
from vqjax.codecs.rqvae import Mlp, RQVAEParams
from vqjax.core import Array, check_range, check_shape

LOSSES = ("mse", "l1")
REVIVALS = ("split", "none")
_MOMENTUM = 0.1  # Share of a batch in the running statistics.


@struct.dataclass
class Stats:
  """What an epoch says of the codewords, and its last batch of the norms."""

  used: tuple[Array, ...]  # Rows that chose each codeword, int32 `[K]` a level.
  # Mean and unbiased variance `[H]` per norm, those of the encoder first.
  moments: tuple[tuple[Array, Array], ...]


def check_epsilons(sk_epsilons, num_levels: int) -> tuple[float, ...]:
  """Returns an epsilon per level, 0 for none; raises ValueError unless so."""
  if not sk_epsilons:
    return (0.0,) * num_levels
  if len(sk_epsilons) != num_levels:
    raise ValueError(
      f"sk_epsilons must have one number per level, {num_levels}, or none; "
      f"got {len(sk_epsilons)}."
    )
  for epsilon in sk_epsilons:
    check_range("sk_epsilons", epsilon, 0, 1e6, "0 is no Sinkhorn")
  return tuple(sk_epsilons)


def choose(residual_NE, words_KE, epsilon: float, sk_iters: int) -> Array:
  """Codewords `[N]` of one level: the nearest, or shared out by Sinkhorn."""
  if epsilon <= 0:
    return nearest(residual_NE, words_KE)
  return sinkhorn.assign(sq_distances(residual_NE, words_KE), epsilon, sk_iters)


def run_training(mlp: Mlp, x_ND, key=None, dropout: float = 0.0):
  """Output by the statistics of the batch, and these as in `Stats`."""
  moments = []

  def drop(layer, x_NH):
    if not dropout:
      return x_NH
    layer_key = jax.random.fold_in(key, layer)
    is_kept_NH = jax.random.bernoulli(layer_key, 1 - dropout, x_NH.shape)
    return jnp.where(is_kept_NH, x_NH / (1 - dropout), 0)

  def normalise(norm, x_NH):
    n = x_NH.shape[0]
    mean_H, var_H = jnp.mean(x_NH, axis=0), jnp.var(x_NH, axis=0)
    moments.append((mean_H, var_H * (n / max(n - 1, 1))))
    gain_H = norm.scale_H / jnp.sqrt(var_H + rqvae.NORM_EPSILON)
    return (x_NH - mean_H[None]) * gain_H[None] + norm.bias_H[None]

  return rqvae.run(mlp, x_ND, drop, normalise), tuple(moments)


def loss(
  params: RQVAEParams,
  key: Array,
  x_ND: Array,
  *,
  loss_type: str = "mse",
  quant_weight: float = 1.0,
  beta: float = 0.25,
  sk_epsilons: tuple[float, ...] = (),
  sk_iters: int = 50,
  dropout: float = 0.0,
  separation: float = 0.0,
) -> tuple[Array, dict]:
  """Training loss of vectors `[N, D]`, and what `loop.Learner` asks for.

  Args:
    params: Parameters; batch norm takes the statistics of the batch.
    key: Of the dropout.
    x_ND: Vectors of a batch.
    loss_type: "mse" or "l1", the mean over all numbers of the batch.
    quant_weight: Of the loss of the quantiser, the mean over levels of
      codebook and commitment loss.
    beta: Of the commitment loss.
    sk_epsilons: Of a Sinkhorn assignment per level, 0 for the nearest codeword;
      empty for none. See `sinkhorn`: it looks at the rows of this device.
    sk_iters: Its iterations.
    dropout: Share of the inputs of each layer that are dropped.
    separation: Weight of the loss that keeps items apart; 0 for none. It looks
      at all pairs of rows of this device.

  Returns:
    The loss, and a dict of `metrics`, scalars, and `stats`, the `Stats` of the
    batch.

  Raises:
    ValueError: A name or a number makes no sense.
  """
  check_shape("x", x_ND, (None, rqvae.dim(params)))
  if loss_type not in LOSSES:
    raise ValueError(
      f"loss_type must be one of {', '.join(LOSSES)}; got {loss_type!r}."
    )
  check_range("dropout", dropout, 0, 0.99)
  check_range("separation", separation, 0, 1e6)
  epsilons = check_epsilons(sk_epsilons, len(params.codebooks))
  encoder_key, decoder_key = jax.random.split(key)
  z_NE, encoder_moments = run_training(
    params.encoder, x_ND, encoder_key, dropout
  )
  ids, losses, residual_NE = [], [], z_NE
  for words_KE, epsilon in zip(params.codebooks, epsilons, strict=True):
    ids.append(
      lax.stop_gradient(choose(residual_NE, words_KE, epsilon, sk_iters))
    )
    chosen_NE = words_KE[ids[-1]]
    to_words = jnp.mean((chosen_NE - lax.stop_gradient(residual_NE)) ** 2)
    commitment = jnp.mean((lax.stop_gradient(chosen_NE) - residual_NE) ** 2)
    losses.append(to_words + beta * commitment)
    residual_NE = lax.stop_gradient(residual_NE - chosen_NE)
  # The value of the sum of codewords, with the gradient of z.
  sum_NE = z_NE - residual_NE
  xhat_ND, decoder_moments = run_training(
    params.decoder, sum_NE, decoder_key, dropout
  )
  error_ND = xhat_ND - x_ND
  reconstruction = jnp.mean(
    error_ND**2 if loss_type == "mse" else jnp.abs(error_ND)
  )
  quantisation = sum(losses) / len(losses)
  total = reconstruction + quant_weight * quantisation
  if separation:
    total += separation * _closeness(z_NE, lax.stop_gradient(sum_NE))
  stats = Stats(
    used=tuple(
      jnp.bincount(ids_N, length=size).astype(jnp.int32)
      for ids_N, size in zip(ids, rqvae.codebook_sizes(params), strict=True)
    ),
    moments=encoder_moments + decoder_moments,
  )
  metrics = {
    "loss": total,
    "mse": jnp.mean(jnp.sum(error_ND**2, axis=-1)),
    "reconstruction": reconstruction,
    "quantisation": quantisation,
  }
  return total, {"metrics": metrics, "stats": lax.stop_gradient(stats)}


def _closeness(z_NE, sum_NE) -> Array:
  """Mean over rows of how far others reach into their cell, 0 to 1 each.

  The squared radius of a cell is the mean squared error of the quantiser. It
  has a gradient too: else all would grow together.
  """
  radius = jnp.mean(sq_norms(z_NE - sum_NE)) + 1e-12
  close_NN = jax.nn.relu(1 - sq_distances(z_NE, z_NE) / radius)
  is_other_NN = 1 - jnp.eye(z_NE.shape[0], dtype=jnp.float32)
  return jnp.sum(close_NN * is_other_NN) / z_NE.shape[0]


def empty_stats(params: RQVAEParams) -> Stats:
  """Returns the `Stats` before the first step."""
  norms = params.encoder.norms + params.decoder.norms
  return Stats(
    used=tuple(
      jnp.zeros(size, jnp.int32) for size in rqvae.codebook_sizes(params)
    ),
    moments=tuple(
      (jnp.zeros_like(norm.mean_H), jnp.zeros_like(norm.var_H))
      for norm in norms
    ),
  )


def merge_stats(old: Stats, new: Stats) -> Stats:
  """Adds the uses of one more batch; the moments are those of the batch."""
  return Stats(jax.tree.map(jnp.add, old.used, new.used), new.moments)


def join_stats(stats: Stats, axis_name: str) -> Stats:
  """Joins the `Stats` of the parts of a batch, under `shard_map`."""
  return Stats(
    lax.psum(stats.used, axis_name), lax.pmean(stats.moments, axis_name)
  )


def update_norms(params: RQVAEParams, stats: Stats) -> RQVAEParams:
  """Takes the moments of a batch into the running statistics of the norms."""
  moments = iter(stats.moments)

  def update(mlp: Mlp) -> Mlp:
    norms = []
    for norm in mlp.norms:
      mean_H, var_H = next(moments)
      blend = lambda old, new: (1 - _MOMENTUM) * old + _MOMENTUM * new
      norms.append(
        norm.replace(
          mean_H=blend(norm.mean_H, mean_H), var_H=blend(norm.var_H, var_H)
        )
      )
    return mlp.replace(norms=tuple(norms))

  encoder = update(params.encoder)
  return params.replace(encoder=encoder, decoder=update(params.decoder))


def frozen(params: RQVAEParams) -> RQVAEParams:
  """Returns a tree of bools like `params`: True for running statistics."""
  is_frozen = jax.tree.map(lambda leaf: False, params)

  def freeze(mlp: Mlp) -> Mlp:
    norms = (norm.replace(mean_H=True, var_H=True) for norm in mlp.norms)
    return mlp.replace(norms=tuple(norms))

  return is_frozen.replace(
    encoder=freeze(is_frozen.encoder), decoder=freeze(is_frozen.decoder)
  )


def usage(stats: Stats) -> dict:
  """Returns dead codewords, and per level the share used and the perplexity."""
  used, perplexity = [], []
  for used_K in stats.used:
    share_K = used_K.astype(jnp.float32)  # Whose sum may pass 2^31.
    share_K = share_K / jnp.maximum(share_K.sum(), 1)
    safe_K = jnp.where(share_K > 0, share_K, 1)
    used.append(jnp.mean(used_K > 0))
    perplexity.append(jnp.exp(-jnp.sum(share_K * jnp.log(safe_K))))
  return {
    "dead_words": sum(jnp.sum(used_K == 0) for used_K in stats.used),
    "usage_M": jnp.stack(used),
    "perplexity_M": jnp.stack(perplexity),
  }


def check_revive(revive: str, name: str = "revive") -> None:
  """Raises ValueError unless `revive`, called `name`, is in `REVIVALS`."""
  if revive not in REVIVALS:
    raise ValueError(
      f"{name} must be one of {', '.join(REVIVALS)}; got {revive!r}."
    )


def end_epoch(
  params: RQVAEParams,
  key: Array,
  stats: Stats,
  *,
  revive: str = "none",
  noise: float = 0.1,
  min_share: float = 0.05,
) -> tuple[RQVAEParams, Stats, dict]:
  """Gives the codewords that the epoch hardly used another chance.

  `split`: a codeword used less than `min_share` of the mean becomes a copy of
  another one, drawn in proportion to its use, plus `noise` standard deviations
  of the codewords. `none` keeps all.

  Returns the parameters, the statistics for the next epoch and the report of
  `usage`.
  """
  check_revive(revive)
  if revive == "split":
    keys = jax.random.split(key, len(params.codebooks))
    split_fn = partial(_split, noise=noise, min_share=min_share)
    codebooks = map(split_fn, keys, params.codebooks, stats.used)
    params = params.replace(codebooks=tuple(codebooks))
  fresh = stats.replace(used=jax.tree.map(jnp.zeros_like, stats.used))
  return params, fresh, usage(stats)


def _split(key, words_KE, used_K, *, noise, min_share):
  """Replaces codewords that are hardly used by copies of those that are."""
  parent_key, noise_key = jax.random.split(key)
  used_K = used_K.astype(jnp.float32)
  is_dead_K = used_K <= min_share * used_K.mean()
  logits_K = jnp.log(jnp.where(is_dead_K, 0, used_K))
  parents_K = jax.random.categorical(parent_key, logits_K, shape=logits_K.shape)
  draw_KE = noise * jax.random.normal(noise_key, words_KE.shape, jnp.float32)
  return kmeans.replace_dead(words_KE, is_dead_K, parents_K, draw_KE)
