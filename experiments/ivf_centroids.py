r"""Finds the centroids of inverted lists: k-means over a file of vectors.

  vqjax ivf_centroids --data=learn.bvecs \
      --num_centroids=1024 --output=centroids.npy
  vqjax ivf_centroids --data=learn.bvecs \
      --num_vectors=50000000 --num_centroids=1048576 --num_iterations=100 \
      --output=centroids.npy
  vqjax ivf_centroids --data=huge.fbin --minibatch \
      --num_centroids=4096 --output=centroids.npy
  ... --multihost                                on every host, for its share

Every iteration reads the file in blocks. Memory is 24 bytes for each number of
a centroid, at most 16 for each vector, and on accelerators up to twice 4 GiB of
distances; the vectors themselves are never held. docs/ivf.md has times. Ctrl-C
or SIGTERM saves, as does each iteration that ends a minute after the last save.
The same command run again resumes, to the same centroids, or says that all is
done.

The default start is in two levels: sqrt(K) coarse clusters of a sample, then
k-means in each of them with a share of the K centroids in proportion to its
vectors. It costs less than one iteration and saves several.

--minibatch begins with steps on small batches instead, until few vectors change
their list, and makes one iteration over the file afterwards: fewer passes over
a file that is larger than memory. The rules are those of
vqjax.fast_ivf.MiniBatchKMeans.

With --multihost every process passes over its share of the vectors, which all
must be able to read; the first one writes. The centroids are those of a single
process up to rounding.

Centroids are float32 `[K, D]` in the units of the data. centroids.npy.json says
what made them, their mean squared error and the sizes of the lists.
"""

import functools
import json
import os
import pathlib
import shlex
import time
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from experiments.lib import cli, minibatch_start, plan, two_level_start
from vqjax import __version__, devices
from vqjax.codecs import kmeans
from vqjax.core import check_range
from vqjax.data import (
  batches,
  datasets,
  files,
  formats,
  json_files,
  numpy_files,
  unit,
)
from vqjax.interop import faiss_io
from vqjax.progress import progress_bar

STARTS = ("two-level", "random")
REQUIRED = ("data", "num_centroids", "output")
OPTIONS = {
  "data": cli.DATA_OPTIONS["data"],
  "num_vectors": cli.Option(
    int, None, "Use only the first vectors, this many."
  ),
  "metric": cli.Option(
    str,
    "l2",
    "cosine for --config.data.metric=cosine: vectors are made of length 1; l2 "
    "or ip takes them as they are.",
  ),
  "num_centroids": cli.Option(
    int, None, "K, lists; at most 1,048,576 and no more than vectors."
  ),
  "num_iterations": cli.Option(
    int,
    None,
    "Passes over the vectors, not counting one to measure the result; 20 if "
    "unset, 1 with --minibatch.",
  ),
  "start": cli.Option(
    str, "two-level", "two-level, or random: K of the vectors."
  ),
  **minibatch_start.OPTIONS,
  "seed": cli.Option(int, 0, "The same seed gives the same centroids."),
  "output": cli.Option(str, None, "File to write, .npy."),
  "overwrite": cli.Option(
    bool, False, "Replace an existing output, and begin anew."
  ),
  "plan": plan.OPTION,
}
_MAX_CENTROIDS = 1 << 20
_ITERATIONS, _ITERATIONS_AFTER_STEPS = 20, 1
_AT_ONCE = 8  # Coarse clusters whose centroids a plan fits.
_BLOCK_DISTANCES = 1 << 33  # Between signs of progress.


