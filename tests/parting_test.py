"""When a run says that its training and validation error part ways."""

import pytest

from vqjax.training import loop, parting


def _plan(**values):
  plan = dict(seed=0, num_epochs=30, steps_per_epoch=4, batch_size=8)
  return loop.Plan(**plan, **{"has_held_out": True, **values})


def _warned(validation, training, **values):
  """Epochs, from 1, at which there is a warning, and the last one."""
  watch, epochs, text = parting.Watch(_plan(**values), []), [], ""
  for i, errors in enumerate(zip(validation, training, strict=True)):
    row = dict(zip(("validation_mse", "train_mse"), errors, strict=True))
    if found := watch.warning(row):
      epochs, text = [*epochs, i + 1], found
  return epochs, text


FALLING = [1 - 0.05 * i for i in range(12)]


def test_five_validations_without_a_new_best_while_training_falls():
  rising = [5, 3, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4]
  epochs, text = _warned(rising, FALLING, scale=10.0)
  assert epochs == [7]  # Once: the best is of epoch 2.
  assert "(best MSE 30), while the training error fell from 9.5 to 7" in text
  assert "--config.train.early_stop=5" in text


@pytest.mark.parametrize(
  ("validation", "training", "values"),
  [
    (FALLING, FALLING, {}),
    ([2, 1, 3, 3, 3, 3, 0.9, 3, 3, 3, 3, 0.8], FALLING, {}),  # Four in a row.
    ([1] * 12, [1] * 12, {}),  # Nothing is learned by heart.
    ([1] * 12, FALLING, {"has_held_out": False}),
    # A start that fits the training vectors closely, and validates worse.
    ([9.0, *FALLING[1:]], [0.1, *FALLING[1:]], {}),
  ],
)
def test_no_warning(validation, training, values):
  assert _warned(validation, training, **values)[0] == []


def test_epochs_without_a_validation_do_not_count():
  watch = parting.Watch(_plan(), [])
  for error in FALLING:
    assert watch.warning({"train_mse": error}) is None


def test_a_run_that_resumes_counts_on():
  rows = [{"validation_mse": 1, "train_mse": x} for x in FALLING]
  watch = parting.Watch(_plan(), rows[:5])
  assert watch.warning(rows[5]) is not None
  assert parting.Watch(_plan(), rows[:6]).warning(rows[6]) is None
