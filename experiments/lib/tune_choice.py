"""What tune recommends: a choice, its configuration and its commands."""

import json
import os
import pathlib
import shlex
from typing import NamedTuple

from experiments.lib import tune_search
from experiments.lib.tune_codecs import Candidate, K
from vqjax import index_build

_RECALL = f"knn_recall@{K}"
_SAME = 0.01  # Errors that differ by less are the same,
_SAME_RECALL = 0.005  # and so are such recalls.
_SMALL = 50_000  # Training vectors, which a network may learn by heart.


class Asked(NamedTuple):
  """Limits of the flags; None for none."""

  recall: float | None
  memory: float | None  # Bytes of all vectors.
  latency: float | None  # Milliseconds.

  @property
  def is_search(self) -> bool:
    """Whether there is anything to search for."""
    return any(limit is not None for limit in self)


class Choice(NamedTuple):
  """A codec, and a search by it if there was anything to search for."""

  codec: str
  why: str
  series: dict | None = None
  point: dict | None = None


def of_codecs(rows: list[dict]) -> Choice:
  """Returns the codec of least error; of nearly equal ones the fastest."""
  rows = [row for row in rows if "mse" in row]
  least = min(row["mse"] for row in rows)
  near = [row for row in rows if row["mse"] <= (1 + _SAME) * least]
  best = min(near, key=lambda row: row["encode_us"])
  why = "it has the least squared error"
  if len(near) > 1:
    why = "it encodes fastest of those within 1 % of the least squared error"
  return Choice(best["codec"], why)


def of_searches(
  all_series: list[dict], asked: Asked, num_vectors: int
) -> Choice:
  """Returns the best search within the limits.

  With a recall that is the fastest one that reaches it, else the one of most
  recall, the fastest of nearly equal ones.

  Raises:
    ValueError: None is within the limits.
  """
  bytes_of = lambda s: tune_search.bytes_of_all(
    s["memory"], s["num_lists"], num_vectors
  )
  fits = [
    s for s in all_series if bytes_of(s) <= (asked.memory or float("inf"))
  ]
  if not fits:
    least = min(all_series, key=bytes_of)
    raise ValueError(
      f"Nothing that was tried takes at most {asked.memory:,.0f} bytes "
      f"(--memory) for {num_vectors:,} vectors; the least is "
      f"{bytes_of(least):,} of {tune_search.label(least)}. Lower --bytes, or "
      "raise --memory."
    )
  quick = pairs = [(s, p) for s in fits for p in s["points"]]
  if asked.latency is not None:
    pairs = [pair for pair in pairs if "ms" in pair[1]]
    quick = [pair for pair in pairs if pair[1]["ms"] <= asked.latency]
  if not quick:
    raise ValueError(
      f"No search answers a query in {asked.latency:g} ms (--latency); the "
      f"fastest takes {min(p['ms'] for _, p in pairs):g} ms on this machine."
    )
  recall_of = lambda pair: pair[1]["recall"][_RECALL]
  us_of = lambda pair: pair[1]["us"]
  top = max(map(recall_of, quick))
  if asked.recall is not None and top >= asked.recall:
    series, point = min(
      (pair for pair in quick if recall_of(pair) >= asked.recall), key=us_of
    )
    why = f"it reaches {_RECALL} {asked.recall:g} in the fewest microseconds"
    return Choice(series["codec"], why, series, point)
  near = [pair for pair in quick if recall_of(pair) >= top - _SAME_RECALL]
  series, point = min(near, key=us_of)
  why = f"it has the most {_RECALL}, {point['recall'][_RECALL]:.3f}"
  if asked.recall is not None:
    why = (
      f"nothing within the limits reaches {_RECALL} {asked.recall:g}; {why}. "
      f"{_remedy(all_series, asked, bytes_of)}"
    )
  return Choice(series["codec"], why, series, point)


