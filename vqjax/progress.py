"""The progress line: rate, time left and a few figures, on standard error."""

import contextlib
import sys

from tqdm import tqdm


def progress_bar(
  total: int, what: str, *, unit: str = "vec", start: int = 0
) -> tqdm:
  """Returns a bar over `total` units; one line every 20 s into a log file."""
  is_terminal = sys.stderr is not None and sys.stderr.isatty()
  return tqdm(
    total=total,
    initial=start,
    desc=what,
    unit=" " + unit,
    unit_scale=True,
    dynamic_ncols=is_terminal,
    ncols=None if is_terminal else 100,
    mininterval=0.5 if is_terminal else 20,
    file=sys.stderr,
    disable=sys.stderr is None,  # A program without a console.
  )


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
