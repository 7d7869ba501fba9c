"""Tells when training and validation error part ways: too few vectors."""

PATIENCE = 5  # Validations in a row without a new best.
_NAMES = {"validation_mse", "train_mse"}
_FALL = 0.01  # Of the training error since the best, at least.
_ENDS = (
  f" --config.train.early_stop={PATIENCE} ends such a run by itself, Ctrl-C "
  "and the same command with --finish end this one."
)


class Watch:
  """Follows both errors of a run; warns once for each best validation."""

  def __init__(self, plan, rows: list[dict]):
    """Starts with the rows that `metrics.jsonl` has of a run that resumes."""
    self._plan = plan
    self._best, self._at_best, self._since = float("inf"), 0.0, 0
    for row in rows:
      self.warning(row)

  def warning(self, row: dict) -> str | None:
    """Returns what to say after an epoch, None for nothing.

    The validation error has had no new best for `PATIENCE` validations, and
    the training error is at least a hundredth below what it was at the best.
    """
    if not self._plan.has_held_out or _NAMES - row.keys():
      return None
    found, error = float(row["validation_mse"]), float(row["train_mse"])
    self._since += 1
    if found < self._best:
      self._best, self._at_best, self._since = found, error, 0
    if self._since != PATIENCE or error > (1 - _FALL) * self._at_best:
      return None
    scale = self._plan.scale
    return (
      f"The validation error has had no new best for {PATIENCE} validations "
      f"(best MSE {scale * self._best:.4g}), while the training error fell "
      f"from {scale * self._at_best:.4g} to {scale * error:.4g}: the model "
      "learns these vectors by heart. More training vectors help, or a smaller "
      "network (qinco2_xs), or a codec without one (rq, opq). The best "
      "checkpoint is kept and becomes the codec."
    ) + ("" if self._plan.stop_patience else _ENDS)
