"""The process of a command: its streams, its file names, its signals.

Output streams may be closed, full, or a pipe whose reader has left; file names
may need an encoding that the locale lacks; Ctrl-C may come again while the
program ends. None of these may cost a result.
"""

import errno
import os
import signal
import sys

_NO_READER = (errno.EPIPE, errno.EBADF)


def prepare() -> None:
  """Makes the process fit to work; before anything is opened or written."""
  _use_utf8()
  _fill_closed()
  if not isinstance(sys.stderr, _Steady):
    sys.stderr = _Steady(sys.stderr or _nowhere())
    sys.stdout = _Steady(sys.stdout or _nowhere(), "Standard output")


def raise_on_ctrl_c() -> None:
  """Lets Ctrl-C raise KeyboardInterrupt, unless it is to be ignored."""
  if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def end_at_once_on_ctrl_c() -> None:
  """Lets Ctrl-C end the process silently: everything is written."""
  signal.signal(signal.SIGINT, lambda *_: os._exit(130))


class _Steady:
  """A text stream that loses what it cannot write instead of raising.

  A stream with a name says so once, on standard error, unless it is a pipe
  whose reader has seen enough.
  """

  def __init__(self, stream, name: str = ""):
    self._stream, self._name = stream, name

  def __getattr__(self, attribute):
    return getattr(self._stream, attribute)

  def write(self, text: str) -> int:
    try:
      self._stream.write(text)
      self._stream.flush()  # Or it fails later, and cannot be caught.
    except (OSError, ValueError) as error:  # ValueError: it is closed.
      self._report(error)
    return len(text)

  def writelines(self, lines) -> None:
    self.write("".join(lines))

  def flush(self) -> None:
    try:
      self._stream.flush()
    except (OSError, ValueError) as error:
      self._report(error)

  def _report(self, error) -> None:
    name, self._name = self._name, ""
    if name and getattr(error, "errno", None) not in _NO_READER:
      sys.stderr.write(f"WARNING: {name} cannot be written: {error}.\n")


def _nowhere():
  return open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 For good.


def _fill_closed() -> None:
  """Opens closed standard streams: else a file gets their number.

  What libraries write there would then go into that file.
  """
  for number in (0, 1, 2):
    try:
      os.fstat(number)
    except OSError:
      opened = os.open(os.devnull, os.O_RDWR)
      if opened != number:
        os.dup2(opened, number)
        os.close(opened)
      os.set_inheritable(number, True)


def _use_utf8() -> None:
  """Starts anew in UTF-8 mode if Python would not take all file names.

  Libraries write paths as UTF-8, whatever the locale says.
  """
  is_utf8 = sys.getfilesystemencoding().lower().replace("-", "") == "utf8"
  if is_utf8 or "utf8" in sys._xoptions or not sys.executable:
    return
  arguments = [sys.executable, "-X", "utf8", *sys.orig_argv[1:]]
  os.execv(sys.executable, arguments)
