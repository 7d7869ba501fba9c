"""Optimisers and learning-rate schedules, from plain values.

Two schedules: `ramp_cosine`, the recipe of QINCo2 (a linear ramp, then a
quarter of a cosine), and `plateau`, that of QINCo (divide by ten when the
validation error stops falling, stop when that no longer helps).
"""

import jax.numpy as jnp
import optax
from flax import struct

from vqjax.core import Array

SCHEDULES = ("ramp_cosine", "plateau")


@struct.dataclass
class Plateau:
  """Progress of the `plateau` schedule; counts are in epochs."""

  best: Array
  since_best: Array
  since_cut: Array
  scale: Array  # Multiplies the learning rate.


def make_plateau() -> Plateau:
  """Returns the state before the first validation."""
  return Plateau(
    jnp.float32(jnp.inf), jnp.int32(0), jnp.int32(0), jnp.float32(1)
  )


def advance_plateau(
  plateau: Plateau, value: Array, *, patience: int, factor: float = 0.1
) -> Plateau:
  """Takes the validation error of one more epoch into account.

  Cuts the scale after `patience` epochs without a new best, counted from the
  best or the last cut.
  """
  improved = value < plateau.best
  zero = jnp.int32(0)
  since_cut = jnp.where(improved, zero, plateau.since_cut + 1)
  is_cut = since_cut >= patience
  return Plateau(
    best=jnp.minimum(plateau.best, value),
    since_best=jnp.where(improved, zero, plateau.since_best + 1),
    since_cut=jnp.where(is_cut, zero, since_cut),
    scale=jnp.where(is_cut, plateau.scale * factor, plateau.scale),
  )


def make_schedule(
  name: str,
  *,
  peak_lr: float,
  ramp_steps: int,
  total_steps: int,
  floor: float = 1e-3,
) -> optax.Schedule:
  """Returns step -> learning rate.

  `ramp_cosine` rises linearly over `ramp_steps`, then follows
  `cos(pi / 2 * (step - ramp_steps) / total_steps)`, never below `floor` of the
  peak. `plateau` is constant here; `Plateau.scale` multiplies it.
  """
  if name not in SCHEDULES:
    raise ValueError(
      f"Unknown schedule {name!r}; known are {', '.join(SCHEDULES)}."
    )
  if not 0 < peak_lr <= 10:
    raise ValueError(
      "peak_lr (--config.train.peak_lr) must be above 0 and at most 10, got "
      f"{peak_lr}."
    )

  def ramp_cosine(step):
    ramp = (step + 1) / max(ramp_steps, 1)
    angle = jnp.pi / 2 * (step - ramp_steps) / total_steps
    fall = jnp.maximum(jnp.cos(jnp.maximum(angle, 0)), floor)
    return peak_lr * jnp.minimum(ramp, fall)

  if name == "plateau":
    return optax.constant_schedule(peak_lr)
  return ramp_cosine


def make_optimiser(
  schedule: optax.Schedule,
  *,
  weight_decay: float = 0.1,
  clip_value: float | None = 0.1,
) -> optax.GradientTransformation:
  """Returns AdamW on gradients clipped by value; `weight_decay` 0 is Adam."""
  parts = [optax.clip(clip_value)] if clip_value else []
  parts.append(
    optax.adamw(schedule, weight_decay=weight_decay)
    if weight_decay
    else optax.adam(schedule)
  )
  return optax.chain(*parts)
