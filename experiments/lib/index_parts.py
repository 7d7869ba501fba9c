"""Parts of an index: one file for each shard of the rows, and their merge."""

import pathlib
import shutil
from collections.abc import Callable

from absl import logging

from experiments.lib import codecs, engine
from vqjax.data import codes, files
from vqjax.interop import faiss_ivf

_KEPT = (  # In a description, of the parts that are merged.
  *("codec", "codec_fingerprint", "decoders_fingerprint", "is_cosine"),
  *("data", "num_rows", "rows", "ids_checksum"),
)


def folder(output) -> pathlib.Path:
  """Returns where the parts of an index lie until they are merged."""
  return pathlib.Path(f"{files.user_path(output)}.parts")


def path(output, num: int, shard: int) -> pathlib.Path:
  """Returns the file of part `shard` of `num`."""
  return folder(output) / f"part-{shard:05d}-of-{num:05d}.faiss"


def rows_of(info: dict, num: int, shard: int) -> range:
  """Returns the rows of a part of the index that `info` describes."""
  return codes.shard_rows(info["num_rows"], num, shard)


def _info_of(info: dict, num: int, shard: int) -> dict:
  rows = rows_of(info, num, shard)
  return {**info, "coarse": "flat", "rows": [[rows.start, rows.stop]]}


def make(config, job, num: int, mine: list[int]) -> list[pathlib.Path]:
  """Makes those parts of a build that are missing; returns the files of all.

  `job` is what `experiments.build_index` prepares.
  """
  output, info = config.output, job.info
  todo = unfinished(output, info, num, mine)
  if len(todo) < len(mine):
    done = len(mine) - len(todo)
    logging.info("%d of the %d shards are made already.", done, len(mine))
  sizes = {i: len(rows_of(info, num, i)) for i in todo}
  if config.engine and todo:
    # What auto means here, not on the worker.
    dtype = {"dtype": codecs.product_dtype(config.dtype)} if config.data else {}
    engine.run(
      *("build_index", {**config, **dtype}, sizes),
      verb="add",
      uses_gpus=bool(config.data),
    )
    engine.check_seen(folder(output), unfinished(output, info, num, todo))
  elif todo:
    engine.make_here(maker(output, info, num, job.part_fn), sizes, verb="add")
  if config.shard:
    logging.info(
      "Shard %s is in %s. When all are there, merge them by the same command "
      "with --shards=%d instead of --shard.",
      *(config.shard, folder(output), num),
    )
  return [path(output, num, i) for i in range(num)]


def unfinished(output, info: dict, num: int, shards) -> list[int]:
  """Returns which of `shards` are still to be made.

  Raises:
    ValueError: There are more shards than rows, or a part is of another index.
  """
  codes.check_num_shards(num, info["num_rows"])
  todo = []
  for shard in shards:
    try:
      made = files.find_made(
        path(output, num, shard), _info_of(info, num, shard)
      )
    except ValueError:  # It is damaged.
      path(output, num, shard).unlink()
      made = None
    except FileExistsError as error:
      raise ValueError(
        f"{folder(output)} has parts of another index; remove the folder, or "
        f"choose another --output. {error}"
      ) from error
    todo += [] if made else [shard]
  return todo


def maker(output, info: dict, num: int, part_fn: Callable) -> Callable:
  """Returns `make(shard, report)`, which writes the part of `part_fn`."""

  def make(shard: int, report: Callable) -> None:
    part = part_fn(rows_of(info, num, shard), report)
    about = _info_of(info, num, shard)
    faiss_ivf.save(part, path(output, num, shard), about, overwrite=True)

  return make


def remove(output) -> None:
  """Removes the parts of an index that is merged."""
  shutil.rmtree(folder(output), ignore_errors=True)


def join_descriptions(paths) -> dict:
  """The description of what the parts become together.

  Raises:
    ValueError: They do not fit each other, or rows are in two of them.
  """
  infos = []
  for path in paths:
    found = faiss_ivf.load(path, mmap=True).info
    if not found.get("rows"):
      raise ValueError(
        f"{files.description_path(path)} does not say which rows {path} has, "
        "so it cannot be merged: make it with vqjax build_index --rows."
      )
    info = {name: found.get(name) for name in _KEPT}
    shared = [{**x, "rows": None} for x in (info, *infos[:1])]
    files.check_same(path, shared[0], shared[-1])
    infos.append(info)
  rows = _join([pair for info in infos for pair in info["rows"]])
  return {**infos[0], "rows": rows}


def _join(rows) -> list[list[int]]:
  """Joins pairs (first, stop) that touch; raises if they overlap."""
  joined = []
  for first, stop in sorted(rows):
    if joined and first < joined[-1][1]:
      raise ValueError(
        f"Rows {first}:{min(stop, joined[-1][1])} are in two of the parts; "
        "merge parts of different --rows."
      )
    if joined and first == joined[-1][1]:
      joined[-1][1] = stop
    else:
      joined.append([first, stop])
  return joined