class State(NamedTuple):
  """Centroids, and the mean squared error that each iteration began with."""

  words_KD: np.ndarray
  errors: tuple[float, ...]
  steps: dict | None = None  # What is said of mini-batch steps.


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Writes the centroids; returns what is written next to them."""
  vectors = _check(config)
  if config.plan:
    if config.minibatch:
      raise ValueError(
        "--plan measures passes over all vectors: leave --minibatch out."
      )
    stages = plan_stages(
      vectors, config.num_centroids, config.num_iterations, config.start
    )
    num_bytes = 4 * config.num_centroids * vectors.shape[1]
    # A vector's coarse cluster, and its order.
    return plan.report(
      stages,
      rows=len(vectors),
      num_bytes=num_bytes,
      more_bytes=4 * num_bytes + 16 * len(vectors),
    )
  meta = describe(config, vectors)
  checkpoint = checkpoint_path(config.output)
  wanted = meta | {"num_iterations": config.num_iterations}
  made = files.find_made(config.output, wanted, config.overwrite)
  if made:
    checkpoint.unlink(missing_ok=True)
    logging.info("%s is made already.", config.output)
    return made
  state, kept = _find_state(config, checkpoint, meta)
  began = time.perf_counter()
  if state is None:
    state = _start(config, vectors, checkpoint, meta, kept)
    logging.info(
      "%s start: %.1f s.", meta["start"], time.perf_counter() - began
    )
  state, last = _iterate(config, vectors, state, checkpoint, meta)
  seconds = time.perf_counter() - began
  record = _record(config, meta, state, last, seconds)
  if devices.is_first():
    _write(config, checkpoint, state, record)
  return record


def _write(config, checkpoint, state: State, record: dict) -> None:
  """Writes the centroids and what made them, and says so."""
  with files.atomic_output(
    config.output, config.overwrite, description=record
  ) as temporary:
    formats.write_vectors(temporary, state.words_KD)
  checkpoint.unlink(missing_ok=True)
  logging.info(
    "%d centroids in %.1f s, mean squared error %.6g, in %s; what made them in "
    "%s.\n%s\nNext:\n  vqjax train "
    "--config=ivf_qinco2_s --config.data.train=%s "
    "--config.ivf.num_lists=%d --config.ivf.centroids=%s%s",
    *(len(state.words_KD), record["seconds"], record["mean_squared_error"]),
    *(config.output, files.description_path(config.output)),
    _lists_line(record["lists"]),
    *(shlex.quote(config.data), len(state.words_KD)),
    shlex.quote(config.output),
    " --config.data.metric=cosine" if config.metric == "cosine" else "",
  )


def plan_stages(
  vectors, num_centroids: int, num_iterations: int, start: str = "two-level"
) -> list:
  """Measured stages of k-means of these vectors."""
  num, words_KD = len(vectors), batches.subsample(vectors, num_centroids, 0)
  num_groups = round(num_centroids**0.5)
  size, each = num // num_groups, -(-num_centroids // num_groups)

  def groups():
    rng = np.random.default_rng(0)
    with faiss_io.thread_pool() as pool:
      while True:
        at = [np.sort(rng.choice(num, size, False)) for _ in range(_AT_ONCE)]
        fit_fn = functools.partial(
          two_level_start.fit_group, vectors, 0, num_codewords=each
        )
        yield len(list(pool.map(fit_fn, at)))

  steps = _passes(vectors, words_KD)
  stages = [plan.measure("k-means", steps, (num_iterations + 1) * num)]
  if start == "random":
    return stages
  coarse = _passes(vectors, words_KD[:num_groups])
  return [
    plan.measure("start, coarse", coarse, num),
    plan.measure("start, fine", groups(), num_groups),
    *stages,
  ]


def _passes(vectors, words_KD):
  """Compares vectors with codewords, block by block, again and again."""
  assign_fn = kmeans.make_assign_fn(words_KD)
  size = _block_size(len(words_KD))
  while True:
    for start in range(0, len(vectors), size):
      block_ND = vectors[start : start + size]
      kmeans.pass_over(block_ND, words_KD, assign_fn, block_size=size)
      yield len(block_ND)


def _check(config):
  """Opens the vectors; raises before any work if something is wrong."""
  cli.require(config, *REQUIRED)
  if config.start not in STARTS:
    raise ValueError(
      f"--start must be one of {', '.join(STARTS)}; got {config.start!r}."
    )
  if not config.output.endswith(".npy"):
    raise ValueError(f"--output must end in .npy, got {config.output}.")
  files.check_output(config.output, config.overwrite, described=True)
  if config.num_iterations is None:
    config.num_iterations = (
      _ITERATIONS_AFTER_STEPS if config.minibatch else _ITERATIONS
    )
  check_range("--num_iterations", config.num_iterations, 0, 100_000)
  minibatch_start.check(config)
  if config.minibatch and jax.process_count() > 1:
    raise ValueError("--minibatch runs in one process: leave --multihost out.")
  check_range("--seed", config.seed, 0, 2**31 - 1)
  vectors = formats.open_vectors(
    config.data, max_vectors=config.num_vectors, role="--data"
  )
  if config.metric not in datasets.METRICS:
    raise ValueError(
      f"--metric must be one of {', '.join(datasets.METRICS)}, got "
      f"{config.metric!r}."
    )
  if config.metric == "cosine":
    vectors = unit.UnitVectors(vectors)
  num = len(vectors)
  check_range(
    "--num_centroids",
    config.num_centroids,
    1,
    min(num, _MAX_CENTROIDS),
    f"{config.data} has {num} vectors to use, and each list needs one",
  )
  # As many once more for what a stopped run saves.
  num_bytes = 2 * 4 * config.num_centroids * vectors.shape[1]
  files.check_folder(
    pathlib.Path(config.output).parent, num_bytes=num_bytes, name=config.output
  )
  batches.check_training(vectors)
  return vectors


def checkpoint_path(output) -> pathlib.Path:
  """Where a run that was stopped has saved."""
  return pathlib.Path(f"{output}.checkpoint.npz")


def describe(config, vectors) -> dict:
  """What a checkpoint must share with the run that continues it."""
  return {
    "num_centroids": config.num_centroids,
    "num_vectors": len(vectors),
    **files.identify(vectors),
    "seed": config.seed,
    "start": config.start,
    "method": "jax",  # As of files made when there was another.
    **minibatch_start.describe(config),
  }


def _find_state(config, checkpoint: pathlib.Path, meta: dict):
  """The state to resume from, and the steps to resume: None to begin."""
  if not checkpoint.exists() or config.overwrite:
    return None, None
  state, found, kept = _load(checkpoint)
  for name, a, b in files.differences(found, meta):
    raise ValueError(
      f"{checkpoint} is of a run that was stopped, with {name}={a}, now it is "
      f"{b}: resume with the same data and options, or start again with "
      "--overwrite."
    )
  if state is None:
    return None, kept
  wanted = (meta["num_centroids"], meta["dim"])
  if state.words_KD.shape != wanted or not np.isfinite(state.words_KD).all():
    raise ValueError(
      f"{checkpoint} is damaged (its centroids are not {wanted} finite "
      "numbers): begin anew with --overwrite."
    )
  if len(state.errors) > config.num_iterations:
    raise ValueError(
      f"{checkpoint} has done {len(state.errors)} iterations, more than "
      f"--num_iterations={config.num_iterations}."
    )
  logging.info("Resuming after %d iterations.", len(state.errors))
  return state, None


def _load(checkpoint: pathlib.Path):
  """State, description and mini-batch steps of a run that was stopped.

  There is no state if it was stopped in its steps.
  """
  try:
    kept = numpy_files.load_npz(checkpoint)
    found = json_files.parse_json(str(kept["meta"]), "its description")
    if "num_steps" in kept:
      return None, found, kept
    words_KD = np.asarray(kept["words_KD"], np.float32)
    errors = tuple(map(float, kept["errors"]))
    steps = json_files.parse_json(str(kept.get("steps", "{}")), "its steps")
    return State(words_KD, errors, steps or None), found, None
  except (ValueError, TypeError, KeyError, OSError) as error:
    raise ValueError(
      f"{checkpoint} is damaged ({error}): begin anew with --overwrite."
    ) from error


def _save(checkpoint: pathlib.Path, state: State, meta: dict) -> None:
  _save_arrays(
    checkpoint,
    {
      "words_KD": state.words_KD,
      "errors": np.array(state.errors, np.float64),
      "steps": json.dumps(state.steps or {}),
    },
    meta,
  )


def _save_arrays(checkpoint: pathlib.Path, arrays: dict, meta: dict) -> None:
  if not devices.is_first():
    return
  with files.atomic_output(checkpoint, overwrite=True) as temporary:
    np.savez(temporary, **arrays, meta=json.dumps(meta))


def _iterate(config, vectors, state: State, checkpoint, meta):
  """Runs the iterations left, and one more to measure what they gave."""
  num, own = len(vectors), len(devices.process_rows(len(vectors)))
  begin, total = len(state.errors) * own, (config.num_iterations + 1) * own
  saved = time.perf_counter()
  try:
    with progress_bar(total, "k-means", start=begin) as bar:
      while True:
        before = len(state.errors) * own
        step = kmeans.pass_over(
          vectors,
          state.words_KD,
          kmeans.make_assign_fn(state.words_KD),
          block_size=_block_size(config.num_centroids),
          progress=lambda done, _, at=before: bar.update(at + done - bar.n),
          is_shared=own < num,
        )
        errors = (*state.errors, float(step.objectives[0]) / num)
        bar.set_postfix_str(f"iteration {len(errors)}, mse {errors[-1]:.6g}")
        if len(errors) > config.num_iterations:
          return state._replace(errors=errors), step
        state = state._replace(words_KD=step.words_KD, errors=errors)
        if time.perf_counter() - saved >= cli.SAVE_SECONDS:
          _save(checkpoint, state, meta)
          saved = time.perf_counter()
  except KeyboardInterrupt:
    _save(checkpoint, state, meta)
    logging.warning(
      "Saved %d of %d iterations in %s.",
      *(len(state.errors), config.num_iterations, checkpoint),
    )
    raise


def _block_size(num_codewords: int) -> int:
  """Vectors at a time: seconds, so that progress is seen and Ctrl-C heard."""
  return int(np.clip(_BLOCK_DISTANCES // num_codewords, 1, 65536))


def _start(config, vectors, checkpoint, meta, kept) -> State:
  """Centroids to begin the iterations with."""
  args = vectors, config.num_centroids, config.seed
  if not config.minibatch:
    is_random = config.start == "random"
    start_fn = _start_random if is_random else two_level_start.run
    return State(start_fn(*args), ())
  save_fn = functools.partial(_save_arrays, checkpoint, meta=meta)
  try:
    words_KD, report = minibatch_start.run(config, vectors, kept, save_fn)
  except (ValueError, KeyError, IndexError) as error:
    if kept is None:
      raise
    raise ValueError(
      f"{checkpoint} is damaged ({error}): begin anew with --overwrite."
    ) from error
  return State(words_KD, (), report)


def _start_random(vectors, num_codewords: int, seed: int) -> np.ndarray:
  return batches.subsample(vectors, num_codewords, seed)


def _record(config, meta, state: State, last, seconds: float) -> dict:
  """What is written next to the centroids."""
  counts_K = last.counts_K
  return {
    "format": "vqjax centroids",
    "shape": list(state.words_KD.shape),
    "source": os.path.abspath(config.data),
    **meta,
    "num_iterations": len(state.errors) - 1,
    **(state.steps or {}),
    "mean_squared_error": state.errors[-1],
    "mean_squared_errors": list(state.errors),  # Before each iteration.
    "lists": {
      "smallest": int(counts_K.min()),
      "largest": int(counts_K.max()),
      "empty": int((counts_K == 0).sum()),
      # Vectors compared in one list, relative to lists of equal sizes.
      "imbalance": float(
        len(counts_K) * np.sum((counts_K / counts_K.sum()) ** 2)
      ),
    },
    "seconds": round(seconds, 1),
    "vqjax_version": __version__,
  }


def _lists_line(lists: dict) -> str:
  return (
    f"Lists of {lists['smallest']} to {lists['largest']} vectors, "
    f"{lists['empty']} empty, imbalance {lists['imbalance']:.2f}."
  )


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED, multihost=True)
