"""The bytes of a file as they come from a server, resumed where they stopped.

What has come lies in `.NAME.part.SUFFIX` next to the file, with what is known
of it in a `.json` beside. A later run continues where an earlier one stopped.
"""

import contextlib
import hashlib
import os
import pathlib
import time
from typing import NamedTuple

from absl import logging

from vqjax.data import files, json_files, transport
from vqjax.progress import progress_bar

try:
  import fcntl
except ImportError:  # Not POSIX.
  fcntl = None

CHUNK = 1 << 18
_NUM_TRIES = 8  # Without a byte more than before.
_LONGEST_WAIT = 600  # Seconds; who asks for more is asked by the user, later.


class Order(NamedTuple):
  """A file to fetch.

  `source` is its address; `url` the one it is fetched from, maybe a mirror.
  `pack` is "gz", "tar" (a .tar.gz, whose members go into `path`, a folder), or
  "". `unpacked_bytes` are what it is going to take, as far as is known.
  """

  path: pathlib.Path
  source: str
  url: str
  pack: str = ""
  unpacked_bytes: int = 0
  sha256: str | None = None  # Of the file on the server.
  also: tuple[str, ...] = ()  # Sources of files that serve as well.


class Restart(Exception):  # noqa: N818 Not an error.
  """The bytes that have come are of no use: the file is fetched anew."""


def part_path(order: Order) -> pathlib.Path:
  """Returns where the bytes that have come lie."""
  name = order.url.rpartition("/")[2] if order.pack else order.path.name
  stem, dot, suffix = name.partition(".")
  return order.path.with_name(f".{stem}.part{dot}{suffix}")


def _state_path(part: pathlib.Path) -> pathlib.Path:
  return part.with_name(f"{part.name}.json")


def forget(part: pathlib.Path) -> None:
  """Empties a part, or removes what is left of one that is in its place."""
  _state_path(part).unlink(missing_ok=True)
  with contextlib.suppress(FileNotFoundError):
    os.truncate(part, 0)


@contextlib.contextmanager
def locked(part: pathlib.Path):
  """Yields the part, which no other process writes then; it may be empty."""
  with open(part, "ab") as file:
    if fcntl is not None:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise OSError(
          f"Another process is fetching {part}; let it end, or stop it."
        ) from error
      except OSError:  # Some network file systems.
        pass
    try:
      yield part
    finally:
      with contextlib.suppress(FileNotFoundError):
        if not part.stat().st_size:
          part.unlink()


class Reach:
  """The most bytes that have come, which decides how long to be patient."""

  def __init__(self):
    self.most, self.num_tries = 0, 0

  def saw(self, position: int) -> None:
    """Notes how far the file is here."""
    if position > self.most:
      self.most, self.num_tries = position, 0

  def wait(self, order: Order, error: transport.TryLater) -> None:
    """Waits before another try; raises OSError if there were enough."""
    self.num_tries += 1
    seconds = min(2.0 ** (self.num_tries - 1), 60)
    seconds = error.wait if error.wait is not None else seconds
    again = "Run the same command again to resume."
    if seconds > _LONGEST_WAIT:
      raise OSError(
        f"{order.url}: {error}, and asks to come back in {seconds:.0f} s. "
        f"{again}"
      ) from error
    if self.num_tries >= _NUM_TRIES:
      raise OSError(
        f"{order.url}: {error}, after {_NUM_TRIES} tries. {again}"
      ) from error
    logging.info(
      "%s: %s; trying again in %.0f s (%d of %d).",
      *(order.path.name, error, seconds, self.num_tries + 1, _NUM_TRIES),
    )
    _sleep(seconds)


def _sleep(seconds: float) -> None:
  time.sleep(seconds)


def size_of(order: Order) -> int | None:
  """Returns the bytes on the server, None if it does not say; patient too."""
  reach = Reach()
  while True:
    try:
      return transport.size_of(order.url)
    except transport.TryLater as error:
      reach.wait(order, error)


