"""How an RQ-VAE starts: random networks, principal components, k-means."""

from functools import partial

import jax
import jax.numpy as jnp

from vqjax.codecs import kmeans, rqvae, rqvae_loss
from vqjax.codecs.rqvae import Mlp, Norm, RQVAEParams
from vqjax.core import Array, check_range, check_shape

NETWORKS = ("pca", "random")


def init(
  key: Array,
  dim: int,
  *,
  layers: tuple[int, ...],
  e_dim: int,
  codebook_sizes: tuple[int, ...],
  batch_norm: bool = False,
) -> RQVAEParams:
  """Returns random parameters: Xavier-normal weights, small codewords.

  Args:
    key: Random key.
    dim: D, dimensions of the vectors.
    layers: Hidden widths of the encoder; the decoder has them in reverse.
    e_dim: E, dimensions that are quantised.
    codebook_sizes: Codewords of each level.
    batch_norm: Whether hidden layers are normalised over the batch.

  Raises:
    ValueError: A size is out of range.
  """
  check_sizes(codebook_sizes)
  for width in (dim, *layers, e_dim):
    check_range("widths of layers and e_dim", width, 1, 1 << 20)
  widths = (dim, *layers, e_dim)
  encoder_key, decoder_key, words_key = jax.random.split(key, 3)

  def codebook(level: int, size: int) -> Array:
    draw = partial(jax.random.uniform, minval=-1 / size, maxval=1 / size)
    return draw(
      jax.random.fold_in(words_key, level), (size, e_dim), jnp.float32
    )

  return RQVAEParams(
    encoder=_init_mlp(encoder_key, widths, batch_norm),
    decoder=_init_mlp(decoder_key, widths[::-1], batch_norm),
    codebooks=tuple(codebook(*each) for each in enumerate(codebook_sizes)),
  )


def check_sizes(codebook_sizes) -> None:
  """Raises ValueError unless these are sizes of levels."""
  check_range(
    "levels (codebook_sizes)",
    len(codebook_sizes),
    *(1, rqvae.MAX_LEVELS, "a token of an id has one letter per level"),
  )
  for size in codebook_sizes:
    check_range("codebook_sizes", size, 2, 1 << 20, "codewords of a level")


def _init_mlp(key: Array, widths: tuple[int, ...], batch_norm: bool) -> Mlp:
  weights, norms = [], []
  for j, (n, m) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
    draw = jax.random.normal(jax.random.fold_in(key, j), (n, m), jnp.float32)
    weights.append(draw * (2 / (n + m)) ** 0.5)
    # Arrays of their own: a training step gives its state away.
    fills = (jnp.full(m, fill, jnp.float32) for fill in (1, 0, 0, 1))
    norms.append(Norm(*fills))
  biases = tuple(jnp.zeros(m, jnp.float32) for m in widths[1:])
  return Mlp(tuple(weights), biases, tuple(norms[:-1]) if batch_norm else ())


def start_networks(params: RQVAEParams, x_ND: Array) -> RQVAEParams:
  """Returns networks that start as the principal components of a sample.

  Each network gets a linear path, to the first `E` components and back, and
  layers that add nothing to it at first. So training starts from residual
  k-means of the components, not from what random networks leave of vectors.

  Args:
    params: From `init`.
    x_ND: Sample of the training vectors.
  """
  check_shape("x", x_ND, (None, rqvae.dim(params)))
  e = params.codebooks[0].shape[1]
  mean_D, skip_DE = _components(x_ND, min(e, x_ND.shape[1]))
  skip_DE = jnp.pad(skip_DE, ((0, 0), (0, e - skip_DE.shape[1])))
  mean_E = jnp.matmul(mean_D, skip_DE, precision="highest")

  def start(mlp: Mlp, bias_E, skip_DE) -> Mlp:
    return mlp.replace(
      weights=(*mlp.weights[:-1], jnp.zeros_like(mlp.weights[-1])),
      biases=(*mlp.biases[:-1], bias_E),
      skip_DE=skip_DE,
    )

  return params.replace(
    encoder=start(params.encoder, -mean_E, skip_DE),
    decoder=start(params.decoder, mean_D, skip_DE.T),
  )


@partial(jax.jit, static_argnames="num")
def _components(x_ND, num: int):
  """Mean `[D]` and the first components `[D, num]`, of length 1."""
  mean_D = x_ND.mean(axis=0)
  centred_ND = x_ND - mean_D[None]
  covariance_DD = jnp.matmul(centred_ND.T, centred_ND, precision="highest")
  _, vectors_DD = jnp.linalg.eigh(covariance_DD)
  return mean_D, vectors_DD[:, ::-1][:, :num]


def start_codebooks(
  key: Array,
  params: RQVAEParams,
  x_ND: Array,
  *,
  num_iterations: int = 100,
  sk_epsilons: tuple[float, ...] = (),
  sk_iters: int = 50,
  block_size: int = 4096,
) -> RQVAEParams:
  """Replaces the codebooks by k-means of the residuals, level after level.

  Args:
    key: Of the starts of k-means.
    params: Whose encoder makes the latent vectors, in training mode.
    x_ND: A sample of the training vectors, at least as many as the largest
      level has codewords.
    num_iterations: Of k-means.
    sk_epsilons: As for `loss`: such a level leaves what Sinkhorn assigns.
    sk_iters: As for `loss`.
    block_size: Rows compared with all codewords at a time.

  Raises:
    ValueError: There are fewer vectors than codewords in a level.
  """
  sizes = rqvae.codebook_sizes(params)
  check_range(
    "vectors that the codebooks start from",
    x_ND.shape[0],
    *(max(sizes), 1 << 40, "k-means needs one for each codeword of a level"),
  )
  epsilons = rqvae_loss.check_epsilons(sk_epsilons, len(sizes))
  residual_NE, _ = jax.jit(rqvae_loss.run_training)(params.encoder, x_ND)
  codebooks = []
  for level, size in enumerate(sizes):
    words_KE = kmeans.fit(
      jax.random.fold_in(key, level),
      residual_NE,
      size,
      num_iterations=num_iterations,
      block_size=block_size,
    )
    codebooks.append(words_KE)
    ids_N = rqvae_loss.choose(residual_NE, words_KE, epsilons[level], sk_iters)
    residual_NE = residual_NE - words_KE[ids_N]
  return params.replace(codebooks=tuple(codebooks))
