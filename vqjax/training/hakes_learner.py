"""What the training loop needs to learn the query side of HAKES.

A training query comes with its neighbours. Their vectors, lists and codes are
looked up once: they do not change while the query side learns.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from vqjax import devices
from vqjax.codecs import hakes
from vqjax.core import check_range
from vqjax.data import batches
from vqjax.training import loop

METRICS = ["loss", "reduced_kl", "coded_kl", "list_loss"]
_VALIDATION_BLOCK = 256
_PARTS = hakes.HakesSide(
  reduction_ED="reduction",
  bias_E="reduction",
  codebooks_MKS="codebooks",
  centroids_LE="centroids",
)


class Samples(NamedTuple):
  """Training queries and the base vectors that are near some of them.

  `near_QG` are rows of the other three, N base vectors in all. Vectors stay in
  the type of their file.
  """

  queries_QD: np.ndarray
  near_QG: np.ndarray
  vectors_ND: np.ndarray
  codes_NM: np.ndarray
  lists_N: np.ndarray


def take(samples: Samples, rows) -> hakes.Batch:
  """Puts the batch of some rows of the queries together, on the host."""
  near_QG = samples.near_QG[rows]
  return hakes.Batch(
    queries_QD=samples.queries_QD[rows],
    neighbours_QGD=samples.vectors_ND[near_QG].astype(np.float32),
    codes_QGM=samples.codes_NM[near_QG],
    lists_QG=samples.lists_N[near_QG],
  )


def make_batch_fn(
  samples: Samples, num_rows: int, batch_size: int, seed: int
) -> Callable[[int], hakes.Batch]:
  """Returns the step to this process's part of that batch.

  Batches are drawn from the first `num_rows` queries.
  """

  def batch_fn(step):
    rows = batches.batch_rows(seed, step, batch_size, num_rows)
    return take(samples, rows[devices.process_rows(batch_size)])

  return batch_fn


def make_schedule(
  peak_lr: float, total_steps: int, warm_up: float
) -> optax.Schedule:
  """Rises linearly over a share `warm_up` of the steps, then falls to 0."""
  check_range("the learning rate", peak_lr, 0, 10)
  check_range("warm_up", warm_up, 0, 1)
  rise = max(round(warm_up * total_steps), 1)
  fall = max(total_steps - rise, 1)

  def schedule(step):
    left = (total_steps - step) / fall
    return peak_lr * jnp.clip(jnp.minimum((step + 1) / rise, left), 0, 1)

  return schedule


def make_optimiser(
  schedules: dict[str, optax.Schedule], *, weight_decay: float
) -> optax.GradientTransformation:
  """Returns AdamW with a schedule for each part of the query side.

  Args:
    schedules: Of the parts that learn, among "reduction" (with its bias),
      "codebooks" and "centroids"; see `frozen`.
    weight_decay: Of the reduction and the codebooks, times the learning rate;
      published 0.999.
  """
  check_range("weight_decay", weight_decay, 0, 1000)
  parts = {}
  for name, schedule in schedules.items():
    decay = 0 if name == "centroids" else weight_decay
    parts[name] = optax.adamw(schedule, weight_decay=decay)
  known = lambda name: name if name in schedules else None
  query = jax.tree.map(known, _PARTS)
  base = hakes.HakesSide(*[None] * 4)
  return optax.partition(parts, hakes.HakesParams(base, query))


def frozen(params: hakes.HakesParams, parts) -> hakes.HakesParams:
  """Returns a tree of bools: False for these parts of the query side."""
  query = jax.tree.map(lambda name: name not in parts, _PARTS)
  return hakes.HakesParams(hakes.HakesSide(*[True] * 4), query)


def make_learner(
  samples: Samples, held_out: slice, knobs: dict, parts
) -> loop.Learner:
  """Returns what `loop.train` asks of HAKES.

  Validation is the divergence of coded neighbours, over held-out queries. The
  state has no statistics; codewords that no neighbour has learn nothing.

  Queries of the `samples` to validate on are `held_out`; `knobs` are keyword
  values of `hakes.loss`, and those `parts` of the query side learn that
  `make_optimiser` names.
  """

  def loss_fn(params, key, batch):
    del key
    loss, parts = hakes.loss(
      params, batch, axis_name=devices.DATA_AXIS, **knobs
    )
    return loss, {"metrics": parts, "stats": ()}

  def validate(params):
    found = validation(params, samples, held_out, knobs)
    logging.info(
      "Held-out KL: codes %.3e, reduced %.3e.",
      found["coded_kl"],
      found["reduced_kl"],
    )
    return {"kl": found["coded_kl"]}

  frozen_fn = partial(frozen, parts=parts)
  return loop.learner_without_stats(loss_fn, validate, frozen_fn)


def validation(
  params: hakes.HakesParams, samples: Samples, rows: slice, knobs: dict
) -> dict[str, float]:
  """Returns the parts of the loss over some rows of the queries."""
  params, total, num = devices.to_local_devices(params), {}, 0
  for start in range(rows.start, rows.stop, _VALIDATION_BLOCK):
    part = slice(start, min(start + _VALIDATION_BLOCK, rows.stop))
    size = part.stop - part.start
    _, parts = hakes.loss(params, take(samples, part), **knobs)
    num += size
    for name, value in parts.items():
      total[name] = total.get(name, 0) + size * float(value)
  return {name: value / num for name, value in total.items()}


def natural_temperature(samples: Samples, score: str) -> float:
  """Returns a temperature for scores of any scale: their spread, at least 1.

  The mean over some queries of the standard deviation over their neighbours.
  For vectors of length 1 it is 1, as published. Squared distances of bytes
  spread over thousands: at 1 their softmax is all on the nearest neighbour,
  and the others teach nothing.
  """
  rows = slice(0, min(_VALIDATION_BLOCK, len(samples.queries_QD)))
  full_QG = hakes.full_scores(take(samples, rows), score)
  return max(float(jnp.std(full_QG, axis=1).mean()), 1.0)