class Stream:
  """All bytes of a file in order: those of the part, then those that come.

  What comes is written to the part first. A broken connection is opened again
  where it broke.
  """

  def __init__(self, order: Order, part: pathlib.Path, reach: Reach):
    self._order, self._part, self._reach = order, part, reach
    self._version, self._total = _read_state(order, part)
    self._reply, self._bar = None, None
    self.position, self.hash = 0, hashlib.sha256()
    self._size = part.stat().st_size

  def __enter__(self):
    """Opens the part."""
    self._file = open(self._part, "rb+")  # noqa: SIM115 Closed at the exit.
    self._reach.saw(self._size)
    return self

  def __exit__(self, *_):
    """Closes part, connection and progress."""
    self._file.close()
    self._disconnect()
    if self._bar is not None:
      self._bar.close()

  def read(self, num: int = CHUNK) -> bytes:
    """Returns up to `num` bytes; none at the end of the file."""
    data = self._file.read(num)
    while not data:
      if self._size == self._total:
        return b""
      data = self._receive(num)
      if data is None:
        return b""
    self.position += len(data)
    self.hash.update(data)
    return data

  def give_up(self) -> None:
    """Drops what has come, which is of no use."""
    forget(self._part)

  def connect(self) -> None:
    """Opens the connection, unless there is one or all bytes are here."""
    while self._reply is None and self._size != self._total:
      try:
        self._connect()
      except transport.TryLater as error:
        self._reach.wait(self._order, error)

  def _receive(self, num: int) -> bytes | None:
    """New bytes, b"" after a break, None at the end of one of unknown size."""
    self.connect()
    if self._size == self._total:
      return None
    try:
      data = self._reply.read_fn(min(num, CHUNK))
      if not data and self._total is None:
        return None
      if not data:
        at = f"byte {self._size} of {self._total}"
        raise transport.TryLater(f"it ended at {at}")
    except transport.TryLater as error:
      self._disconnect()
      self._reach.wait(self._order, error)
      return b""
    data = self._kept(data)
    self._bar.update(len(data))
    return data

  def _kept(self, data: bytes) -> bytes:
    if self._total is not None and self._size + len(data) > self._total:
      raise OSError(
        f"{self._order.url} sends more than the {self._total} bytes that it "
        "says the file has; try again later, or another address (--base_url)."
      )
    try:
      self._file.write(data)
      self._file.flush()
    except OSError as error:
      raise OSError(
        f"The disk is full: {self._size} bytes of {self._order.path} stay in "
        f"{self._part.name}. Free some space, and run the same command again."
        if files.is_full_disk(error)
        else f"{self._part} cannot be written: {error}."
      ) from error
    self._size += len(data)
    self._reach.saw(self._size)
    return data

  def _connect(self) -> None:
    reply = transport.open_url(self._order.url, self._size, self._version)
    self._reply = reply
    is_changed = bool(self._version) and reply.version != self._version
    is_changed |= None not in (self._total, reply.total) and (
      reply.total != self._total
    )
    if self._size and is_changed:
      raise Restart("the file on the server has changed since its first part")
    if reply.start != self._size:
      raise Restart("the server cannot continue in the middle of a file")
    self._version, self._total = reply.version, reply.total
    if self._bar is None:
      self._begin()
    _write_state(self._order, self._part, self._version, self._total)

  def _begin(self) -> None:
    """Looks for room on the disk, and shows the progress."""
    left = (self._total or 0) - self._size + self._order.unpacked_bytes
    files.check_space(self._part.parent, left, self._order.path)
    if self._size:
      logging.info(
        "%s: resumes at %.1f MB.", self._order.path.name, self._size / 1e6
      )
    name = self._order.path.name
    self._bar = progress_bar(self._total, name, unit="B", start=self._size)

  def _disconnect(self) -> None:
    if self._reply is not None:
      with contextlib.suppress(OSError):
        self._reply.close_fn()
    self._reply = None


def _read_state(order: Order, part: pathlib.Path) -> tuple[str, int | None]:
  """Version and size of the file that the part is of; empties another's."""
  with contextlib.suppress(OSError, ValueError):
    state = json_files.read_json(_state_path(part))
    fields = {"url": str, "version": str, "total": (int, type(None))}
    json_files.check_fields(part, state, fields)
    is_whole = state["total"] is None or part.stat().st_size <= state["total"]
    if state["url"] == order.url and is_whole:
      return state["version"], state["total"]
  forget(part)
  return "", None


def _write_state(order: Order, part, version: str, total) -> None:
  state = {"url": order.url, "version": version, "total": total}
  files.write_json(_state_path(part), state, overwrite=True)
