"""Tables of outcomes, and what of two folders is compared."""

import collections
import json
import os
import pathlib
import sys

import numpy as np

from experiments.lib import cli, run_folder
from vqjax.data import temporary
from vqjax.storage import tensors

# What differs between two runs of one command.
_VOLATILE = ("created", "seconds", "info_digest")


class Table:
  """Counts outcomes by row; `pytest -s` shows it."""

  def __init__(self, title: str, columns: list[str]):
    self._title, self._columns = title, columns
    self._counts = collections.defaultdict(collections.Counter)
    self.forbidden = []

  def add(self, row: str, column: str, detail: str | None = None) -> None:
    """Counts an outcome; with `detail` it is a forbidden one."""
    self._counts[row][column] += 1
    if detail is not None:
      self.forbidden.append(f"{row}: {column}: {detail}")

  def check(self) -> None:
    """Prints the table; raises where an outcome was forbidden."""
    rows = [
      [row, *(counts[column] or "" for column in self._columns)]
      for row, counts in self._counts.items()
    ]
    text = cli.table([self._title, *self._columns], rows)
    sys.stdout.write(f"\n{text}\n")
    shown = "\n".join(self.forbidden[:20])
    assert not self.forbidden, f"{len(self.forbidden)} forbidden:\n{shown}"


def snapshot(folder: pathlib.Path, *, is_lenient: bool = False) -> dict:
  """What each file in a folder holds, but for times and for where it lies.

  `is_lenient` gives the bytes of files that cannot be read.
  """
  found = {}
  for path in sorted(folder.rglob("*")):
    if path.is_file():
      try:
        content = _content(path, folder)
      except (ValueError, OSError, KeyError):
        if not is_lenient:
          raise
        content = path.read_bytes()
      found[str(path.relative_to(folder))] = content
  return found


def _content(path, folder):
  if path.suffix == ".safetensors":
    text, arrays = tensors.read(path)
    found = {k: (v.dtype.name, v.tobytes()) for k, v in arrays.items()}
    return _plain(json.loads(text), folder), found
  if path.suffix == ".npz":
    with np.load(path) as found:
      return {name: (str(x.dtype), x.tobytes()) for name, x in found.items()}
  if path.suffix == ".json":
    return _plain(json.loads(path.read_bytes()), folder)
  return path.read_bytes()


def _plain(value, folder):
  if isinstance(value, dict):
    kept = {k: v for k, v in value.items() if k not in _VOLATILE}
    return {k: _plain(v, folder) for k, v in kept.items()}
  if isinstance(value, list):
    return [_plain(v, folder) for v in value]
  if isinstance(value, str):
    return value.replace(str(folder), "FOLDER")
  return value


def is_temporary(name: str) -> bool:
  """Whether a file is one that a killed process may leave for its successor."""
  return ".tmp-" in name or name.endswith(run_folder.LOCK_NAME)


def forget_process(folder: pathlib.Path) -> None:
  """Makes what this process has begun that of a process that died long ago."""
  temporary._mine.clear()
  temporary._cleaned.clear()
  for path in folder.rglob("*"):
    if is_temporary(path.name):
      os.utime(path, (0, 0))
