"""The progress line: rate, time left and a few figures, on standard error."""

import contextlib
import os
import sys
import threading

from tqdm import tqdm


def progress_bar(
  total: int | None,
  what: str,
  *,
  unit: str = "vec",
  start: int = 0,
  bar_format: str | None = None,
) -> tqdm:
  """Returns a bar over `total` units; one line every 20 s into a log file.

  None is a total that is not known.
  """
  is_terminal = sys.stderr is not None and sys.stderr.isatty()
  has_size = is_terminal and _has_size()
  return tqdm(
    total=total,
    initial=start,
    desc=what,
    unit=" " + unit,
    unit_scale=True,
    bar_format=bar_format,
    dynamic_ncols=has_size,
    ncols=None if has_size else 100,
    nrows=None if has_size else 20,
    mininterval=0.5 if is_terminal else 20,
    file=sys.stderr,
    disable=sys.stderr is None,  # A program without a console.
  )


def _has_size() -> bool:
  """Whether the terminal knows its size; in some containers it is 0 x 0."""
  try:
    return min(os.get_terminal_size(sys.stderr.fileno())) > 0
  except (OSError, ValueError):
    return False


@contextlib.contextmanager
def progress(
  total: int, what: str, *, unit: str = "vec", is_shown: bool = True
):
  """Yields a `(done, total)` callback of a progress line, or None."""
  if not is_shown:
    yield None
    return
  with progress_bar(total, what, unit=unit) as bar:
    yield lambda done, _: bar.update(done - bar.n)


@contextlib.contextmanager
def elapsed(what: str):
  """Shows the time of a block that cannot say how far it is."""
  is_over = threading.Event()
  bar = progress_bar(None, what, bar_format="{desc}: {elapsed}")

  def tick():
    while not is_over.wait(bar.mininterval):
      bar.refresh()

  thread = threading.Thread(target=tick, daemon=True)
  thread.start()
  try:
    yield
  finally:
    is_over.set()
    thread.join()
    bar.close()


def count(num: int, what: str) -> str:
  """Returns `1 list` or `1,024 lists`."""
  return f"{num:,} {what}" + ("" if num == 1 else "s")
