"""A run folder: whose it is, what it is of, and whether it is finished.

  config.json    the configuration, and in `derived` what follows from it and
                 from the data: number of vectors, their checksum, ...
  run.lock       the process at work, while there is one
  summary.json   written last: a run that has it is finished

Paths are no part of a run: files are known by what is in them, and may move.
"""

import contextlib
import datetime
import json
import os
import pathlib
import secrets
import socket
import threading
import time

from absl import logging

from vqjax import devices
from vqjax.data import files, json_files, temporary

CONFIG_NAME, SUMMARY_NAME = "config.json", "summary.json"
LOCK_NAME = "run.lock"
_BEAT, _DEAD = 15.0, 120.0  # Seconds: a sign of life, and without any.
_WATCH = 1.0  # Seconds between looks at the lock of another host.


def read_json(path: pathlib.Path, how_to_resume: str) -> dict:
  """Reads a file of a run folder; ValueError where it is damaged."""
  try:
    return json_files.read_json(path)
  except ValueError as error:
    raise ValueError(f"{error} {how_to_resume}") from error


def read_config(workdir: pathlib.Path) -> dict | None:
  """Returns what config.json says of the run; None without a run."""
  path = workdir / CONFIG_NAME
  if path.exists():
    return read_json(
      path,
      "Put back a copy of it, or choose another --workdir; without it "
      "the origin of the checkpoints next to it is unknown.",
    )
  if (workdir / "checkpoints").exists():
    raise ValueError(
      f"{workdir} has checkpoints, but no {CONFIG_NAME} that says what they "
      "are of: put it back, or choose another --workdir."
    )
  return None


def read_summary(workdir: pathlib.Path) -> dict | None:
  """Returns the summary of a finished run; None if it is not finished.

  A damaged one counts for nothing: it is written again.
  """
  with contextlib.suppress(FileNotFoundError, ValueError):
    return json_files.read_json(workdir / SUMMARY_NAME)
  return None


def differences(old: dict, new: dict) -> dict:
  """Returns what differs of two configurations: dotted name to both values."""
  new = json.loads(json.dumps(new))  # Lists for tuples.
  return {name: (a, b) for name, a, b in files.differences(old, new)}


def take(found: dict, *names: str) -> None:
  """Removes differences of these names, or below them: they are allowed."""
  for name in list(found):
    if any(name == n or name.startswith(f"{n}.") for n in names):
      del found[name]


def refuse(workdir, found: dict, says: dict[str, str]) -> None:
  """Raises ValueError if settings differ, by the flag that sets them.

  Args:
    workdir: The run folder.
    found: What differs still.
    says: What to say of names that are no flags.
  """
  if not found:
    return
  texts = []
  for name, (old, new) in list(found.items())[:3]:
    known = [text for key, text in says.items() if name.startswith(key)]
    text = known[0] if known else f"--config.{name}"
    texts.append(f"{text} was {old}, but is {new} in this command")
  raise ValueError(
    f"{workdir} holds a run with other settings: {'; '.join(texts)}. Give the "
    "same, or choose another --workdir."
  )


def write_config(workdir: pathlib.Path, record: dict) -> None:
  """Writes config.json, unless it is there and the same."""
  path = workdir / CONFIG_NAME
  if devices.is_first() and not (
    path.exists() and json.loads(path.read_text(encoding="utf-8")) == record
  ):
    files.write_json(path, record, overwrite=True)
  devices.gather(0)  # It is there for all.


def check_shared(workdir: pathlib.Path) -> None:
  """Raises ValueError unless all processes find the same in the folder."""
  names = (CONFIG_NAME, SUMMARY_NAME, "checkpoints")
  seen = sum((workdir / name).exists() << i for i, name in enumerate(names))
  if len(set(devices.gather(seen).tolist())) > 1:
    raise ValueError(
      f"The processes find different files in {workdir}: --workdir must be a "
      "folder that all of them share."
    )


@contextlib.contextmanager
def locked(workdir: pathlib.Path):
  """Keeps other processes out of a run folder until the block ends.

  The first process of a run takes the lock for all of them.

  Raises:
    ValueError: Another process is at work there; the message names it.
  """
  error, lock = None, None
  if devices.is_first():
    try:
      lock = _Lock(workdir)
    except (ValueError, OSError) as e:
      error = e
  try:
    if devices.gather(error is not None).any():
      raise error or ValueError(f"The first process cannot work in {workdir}.")
    yield
  finally:
    if lock is not None:
      lock.release()


