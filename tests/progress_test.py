"""What is shown while something takes its time."""

import os
import subprocess
import sys
import time

import pytest

from vqjax import progress


def test_a_block_that_cannot_say_how_far_it_is(capfd, monkeypatch):
  make = progress.progress_bar

  def quick(*args, **values):
    bar = make(*args, **values)
    bar.mininterval = 0.01
    return bar

  monkeypatch.setattr(progress, "progress_bar", quick)

  @progress.elapsed("train LSQ")
  def fail():
    time.sleep(0.1)
    raise ZeroDivisionError

  with pytest.raises(ZeroDivisionError):
    fail()
  shown = capfd.readouterr().err
  assert shown.count("train LSQ: 00:00") > 2
  assert shown.endswith("\n")


def test_counts_are_english():
  texts = [progress.count(n, "list") for n in (0, 1, 2, 1024)]
  assert texts == ["0 lists", "1 list", "2 lists", "1,024 lists"]


@pytest.mark.parametrize(
  ("streams", "is_own"), [("2>&1 | cat", False), ("2>/dev/null | cat", True)]
)
def test_json_never_goes_where_progress_is(streams, is_own):
  program = "from experiments.lib import cli; print(cli.has_own_stdout())"
  done = subprocess.run(
    f"{sys.executable} -c '{program}' {streams}",
    shell=True,
    capture_output=True,
    text=True,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
  )
  assert done.stdout == f"{is_own}\n"


def test_a_terminal_without_a_size_shows_the_bar():
  """As in some containers; its size is 0 x 0."""
  seen, end = os.openpty()
  program = "from vqjax import progress; progress.progress_bar(9, 'x').close()"
  subprocess.run(
    [sys.executable, "-c", program],
    stderr=end,
    check=True,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
  )
  os.close(end)
  assert b"x:   0%" in os.read(seen, 1000)
  os.close(seen)
