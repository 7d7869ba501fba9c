"""Mini-batch steps of `ivf_centroids --minibatch`, saved and resumed.

A file that is larger than memory is read in batches of rows, drawn in random
order without repetition; see `vqjax.codecs.minibatch_kmeans`.
"""

import itertools
import time
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import logging

from experiments.lib import cli
from vqjax.codecs import minibatch_kmeans, minibatch_training
from vqjax.core import check_range
from vqjax.data import batches
from vqjax.progress import progress_bar

OPTIONS = {
  "minibatch": cli.Option(
    bool,
    False,
    "Begin with mini-batch steps instead of --start: for files larger than "
    "memory, of which few passes are to be made.",
  ),
  "batch_size": cli.Option(int, 1024, "Vectors of a step."),
  "max_steps": cli.Option(
    int, 5000, "Steps at most; they end when few labels change."
  ),
  "tol": cli.Option(
    float, 5e-5, "Smoothed share of changed labels at which steps end."
  ),
}
_RULE = minibatch_kmeans.Rule("l2")


class Steps(NamedTuple):
  """The centroids that the steps found, and what is said of these."""

  words_KD: np.ndarray
  report: dict


def check(config) -> None:
  """Raises ValueError if an option makes no sense."""
  check_range("--batch_size", config.batch_size, 1, 1 << 24)
  check_range("--max_steps", config.max_steps, 0, 100_000_000)
  check_range("--tol", config.tol, 0, 1)


def describe(config) -> dict:
  """What a file or a checkpoint says of the settings; empty without steps."""
  if not config.minibatch:
    return {}
  names = ("batch_size", "max_steps", "tol")
  return {"start": "minibatch"} | {name: config[name] for name in names}


def run(
  config, vectors, kept: dict | None, save_fn: Callable[[dict], None]
) -> Steps:
  """Runs the steps, or those that are left after `kept`.

  `save_fn` takes what a later call needs as `kept`.
  """
  reader = batches.BatchReader(vectors, config.seed, config.batch_size)
  num_first = -(-config.num_centroids // config.batch_size)
  if kept is None:
    first_KD = np.concatenate([reader(i) for i in range(num_first)])
    run = minibatch_training.begin(
      _RULE, first_KD[: config.num_centroids], config.batch_size
    )
  else:
    stop = num_first + int(kept["num_steps"])
    waiting = range(max(stop - _RULE.history_size, num_first), stop)
    run = minibatch_training.unpack(_RULE, kept, [reader(i) for i in waiting])
    logging.info("Resuming after %d steps.", run.num_steps)
  run = _run_steps(config, reader, num_first, run, save_fn)
  report = {"num_steps": run.num_steps, "changed_labels": run.history[-1]}
  logging.info(
    "%d steps of %d vectors, smoothed share of changed labels %.3g%s.",
    *(run.num_steps, config.batch_size, run.history[-1]),
    "" if run.is_done else f": above --tol={config.tol:g}",
  )
  return Steps(run.words_KD, report)


def _run_steps(config, reader, num_first: int, run, save_fn):
  """Saves once a minute, and when it is interrupted."""
  numbers = range(num_first + run.num_steps, num_first + config.max_steps)
  saved = time.perf_counter()
  stream = batches.prefetch(reader, numbers, depth=minibatch_kmeans.CHUNK)
  try:
    with progress_bar(
      config.max_steps, "mini-batches", unit="step", start=run.num_steps
    ) as bar:
      while not run.is_done and run.num_steps < config.max_steps:
        chunk = list(itertools.islice(stream, minibatch_kmeans.CHUNK))
        run = minibatch_training.advance(_RULE, run, chunk, tol=config.tol)
        bar.update(run.num_steps - bar.n)
        bar.set_postfix_str(f"changed labels {run.history[-1]:.3g}")
        if time.perf_counter() - saved >= cli.SAVE_SECONDS:
          save_fn(minibatch_training.pack(run))
          saved = time.perf_counter()
  except KeyboardInterrupt:
    save_fn(minibatch_training.pack(run))
    logging.warning("Saved %d steps.", run.num_steps)
    raise
  finally:
    stream.close()
  return run
