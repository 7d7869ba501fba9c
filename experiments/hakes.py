r"""Trains HAKES: learns the query side of an IVF-PQ index from neighbours.

  vqjax hakes --config=hakes
  vqjax hakes --config=hakes:smoke
  vqjax hakes --config=hakes --workdir=runs/mine \
      --config.data.base=base.npy --config.data.metric=ip \
      --config.data.train_queries=train.npy --config.data.queries=q.npy \
      --config.data.groundtruth=gt.npy

The stages are base, samples, learn, centroids, index and evaluate; --stage=NAME
runs one alone, after those before it. A stage whose output is in the run folder
is skipped; delete the output to run it again. Ctrl-C saves; the same command
resumes. Stock faiss searches index.faiss.
"""

import json
import pathlib

from absl import logging
from ml_collections import config_dict

from experiments.lib import (
  cli,
  hakes_data,
  hakes_evaluate,
  hakes_stages,
  run_folder,
)
from vqjax.training import writers

STAGES = {  # Name to function and output.
  "base": (hakes_stages.base, "findex.bin"),
  "samples": (hakes_stages.samples, "samples.npz"),
  "learn": (hakes_stages.learn, "learned.bin"),
  "centroids": (hakes_stages.centroids, "uindex.bin"),
  "index": (hakes_stages.index, "index.faiss"),
  "evaluate": (hakes_evaluate.evaluate, "evaluation.json"),
}
# Settings that only the last stage depends on.
_OF_EVALUATION = (
  *("evaluate", "derived.queries", "derived.groundtruth"),
  *("data.num_queries", "data.groundtruth_dim"),
)


def run(
  config: config_dict.ConfigDict | str, workdir, *, stage: str | None = None
) -> dict | None:
  """Runs all stages or one; returns the evaluation, None when interrupted.

  If there is nothing to evaluate yet, the result is empty.

  Args:
    config: A configuration, or its name or file, as --config takes it.
    workdir: The run folder.
    stage: One of `STAGES`; all if None.
  """
  config = cli.config_of(config)
  if stage is not None and stage not in STAGES:
    raise ValueError(
      f"--stage must be one of {', '.join(STAGES)}, got {stage!r}."
    )
  writers.check_tracker(config.train.get("tracker", "none"))
  cli.keep_compiled()
  workdir = pathlib.Path(workdir)
  data = hakes_data.open_data(config)
  with run_folder.locked(workdir):
    _prepare(config, data, workdir)
    logging.info(
      "%s: %d vectors of %d dimensions.", data.name, len(data.base), data.dim
    )
    for name in list(STAGES) if stage is None else [stage]:
      if not _run_stage(name, config, data, workdir):
        logging.warning("Stopped. Run the same command again to resume.")
        return None
    return _read_evaluation(workdir) or {}


def _run_stage(name: str, config, data, workdir: pathlib.Path) -> bool:
  """Runs a stage unless its output is there; False when interrupted."""
  stage_fn, output = STAGES[name]
  path, names = workdir / output, list(STAGES)
  is_there = path.exists()
  if name == "evaluate":
    is_there = _read_evaluation(workdir) is not None
  if is_there:
    logging.info("%s: %s is there.", name, path)
    return True
  for earlier in names[: names.index(name)]:
    needed = workdir / STAGES[earlier][1]
    if not needed.exists():
      raise ValueError(
        f"Stage {name} needs {needed}; run --stage={earlier} first."
      )
  logging.info("Stage %s.", name)
  return stage_fn(config, data, workdir)


def _read_evaluation(workdir: pathlib.Path) -> dict | None:
  """The evaluation; None if it is not there, or damaged."""
  path = workdir / STAGES["evaluate"][1]
  if not path.exists():
    return None
  try:
    return run_folder.read_json(path, "It is made again.")
  except ValueError as error:
    logging.warning("%s", error)
    return None


def _prepare(config, data, workdir: pathlib.Path) -> None:
  """Writes config.json; refuses to mix two runs in one folder.

  How to evaluate, and by which queries, may change: then the evaluation is
  done again.
  """
  new = json.loads(config.to_json_best_effort())
  new["derived"] = hakes_data.identify(config, data)
  if (old := run_folder.read_config(workdir)) is not None:
    train = old.get("train", {})
    if "stop_patience" in train:  # Its name in an earlier version.
      train["early_stop"] = train.pop("stop_patience")
    found = run_folder.differences(old, new)
    if "derived" not in old:  # Of an earlier version.
      run_folder.take(found, "derived")
    run_folder.take(found, *hakes_data.FREE)
    has_changed = any(name.startswith(_OF_EVALUATION) for name in found)
    run_folder.take(found, *_OF_EVALUATION)
    run_folder.refuse(workdir, found, hakes_data.SAYS)
    if has_changed:
      (workdir / STAGES["evaluate"][1]).unlink(missing_ok=True)
  run_folder.write_config(workdir, new)


if __name__ == "__main__":
  stage_help = f"One of {', '.join(STAGES)}; all if unset."
  cli.run_config(
    run,
    {"stage": cli.Option(str, None, stage_help)},
    "Name or file of a configuration: hakes[:smoke|:published], ./mine.py.",
  )
