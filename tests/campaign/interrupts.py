"""Stops or disturbs a command before one of its changes on disk.

An audit hook of Python sees each opening for writing, renaming, linking,
removing and making of a folder, whoever does it. Hooks cannot be removed; ours
does nothing unless it is armed.
"""

import contextlib
import os
import sys

_CHANGES = {  # Event to the positions of paths among its arguments.
  "os.rename": (0, 1),
  "os.link": (0, 1),
  "os.remove": (0,),
  "os.mkdir": (0,),
  "os.rmdir": (0,),
  "os.chmod": (0,),
  "os.truncate": (0,),
}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_armed = []


class Killed(BaseException):
  """Stands for the end of a process: nothing is cleaned up after it."""


@contextlib.contextmanager
def before_change(folder, act):
  """Calls `act(number, event, path)` before each change below `folder`.

  What it raises is raised in place of the change.
  """
  _install()
  watch = _Watch(str(folder), act)
  _armed.append(watch)
  try:
    yield watch
  finally:
    _armed.remove(watch)


def killing(number: int | None):
  """Returns an `act` after which nothing is changed; None never does it."""

  def act(at, event, path):
    if number is not None and at >= number:
      raise Killed

  return act


class _Watch:
  """Counts the changes below a folder."""

  def __init__(self, folder: str, act):
    self.folder, self.act, self.num = folder, act, 0
    self._is_acting = False

  def see(self, event: str, path: str) -> None:
    if self._is_acting:
      return
    self._is_acting = True
    try:
      self.num += 1
      self.act(self.num - 1, event, path)
    finally:
      self._is_acting = False


def _hook(event: str, args) -> None:
  if not _armed:
    return
  if event == "open":
    path, _, flags = args
    paths = [path] if isinstance(flags, int) and flags & _WRITES else []
  else:
    paths = [args[i] for i in _CHANGES.get(event, ())]
  for path in paths:
    if isinstance(path, str | bytes | os.PathLike):
      text = os.fsdecode(path)
      for watch in list(_armed):
        if text.startswith(watch.folder):
          watch.see(event, text)
          return


_installed = []


def _install() -> None:
  if not _installed:
    _installed.append(True)
    sys.addaudithook(_hook)
