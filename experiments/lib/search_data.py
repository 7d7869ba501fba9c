"""What a search is measured with: queries, true neighbours, baselines."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from experiments.lib import cli, codecs, inputs
from vqjax.core import check_range, check_shape
from vqjax.data import batches, codes, datasets, files
from vqjax.interop import faiss_baselines, faiss_io
from vqjax.search import metrics, pipeline

_BLOCK = 16384
_MAX_TRAIN = 200_000  # IVF-RQ trains half a minute on them, on 2 threads.
_RANKS = (1, 10, 100)
_OVERLAP = 10
_NUM_CHECKED = 16  # Queries whose true neighbours are checked against
_NUM_SAMPLED = 20_000  # so many vectors of the base.


class Data(NamedTuple):
  """Queries, ids of their true neighbours, and the base where it is given."""

  xq_QD: np.ndarray
  true_QG: np.ndarray
  base: Any | None  # Open file of as many vectors as are searched.
  metric: str


def open_data(codec, config, path, num_vectors: int, is_of) -> Data:
  """Opens queries and true neighbours among the first `num_vectors`.

  The codes in `path` are of these vectors; `is_of` tells them from others,
  None where nobody knows.
  """
  dataset = _resolve(codec, config)
  xq_QD = datasets.open_split(dataset, "queries")
  xq_QD = batches.read_rows(xq_QD, range(len(xq_QD)))
  base = None
  if dataset.base:
    base = datasets.open_split(dataset, "base", max_vectors=num_vectors)
    if len(base) < num_vectors:
      raise ValueError(
        f"{dataset.base} has {len(base)} vectors, but {num_vectors} are "
        "indexed; give the base that was encoded as --data."
      )
    inputs.check_data(path, is_of, base)
  true_QG = _neighbours(dataset, xq_QD, base, num_vectors)
  return Data(xq_QD, true_QG, base, dataset.metric)


def _resolve(codec, config) -> datasets.Dataset:
  """The data of the options, else those that the codec was trained on."""
  if config.queries or config.data or config.groundtruth:
    cli.require(config, "queries")
    dataset = datasets.own_dataset(
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


def _neighbours(dataset, xq_QD, base, num_vectors: int) -> np.ndarray:
  missing = "There is no ground truth"
  if dataset.groundtruth:
    whole = dataclasses.replace(dataset, num_base=None)
    ids_QG = np.asarray(datasets.open_split(whole, "groundtruth"))[: len(xq_QD)]
    if ids_QG.max() < num_vectors:
      if base is not None:
        _check_neighbours(dataset, xq_QD, ids_QG, base)
      return ids_QG
    missing = (
      f"{dataset.groundtruth} names vectors beyond the {num_vectors} that are "
      "searched"
    )
  if base is None:
    raise ValueError(
      f"{missing}; give the vectors that were encoded as --data, to find the "
      "true neighbours by exact search."
    )
  logging.info(
    "%s: searching the true neighbours of %d queries.", missing, len(xq_QD)
  )
  num = min(_OVERLAP, num_vectors)
  with cli.progress(num_vectors, "exact search") as done:
    return faiss_io.knn(xq_QD, _blocks(base, done), num, dataset.metric)[1]


def _check_neighbours(dataset, xq_QD, true_QG, base) -> None:
  """Raises ValueError where the true neighbours cannot be those.

  For some queries: the first must not be farther than any vector of a sample,
  nor one that recall is measured with farther than the next.
  """
  at = batches.spread(len(xq_QD), _NUM_CHECKED)
  xq_QD, ids_QG = xq_QD[at], true_QG[at, :_OVERLAP]
  sample_N = batches.spread(len(base), _NUM_SAMPLED)
  xs_ND = batches.read_rows(base, sample_N)
  _, near_Q1 = faiss_io.knn(xq_QD, xs_ND, 1, dataset.metric)
  ids_QR = np.hstack([ids_QG, sample_N[near_Q1]])
  error_QR, noise_Q = _errors(xq_QD, ids_QR, base, dataset.metric)
  last = ids_QG.shape[1]
  less, more = np.r_[0, : last - 1], np.r_[last, 1:last]
  wrong_QR = error_QR[:, less] > error_QR[:, more] + noise_Q[:, None]
  if wrong_QR.any():
    q, r = np.argwhere(wrong_QR)[0]
    raise ValueError(
      f"{dataset.groundtruth} must name the vectors of {dataset.base} "
      f"nearest ({dataset.metric}) to each query of {dataset.queries}, nearest "
      f"first, but for query {at[q]} it has row {ids_QR[q, less[r]]}, which is "
      f"farther than row {ids_QR[q, more[r]]}; give the ground truth of these "
      "files, or leave it out to have it found by exact search."
    )


def _errors(xq_QD, ids_QR, base, metric: str):
  """What is less for nearer rows, `[Q, R]`, and how exact `[Q]` float32 has it.

  A negative id stands for none, at inf.
  """
  x_ND = batches.read_rows(base, np.maximum(ids_QR, 0).ravel()).astype(float)
  x_QRD, xq_Q1D = x_ND.reshape(*ids_QR.shape, -1), xq_QD[:, None].astype(float)
  if metric == "ip":
    error_QR = -(x_QRD * xq_Q1D).sum(axis=-1)
  else:
    error_QR = np.square(x_QRD - xq_Q1D).sum(axis=-1)
  size_QR = np.square(x_QRD).sum(axis=-1) + np.square(xq_Q1D).sum(axis=-1)
  return np.where(ids_QR < 0, np.inf, error_QR), 1e-5 * size_QR.max(axis=1)


def _blocks(vectors, done):
  parts = batches.map_blocks(
    lambda x_ND: x_ND, vectors, block_size=_BLOCK, progress=done
  )
  return (x_ND for _, x_ND in parts)


def recall_names(num_results: int, true_QG) -> list[str]:
  """Returns the kinds of recall that results and neighbours allow."""
  names = [f"1-recall@{r}" for r in _RANKS if r <= num_results]
  if min(num_results, true_QG.shape[1]) >= _OVERLAP:
    names.append(f"knn_recall@{_OVERLAP}")
  return names


def recalls(ids_QR, true_QG) -> dict[str, float]:
  """Returns the values of `recall_names`."""
  kinds = {
    "1-recall": metrics.nn_recall_at,
    "knn_recall": metrics.knn_recall_at,
  }
  found = {}
  for name in recall_names(ids_QR.shape[1], true_QG):
    kind, num = name.split("@")
    found[name] = float(kinds[kind](ids_QR, true_QG, int(num)))
  return found


def baseline_names(config) -> list[str]:
  """Returns the baselines asked for, as `faiss_baselines` spells them."""
  known = {name.lower(): name for name in faiss_baselines.NAMES}
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
    dataset = datasets.own_dataset(train=config.train)
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
    logging.info("Training faiss %s on %d vectors ...", name, len(xt_ND))
    with cli.timed(seconds, name):
      found[name] = faiss_baselines.fit(name, like, xt_ND)
    with cli.progress(len(base), f"add to {name}") as done:
      faiss_baselines.add(found[name], _blocks(base, done))
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
  sizes, num = codec.codebook_sizes[: found.shape[1]], len(found)
  dtype = codecs.product_dtype(config.dtype)
  decode_fn = codecs.make_decode_fn(codec, dtype)
  size = min(codecs.decode_rows(), num)
  check_range("k", config.k, 1, num, "codes to search in")
  decode_fn(np.asarray(found[:1]).repeat(size, axis=0))  # Compiles.
  with cli.progress(num, "decode") as done, cli.timed(seconds, "search"):
    blocks = inputs.decoded(decode_fn, found, sizes, size, done)
    return faiss_io.knn(data.xq_QD, blocks, config.k, data.metric)[1]
