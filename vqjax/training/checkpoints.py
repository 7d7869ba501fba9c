"""Training checkpoints: the latest two and the best one, through orbax.

Saved asynchronously; a half-written checkpoint is never taken for a whole one
(orbax renames it into place when it is complete).
"""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging
from orbax.checkpoint import checkpoint_managers

_METRIC = "validation"


class Checkpoints:
  """The checkpoints of one run, in `folder`, by training step."""

  def __init__(self, folder: pathlib.Path, *, num_latest: int = 2):
    keep = checkpoint_managers.AnyPreservationPolicy(
      [
        checkpoint_managers.LatestN(num_latest),
        checkpoint_managers.BestN(
          get_metric_fn=lambda metrics: metrics[_METRIC],
          reverse=True,
          n=1,
          keep_checkpoints_without_metrics=False,
        ),
      ]
    )
    self._folder = pathlib.Path(folder).absolute()
    self._manager = ocp.CheckpointManager(
      self._folder,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=keep,
        best_fn=lambda metrics: metrics[_METRIC],
        best_mode="min",
        step_prefix="step",
        cleanup_tmp_directories=True,
      ),
    )

  def steps(self) -> list[int]:
    """Returns the steps at which there is a checkpoint, ascending."""
    return sorted(self._manager.all_steps())

  def save(self, step: int, state: Any, *, validation: float | None = None):
    """Starts to save `state`; with `validation` it may become the best."""
    if step in self._manager.all_steps():
      return
    metrics = None if validation is None else {_METRIC: validation}
    self._manager.save(
      step, args=ocp.args.StandardSave(state), metrics=metrics, force=True
    )

  def latest(self) -> int | None:
    """Returns the step of the newest checkpoint, None without any."""
    return self._manager.latest_step()

  def best(self) -> int | None:
    """Returns the step with the lowest validation error, None without any."""
    return self._manager.best_step()

  def restore(self, step: int, like: Any) -> Any:
    """Returns the state saved at `step`; `like` has its shapes and places.

    Raises:
      ValueError: The checkpoint is of another model.
    """
    self.wait()
    wanted = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
      return self._manager.restore(step, args=ocp.args.StandardRestore(wanted))
    except (ValueError, KeyError, TypeError) as error:
      raise ValueError(
        f"The checkpoint of step {step} in {self._folder} does not fit the "
        f"model of this configuration ({_first_line(error)}). Resume with the "
        "configuration and the version of vqjax the run was started with, or "
        "choose a new --workdir."
      ) from error

  def wait(self) -> None:
    """Returns when everything is on disk."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for what is being saved and stops the writer."""
    self._manager.wait_until_finished()
    self._manager.close()
    logging.debug("Checkpoints in %s: %s", self._folder, self.steps())


def _first_line(error: Exception) -> str:
  return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
