"""Checkpoints that are damaged: seen, and another one taken."""

import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.training import checkpoints


@pytest.fixture
def saved(tmp_path):
  """Those of steps 1, 2 and 3; the second is the best."""
  found = checkpoints.Checkpoints(tmp_path / "checkpoints", num_latest=3)
  for step, validation in ((1, 2.0), (2, 1.0), (3, 3.0)):
    found.save(step, _state(step), validation=validation)
  found.wait()
  yield found
  found.close()


def _state(step):
  x_N = np.random.default_rng(step).normal(size=100_000).astype(np.float32)
  return {"x_N": jnp.asarray(x_N), "step": jnp.int32(step)}


def _flip(tmp_path, step):
  """Changes one bit, which orbax alone does not see."""
  folder = tmp_path / "checkpoints" / f"step_{step}"
  file = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
  data = bytearray(file.read_bytes())
  data[len(data) // 2] ^= 1
  file.write_bytes(data)


def test_one_bit_is_seen(saved, tmp_path):
  _flip(tmp_path, 3)
  with pytest.raises(ValueError, match="step 3 in .* is damaged"):
    saved.restore(3, _state(0))
  with pytest.raises(ValueError, match="step 3 in .* is damaged"):
    saved.restore_tree(3)
  step, state = saved.restore_latest(_state(0))
  assert step == 2
  np.testing.assert_array_equal(state["x_N"], _state(2)["x_N"])
  assert saved.steps() == [1, 2]  # That of step 3 is made again.


def test_the_second_best_is_taken(saved, tmp_path):
  assert saved.restore_best()[0] == 2
  _flip(tmp_path, 2)
  step, state = saved.restore_best()
  assert step == 1
  np.testing.assert_array_equal(state["x_N"], _state(1)["x_N"])
  assert saved.steps() == [1, 2, 3]


def test_the_best_of_each_figure_and_the_latest_evaluated_are_kept(tmp_path):
  keep = dict(
    num_latest=1,
    num_evaluated=2,
    measure="collision_rate",
    best_of=("train_loss", "utilisation"),
  )
  found = checkpoints.Checkpoints(tmp_path, **keep)
  figures = {  # Collisions, training loss, utilisation.
    1: (0.1, 3.0, 0.5),
    2: (0.2, 1.0, 0.5),
    3: (0.3, 2.0, 0.9),
    4: (0.3, 2.0, 0.8),
    6: (0.3, 2.0, 0.8),
    7: (0.3, 2.0, 0.8),
  }
  names = ("collision_rate", "train_loss", "utilisation")
  for step in range(1, 9):
    of_step = dict(zip(names, figures.get(step, ()), strict=False))
    validation = of_step.get("collision_rate")
    state = {"step": jnp.int32(step)}
    found.save(step, state, validation=validation, figures=of_step)
  found.wait()
  assert found.steps() == [1, 2, 3, 6, 7, 8]
  assert found.best() == 1
  found.close()
  for measure, step in (("train_loss", 2), ("utilisation", 3), ("mse", 1)):
    found = checkpoints.Checkpoints(tmp_path, **{**keep, "measure": measure})
    assert found.restore_best()[0] == step
    found.close()


def test_without_a_whole_one_it_is_an_error(saved, tmp_path):
  for step in (1, 2, 3):
    _flip(tmp_path, step)
  with pytest.raises(ValueError, match="step 3 in .* is damaged"):
    saved.restore_latest(_state(0))
  assert saved.steps() == [1, 2, 3]


@pytest.mark.parametrize(
  "dtype", ["float32", "int32", "uint8", "bool", "bfloat16"]
)
def test_the_checksum_depends_on_every_number(dtype):
  x_N = jnp.zeros(5, dtype)
  sums = {int(checkpoints.checksum(x_N))}
  sums |= {int(checkpoints.checksum(x_N.at[i].set(1))) for i in range(5)}
  assert len(sums) == 6
