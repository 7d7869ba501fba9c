"""What a command would take, measured on its first steps: the flag --plan.

A command names its stages. Each is an iterator that does some of the real work
and yields how much, in memory; it is stopped after a few seconds, and the rate
of its later steps tells how long all of it takes. Nothing is written.
"""

import resource
import sys
import time
from typing import NamedTuple

from absl import logging

from experiments.lib import cli

OPTION = cli.Option(
  bool,
  False,
  "Only say rows, bytes, memory and seconds, from a few measured steps; "
  "nothing is written.",
)
_SECONDS = 4.0  # Of measuring a stage, after its first step.
_MOST_STEPS = 50
_PAGE = 1 if sys.platform == "darwin" else 1024  # Units of ru_maxrss, bytes.


class Stage(NamedTuple):
  """A part of the work, and how long it takes."""

  name: str
  seconds: float


def measure(name: str, steps, total: float) -> Stage:
  """Runs the first steps of a stage.

  Args:
    name: Of the stage.
    steps: Iterator that works and yields how much it did.
    total: How much there is to do.
  """
  began = time.perf_counter()
  done = rated = 0
  first = began
  for num, amount in enumerate(steps):
    now = time.perf_counter()
    done += amount
    if not num:  # It compiles and opens files, once.
      first = now
    else:
      rated += amount
    if now - first > _SECONDS or num == _MOST_STEPS or done >= total:
      break
  now = time.perf_counter()
  if done >= total:
    return Stage(name, now - began)
  if not rated:
    return Stage(name, (now - began) * total / max(done, 1))
  rate = rated / (now - first)
  return Stage(name, now - began + (total - done) / rate)


def scaled(name: str, fit_fn, total: int, most: int = 8192) -> Stage:
  """Measures work that has no steps, on few and on twice as many rows.

  `fit_fn` takes a number of rows. Its time is taken to grow by a line.
  """
  few = min(total // 4, most)
  if few < 512:
    return Stage(name, _time(fit_fn, total))
  one, two = _time(fit_fn, few), _time(fit_fn, 2 * few)
  # What does not grow: compiling, for each of the sizes.
  slope = max(two - one, 0.0) / few
  return Stage(name, one + slope * (total - few))


def _time(fn, *args) -> float:
  began = time.perf_counter()
  fn(*args)
  return time.perf_counter() - began


def report(
  stages, *, rows: int, num_bytes: float, more_bytes=0.0, left_out: str = ""
) -> dict:
  """Says and returns the plan.

  Args:
    stages: What was measured.
    rows: Vectors that the command works on.
    num_bytes: Of all that would be written.
    more_bytes: Of memory that the measured steps did not need yet.
    left_out: What was not measured.
  """
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PAGE
  found = {
    "rows": int(rows),
    "bytes": int(num_bytes),
    "memory": int(peak + more_bytes),
    "seconds": round(sum(stage.seconds for stage in stages), 1),
  }
  lines = [f"  {s.name}: {duration(s.seconds)}" for s in stages]
  if left_out:
    lines.append(f"  not counted: {left_out}")
  logging.info(
    "Plan: %d rows, %s to write, about %s of memory, %s on this machine:\n%s\n"
    "Nothing was written. Leave --plan out to do it.",
    *(found["rows"], _size(found["bytes"]), _size(found["memory"])),
    *(duration(found["seconds"]), "\n".join(lines)),
  )
  return found


def duration(seconds: float) -> str:
  """Returns 12.3 s, 12 min or 3.4 h."""
  if seconds < 100:
    return f"{seconds:.1f} s"
  return (
    f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
  )


def _size(num_bytes: float) -> str:
  for unit, size in (("GB", 1e9), ("MB", 1e6)):
    if num_bytes >= size:
      return f"{num_bytes / size:.1f} {unit}"
  return f"{num_bytes / 1e3:.1f} kB"
