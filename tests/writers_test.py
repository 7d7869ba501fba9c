"""Lines of metrics: their digits, and what damage leaves of them."""

import contextlib
import json
import pathlib
import sqlite3
import sys
import time
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


def test_trackio_has_one_run_for_a_folder(tmp_path, monkeypatch, capsys):
  """Against a stand-in, which greets on standard output as the real one."""
  inits, logged = [], []

  def init(**settings):
    sys.stdout.write("* hello")
    inits.append(settings)
    log = lambda scalars, step: logged.append((step, scalars))
    return types.SimpleNamespace(log=log, finish=lambda: logged.append("end"))

  stand_in = types.SimpleNamespace(init=init)
  monkeypatch.setitem(sys.modules, "trackio", stand_in)
  monkeypatch.setenv("TRACKIO_PROJECT", "mine")
  _log(tmp_path / "run", "trackio")
  _log(tmp_path / "run", "trackio", first_step=1)
  want = {"loss": 2.0, "usage_M/0": 0.5, "usage_M/1": 1.0}
  assert logged == [(1, want), "end", (2, want), "end"]
  first, second = inits
  assert first == second
  assert (first["project"], first["resume"]) == ("mine", "allow")
  assert first["name"].startswith("run-")
  assert capsys.readouterr().out == ""


def test_wandb_offline(tmp_path, monkeypatch):
  pytest.importorskip("wandb")
  monkeypatch.setenv("WANDB_MODE", "offline")
  _log(tmp_path, "wandb")
  (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
  for _ in range(100):  # It is written by another process.
    if b"usage_M" in file.read_bytes():
      return
    time.sleep(0.1)
  raise AssertionError(file.read_bytes())


def test_trackio_offline(tmp_path, monkeypatch):
  """Resumed, it is one run of two steps."""
  monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "base"))
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  trackio = pytest.importorskip("trackio")
  _log(tmp_path / "run", "trackio")
  _log(tmp_path / "run", "trackio", first_step=1)
  (run,) = trackio.Api().runs("vqjax")
  assert run.name.startswith("run-")
  (file,) = (tmp_path / "base").glob("*.db")
  with contextlib.closing(sqlite3.connect(file)) as base:
    rows = base.execute("select step, metrics from metrics").fetchall()
  found = [(step, json.loads(metrics)["usage_M/0"]) for step, metrics in rows]
  assert found == [(1, 0.5), (2, 0.5)]


@pytest.mark.parametrize(
  ("name", "extra"),
  [("tensorboard", "tracking"), ("wandb", "tracking"), ("trackio", "trackio")],
)
def test_a_tracker_that_is_not_installed_is_one_sentence(
  name, extra, monkeypatch
):
  for package in ("tensorboardX", "wandb", "trackio"):
    monkeypatch.setitem(sys.modules, package, None)
  with pytest.raises(ImportError, match=rf"pip install 'vqjax\[{extra}\]'"):
    writers.check_tracker(name)
  with pytest.raises(ValueError, match="must be one of none, .*; got 'mlflow'"):
    writers.check_tracker("mlflow")
