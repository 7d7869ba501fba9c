"""What people are told: messages, warnings, and errors in one line."""

import contextlib
import dis
import functools
import logging as std_logging
import os
import pathlib
import signal
import sys

import jax
from absl import logging

from vqjax import shipped

_CHATTY = {"orbax", "etils", "tensorstore", "matplotlib"}


class PlainFormatter(std_logging.Formatter):
  """The message alone; its level if it is more than information."""

  def format(self, record):
    text = record.getMessage()
    if record.levelno >= std_logging.WARNING:
      text = f"{record.levelname}: {text}"
    if record.exc_info:
      text += "\n" + self.formatException(record.exc_info)
    return text


def is_for_people(record) -> bool:
  """False for what libraries tell each other, such as orbax's progress.

  Their warnings are shown, except those by the checkpoint libraries and by
  matplotlib, which are about their own defaults and folders.
  """
  if _is_ours(record.pathname) or logging.level_debug():
    return True
  is_chatty = _CHATTY.intersection(pathlib.Path(record.pathname).parts)
  needed = std_logging.ERROR if is_chatty else std_logging.WARNING
  return record.levelno >= needed


@functools.cache
def _is_ours(file: str) -> bool:
  """Whether this is a source file of the library, a command, a config."""
  rooms = [shipped.root() / name for name in ("experiments", "configs")]
  rooms.append(pathlib.Path(shipped.__file__).resolve().parent)
  path = pathlib.Path(file).resolve()
  return any(path.is_relative_to(room) for room in rooms)


@contextlib.contextmanager
def without_next_steps():
  """Leaves out what commands say to run next: a pipeline runs it."""

  def cut(record):
    said, _, _ = f"\n{record.getMessage()}".partition("\nNext:\n")
    record.msg, record.args = said[1:], ()
    return bool(said)

  handler = logging.get_absl_handler()
  handler.addFilter(cut)
  try:
    yield
  finally:
    handler.removeFilter(cut)


@contextlib.contextmanager
def user_errors(how_to_resume: str = "Run the same command again."):
  """Turns errors that tell a user what to do into one line, exit code 1.

  Such are errors of the system (OSError, MemoryError, ImportError), and those
  that a `raise` of vqjax, its commands or configurations raised: whoever wrote
  it wrote a message. Any other error, such as a KeyError or a ValueError of
  NumPy that was not foreseen, is a fault of ours and keeps its traceback.

  SIGTERM acts like Ctrl-C: the program cleans up and says how to resume.
  """
  before = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if not jax.distributed.is_initialized():
      raise
    reason = str(e).splitlines()[0][:300]
    logging.error(
      "Lost another process of the run: %s. %s", reason, how_to_resume
    )
    leave(1)
  except Exception as e:
    if logging.level_debug() or not is_for_user(e):
      raise
    text = str(e) or "There is not enough memory."  # Of a MemoryError.
    logging.error("%s\n(--verbosity=1 shows where this comes from.)", text)
    leave(1)
  except KeyboardInterrupt:
    logging.warning("Stopped. %s", how_to_resume)
    leave(130)
  finally:
    signal.signal(signal.SIGTERM, before)


def is_for_user(error: Exception) -> bool:
  """Whether an error's message was written for users; see `user_errors`."""
  if isinstance(error, OSError | ImportError | MemoryError):
    return True
  kinds = (ValueError, TypeError, FloatingPointError)
  if not isinstance(error, kinds) or error.__traceback__ is None:
    return False
  last = error.__traceback__
  while last.tb_next:
    last = last.tb_next
  code = last.tb_frame.f_code
  is_raise = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
  return is_raise and _is_ours(code.co_filename)


def leave(code: int) -> None:
  """Exits; as one process of many at once.

  An orderly end waits for the others, which may be waiting for this one.
  """
  if not jax.distributed.is_initialized():
    sys.exit(code)
  logging.flush()
  os._exit(code)