def _remedy(all_series, asked: Asked, bytes_of) -> str:
  """Says what would reach the recall."""
  reach = lambda p: p["recall"][_RECALL] >= asked.recall
  enough = [s for s in all_series if any(map(reach, s["points"]))]
  if enough:
    least = min(enough, key=bytes_of)
    return (
      f"{tune_search.label(least)} reaches it, in "
      f"{bytes_of(least):,} bytes of memory"
    )
  return (
    "More --bytes help; so do whole vectors, if they fit into memory: vqjax "
    "fast_ivf, vqjax hakes"
  )


def config_text(config, candidate: Candidate, num_vectors: int) -> str:
  """Returns the file of the configuration, for `vqjax train --config=`."""
  values = {"data.train": os.path.abspath(config.data)}
  if config.queries:
    values["data.base"] = values["data.train"]
    values["data.queries"] = os.path.abspath(config.queries)
  values["data.metric"] = config.metric
  values |= {f"model.{name}": n for name, n in candidate.model.items()}
  if candidate.config == "opq":
    values["model.opq"] = True
  if candidate.is_learned and num_vectors < _SMALL:
    values["train.early_stop"] = 8
  values["seed"] = config.seed
  module = "pq" if candidate.config == "opq" else candidate.config
  lines = [f"  config.{k} = {_text(value)}" for k, value in values.items()]
  folder = shlex.quote(str(pathlib.Path(config.output)))
  return "\n".join(
    [
      f'"""{candidate.name}, {config.bytes} bytes: recommended by vqjax tune.',
      "",
      f"  vqjax train --config={folder}/config.py --workdir={folder}/run",
      '"""',
      "",
      f"from configs import {module}",
      "",
      "",
      'def get_config(arg: str = ""):',
      f"  config = {module}.get_config(arg)",
      *lines,
      "  return config",
      "",
    ]
  )


def _text(value) -> str:
  """The value in Python."""
  return json.dumps(value) if isinstance(value, str) else repr(value)


def commands(config, choice: Choice, num_vectors: int) -> list[str]:
  """Returns the commands that make what is recommended, of the whole file."""
  at = lambda name: str(pathlib.Path(config.output, name))
  data, run = f"--data={config.data}", f"--codec={at('run')}"
  queries = [f"--queries={config.queries}"] if config.queries else []
  line = lambda *words: f"vqjax {shlex.join(words)}"
  found = [
    line("train", f"--config={at('config.py')}", f"--workdir={at('run')}")
  ]
  if choice.point is None:
    which = [data, *queries] if queries else ["--split=validation"]
    return [*found, line("evaluate", run, *which)]
  lists = index_build.default_lists(num_vectors)
  metric = [] if config.metric == "l2" else [f"--metric={config.metric}"]
  found.append(
    line(
      *("build_index", run, data, f"--num_lists={lists}", *metric),
      f"--output={at('index')}",
    )
  )
  more = []
  if kind := choice.series["refiner"]:
    file = at("refiner.safetensors")
    index = at("index/index.faiss")
    found.append(
      line(
        *("refiner", f"--kind={kind}", f"--index={index}", data),
        f"--output={file}",
      )
    )
    more = [f"--refiner={file}"]
  if not queries:
    return found
  setting = choice.point["setting"]
  nprobe = scaled_probes(setting["nprobe"], choice.series["num_lists"], lists)
  near = sorted({max(nprobe // 2, 1), nprobe, min(2 * nprobe, lists)})
  more += [f"--nprobe={','.join(map(str, near))}"]
  more += [f"--{k}={setting[k]}" for k in setting if k != "nprobe"]
  search = ["search", f"--index={at('index')}", data, *queries, *more]
  return [*found, line(*search, f"--output={at('search.json')}")]


def scaled_probes(nprobe: int, num_lists: int, all_lists: int) -> int:
  """Returns the same share of more lists, at least one."""
  return max(1, min(round(nprobe * all_lists / num_lists), all_lists))
