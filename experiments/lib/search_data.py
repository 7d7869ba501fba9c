"""What a search is measured with: queries, true neighbours, baselines."""

from typing import Any, NamedTuple

import numpy as np
from absl import logging

from experiments.lib import cli, codecs, inputs, truth
from vqjax import evaluation
from vqjax.core import check_range, check_shape
from vqjax.data import batches, codes, datasets, files
from vqjax.interop import faiss_baselines
from vqjax.search import pipeline

_BLOCK = 16384
_MAX_TRAIN = 200_000  # IVF-RQ trains half a minute on them, on 2 threads.


class Data(NamedTuple):
  """Queries, their true neighbours, and the base if it is given."""

  xq_QD: np.ndarray
  truth: evaluation.Truth
  base: Any | None  # Open file of as many vectors as are searched.
  metric: str


def open_data(codec, config, path, num_vectors: int, is_of) -> Data:
  """Opens queries and true neighbours among the first `num_vectors`.

  The codes in `path` are of these vectors; `is_of` tells them from others,
  None if unknown.
  """
  dataset = _resolve(codec, config)
  base = None
  if dataset.base:
    base = datasets.open_split(dataset, "base", max_vectors=num_vectors)
    if len(base) < num_vectors:
      raise ValueError(
        f"{dataset.base} has {len(base)} vectors, but {num_vectors} are "
        "indexed; give the base that was encoded as --data."
      )
    inputs.check_data(path, is_of, base)
  opened, sizes = truth.of_dataset(dataset)
  found = evaluation.open_truth(opened, num_vectors, base, sizes)
  return Data(found.xq_QD, found, base, dataset.metric)


def _resolve(codec, config) -> datasets.Dataset:
  """The data of the options, else those that the codec was trained on."""
  if config.queries or config.data or config.groundtruth:
    cli.require(config, "queries")
    dataset = datasets.resolve(
      base=config.data,
      queries=config.queries,
      groundtruth=config.groundtruth,
      metric=codec.info.get("metric") or "l2",
    )
  else:
    dataset = codecs.resolve_data(codec, config, needs_base=False)
  if not dataset.queries:
    raise ValueError(
      "The codec was trained on a file without queries; give --queries=FILE "
      "and --groundtruth=FILE, or --data=BASE to find the true neighbours."
    )
  check_shape(
    "queries", datasets.open_split(dataset, "queries"), (None, codec.dim)
  )
  return dataset


def blocks(vectors, done):
  """Yields blocks of open vectors `[n, D]`."""
  parts = batches.map_blocks(
    lambda x_ND: x_ND, vectors, block_size=_BLOCK, progress=done
  )
  return (x_ND for _, x_ND in parts)


def numbers(config, name: str, low: int, high: int) -> list[int]:
  """Returns values as 0,5,10, rising; those above `high` become it."""
  if config[name] is None:
    return []
  parts = [part.strip() for part in config[name].split(",")]
  if not all(part.isdecimal() and int(part) >= low for part in parts):
    raise ValueError(
      f"--{name} must be numbers from {low} on, as 4,8,16; got "
      f"{config[name]!r}."
    )
  values = sorted({min(int(part), high) for part in parts})
  if max(map(int, parts)) > high:
    logging.info("--%s is cut at %d, the size of the index.", name, high)
  return values


def baseline_names(config, names=faiss_baselines.NAMES) -> list[str]:
  """Returns the baselines asked for, as `names` spells them."""
  known = {name.lower(): name for name in names}
  asked = [name.strip() for name in config.baselines.split(",") if name.strip()]
  unknown = [name for name in asked if name.lower() not in known]
  if unknown:
    raise ValueError(
      f"--baselines may name {', '.join(known.values())}; got "
      f"{', '.join(unknown)}."
    )
  return list(dict.fromkeys(known[name.lower()] for name in asked))


def open_train(codec, config):
  """Opens the vectors that baselines may be trained on, and says how many."""
  if config.train:
    metric = codec.info.get("metric") or "l2"
    dataset = datasets.resolve(train=config.train, metric=metric)
    held_out = 0
  else:
    dataset = codecs.resolve_data(codec, config, needs_base=False)
    if not dataset.train:
      raise ValueError("--train=FILE is needed to train the --baselines.")
    held_out = codec.info.get("data", {}).get("validation_size", 10_000)
  x_ND = datasets.open_split(dataset, "train")
  check_shape("--train", x_ND, (None, codec.dim))
  return x_ND, batches.split(len(x_ND), held_out)[0] if held_out else len(x_ND)


def baselines_of(train, base) -> dict:
  """Returns what tells baselines of these vectors from others."""
  xt_ND, num_rows = train
  return {
    "train": {"num": num_rows, **files.identify(xt_ND)},
    "base": files.identify(base),
  }


def fit_baselines(names, like, train, base) -> dict:
  """Trains and fills them, on the lists of `like`; returns each index.

  A sample of the vectors of `train`, from `open_train`, is trained on.
  """
  found, seconds = {}, {}
  xt_ND = batches.subsample(train[0], _MAX_TRAIN, 0, num_rows=train[1])
  for name in names:
    what = f"train faiss {name} on {len(xt_ND):,} vectors"
    with cli.elapsed(what), cli.timed(seconds, name):
      found[name] = faiss_baselines.fit(name, like, xt_ND)
    with cli.progress(len(base), f"add to {name}") as done:
      faiss_baselines.add(found[name], blocks(base, done))
    logging.info("Trained %s in %.1f s.", name, seconds[name])
  return found


def baseline_fn(index, k: int):
  """Returns a search with a baseline, as `Searcher.search`."""

  def search_fn(xq_QD, **setting):
    ids_QR = faiss_baselines.search(index, xq_QD, k, **setting)
    return pipeline.Result(ids_QR, np.zeros(ids_QR.shape), {}, 0)

  return search_fn


def search_decoded(codec, config, data: Data, found: codes.Codes, seconds):
  """Ids `[Q, R]` by exact search among the decoded codes, all of them."""
  num, dtype = len(found), codecs.product_dtype(config.dtype)
  check_range("k", config.k, 1, num, "codes to search in")
  next(codec.decode_blocks(found, dtype))  # Compiles.
  with cli.progress(num, "decode") as done, cli.timed(seconds, "search"):
    blocks = codec.decode_blocks(found, dtype, progress=done)
    return evaluation.nearest(data.xq_QD, blocks, config.k, data.metric)[1]
