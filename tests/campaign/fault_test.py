"""Full disks, missing permissions, signals and rivals, at every change on disk.

The command says in one line what was wrong, leaves no output or a whole one and
no temporary file, and the same command completes it when the fault is gone.
"""

import errno
import fcntl
import os
import resource
import shutil

import numpy as np
import pytest
import tqdm

from tests.campaign import attacks, outcomes, subjects

_STEPS = [17, pytest.param(1, marks=pytest.mark.slow)]  # Between changes.
_NEEDS_ROOM = ("open", "os.mkdir", "os.rename")


def _failing(number: int, code: int):
  """An `act` that fails once, as the system does."""

  def act(at, event, path):
    if at == number and event in _NEEDS_ROOM:
      act.has_failed = True
      raise OSError(code, os.strerror(code), path)

  act.has_failed = False
  return act


@pytest.mark.parametrize("step", _STEPS)
@pytest.mark.parametrize(
  ("code", "words"),
  [
    (errno.ENOSPC, ("disk is full", "No space left")),
    pytest.param(errno.EACCES, ("Permission denied",), marks=pytest.mark.slow),
  ],
)
def test_changes_that_fail(inputs, tmp_path, code, words, step):
  table = outcomes.Table(errno.errorcode[code], attacks.COLUMNS)
  for name in subjects.COMMANDS:
    folder = tmp_path / name.replace(" ", "_")
    attack = attacks.Attack(table, name, inputs, folder)
    for number in range(len(name) % step, 1000, step):
      attack.begin()
      act = _failing(number, code)
      error = attack.disturbed(act)
      if number >= attack.num_changes:
        break
      if not act.has_failed:
        continue
      if error is not None:
        attacks.check_said(attack, f"change {number}", error, *words)
      attacks.check_no_temporary(attack, f"change {number}")
      attack.judge(f"change {number}")
  table.check()


@pytest.mark.parametrize("step", _STEPS)
def test_signals(inputs, tmp_path, step):
  table = outcomes.Table("Ctrl-C", attacks.COLUMNS)

  def act(number):
    def interrupt(at, event, path):
      if at == number:
        raise KeyboardInterrupt

    return interrupt

  for name in subjects.COMMANDS:
    folder = tmp_path / name.replace(" ", "_")
    attack = attacks.Attack(table, name, inputs, folder)
    for number in range(len(name) % step, 1000, step):
      attack.begin()
      error = attack.disturbed(act(number))
      if error is None:
        break
      if not isinstance(error, KeyboardInterrupt):
        attacks.check_said(attack, f"change {number}", error)
      attack.judge(f"change {number}")
  table.check()


@pytest.mark.slow
def test_signals_at_work(inputs, tmp_path, monkeypatch):
  table = outcomes.Table("Ctrl-C at work", attacks.COLUMNS)
  update = tqdm.tqdm.update
  for name in subjects.COMMANDS:
    folder = tmp_path / name.replace(" ", "_")
    attack = attacks.Attack(table, name, inputs, folder)
    attack.begin()

    def interrupt(*_):
      raise KeyboardInterrupt

    monkeypatch.setattr(tqdm.tqdm, "update", interrupt)
    error = attack.disturbed(lambda *_: None)
    monkeypatch.setattr(tqdm.tqdm, "update", update)
    if error is not None:
      assert isinstance(error, KeyboardInterrupt), error
      attacks.check_no_temporary(attack, "work")
      attack.judge("work")
  table.check()


@pytest.mark.parametrize(
  "num_limits", [2, pytest.param(40, marks=pytest.mark.slow)]
)
def test_disks_that_are_full(inputs, tmp_path, num_limits):
  table = outcomes.Table("file size limit", attacks.COLUMNS)
  for name in subjects.COMMANDS:
    folder = tmp_path / name.replace(" ", "_")
    attack = attacks.Attack(table, name, inputs, folder)
    sizes = [p.stat().st_size for p in folder.rglob("*") if p.is_file()]
    for limit in np.linspace(0, max(sizes) - 1, num_limits, dtype=int):
      attack.begin()
      _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
      resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), hard))
      try:
        error = attack.disturbed(lambda *_: None)
      finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
      if error is not None:
        what = f"limit {limit}"
        words = ("disk is full", "File too large")
        attacks.check_said(attack, what, error, *words)
        attacks.check_no_temporary(attack, what)
        attack.judge(what)
  table.check()


def _rival(number: int, made, folder):
  """An `act` by which another process makes the outputs, if it may."""

  def act(at, event, path):
    if at != number:
      return
    fd = os.open(folder, os.O_RDONLY)
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return  # It waits, and finds ours.
    finally:
      os.close(fd)
    if all((folder / p.name).exists() for p in made.iterdir()):
      return
    shutil.copytree(made, folder, dirs_exist_ok=True)
    act.has_come = True

  act.has_come = False
  return act


@pytest.mark.parametrize("step", _STEPS)
@pytest.mark.parametrize(
  "is_same", [pytest.param(True, marks=pytest.mark.slow), False]
)
def test_rivals(inputs, others, tmp_path, is_same, step):
  """Another process makes the output while we work: one of both is whole."""
  table = outcomes.Table("rival", ["tries", "ours", "its", "FORBIDDEN"])
  for name, subject in subjects.COMMANDS.items():
    if not subject.overwrites or subject.is_one:
      continue
    folder = tmp_path / name.replace(" ", "_")
    attack = attacks.Attack(table, name, inputs, folder)
    made = tmp_path / f"{folder.name}_rival"
    subject.run(inputs if is_same else others, made)
    its = outcomes.snapshot(made)
    for number in range(len(name) % step, 1000, step):
      attack.begin()
      act = _rival(number, made, attack.folder)
      error = attack.disturbed(act)
      if number >= attack.num_changes:
        break
      if not act.has_come:
        continue
      attack.add("tries")
      what = f"change {number}"
      if error is not None:
        attacks.check_said(attack, what, error, "exists already")
      found = outcomes.snapshot(attack.folder)
      is_ours = found == attack.wanted and error is None
      if is_ours or found == its:
        attack.add("ours" if is_ours else "its")
      else:
        attack.add("FORBIDDEN", f"{what}: {sorted(found)}, {error}")
  table.check()


@pytest.mark.parametrize("name", subjects.COMMANDS)
def test_outputs_that_cannot_be(inputs, tmp_path, name):
  subject = subjects.COMMANDS[name]
  made = tmp_path / "made"
  subject.run(inputs, made)
  (output,) = [
    p for p in made.iterdir() if name == "train" or p.suffix != ".json"
  ][:1]
  (tmp_path / "file").write_text("")
  with pytest.raises((OSError, ValueError), match="file"):
    subject.run(inputs, tmp_path / "file")
  if not output.is_file() or name == "train":
    return
  blocked = tmp_path / "blocked" / output.name
  blocked.mkdir(parents=True)
  with pytest.raises((OSError, ValueError), match="folder"):
    subject.run(inputs, blocked.parent)
  blocked.rmdir()
  blocked.write_text("mine")
  blocked.chmod(0o444)
  with pytest.raises(FileExistsError, match="exists already"):
    subject.run(inputs, blocked.parent)
  assert blocked.read_text() == "mine"
