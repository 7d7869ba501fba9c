"""What the training loop needs to learn an RQ-VAE."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import devices
from vqjax.codecs import rqvae, rqvae_loss, runner
from vqjax.codecs.rule import SearchRule
from vqjax.data import batches
from vqjax.training import loop

METRICS = ["loss", "mse", "reconstruction", "quantisation"]
_SAMPLE = 65_536  # Vectors that the variance is measured on.


def make_state(params: rqvae.RQVAEParams, tx) -> loop.TrainState:
  """Returns the state before the first step, from started parameters."""
  stats = rqvae_loss.empty_stats(params)
  return loop.make_state(params, tx, stats, METRICS, rqvae_loss.frozen)


def make_learner(
  vectors, rows: range, *, beam_size: int = 1, revive: str = "none", **knobs
) -> loop.Learner:
  """Returns the learner of an RQ-VAE.

  The validation codes items as the finished codec does and reports

  - `mse`, squared error per vector, and `relative_error`, its share of the
    variance (the mean squared distance to the mean),
  - `collision_rate`, (items - distinct codes) / items,
  - `utilisation_M`, the share of its codewords that a level uses, their mean
    `utilisation`, and `perplexity_M`, e to the entropy of the codes of a level.

  Args:
    vectors: Items, an array or an open file.
    rows: Those that it is validated on.
    beam_size: Of the search of the validation.
    revive: What becomes of codewords that an epoch hardly used.
    **knobs: Of `rqvae_loss.loss`.
  """
  rule = SearchRule(beam_size=beam_size)
  variance = _variance(vectors, rows)

  def code(tables, x_ND):
    codes_NM = rqvae.CODEC.encode(tables, x_ND, None, rule)
    error_ND = x_ND - rqvae.decode(tables, codes_NM)
    return codes_NM, jnp.sum(error_ND**2, axis=-1)

  prepare_fn, code_fn = jax.jit(rqvae.prepare), devices.data_parallel(code)

  def validate(params):
    tables = prepare_fn(devices.to_local_devices(params))
    mine = devices.process_rows(len(rows))
    blocks = batches.map_blocks(
      partial(code_fn, tables),
      vectors,
      block_size=runner.encode_block(rqvae.CODEC, tables, rule),
      rows=rows[mine.start : mine.stop],
    )
    parts = [part for _, part in blocks]
    codes_NM, error_N = (
      devices.gather_rows(np.concatenate(each), len(rows))
      for each in zip(*parts, strict=True)
    )
    mse = float(np.mean(error_N, dtype=float))
    return {
      "mse": mse,
      "relative_error": mse / variance,
      **code_figures(codes_NM, rqvae.codebook_sizes(params)),
    }

  return loop.Learner(
    loss_fn=partial(rqvae_loss.loss, **knobs),
    join_stats_fn=rqvae_loss.join_stats,
    merge_stats_fn=rqvae_loss.merge_stats,
    end_epoch_fn=partial(rqvae_loss.end_epoch, revive=revive),
    usage_fn=rqvae_loss.usage,
    validate_fn=validate,
    frozen_fn=rqvae_loss.frozen,
    update_fn=rqvae_loss.update_norms,
  )


def code_figures(codes_NM: np.ndarray, codebook_sizes) -> dict:
  """Collisions and use of codewords of codes `[N, M]`; see `make_learner`."""
  num = len(codes_NM)
  utilisation, perplexity = [], []
  for codes_N, size in zip(codes_NM.T, codebook_sizes, strict=True):
    share_K = np.bincount(codes_N, minlength=size) / num
    share_K = share_K[share_K > 0]
    utilisation.append(len(share_K) / size)
    perplexity.append(float(np.exp(-np.sum(share_K * np.log(share_K)))))
  num_distinct = len(np.unique(codes_NM, axis=0))
  return {
    "collision_rate": (num - num_distinct) / num,
    "utilisation": float(np.mean(utilisation)),
    "utilisation_M": utilisation,
    "perplexity_M": perplexity,
  }


def _variance(vectors, rows: range) -> float:
  """Mean squared distance to the mean, of a sample of the rows."""
  at_N = rows.start + batches.evenly_spaced_rows(len(rows), _SAMPLE)
  x_ND = batches.read_rows(vectors, at_N)
  centred_ND = x_ND - x_ND.mean(axis=0, dtype=float)
  return max(float(np.sum(centred_ND**2) / len(x_ND)), 1e-30)