class _Lock:
  """run.lock: made at once or not at all, touched while its process lives."""

  def __init__(self, workdir: pathlib.Path):
    files.check_folder(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    self._path = workdir / LOCK_NAME
    self._text = json.dumps(_who() | {"token": secrets.token_hex(8)}) + "\n"
    self._take()
    self._is_over = threading.Event()
    self._thread = threading.Thread(target=self._beat, daemon=True)
    self._thread.start()

  def _take(self) -> None:
    with temporary.beside(self._path) as own:
      own.write_text(self._text, encoding="utf-8")
      while True:
        with contextlib.suppress(FileExistsError):
          self._link(own)
          return
        with contextlib.suppress(FileNotFoundError):  # Released just now.
          self._remove(_check_dead(self._path, own))

  def _link(self, own: pathlib.Path) -> None:
    try:
      os.link(own, self._path)
    except FileExistsError:
      raise
    except OSError:  # No links in this file system.
      with open(self._path, "x", encoding="utf-8") as file:
        file.write(self._text)

  def _remove(self, dead: str) -> None:
    """Removes a dead lock, unless another process has taken it over."""
    with temporary.beside(self._path) as aside:
      self._path.rename(aside)
      if _read(aside) != dead:
        with contextlib.suppress(OSError):
          os.link(aside, self._path)

  def _beat(self) -> None:
    while not self._is_over.wait(_BEAT):
      try:
        is_own = _read(self._path) == self._text
        if is_own:
          os.utime(self._path)
      except OSError:  # Removed by hand, or the file system is away.
        continue
      if not is_own:
        logging.error(
          "Another process has taken over %s while this one stood still.",
          self._path.parent,
        )
        logging.flush()
        os._exit(1)  # Before it writes into the other's run.

  def release(self) -> None:
    self._is_over.set()
    self._thread.join()
    with contextlib.suppress(OSError):
      if _read(self._path) == self._text:
        self._path.unlink()


def _read(path: pathlib.Path) -> str:
  return path.read_text(encoding="utf-8", errors="replace")


def _who() -> dict:
  """What tells this process from others, on any host."""
  return {
    "host": socket.gethostname(),
    "pid": os.getpid(),
    "since": datetime.datetime.now().isoformat(" ", "seconds"),
    "machine": _machine(),
    "started": _start_of(os.getpid()),
  }


def _machine() -> str:
  """Equal where process numbers mean the same: one boot, one namespace."""
  parts = [socket.gethostname()]
  with contextlib.suppress(OSError):
    parts.append(
      pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    )
    parts.append(os.readlink("/proc/self/ns/pid"))
  return " ".join(parts)


def _start_of(pid: int) -> str | None:
  """When a process began, in ticks of its machine; None if not known."""
  with contextlib.suppress(OSError, IndexError):
    text = pathlib.Path(f"/proc/{pid}/stat").read_text()
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
  return None


def _check_dead(path: pathlib.Path, own: pathlib.Path) -> str:
  """Returns the text of a lock whose process is dead; else raises ValueError.

  Whether a process of another host lives is told by its touching the lock.
  """
  text, holder, pid = _read(path), {}, 0
  with contextlib.suppress(ValueError, KeyError, TypeError):
    holder = json.loads(text)
    pid = int(holder["pid"])
  name = "an unknown process"  # Its lock is damaged.
  if pid:
    name = f"process {pid} on {holder.get('host')} since {holder.get('since')}"
  if pid and holder.get("machine") == _machine():
    is_dead = not _is_alive(pid, holder.get("started"))
  else:
    is_dead = _stands_still(path, own, name)
  if is_dead:
    logging.info("Removed the lock of a dead process: %s.", name)
    return text
  raise ValueError(
    f"Another process is at work in {path.parent}: {name}. Wait for it, stop "
    "it, or choose another --workdir. If there is no such process any more, "
    f"remove {path}."
  )


def _is_alive(pid: int, started: str | None) -> bool:
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    pass
  return started is None or _start_of(pid) == started


def _stands_still(path: pathlib.Path, own: pathlib.Path, name: str) -> bool:
  """Waits until the lock is touched, False, or was not for long, True."""
  first, says = path.stat().st_mtime, False
  while True:
    os.utime(own)  # By the clock of the file system, as the lock itself.
    age = own.stat().st_mtime - path.stat().st_mtime
    if path.stat().st_mtime != first:
      return False
    if age > _DEAD:
      return True
    if not says:
      logging.info(
        "%s is locked by %s: waiting up to %.0f s for a sign of life.",
        *(path.parent, name, _DEAD - age),
      )
      says = True
    time.sleep(_WATCH)
