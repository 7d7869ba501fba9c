r"""Finds the true nearest neighbours of queries, by exact search.

  vqjax ground_truth --data=base.npy --queries=query.npy --output=truth.npy

truth.npy, or a .ivecs or .ibin, holds for each query the rows of its --k
nearest vectors, nearest first. Of equally near ones the lower row comes first.
The base is read once and never held. search, evaluate and others take the file
as --groundtruth.

Shards of a large base can be searched at the same time, in truth.npy.parts,
counted from 0. The second command makes what is missing, and merges all into
the file that one process makes, to the last bit:

  ... --output=truth.npy --shard=3/16          one, as of sbatch --array=0-15
  ... --output=truth.npy --shards=16           all, and merge
  ... --output=truth.npy --shards=16 --engine=ray --workers=4         by Ray

The same command run again says that all is done, or makes what is left.
"""

import shlex
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from absl import logging

from experiments.lib import cli, engine, parts
from vqjax import ground_truth
from vqjax.core import check_range
from vqjax.data import batches, datasets, files, formats

REQUIRED = ("data", "queries", "output")
OPTIONS = {
  "data": cli.DATA_OPTIONS["data"],
  "queries": cli.Option(str, None, "Queries, of the same dimension."),
  "k": cli.Option(int, 100, "Neighbours of a query."),
  "metric": cli.Option(str, "l2", "l2, ip or cosine."),
  "num_vectors": cli.Option(
    int, None, "Use only this many of --data, the first."
  ),
  "output": cli.Option(str, None, "File to write: .npy, .ivecs or .ibin."),
  **engine.SHARD_OPTIONS,
  **engine.OPTIONS,
  "overwrite": cli.Option(bool, False, "Replace an existing output file."),
}
_SUFFIXES = (".npy", ".ivecs", ".ibin")
_KIND = {"format": "vqjax ground truth", "version": 1}


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Writes the ids; returns where they are."""
  cli.require(config, *REQUIRED)
  engine.check(config)
  num_shards, mine = engine.share(config)
  if not config.output.endswith(_SUFFIXES):
    raise ValueError(
      f"--output must end in {', '.join(_SUFFIXES)}; got {config.output}."
    )
  files.check_output(config.output, config.overwrite, described=True)
  job = _open(config)
  shape = job.info["shape"]
  if files.find_made(config.output, job.info, config.overwrite):
    logging.info("%s is made already.", config.output)
    return {"output": config.output, "shape": tuple(shape)}
  if num_shards:
    of_job = _parts(config, job, num_shards)
    make_fn = _maker(job, of_job)
    of_job.make("ground_truth", config, mine, make_fn, verb="exact search")
    if config.shard:
      return {"output": str(of_job.path(mine[0]))}
    try:
      found = ground_truth.merge(map(_read, of_job.paths), shape[1])
    except FileNotFoundError:  # Unless another process has merged them.
      if not files.find_made(config.output, job.info):
        raise
      logging.info("%s is made already, by another process.", config.output)
      return {"output": config.output, "shape": tuple(shape)}
  else:
    num = len(job.base)
    with cli.progress(num, "exact search") as done:
      found = job.search_fn(range(num), progress=done)
  ids_QK = found.ids_QK
  if job.info["num_rows"] < 2**31:
    ids_QK = ids_QK.astype(np.int32)
  formats.write_vectors(
    *(config.output, ids_QK),
    overwrite=config.overwrite,
    description=dict(job.info),
  )
  if num_shards:
    of_job.remove()
  logging.info(
    "%d neighbours of each of %d queries among %d vectors, in %s.\nNext:\n"
    "  vqjax search --index=INDEX --data=%s --queries=%s --groundtruth=%s",
    *(shape[1], shape[0], job.info["num_rows"], config.output),
    *map(shlex.quote, (config.data, config.queries, config.output)),
  )
  return {"output": config.output, "shape": tuple(shape)}


class _Job(NamedTuple):
  """A search that is to be done."""

  base: object  # Open vectors.
  info: dict  # Description of the ids.
  search_fn: Callable  # (rows, progress) -> Nearest.


def _open(config) -> _Job:
  dataset = datasets.resolve(
    base=config.data, queries=config.queries, metric=config.metric
  )
  base = datasets.open_split(dataset, "base", max_vectors=config.num_vectors)
  queries = datasets.open_split(dataset, "queries")
  check_range("--k", config.k, 1, len(base), "vectors of --data")
  xq_QD = batches.read_rows(queries, np.arange(len(queries)))
  info = {
    **_KIND,
    "shape": [len(xq_QD), config.k],
    "num_rows": len(base),
    "metric": config.metric,
    "data": files.identify(base),
    "queries": files.identify(queries),
  }
  search_fn = lambda rows, progress: ground_truth.search(
    xq_QD, base, config.k, config.metric, rows=rows, progress=progress
  )
  return _Job(base, info, search_fn)


def _parts(config, job: _Job, num: int) -> parts.Parts:
  return parts.Parts(config.output, ".npz", job.info, num)


def open_parts(config) -> Callable:
  """Returns `make(shard, report)`, which searches a shard of the base."""
  job = _open(config)
  return _maker(job, _parts(config, job, config.shards))


def _maker(job: _Job, of_job: parts.Parts) -> Callable:
  def make(shard: int, report: Callable) -> None:
    count = lambda num, _: report(num)
    found = job.search_fn(of_job.rows(shard), progress=count)
    path, info = of_job.path(shard), of_job.info_of(shard)
    with files.atomic_output(path, overwrite=True, description=info) as file:
      np.savez(file, **found._asdict())

  return make


def _read(path) -> ground_truth.Nearest:
  with np.load(path) as found:
    return ground_truth.Nearest(**found)


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
