"""Lines of metrics: their digits, and what damage leaves of them."""

import json
import pathlib
import sys
import types

import pytest

from vqjax.training import writers


def test_small_numbers_keep_their_digits(tmp_path):
  writer = writers.Writer(tmp_path)
  writer.write(1, {"kl": 3.4612345678e-9, "usage_M": [1e-12, 123456.789]})
  writer.close()
  (row,) = writers.read_rows(tmp_path / "metrics.jsonl")
  assert row == {"step": 1, "kl": 3.46123457e-9, "usage_M": [1e-12, 123456.789]}


@pytest.mark.parametrize(
  "damage", [b"\xff\xfe{", b"[1, 2]", b"{}", b"[" * 3000, b'{"step": null}']
)
def test_damaged_lines_are_left_out(damage, tmp_path, caplog):
  file = tmp_path / "metrics.jsonl"
  file.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n{"ste')
  assert writers.read_rows(file) == [{"step": 1}, {"step": 3}]
  assert "metrics.jsonl has 1 damaged lines of 4" in caplog.text
  file.write_bytes(b'{"step": 1}\n{"ste')  # As a kill leaves it.
  caplog.clear()
  assert writers.read_rows(file) == [{"step": 1}]
  assert not caplog.text


def test_a_kill_while_old_lines_are_dropped_loses_none(tmp_path, monkeypatch):
  file = tmp_path / "metrics.jsonl"
  lines = "".join(json.dumps({"step": step}) + "\n" for step in range(9))
  file.write_text(lines)

  def dying(path, text):
    with open(path, "w") as half:
      half.write(text[:5])
    raise KeyboardInterrupt

  monkeypatch.setattr(pathlib.Path, "write_text", dying)
  with pytest.raises(KeyboardInterrupt):
    writers.Writer(tmp_path, first_step=5)
  assert file.read_text() == lines


def _log(folder, name, *, first_step=0):
  tracker = writers.open_tracker(name, folder, {"seed": 0})
  writer = writers.Writer(folder, first_step=first_step, tracker=tracker)
  writer.write(first_step + 1, {"loss": 2.0, "usage_M": [0.5, 1.0]})
  writer.close()


def test_tensorboard_has_the_numbers(tmp_path):
  _log(tmp_path, "tensorboard")
  (file,) = (tmp_path / "tensorboard").iterdir()
  data = file.read_bytes()
  assert b"loss" in data
  assert b"usage_M/1" in data


def test_wandb_has_one_run_for_a_folder(tmp_path, monkeypatch):
  """Against a stand-in: the real one starts a process of its own."""
  inits, logged = [], []

  def init(**settings):
    inits.append(settings)
    log = lambda scalars, step: logged.append((step, scalars))
    return types.SimpleNamespace(log=log, finish=lambda: logged.append("end"))

  wandb = types.SimpleNamespace(init=init, Settings=dict)
  wandb.errors = types.SimpleNamespace(Error=ZeroDivisionError)
  monkeypatch.setitem(sys.modules, "wandb", wandb)
  _log(tmp_path, "wandb")
  _log(tmp_path, "wandb", first_step=1)
  want = {"loss": 2.0, "usage_M/0": 0.5, "usage_M/1": 1.0}
  assert logged == [(1, want), "end", (2, want), "end"]
  first, second = inits
  assert first["id"] == second["id"]
  assert first["config"] == {"seed": 0}
  _log(tmp_path / "other", "wandb")
  assert inits[-1]["id"] != first["id"]

  def refuse(**settings):
    raise ZeroDivisionError("no key.")

  wandb.init = refuse
  with pytest.raises(ValueError, match="no key. With WANDB_MODE=offline"):
    _log(tmp_path, "wandb")


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_one_sentence(name, monkeypatch):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  monkeypatch.setitem(sys.modules, "wandb", None)
  with pytest.raises(ImportError, match=r"pip install 'vqjax\[tracking\]'"):
    writers.check_tracker(name)
  with pytest.raises(ValueError, match="must be one of none, .*; got 'mlflow'"):
    writers.check_tracker("mlflow")
