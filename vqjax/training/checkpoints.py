"""Training checkpoints: the latest ones and the best ones, through orbax.

Saved asynchronously; a half-written checkpoint is never taken for a whole one
(orbax renames it into place when it is complete). Each has a checksum of its
arrays, so that a damaged one is not taken either.
"""

import contextlib
import errno
import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

from vqjax import devices
from vqjax.data import files

_METRIC = "validation"
_HIGHER = ("utilisation",)  # Figures of which more is better.
_PREFIX = "step"
# What orbax raises for files that are damaged or of another tree.
_ERRORS = (
  *(ValueError, KeyError, TypeError, AttributeError, IndexError, OSError),
  RuntimeError,
)


class Checkpoints:
  """The checkpoints of one run, in `folder`, by training step."""

  def __init__(
    self,
    folder: pathlib.Path,
    *,
    num_latest: int = 2,
    num_evaluated: int = 0,
    measure: str = _METRIC,
    best_of: tuple[str, ...] = (),
    read_only: bool = False,
  ):
    """Opens them.

    Args:
      folder: Where they lie.
      num_latest: How many of the latest are kept,
      num_evaluated: and of the latest that were evaluated.
      measure: Figure by which `best` decides; the best of it is kept,
      best_of: and the best of each of these figures.
      read_only: If a process may still be training.
    """
    self._value = functools.partial(_value, measure)
    best_n = functools.partial(
      checkpoint_managers.BestN, keep_checkpoints_without_metrics=False
    )
    policies = [checkpoint_managers.LatestN(num_latest)]
    policies += [
      best_n(get_metric_fn=functools.partial(_value, name), reverse=True, n=1)
      for name in (measure, *best_of)
    ]
    # The greatest steps of those with figures.
    step_fn = lambda metrics: metrics.get(_PREFIX, 0)
    policies.append(best_n(get_metric_fn=step_fn, n=num_evaluated))
    keep = checkpoint_managers.AnyPreservationPolicy(policies)
    self._folder = pathlib.Path(folder).absolute()
    if not read_only:
      _remove_damaged_metrics(self._folder)
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        best_fn=self._value,
        best_mode="min",
        step_prefix=_PREFIX,
        cleanup_tmp_directories=not read_only,
        read_only=read_only,
      ),
      item_handlers=ocp.StandardCheckpointHandler(),
    )

  def steps(self) -> list[int]:
    """Returns the steps at which there is a checkpoint, ascending."""
    return sorted(self._manager.all_steps())

  def save(
    self,
    step: int,
    state: Any,
    *,
    validation: float | None = None,
    figures: dict[str, float] | None = None,
  ):
    """Starts to save `state`.

    With `validation`, of which less is better, it may become the best, and by
    other `figures` the best of them.
    """
    if step in self._manager.all_steps():
      return
    metrics = None
    if validation is not None:
      metrics = {_METRIC: validation, _PREFIX: step, **(figures or {})}
    saved = {"state": state, "checksum": checksum(state)}
    with self._full_disk_in_words():
      # Before: where orbax finds out, its threads print pages.
      num_bytes = sum(x.nbytes for x in jax.tree.leaves(saved))
      files.check_space(
        self._folder,
        num_bytes // jax.process_count(),
        f"The checkpoint of step {step}",
      )
      self._manager.save(
        step, args=ocp.args.StandardSave(saved), metrics=metrics, force=True
      )

  def latest(self) -> int | None:
    """Returns the step of the newest checkpoint, None without any."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """Returns the step with the best figure, None without any."""
    return self._manager.best_step()

  def restore(self, step: int, like: Any) -> Any:
    """Returns the state saved at `step`; `like` has its shapes and places.

    Raises:
      ValueError: The checkpoint is damaged or of another model.
    """
    self.wait()
    wanted = {"state": like, "checksum": jnp.uint32(0)}
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, wanted)
    return self._restore(step, ocp.args.StandardRestore(wanted))

  def _restore(self, step: int, args) -> Any:
    try:
      found = self._manager.restore(step, args=args)
      is_whole = int(found["checksum"]) == int(checksum(found["state"]))
    except _ERRORS as error:
      raise ValueError(
        f"The checkpoint of step {step} in {self._folder} is damaged, or does "
        f"not fit the model of this configuration ({_first_line(error)}). "
        "Resume with the configuration and the version of vqjax the run was "
        "started with, or choose a new --workdir."
      ) from error
    if not is_whole:
      raise ValueError(
        f"The checkpoint of step {step} in {self._folder} is damaged: its "
        "arrays do not have their checksum."
      )
    return found["state"]

  def restore_tree(self, step: int) -> dict:
    """Returns the state saved at `step` as dicts of arrays of this process.

    Raises ValueError as `restore`.
    """
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    try:
      saved = self._manager.item_metadata(step)
      wanted = jax.tree.map(like, getattr(saved, "tree", saved))
    except _ERRORS as error:
      raise ValueError(
        f"The checkpoint of step {step} in {self._folder} is damaged: "
        f"{_first_line(error)}."
      ) from error
    return self._restore(step, ocp.args.StandardRestore(wanted))

  def restore_latest(self, like: Any) -> tuple[int, Any] | None:
    """Returns step and state of the newest checkpoint that is whole.

    Damaged ones after it are removed, so that they are made again. None if
    there is no checkpoint.

    Raises:
      ValueError: None of them is whole and fits.
    """
    self.wait()
    found = self._first_whole(
      self.steps()[::-1], lambda step: self.restore(step, like)
    )
    for step in self.steps():
      if found and step > found[0]:
        self._manager.delete(step)
    return found

  def restore_best(self, like: Any = None) -> tuple[int, Any] | None:
    """Returns step and state of the best checkpoint that is whole.

    Without any validation it is the newest. `like` None gives what
    `restore_tree` does. Raises as `restore_latest`.
    """
    self.wait()  # Else the newest has no validation error yet.
    if like is None:
      return self._first_whole(self._ranked(), self.restore_tree)
    return self._first_whole(
      self._ranked(), lambda step: self.restore(step, like)
    )

  def _ranked(self) -> list[int]:
    """Steps from the best to the worst; those without validation last."""
    figures = {step: self._manager.metrics(step) for step in self.steps()}
    value = lambda step: self._value(figures[step] or {})
    return sorted(self.steps()[::-1], key=value)

  def _first_whole(self, steps: list[int], restore_fn):
    first_error = None
    for step in steps:
      state, error = None, None
      try:
        state = restore_fn(step)
      except ValueError as e:
        error = e
      # All processes take the same.
      if not devices.gather(error is not None).any():
        if first_error is not None:
          logging.warning(
            "%s Using the checkpoint of step %d instead.", first_error, step
          )
        return step, state
      first_error = first_error or error
    if first_error is not None:
      raise first_error
    return None

  def wait(self) -> None:
    """Returns when everything is on disk."""
    with self._full_disk_in_words():
      self._manager.wait_until_finished()

  @contextlib.contextmanager
  def _full_disk_in_words(self):
    """Makes one sentence of what orbax raises if a disk is full."""
    try:
      yield
    except Exception as error:
      if not files.is_full_disk(error):
        raise
      raise OSError(
        errno.ENOSPC,
        f"The disk is full: could not write a checkpoint into {self._folder} "
        f"({_first_line(error)}). The earlier ones are whole: free some space, "
        "and run the same command again.",
      ) from error

  def close(self) -> None:
    """Waits for what is being saved and stops the writer."""
    with self._full_disk_in_words():
      self._manager.wait_until_finished()
      self._manager.close()
    logging.debug("Checkpoints in %s: %s", self._folder, self.steps())


def _value(measure: str, metrics: dict) -> float:
  """A figure, as a number of which less is better; else the validation's."""
  if measure in metrics:
    return signed(measure, metrics[measure])
  return metrics.get(_METRIC, np.inf)


