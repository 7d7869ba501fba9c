"""Shards of one output file: a file for each, until all are merged.

They lie in OUTPUT.parts, each with its description, so that every process knows
what is left to do, whoever made the others.
"""

import contextlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

from absl import logging

from experiments.lib import engine
from vqjax.data import codes, files


class Parts(NamedTuple):
  """The shards of an output."""

  output: str
  suffix: str
  info: dict  # What the description of the output says; num_rows among it.
  num: int

  @property
  def folder(self) -> pathlib.Path:
    """Where they lie."""
    return pathlib.Path(f"{files.user_path(self.output)}.parts")

  @property
  def paths(self) -> list[pathlib.Path]:
    """The files of all."""
    return [self.path(shard) for shard in range(self.num)]

  def path(self, shard: int) -> pathlib.Path:
    """The file of a shard."""
    name = f"part-{shard:05d}-of-{self.num:05d}{self.suffix}"
    return self.folder / name

  def rows(self, shard: int) -> range:
    """The rows of a shard."""
    return codes.shard_rows(self.info["num_rows"], self.num, shard)

  def info_of(self, shard: int) -> dict:
    """What the description of a shard says."""
    rows = self.rows(shard)
    return {**self.info, "rows": [[rows.start, rows.stop]]}

  def unfinished(self, shards) -> list[int]:
    """Returns which of `shards` are still to be made.

    Raises:
      ValueError: A shard would be empty, or a part is of another output.
    """
    codes.check_num_shards(self.num, self.info["num_rows"])
    return [shard for shard in shards if not self._is_made(shard)]

  def _is_made(self, shard: int) -> bool:
    path = self.path(shard)
    try:
      return files.find_made(path, self.info_of(shard)) is not None
    except FileExistsError as error:
      raise ValueError(
        f"{self.folder} has parts of something else: remove the folder, or "
        f"choose another --output. {error}"
      ) from error
    except ValueError:  # It is damaged.
      path.unlink()
      return False

  def make(
    self,
    command: str,
    config,
    mine: list[int],
    make_fn: Callable,
    *,
    verb: str,
    uses_gpus: bool = False,
  ) -> None:
    """Makes those of `mine` that are missing, here or by the engine.

    `make_fn(shard, report)` makes one here; see `engine.run` for the others.
    """
    todo = self.unfinished(mine)
    if len(todo) < len(mine):
      done = len(mine) - len(todo)
      logging.info("%d of the %d shards are made already.", done, len(mine))
    sizes = {shard: len(self.rows(shard)) for shard in todo}
    if config["engine"] and todo:
      engine.run(command, config, sizes, verb=verb, uses_gpus=uses_gpus)
      engine.check_seen(self.folder, self.unfinished(todo))
    elif todo:
      engine.make_here(make_fn, sizes, verb=verb)
    if config["shard"]:
      logging.info(
        "Shard %s is in %s. When all are there, merge them by the same command "
        "with --shards=%d instead of --shard.",
        *(config["shard"], self.folder, self.num),
      )

  def remove(self) -> None:
    """Removes them: they are merged. What else is there stays."""
    with contextlib.suppress(OSError):
      for path in self.folder.glob("part-*-of-*"):
        path.unlink()
      self.folder.rmdir()
