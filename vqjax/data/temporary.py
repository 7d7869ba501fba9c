"""Temporary files whose names say which process writes them.

So a later one knows the files of killed processes, and removes them.
"""

import contextlib
import os
import pathlib
import re
import secrets
import shutil
import socket
import time

_STALE_SECONDS = 60
_NAME = re.compile(r"\..*\.tmp-(\w+)-(\d+)-[0-9a-f]{8}(\.\w+)?")
_mine = set()  # Temporary files that this process is writing.
_cleaned = set()  # Folders in which it has looked for files of others.


def at_point(name: str, path) -> None:
  """Called before each change on disk; does nothing.

  A test replaces it by a function that raises, from some call on, to see what
  a kill at this point leaves.
  """
  del name, path


@contextlib.contextmanager
def beside(target: pathlib.Path):
  """Yields a path in the folder of `target`; its file is removed at the end."""
  path = _name(target)
  _mine.add(path)
  try:
    yield path
  finally:
    at_point("remove", path)
    path.unlink(missing_ok=True)
    _mine.discard(path)


@contextlib.contextmanager
def folder_beside(target: pathlib.Path):
  """Yields a new folder next to `target`; it is removed at the end."""
  path = _name(target)
  _mine.add(path)
  try:
    path.mkdir()
    yield path
  finally:
    at_point("remove", path)
    shutil.rmtree(path, ignore_errors=True)
    _mine.discard(path)


def _name(target: pathlib.Path) -> pathlib.Path:
  tag = f"{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
  return target.with_name(f".{target.stem[:80]}.tmp-{tag}{target.suffix}")


def remove_stale(folder: pathlib.Path) -> None:
  """Removes temporary files and folders of killed processes of this host.

  Looks once in each folder. Those of the last minute stay.
  """
  if folder in _cleaned or os.name != "posix":
    return
  _cleaned.add(folder)
  with contextlib.suppress(OSError):
    for path in folder.iterdir():
      if _is_stale(path) and path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
      elif _is_stale(path):
        path.unlink(missing_ok=True)


def _is_stale(path: pathlib.Path) -> bool:
  match = _NAME.fullmatch(path.name)
  if not match or match[1] != _host() or path in _mine or path.is_symlink():
    return False
  if time.time() - path.stat().st_mtime < _STALE_SECONDS:
    return False
  if int(match[2]) == os.getpid():
    return True  # An earlier process had the same number.
  try:
    os.kill(int(match[2]), 0)
  except ProcessLookupError:
    return True
  except (OSError, OverflowError):
    return False
  return False


def _host() -> str:
  """Names this host or container, in which process numbers mean the same."""
  name = re.sub(r"\W", "_", socket.gethostname(), flags=re.ASCII)[:32]
  with contextlib.suppress(OSError):
    name += f"_{os.stat('/proc/self/ns/pid').st_ino:x}"
  return name
