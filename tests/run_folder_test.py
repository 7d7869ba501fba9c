"""Locks of run folders: who is kept out, and whose lock counts for nothing."""

import errno
import fcntl
import os
import pathlib
import subprocess
import sys

import pytest

from experiments.lib import run_folder


def test_a_folder_is_for_one_at_a_time(tmp_path):
  with run_folder.locked(tmp_path):
    said = f"process {os.getpid()} on .* since 20.*choose another folder"
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


def test_a_lock_of_a_killed_process_holds_nobody_up(tmp_path):
  path = tmp_path / run_folder.LOCK_NAME
  path.write_text("process 1 on far since 2020-01-01 00:00:00")
  with run_folder.locked(tmp_path):
    assert path.read_text().startswith(f"process {os.getpid()} on ")
  assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch):
  def refuse(file, how):
    raise OSError(errno.ENOLCK, "No locks available")

  said = []
  monkeypatch.setattr(fcntl, "flock", refuse)
  warn = lambda text, *args: said.append(text % args)
  monkeypatch.setattr(run_folder.logging, "warning", warn)
  with run_folder.locked(tmp_path):
    pass
  assert "run.lock cannot be locked (No locks available)" in said[0]


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
