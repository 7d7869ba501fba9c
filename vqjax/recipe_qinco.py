"""How a QINCo is trained, with and without lists."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import ivf_lists, recipes
from vqjax.codecs import qinco, qinco_loss
from vqjax.codecs.rule import SearchRule
from vqjax.core import check_range
from vqjax.data import batches
from vqjax.training import learners, loop, optimisers

# Weights per number of the data from which on noise gains; its share for one
# weight per number and pass, and at most.
_FEW, _NOISE, _MOST_NOISE = 0.2, 1 / 300, 0.5
SEARCH = ("num_candidates", "beam_size", "num_joint_candidates")


def make_plan(config, num_rows: int, scale: float) -> loop.Plan:
  """Returns the lengths and intervals of the training loop."""
  train = config.train
  qinco_loss.check_redraw(train.redraw, "--config.train.redraw")
  dtypes = ("auto", "float32", "bfloat16")
  optimisers.check_name("dtype", train.dtype, dtypes)
  recipes.check_options(train, counts=("epoch_size",))
  if train.noise_share is not None:
    name = "--config.train.noise_share"
    check_range(name, train.noise_share, 0, 0.9, "of the variance; 0 for none")
  batch_size = train.batch_size * jax.device_count() * train.accumulate
  if num_rows < batch_size:
    raise ValueError(
      f"A step takes {batch_size} vectors (--config.train.batch_size x devices "
      f"x --config.train.accumulate), but there are only {num_rows} to train "
      "on. Lower --config.train.batch_size or --config.data.validation_size."
    )
  steps = max(min(train.epoch_size, num_rows) // batch_size, 1)
  return recipes.make_plan(config, steps, batch_size, scale=scale)


def noise_share(config, plan: loop.Plan, shape) -> float:
  """Returns the share of noise for `[N, D]` vectors, by default from N and D.

  A network learns vectors by heart if it has as many weights as they have
  numbers, and the more often it sees them. What the constants rest on is in
  docs/what_was_tried.md.
  """
  if config.train.noise_share is not None:
    return config.train.noise_share
  num, dim = shape
  make_fn = partial(make_state, config, _make_tx(config, plan), None)
  params = jax.eval_shape(
    make_fn, jax.ShapeDtypeStruct(shape, "float32")
  ).params
  weights = sum(x.size for x in jax.tree.leaves(params)) / (num * dim)
  passes = plan.total_steps * plan.batch_size / num
  is_few = weights > _FEW
  return min(_NOISE * weights * passes, _MOST_NOISE) if is_few else 0.0


def check(config, plan: loop.Plan, shape) -> None:
  """Raises ValueError if model and searches do not fit `[N, D]` vectors."""
  make_fn = partial(make_state, config, _make_tx(config, plan), None)
  # Without lists, which change nothing here and may take long to make.
  abstract = jax.eval_shape(make_fn, jax.ShapeDtypeStruct(shape, jnp.float32))
  check_search(config, abstract.params)


def check_search(config, params) -> None:
  """Raises ValueError unless the searches of the config fit the model."""
  for name in ("model", "encode"):
    rule = SearchRule(**{knob: config[name][knob] for knob in SEARCH})
    try:
      qinco.check_rule(params, rule)
    except ValueError as error:
      raise ValueError(f"In config.{name}: {error}") from error


def _make_tx(config, plan):
  schedule = recipes.make_schedule(config.train, plan)
  return recipes.make_tx(config.train, schedule)


def make_state(config, tx, centroids_LD, rows) -> loop.TrainState:
  """Returns the state before the first step, started from a sample."""
  sizes = {k: v for k, v in config.model.items() if k not in SEARCH}
  sizes |= {k: v for k, v in config.init.items() if k != "max_vectors"}
  return learners.make_state(
    rows, tx, seed=config.seed, centroids_LD=centroids_LD, **sizes
  )


def prepare(
  config, workdir, vectors, num_rows: int, held_out: slice, plan: loop.Plan
) -> recipes.Job:
  """Makes the lists of an IVF model if they are not there, and the job."""
  centroids_LD, vectors = ivf_lists.prepare(config, workdir, vectors, num_rows)
  held_out = batches.read_rows(
    vectors, np.arange(held_out.start, held_out.stop)
  )
  schedule = recipes.make_schedule(config.train, plan)
  tx = recipes.make_tx(config.train, schedule)
  make_fn = partial(make_state, config, tx, centroids_LD)

  def start():
    rows = batches.subsample(
      vectors, config.init.max_vectors, config.seed, num_rows=num_rows
    )
    return make_fn(jax.tree.map(jnp.asarray, rows))

  shape_fn = lambda x: jax.ShapeDtypeStruct((num_rows, *x.shape[1:]), x.dtype)
  abstract = jax.eval_shape(make_fn, jax.tree.map(shape_fn, held_out))
  shape = (num_rows, qinco.dim(abstract.params))
  learner = learners.make_learner(
    held_out,
    SearchRule(**{name: config.model[name] for name in SEARCH}),
    dtype=recipes.product_dtype(config.train.dtype),
    redraw=config.train.redraw,
    noise_share=noise_share(config, plan, shape),
  )
  return recipes.Job(
    vectors=vectors,
    learner=learner,
    tx=tx,
    schedule=schedule,
    start_fn=start,
    abstract=abstract,
    state_fn=partial(learners.state_of, tx=tx),
  )


def _static(config) -> dict:
  ivf = config.get("ivf")
  return {
    "add_word": not config.model.is_qinco1,
    "is_ivf": bool(ivf and (ivf.num_lists or ivf.centroids)),
  }


def _set_num_codes(config, num_codes: int) -> None:
  config.model.num_steps = num_codes


RECIPE = recipes.Recipe(
  plan_fn=make_plan,
  check_fn=check,
  prepare_fn=prepare,
  set_num_codes_fn=_set_num_codes,
  static_fn=_static,
)
