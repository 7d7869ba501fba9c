"""Kills before every change on disk: nothing or the whole is left.

A kill leaves no output or a whole one, never an old description beside a new
file. The same command run again ends as one that was not disturbed, and leaves
no temporary file.
"""

import random
import signal
import subprocess
import time

import pytest

from tests import commands
from tests.campaign import attacks, interrupts, outcomes, subjects

_EVERY = [5, pytest.param(1, marks=pytest.mark.slow)]  # Changes on disk.


def _kill_everywhere(table, name, inputs, tmp_path, every, others=None) -> None:
  attack = attacks.Attack(table, name, inputs, tmp_path, others)
  for number in range(0, 1000, every):
    attack.begin()
    error = attack.disturbed(interrupts.killing(number))
    if error is None:
      break
    assert isinstance(error, interrupts.Killed), error
    attack.judge(f"kill {number}")
  assert number > 4


@pytest.mark.parametrize("every", _EVERY)
def test_kills_of_new_outputs(inputs, tmp_path, every):
  table = outcomes.Table("kill", attacks.COLUMNS)
  for name in subjects.COMMANDS:
    folder = tmp_path / name.replace(" ", "_")
    _kill_everywhere(table, name, inputs, folder, every)
  table.check()


@pytest.mark.slow
@pytest.mark.parametrize("every", [1])
def test_kills_of_outputs_that_are_replaced(inputs, others, tmp_path, every):
  table = outcomes.Table("kill", attacks.COLUMNS)
  for name, subject in subjects.COMMANDS.items():
    if subject.overwrites:
      folder = tmp_path / name.replace(" ", "_")
      _kill_everywhere(table, name, inputs, folder, every, others)
  table.check()


@pytest.mark.slow
def test_kills_by_the_system(inputs, tmp_path):
  args = [
    *(f"--codec={inputs / 'rq'}", f"--data={inputs / 'x.npy'}"),
    *(f"--output={tmp_path / 'codes'}", "--shards=20"),
  ]
  began = time.monotonic()
  commands.run("encode", *args)
  seconds = time.monotonic() - began
  wanted = outcomes.snapshot(tmp_path / "codes")
  draw = random.Random(0)
  for number in range(10):
    args[2] = f"--output={tmp_path / str(number)}"
    process = subprocess.Popen(
      commands.command("encode", *args),
      cwd=commands.ROOT,
      stderr=subprocess.DEVNULL,
    )
    time.sleep(seconds * draw.uniform(0.5, 1))
    process.send_signal(signal.SIGKILL)
    process.wait()
    outcomes.forget_process(tmp_path)
    commands.run("encode", *args)
    assert outcomes.snapshot(tmp_path / str(number)) == wanted
