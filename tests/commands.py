"""Commands run from a shell, as tests of their ends need them."""

import pathlib
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]


def command(name, *args):
  return [sys.executable, "-m", f"experiments.{name}", *args]


def run(name, *args, check=True):
  """Runs it to its end; `stdout` and `stderr` of the result are text."""
  return subprocess.run(
    command(name, *args), cwd=ROOT, capture_output=True, text=True, check=check
  )


def stop_once(is_far_fn, name, *args) -> str:
  """Ends it by SIGTERM as soon as `is_far_fn()`; returns what it said."""
  with subprocess.Popen(
    command(name, *args), cwd=ROOT, stderr=subprocess.PIPE, text=True
  ) as process:
    while process.poll() is None:
      if is_far_fn():
        process.send_signal(signal.SIGTERM)
        break
      time.sleep(0.01)
    message = process.stderr.read()
  assert process.returncode == 130  # A scheduler must not take it for done.
  return message


def has_metrics(folder, num):
  """Whether a training run wrote `num` lines of metrics."""
  file = pathlib.Path(folder) / "metrics.jsonl"
  return file.exists() and file.read_text().count("\n") >= num
