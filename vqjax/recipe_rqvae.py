"""How an RQ-VAE is trained on items.

All items are learned from. An epoch is one pass over them, in steps of equal
size of at most `config.train.batch_size`.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import recipes
from vqjax.codecs import rqvae_loss, rqvae_start
from vqjax.data import batches
from vqjax.training import loop, optimisers, rqvae_learner

KMEANS = ("none", "small", "large")
_BEST = ("mse", "collision_rate", "utilisation", "train_loss")


def make_plan(config, num_rows: int, scale: float) -> loop.Plan:
  """Returns the lengths and intervals of the training loop."""
  train = config.train
  rqvae_loss.check_revive(train.redraw, "--config.train.redraw")
  optimisers.check_name("best", train.best, _BEST)
  recipes.check_options(train, counts=("eval_epochs",))
  for name, known in (("kmeans", KMEANS), ("networks", rqvae_start.NETWORKS)):
    if config.init[name] not in known:
      raise ValueError(
        f"--config.init.{name} must be one of {', '.join(known)}; got "
        f"{config.init[name]!r}."
      )
  parts = jax.device_count() * train.accumulate
  steps = -(-num_rows // (train.batch_size * parts))
  return recipes.make_plan(
    config,
    steps,
    parts * -(-num_rows // (steps * parts)),
    eval_epochs=train.eval_epochs,
    measure=train.best,
    scale=scale if train.best == "mse" else 1.0,
    best_of=_BEST,
    num_evaluated=train.save_limit,
  )


def check(config, plan: loop.Plan, shape) -> None:
  """Raises ValueError if the model does not fit `[N, D]` vectors."""
  x_ND = jax.ShapeDtypeStruct((plan.batch_size, shape[1]), jnp.float32)
  try:
    params = jax.eval_shape(partial(_init, config), x_ND)
    jax.eval_shape(
      partial(rqvae_loss.loss, **config.loss), params, jax.random.key(0), x_ND
    )
  except ValueError as error:
    raise ValueError(f"In the configuration: {error}") from error
  most = max(config.model.codebook_sizes)
  if most > shape[0]:
    raise ValueError(
      f"{shape[0]} training vectors cannot fill the {most} codewords of a "
      "level: lower --config.model.codebook_sizes, or give more vectors."
    )
  num = _num_to_start(config, plan, shape[0])
  if config.init.kmeans != "none" and most > num:
    of = {
      "small": f"the first batch, of {num} vectors: raise "
      "--config.train.batch_size, or set --config.init.kmeans=large",
      "large": f"a sample of {num} vectors: raise --config.init.max_vectors",
    }
    raise ValueError(
      f"--config.init.kmeans={config.init.kmeans} starts the {most} codewords "
      f"of a level from {of[config.init.kmeans]}."
    )


def _num_to_start(config, plan, num_rows: int) -> int:
  """How many vectors k-means starts the codebooks from."""
  if config.init.kmeans == "small":
    return min(plan.batch_size, num_rows)
  return min(config.init.max_vectors, num_rows)


def _init(config, sample_ND):
  key = jax.random.key(config.seed)
  params = rqvae_start.init(key, sample_ND.shape[1], **config.model)
  if config.init.networks == "pca":
    params = rqvae_start.start_networks(params, sample_ND)
  return params


def prepare(
  config, workdir, vectors, num_rows: int, held_out: slice, plan: loop.Plan
) -> recipes.Job:
  """Returns the job; held out are all vectors if none were set aside."""
  del workdir
  schedule = recipes.make_schedule(config.train, plan)
  tx = recipes.make_tx(config.train, schedule)
  make_state = partial(rqvae_learner.make_state, tx=tx)

  def start():
    params = _init(config, jnp.asarray(_sample(config, vectors, num_rows)))
    if config.init.kmeans != "none":
      params = rqvae_start.start_codebooks(
        jax.random.fold_in(jax.random.key(config.seed), 1),
        params,
        jnp.asarray(_start_vectors(config, plan, vectors, num_rows)),
        num_iterations=config.init.num_iterations,
        sk_epsilons=config.loss.sk_epsilons,
        sk_iters=config.loss.sk_iters,
      )
    return make_state(params)

  return recipes.Job(
    vectors=vectors,
    learner=rqvae_learner.make_learner(
      vectors,
      range(held_out.start, held_out.stop),
      beam_size=config.encode.beam_size,
      revive=config.train.redraw,
      **config.loss,
    ),
    tx=tx,
    schedule=schedule,
    start_fn=start,
    abstract=jax.eval_shape(
      lambda x_ND: make_state(_init(config, x_ND)),
      jax.ShapeDtypeStruct((num_rows, vectors.shape[1]), jnp.float32),
    ),
    state_fn=make_state,
  )


def _start_vectors(config, plan, vectors, num_rows: int) -> np.ndarray:
  """What k-means starts from: the first batch, or a sample of the file."""
  if config.init.kmeans == "small":
    rows_N = batches.batch_rows(config.seed, 0, plan.batch_size, num_rows)
    num = _num_to_start(config, plan, num_rows)
    return batches.read_rows(vectors, rows_N[:num])
  return _sample(config, vectors, num_rows)


def _sample(config, vectors, num_rows: int) -> np.ndarray:
  """What the networks start from, spread over the file."""
  return batches.subsample(
    vectors, config.init.max_vectors, config.seed, num_rows=num_rows
  )


def _set_num_codes(config, num_codes: int) -> None:
  """Takes the first levels, or repeats the last."""
  for group, name in (
    (config.model, "codebook_sizes"),
    (config.loss, "sk_epsilons"),
  ):
    values = group[name]
    if values:
      more = (values[-1],) * (num_codes - len(values))
      group[name] = (*values[:num_codes], *more)


RECIPE = recipes.Recipe(
  plan_fn=make_plan,
  check_fn=check,
  prepare_fn=prepare,
  set_num_codes_fn=_set_num_codes,
)
