"""Small QINCos with random weights, of every kind, for the tests."""

import jax.numpy as jnp
import numpy as np

from vqjax.codecs.qinco import QincoParams, codebook_sizes


def make_params(
  seed=0,
  *,
  dim=6,
  num_networks=3,
  num_codewords=7,
  network_dim=5,
  hidden_dim=4,
  num_blocks=2,
  low_rank=None,
  is_qinco1=False,
  num_lists=0,
):
  """Weights of a size at which the network matters as much as the words."""
  rng = np.random.default_rng(seed)
  t, d, k, e, h, j = (
    num_networks, dim, num_codewords, network_dim, hidden_dim, num_blocks,
  )  # fmt: skip
  if is_qinco1:
    e = d
  draw = lambda *shape, scale=0.5: jnp.asarray(
    scale * rng.normal(size=shape), jnp.float32
  )
  u = low_rank or e
  return QincoParams(
    mean_D=draw(d, scale=1.0),
    std=jnp.float32(1.7),
    first_KD=draw(num_lists or k, d, scale=1.0),
    codebooks_TKD=draw(t, k, d),
    preselect_TKD=None if is_qinco1 else draw(t, k, d),
    in_TDE=None if e == d else draw(t, d, e),
    word_TEU=draw(t, e, u),
    state_TDU=draw(t, d, u),
    mix_TUE=draw(t, u, e) if low_rank else None,
    bias_TE=None if low_rank else draw(t, e),
    up_TJEH=draw(t, j, e, h),
    down_TJHE=draw(t, j, h, e),
    out_TED=None if e == d else draw(t, e, d),
    add_word=not is_qinco1,
    is_ivf=bool(num_lists),
  )


CASES = {
  "qinco2": dict(),
  "qinco2_one_block": dict(num_blocks=1),
  "qinco2_same_dim": dict(network_dim=6),
  "qinco1": dict(is_qinco1=True),
  "low_rank": dict(is_qinco1=True, low_rank=2),
  "ivf": dict(num_lists=11),
}


def prefixes(params, n=9):
  """Codes drawn at random, `[n, 1]` to `[n, M]`."""
  rng, sizes = np.random.default_rng(0), codebook_sizes(params)
  codes_NM = np.stack([rng.integers(k, size=n) for k in sizes], axis=1)
  return [jnp.asarray(codes_NM[:, : m + 1]) for m in range(len(sizes))]


def vectors(n=20, dim=6, seed=1):
  draw_ND = np.random.default_rng(seed).normal(size=(n, dim))
  return (2 * draw_ND).astype(np.float32)