def signed(measure: str, value: float) -> float:
  """Returns the value of a figure as a number of which less is better."""
  return -value if measure in _HIGHER else value


def _remove_damaged_metrics(folder: pathlib.Path) -> None:
  """Removes validation errors that cannot be read: orbax would raise."""
  for path in folder.glob(f"{_PREFIX}_*/metrics/metrics"):
    try:
      float(json.loads(path.read_bytes())[_METRIC])
    except (ValueError, KeyError, TypeError):
      logging.warning("%s is damaged, and removed.", path)
      if devices.is_first():
        shutil.rmtree(path.parent)
  devices.gather(0)  # Gone for all.


@jax.jit
def checksum(tree: Any) -> jax.Array:
  """Returns a uint32 that changes with any bit of any array of the tree."""
  total = jnp.uint32(0)
  for leaf in jax.tree.leaves(tree):
    total += _checksum_of(jnp.ravel(leaf))
  return total


def _checksum_of(x_N):
  """Sum of the bits of the numbers, each times another odd number."""
  bits_N = x_N.astype(jnp.uint8) if x_N.dtype == bool else x_N
  size = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[bits_N.dtype.itemsize]
  bits_N = jax.lax.bitcast_convert_type(bits_N, size).astype(jnp.uint32)
  odd_N = 2 * jnp.arange(len(bits_N), dtype=jnp.uint32) + 1
  return jnp.sum(bits_N * odd_N, dtype=jnp.uint32)


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
