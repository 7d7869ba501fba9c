"""Locks of run folders: who is kept out, and whose lock counts for nothing."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from experiments.lib import run_folder


def _lock_of(folder, **changes):
  """Writes the lock of another process."""
  lock = run_folder._who() | changes
  (folder / run_folder.LOCK_NAME).write_text(json.dumps(lock))


def test_a_folder_is_for_one_at_a_time(tmp_path):
  with run_folder.locked(tmp_path):
    said = f"process {os.getpid()} on .* since 20.*--workdir"
    with (
      pytest.raises(ValueError, match=said),
      run_folder.locked(tmp_path),
    ):
      pass
    assert (tmp_path / run_folder.LOCK_NAME).exists()
  assert not list(tmp_path.iterdir())
  with pytest.raises(KeyError), run_folder.locked(tmp_path):
    raise KeyError
  assert not list(tmp_path.iterdir())


def test_another_process_is_named(tmp_path):
  code = (
    "import pathlib, sys, time; from experiments.lib import run_folder\n"
    "with run_folder.locked(pathlib.Path(sys.argv[1])):\n"
    "  print('locked', flush=True); time.sleep(60)"
  )
  with subprocess.Popen(
    [sys.executable, "-c", code, str(tmp_path)],
    stdout=subprocess.PIPE,
    text=True,
  ) as other:
    assert other.stdout.readline() == "locked\n"
    with (
      pytest.raises(ValueError, match=f"Another process .* {other.pid} on"),
      run_folder.locked(tmp_path),
    ):
      pass
    other.kill()
  with run_folder.locked(tmp_path):  # It left its lock, but is dead.
    pass
  assert not list(tmp_path.iterdir())


def test_a_number_that_was_given_again_is_another_process(tmp_path):
  _lock_of(tmp_path, started="1")  # Of this number, but begun elsewhen.
  before = (tmp_path / run_folder.LOCK_NAME).read_text()
  with run_folder.locked(tmp_path):
    assert (tmp_path / run_folder.LOCK_NAME).read_text() != before
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": null}', None])
def test_locks_of_other_hosts_count_while_they_are_touched(
  text, tmp_path, monkeypatch
):
  path = tmp_path / run_folder.LOCK_NAME
  _lock_of(tmp_path, host="far", machine="far", pid=1)
  if text is not None:
    path.write_text(text)
  old = time.time() - run_folder._DEAD - 5
  os.utime(path, (old, old))
  with run_folder.locked(tmp_path):  # Not touched for long.
    pass
  _lock_of(tmp_path, host="far", machine="far", pid=1)
  touch = lambda seconds: os.utime(path, (old + 200, old + 200))
  monkeypatch.setattr(time, "sleep", touch)  # While it is watched.
  with (
    pytest.raises(ValueError, match="process 1 on far"),
    run_folder.locked(tmp_path),
  ):
    pass


def test_a_lock_is_touched_while_its_process_lives(tmp_path, monkeypatch):
  monkeypatch.setattr(run_folder, "_BEAT", 0.01)
  path = tmp_path / run_folder.LOCK_NAME
  with run_folder.locked(tmp_path):
    os.utime(path, (0, 0))
    for _ in range(500):
      if path.stat().st_mtime > 0:
        break
      time.sleep(0.01)
    assert path.stat().st_mtime > 0


@pytest.mark.skipif(sys.platform != "linux", reason="writes into /proc")
def test_a_folder_that_cannot_be_is_named(tmp_path):
  with (
    pytest.raises(OSError, match="/proc/x cannot be written: .*choose another"),
    run_folder.locked(pathlib.Path("/proc/x")),
  ):
    pass
  (tmp_path / "a").write_text("")
  with (
    pytest.raises(NotADirectoryError, match="a is a file, not a folder"),
    run_folder.locked(tmp_path / "a" / "run"),
  ):
    pass
