"""Optimisers and learning-rate schedules, by name, from plain values.

Optimisers have the defaults of PyTorch, so that published settings mean what
they say. `ramp_cosine` is the schedule of QINCo2 (a linear ramp, then a quarter
of a cosine), `plateau` that of QINCo (divide by ten when the validation error
stops falling, stop when that no longer helps); `constant`, `linear` and
`cosine` rise from 0, as in RQ-VAE programs.
"""

import jax
import jax.numpy as jnp
import optax
from flax import struct

from vqjax.core import Array, check_range

SCHEDULES = ("ramp_cosine", "plateau", "constant", "linear", "cosine")
OPTIMISERS = ("adamw", "adam", "sgd", "adagrad", "rmsprop")


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
  """Returns step -> learning rate; the first step is 0.

  `ramp_cosine` rises linearly over `ramp_steps`, then follows
  `cos(pi / 2 * (step - ramp_steps) / total_steps)`, never below `floor` of the
  peak. `plateau` is constant here; `Plateau.scale` multiplies it.

  The others are `step / ramp_steps` of the peak while that is below 1: the
  first step changes nothing. Then `constant` stays, and `linear` falls in a
  line, `cosine` in half a cosine, to 0 at `total_steps`.
  """
  check_name("schedule", name, SCHEDULES)
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

  def with_warm_up(step):
    left = (total_steps - step) / max(total_steps - ramp_steps, 1)
    left = jnp.clip(left, 0, 1)
    fall = {
      "constant": jnp.ones_like(left),
      "linear": left,
      "cosine": (1 - jnp.cos(jnp.pi * left)) / 2,
    }[name]
    rise = step / max(ramp_steps, 1)
    return peak_lr * jnp.where(step < ramp_steps, rise, fall)

  if name == "plateau":
    return optax.constant_schedule(peak_lr)
  return ramp_cosine if name == "ramp_cosine" else with_warm_up


def make_optimiser(
  schedule: optax.Schedule,
  name: str = "adamw",
  *,
  weight_decay: float = 0.1,
  clip_value: float | None = None,
  clip_norm: float | None = None,
) -> optax.GradientTransformation:
  """Returns an optimiser with the defaults of PyTorch.

  Args:
    schedule: Step to learning rate.
    name: One of `OPTIMISERS`.
    weight_decay: `adamw` takes its product with the learning rate off the
      parameters; the others add its product with them to the gradients.
    clip_value: Greatest size of a number of a gradient; None or 0 for any.
    clip_norm: Greatest norm of all gradients together; None or 0 for any.

  Raises:
    ValueError: There is no such optimiser, or a number is negative.
  """
  check_name("optimiser", name, OPTIMISERS)
  for knob, value in (
    ("weight_decay", weight_decay),
    ("clip_value", clip_value or 0),
    ("clip_norm", clip_norm or 0),
  ):
    check_range(f"--config.train.{knob}", value, 0, 1e30)
  parts = [optax.clip(clip_value)] if clip_value else []
  parts += [_clip_by_norm(clip_norm)] if clip_norm else []
  if name == "adamw" and weight_decay:
    return optax.chain(*parts, optax.adamw(schedule, weight_decay=weight_decay))
  if name in ("adamw", "adam") and not weight_decay:
    return optax.chain(*parts, optax.adam(schedule))
  rule = {
    "adam": optax.scale_by_adam(),
    "sgd": optax.identity(),
    # Inside the root: as PyTorch's 1e-10 outside of it.
    "adagrad": optax.scale_by_rss(initial_accumulator_value=0, eps=1e-20),
    "rmsprop": optax.scale_by_rms(decay=0.99, eps=1e-8, eps_in_sqrt=False),
  }[name]
  decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
  return optax.chain(
    *parts, *decay, rule, optax.scale_by_learning_rate(schedule)
  )


def _clip_by_norm(largest: float) -> optax.GradientTransformation:
  """Scales gradients down by `largest / (norm + 1e-6)`, as PyTorch does."""

  def clip(grads, params):
    del params
    scale = jnp.minimum(largest / (optax.tree.norm(grads) + 1e-6), 1)
    return jax.tree.map(lambda g: g * scale, grads)

  return optax.stateless(clip)


def check_name(what: str, name: str, known: tuple[str, ...]) -> None:
  """Raises ValueError unless the value of `--config.train.WHAT` is known."""
  if name not in known:
    raise ValueError(
      f"--config.train.{what} must be one of {', '.join(known)}; got {name!r}."
    )
