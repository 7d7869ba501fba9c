"""What a training run shows to people and hears from them.

A progress line of the first process, and the signals that stop a run.
"""

import contextlib
import signal
import threading

from absl import logging
from tqdm import tqdm

from vqjax import devices
from vqjax.progress import progress_bar


def make_bar(plan, step, is_shown=True):
  """Returns the progress line, shown by the first process."""
  if not (is_shown and devices.is_first()):
    return tqdm(disable=True)
  return progress_bar(
    plan.total_steps * plan.batch_size, "train", start=step * plan.batch_size
  )


def rate_text(bar, plan, text):
  """Returns steps per second, as late as the vectors per second of the bar."""
  if bar.disable:
    return ""
  now = bar.format_dict
  rate = now["rate"] or (now["n"] - now["initial"]) / max(now["elapsed"], 1e-9)
  return f"{rate / plan.batch_size:.3g} step/s" + f", {text}" * bool(text)


def epoch_text(row, plan, step, figures):
  """Returns where the run is, and the figure that its validation found."""
  name, value = plan.measure, figures[plan.measure] * plan.scale
  name = name.upper() if len(name) < 4 else name.replace("_", " ")
  text = f"epoch {step // plan.steps_per_epoch}/{plan.num_epochs}, "
  text += f"{name} {value:.4g}"
  if "dead_words" in row:
    text += f", {int(row['dead_words'])} unused"
  return text


@contextlib.contextmanager
def catch_signals():
  """Sets an event on SIGTERM or Ctrl-C; a second signal acts at once."""
  stop = threading.Event()
  if threading.current_thread() is not threading.main_thread():
    yield stop
    return

  def handle(number, frame):
    del frame
    stop.set()
    signal.signal(number, before[number])
    logging.warning(
      "%s: saving a checkpoint, then stopping.", signal.Signals(number).name
    )

  before = {
    number: signal.getsignal(number)
    for number in (signal.SIGTERM, signal.SIGINT)
  }
  for number in before:
    signal.signal(number, handle)
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
