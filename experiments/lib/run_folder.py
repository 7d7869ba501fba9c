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
import socket

from absl import logging

from vqjax import devices
from vqjax.data import files, json_files

CONFIG_NAME, SUMMARY_NAME = "config.json", "summary.json"
LOCK_NAME = "run.lock"


def read_json(path: pathlib.Path, how_to_resume: str) -> dict:
  """Reads a file of a run folder; ValueError if it is damaged."""
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
      lock = _take_lock(workdir)
    except (ValueError, OSError) as e:
      error = e
  try:
    if devices.gather(error is not None).any():
      raise error or ValueError(f"The first process cannot work in {workdir}.")
    yield
  finally:
    if lock is not None:
      with lock:
        (workdir / LOCK_NAME).unlink(missing_ok=True)


def _take_lock(workdir: pathlib.Path):
  """Returns run.lock, open: the system unlocks it when the process ends."""
  files.check_folder(workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / LOCK_NAME
  while True:
    file = open(path, "a+", encoding="utf-8", errors="replace")  # noqa: SIM115
    try:
      _lock(file, path)
      # Else the process that had it has just removed it.
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(file.fileno()), path.stat()):
          break
    except BaseException:
      file.close()
      raise
    file.close()
  now = datetime.datetime.now().isoformat(" ", "seconds")
  file.truncate(0)
  file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
  file.flush()
  return file


def _lock(file, path: pathlib.Path) -> None:
  """Locks an open file; raises ValueError if another process has it."""
  try:
    if files.fcntl is not None:
      files.fcntl.flock(file, files.fcntl.LOCK_EX | files.fcntl.LOCK_NB)
  except BlockingIOError as error:
    file.seek(0)
    name = file.read(200).strip() or "an unknown process"
    raise ValueError(
      f"Another process is at work in {path.parent}: {name}. Wait for it, stop "
      "it, or choose another folder."
    ) from error
  except OSError as error:
    logging.warning(
      "%s cannot be locked (%s): start no other process in this folder.",
      *(path, error.strerror),
    )
