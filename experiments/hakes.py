r"""Learns what an IVF-PQ index is searched by, from its own neighbours.

  python -m experiments.hakes --config=configs/hakes.py
  python -m experiments.hakes --config=configs/hakes.py:smoke
  python -m experiments.hakes --config=configs/hakes.py --workdir=runs/mine \
      --config.data.base=base.npy --config.data.metric=ip \
      --config.data.train_queries=train.npy --config.data.queries=q.npy \
      --config.data.groundtruth=gt.npy

Stages, each of which can be run alone by --stage=NAME once those before it
have: base, samples, learn, centroids, index, evaluate. A stage whose output is
in the run folder is skipped; delete the output to have it again. Ctrl-C saves;
the same command goes on. index.faiss is for stock faiss.
"""

import json
import pathlib

from absl import logging
from ml_collections import config_dict

from experiments.lib import cli, hakes_data, hakes_evaluate, hakes_stages
from vqjax.data import files

STAGES = {  # Name to function and output.
  "base": (hakes_stages.base, "findex.bin"),
  "samples": (hakes_stages.samples, "samples.npz"),
  "learn": (hakes_stages.learn, "learned.bin"),
  "centroids": (hakes_stages.centroids, "uindex.bin"),
  "index": (hakes_stages.index, "index.faiss"),
  "evaluate": (hakes_evaluate.evaluate, "evaluation.json"),
}


def run(
  config: config_dict.ConfigDict, workdir: str, *, stage: str | None = None
) -> dict | None:
  """Runs all stages or one; returns the evaluation, None when interrupted.

  Where there is nothing to evaluate, or not yet, the result is empty.
  """
  if stage is not None and stage not in STAGES:
    raise ValueError(
      f"--stage must be one of {', '.join(STAGES)}, got {stage!r}."
    )
  cli.keep_compiled()
  workdir = pathlib.Path(workdir)
  data = hakes_data.open_data(config)
  _prepare(config, workdir)
  logging.info(
    "%s: %d vectors of %d dimensions.", data.name, len(data.base), data.dim
  )
  names = list(STAGES)
  for name in names if stage is None else [stage]:
    stage_fn, output = STAGES[name]
    if (workdir / output).exists():
      logging.info("%s: %s is there.", name, workdir / output)
      continue
    for earlier in names[: names.index(name)]:
      needed = workdir / STAGES[earlier][1]
      if not needed.exists():
        raise ValueError(
          f"Stage {name} needs {needed}; run --stage={earlier} first."
        )
    logging.info("Stage %s.", name)
    if not stage_fn(config, data, workdir):
      logging.warning("Stopped. To go on, run the same command again.")
      return None
  evaluation = workdir / STAGES["evaluate"][1]
  return json.loads(evaluation.read_text()) if evaluation.exists() else {}


def _prepare(config, workdir: pathlib.Path) -> None:
  """Writes config.json; refuses to mix two runs in one folder.

  How to evaluate may change: then the evaluation is done again.
  """
  file, new = workdir / "config.json", json.loads(config.to_json_best_effort())
  if file.exists():
    old = json.loads(file.read_text())
    for group in sorted(set(old) | set(new)):
      if group != "evaluate":
        _check_same(old.get(group), new.get(group), group, workdir)
    if old == new:
      return
    (workdir / STAGES["evaluate"][1]).unlink(missing_ok=True)
  with files.atomic_output(file, overwrite=True) as temporary:
    pathlib.Path(temporary).write_text(json.dumps(new, indent=2))


def _check_same(old, new, name: str, workdir) -> None:
  if isinstance(old, dict) and isinstance(new, dict):
    for key in sorted(set(old) | set(new)):
      _check_same(old.get(key), new.get(key), f"{name}.{key}", workdir)
  elif old != new:
    raise ValueError(
      f"The run in {workdir} was started with {name}={old}, now it is {new}. "
      "Go on with the same configuration, or choose another --workdir."
    )


if __name__ == "__main__":
  stage_help = f"One of {', '.join(STAGES)}; all if unset."
  cli.run_config(
    run,
    {"stage": cli.Option(str, None, stage_help)},
    "Name or file of a configuration: hakes[:smoke|:published], ./mine.py.",
  )
