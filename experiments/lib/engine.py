"""Shards of a command, made here or by the workers of an engine.

A command that can be cut has `open_parts(config)`. It opens codec and data, and
returns `make(shard, report)`, which writes one shard. A worker opens them once.
"""

import functools
import os
import re
import socket
from collections.abc import Callable
from typing import NamedTuple

import jax
from absl import logging

from experiments.lib import cli, errors
from vqjax import __version__, shipped
from vqjax.core import check_range
from vqjax.interop import ray_engine

SHARD_OPTIONS = {
  "shards": cli.Option(int, None, "n, number of shards to divide the work by."),
  "shard": cli.Option(
    str, None, "i/n: make only shard i of n; i from 0 to n-1."
  ),
}
OPTIONS = {
  "engine": cli.Option(
    str,
    None,
    "ray: hand the --shards out to workers of Ray, on this host or a cluster "
    "whose hosts see the same files; needs pip install 'vqjax[ray]'.",
  ),
  "address": cli.Option(
    str,
    None,
    "Of a Ray cluster, host:port, or auto for the one of this host. If unset, "
    "RAY_ADDRESS, else Ray is started for this host alone.",
  ),
  "workers": cli.Option(
    int,
    None,
    "Shards that are made at a time with --engine. Each has one GPU, where "
    "there are any, and its share of the cores as threads: two workers on 16 "
    "cores have 8 each. If unset, one for each GPU, else one for each host.",
  ),
  "max_retries": cli.Option(
    int, 3, "How often a shard is made again whose worker was lost."
  ),
}
_MANY = 99_999


class Refusal(NamedTuple):
  """What a worker says to people, instead of its result."""

  text: str


def share(config) -> tuple[int, list[int]]:
  """Number of shards, 0 for none, and the ones of this process."""
  count = jax.process_count()
  if config.shard is None:
    num = config.shards
    if num is None:
      num = count if count > 1 else 0
    else:
      check_range("--shards", num, 1, _MANY)
    return num, list(range(jax.process_index(), num, count))
  if config.shards is not None or count > 1:
    raise ValueError(
      f"--shard={config.shard} makes one shard in a process of its own: leave "
      "--shards and --multihost out."
    )
  match = re.fullmatch(r"(\d+)/(\d+)", config.shard)
  if not match or int(match[2]) < 1:
    raise ValueError(
      "--shard must be i/n, shard i of n counted from 0, as 0/16 to 15/16; got "
      f"{config.shard!r}."
    )
  shard, num = int(match[1]), int(match[2])
  if shard >= num:
    raise ValueError(
      f"--shard must lie between 0/{num} and {num - 1}/{num}: shards are "
      f"counted from 0; got {config.shard}."
    )
  return num, [shard]


def check(config) -> None:
  """Raises ValueError if the flags of the engine do not fit; before JAX starts.

  Whoever hands out the work leaves the memory of GPUs to the workers.
  """
  if config.engine is None:
    for name, option in OPTIONS.items():
      if config[name] != option.default:
        raise ValueError(f"--{name} is for --engine=ray; leave it out.")
    return
  if config.engine != "ray":
    raise ValueError(f"--engine must be ray; got {config.engine!r}.")
  if config.shards is None:
    raise ValueError(
      "--engine=ray hands out shards: give --shards=n, some for each worker, "
      "and leave --shard and --multihost out."
    )
  check_range("--max_retries", config.max_retries, 0, 1000)
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def run(
  command: str, config, sizes: dict[int, int], *, verb: str, uses_gpus: bool
) -> None:
  """Makes shards of a command by the engine of the flags.

  Args:
    command: Its name; the module has `open_parts`.
    config: Its options, a dict; a `dtype` should be said, not auto.
    sizes: `{shard: rows}` of those to be made.
    verb: Of the progress line.
    uses_gpus: Whether the work takes GPUs.

  Raises:
    ValueError: A worker refused its shard; the message is the worker's.
  """
  values = {k: v for k, v in config.items() if k not in OPTIONS}
  work_fn = _make_work_fn(command, os.getcwd(), tuple(sorted(values.items())))
  with ray_engine.connect(config["address"]) as hosts:
    found = ray_engine.share_out(hosts, config["workers"], uses_gpus=uses_gpus)
    logging.info(
      "Ray: %s at a time on %s, each with %s%s; %s to make.",
      *(cli.count(found.workers, "shard"), cli.count(len(hosts), "host")),
      *(cli.count(found.cpus, "thread"), " and a GPU" if found.gpus else ""),
      cli.count(len(sizes), "shard"),
    )
    with cli.progress(sum(sizes.values()), verb) as done:
      ray_engine.run(
        *(work_fn, sizes, found),
        max_retries=config["max_retries"],
        progress=done,
        take_fn=_take,
      )


def make_here(make: Callable, sizes: dict[int, int], *, verb: str) -> None:
  """Makes shards in this process, one after the other."""
  total, before = sum(sizes.values()), 0
  with cli.progress(total, verb) as done:
    for shard, size in sizes.items():
      make(shard, lambda num, before=before: done(before + num, total))
      before += size


def check_seen(folder, missing) -> None:
  """Raises OSError if shards that workers made are not seen from here."""
  if missing:
    raise FileNotFoundError(
      f"{cli.count(len(missing), 'shard')} that workers made cannot be seen in "
      f"{folder} from here; give --output in a folder that all hosts share."
    )


def _take(shard: int, result) -> None:
  if isinstance(result, Refusal):
    raise ValueError(f"Shard {shard}: {result.text}")


def _make_work_fn(command: str, folder: str, items) -> Callable:
  """Returns `(shard, report) -> None | Refusal` for another process.

  As a function inside of another it travels whole: in a wheel `experiments` is
  not to be found by that name before vqjax has put it there.
  """
  version = __version__

  def work(shard, report):
    from vqjax import shipped

    shipped.import_experiments()
    from experiments.lib import engine

    return engine.make_part(version, command, folder, items, shard, report)

  return work


def make_part(version: str, command: str, folder: str, items, shard, report):
  """Makes a shard, in a worker; returns None, or what people are to know."""
  try:
    _check_host(version, folder)
    os.chdir(folder)
    _opened(command, items)(shard, report)
  except Exception as error:
    if errors.is_for_user(error):
      return Refusal(str(error) or "There is not enough memory.")
    raise
  return None


def _check_host(version: str, folder: str) -> None:
  """Raises ValueError if this host cannot do the work of another."""
  host = socket.gethostname()
  if version != __version__:
    raise ValueError(
      f"Host {host} has vqjax {__version__}, but {version} is needed; install "
      "the same version on all hosts."
    )
  if not os.path.isdir(folder):
    raise ValueError(
      f"There is no folder {folder} on host {host}; all hosts must see the "
      "same files under the same names."
    )


@functools.lru_cache(maxsize=1)
def _opened(command: str, items) -> Callable:
  module = shipped.import_command(command)
  return module.open_parts(cli.get_config(module.OPTIONS, **dict(items)))
