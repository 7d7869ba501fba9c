"""`vqjax index_add --refresh`: trains the codec further, makes all codes again.

The run of the training and the shards of codes lie in the folder of the index,
in refresh-CHECKSUM, until the new generation counts: a stopped command resumes.
"""

import hashlib
import json
import math
import pathlib
import shutil
from typing import Any, NamedTuple

import numpy as np
from absl import logging

import vqjax
from experiments import encode, train
from experiments.lib import errors, inputs
from vqjax import index_drift, recipes, shipped
from vqjax.core import check_range
from vqjax.data import codes, files, formats, item_ids
from vqjax.search import residual_bits
from vqjax.storage import index_folder

_CONFIGS = {"pq": "pq", "rq": "rq", "rqvae": "rqvae", "qinco": "qinco2_s"}
_PART = 2  # An epoch for each two of a training from the start.
_SHARD_ROWS = 100_000


class Opened(NamedTuple):
  """An index folder, and the vectors of --data with their ids."""

  info: dict
  index: vqjax.Index
  vectors: Any
  ids_N: np.ndarray | None
  made_of: dict  # What tells these vectors and ids from others.


def open_both(config, folder: pathlib.Path) -> Opened:
  """Opens the index and what is to go into it."""
  info = index_folder.read_manifest(folder)[1]
  index = vqjax.load_index(folder)
  vectors = index.open_vectors(config.data)
  ids_N = inputs.item_ids_of(config, len(vectors))
  data = {"num_vectors": len(vectors), **files.identify(vectors)}
  made_of = {"data": data, **item_ids.describe(ids_N)}
  return Opened(info, index, vectors, ids_N, made_of)


def run(config, folder: pathlib.Path) -> dict:
  """Makes the new generation; returns the errors before and after."""
  info, index, vectors, ids_N, made_of = open_both(config, folder)
  wanted = {
    **made_of,
    "train": config.train and files.identify(index.open_vectors(config.train)),
    "config": config.config,
    "epochs": config.epochs,
  }
  if info.get("refreshed") == wanted:
    logging.info("%s is of these vectors already.", config.index)
    return {"num_vectors": len(index), "is_there": True}
  left_out = {"encode"}
  if _warn_of_lost(index, ids_N, len(vectors)):
    left_out.add("added")  # These may be added again.
  generation = index_folder.next_generation(folder)
  work = folder / f"refresh-{_digest(wanted, index.codec)}"
  settings = _settings(config, index.codec, work)
  with errors.without_next_steps():
    if train.run(settings, str(work / "codec")) is None:
      raise KeyboardInterrupt
    encode.run(
      codec=str(work / "codec"),
      data=config.data,
      output=str(work / "codes"),
      shards=math.ceil(len(vectors) / _SHARD_ROWS),
    )
  codec, found = vqjax.load(work / "codec"), codes.open_codes(work / "codes")
  new = vqjax.build_index(
    codec,
    config.data,
    None if codec.is_ivf else index.num_lists,
    ids=ids_N,
    metric=index.metric,
    refiner=_refiner_of(index),
    codes=found[0 : len(found)],
    progress=True,
  )
  both = [index_drift.mse(each, vectors) for each in (index.codec, codec)]
  new.save(generation, overwrite=True)
  kept = {k: v for k, v in info.items() if k not in left_out}
  index_folder.switch(folder, generation, {**kept, "refreshed": wanted})
  removed = index_folder.remove_generations(folder, config.keep)
  for path in folder.glob("refresh-*"):
    shutil.rmtree(path)
  logging.info(
    "%d vectors in %s, by codec %s. Squared error of all: %.4g by the codec of "
    "before, %.4g now (%+.1f %%).%s",
    *(len(new), generation, codec.fingerprint, *both),
    100 * (both[1] / both[0] - 1),
    f" Removed {', '.join(removed)}." if removed else "",
  )
  return {
    "num_vectors": len(new),
    "generation": str(generation),
    "mse_before": both[0],
    "mse": both[1],
  }


def _digest(wanted: dict, codec) -> str:
  """What tells this refresh from others, 8 hex digits."""
  text = json.dumps([wanted, codec.fingerprint])
  return hashlib.sha256(text.encode()).hexdigest()[:8]


def _warn_of_lost(index, ids_N, num: int) -> int:
  """Says so if vectors of the index are not among the new ones; how many."""
  new = set(range(num)) if ids_N is None else set(ids_N.tolist())
  lost = [item for item in index.ids.tolist() if item not in new]
  if lost:
    logging.warning(
      "%d ids of the index are not among those of --data, %r the first: the "
      "new generation is without them.",
      *(len(lost), lost[0]),
    )
  return len(lost)


def _refiner_of(index) -> str | None:
  """The kind of the refiner of an index."""
  if index.refiner is None:
    return None
  is_bits = isinstance(index.refiner, residual_bits.ResidualBits)
  return "rabitq" if is_bits else "fastscan"


def _settings(config, codec, work: pathlib.Path):
  """The configuration of the training that starts from a codec."""
  settings = shipped.read_config(config.config or _CONFIGS[codec.name])
  if settings.codec != codec.name:
    raise ValueError(
      f"--config={config.config} is of a {settings.codec} codec, the index is "
      f"of a {codec.name} codec; leave it out, or give its configuration."
    )
  known, is_learned = codec.info.get("config"), recipes.get(codec.name)
  if config.config is None and known is None and is_learned:
    raise ValueError(
      "The codec of the index does not say how it was trained: give "
      "--config=NAME, the configuration that it was trained with."
    )
  for group, values in (known or {}).items():
    for name, value in values.items():
      if name in settings[group] and config.config is None:
        value = tuple(value) if isinstance(value, list) else value
        settings[group][name] = value
  settings.encode.update(codec.info.get("encode", {}))
  settings.data.update(
    train=str(pathlib.Path(config.train or config.data).absolute()),
    metric=codec.metric,
    name=None,
  )
  if not is_learned:
    if config.epochs is not None:
      raise ValueError(
        f"A {codec.name} codec is fitted without epochs; leave --epochs out."
      )
    return _closed(settings, codec)
  if config.epochs is not None:
    check_range("--epochs", config.epochs, 1, 1 << 20)
  num = config.epochs or math.ceil(settings.train.num_epochs / _PART)
  settings.train.update(
    num_epochs=num,
    ramp_epochs=min(settings.train.ramp_epochs, num - 1),
    start=_keep_codec(codec, work / "start"),
  )
  if codec.is_ivf:
    settings.ivf.num_lists = 0
    settings.ivf.centroids = _keep_centroids(codec, work / "centroids.npy")
  return settings


def _closed(settings, codec):
  """A closed form has no training steps: it is fitted again."""
  sizes = codec.codebook_sizes
  settings.model.update(num_codes=len(sizes), codebook_size=sizes[0])
  if codec.name == "pq":
    settings.model.opq = codec.params.rotation_DD is not None
  return settings


def _keep_codec(codec, path: pathlib.Path) -> str:
  """The folder of the codec that training starts from."""
  if not path.exists():
    codec.save(path)
  return str(path)


def _keep_centroids(codec, path: pathlib.Path) -> str:
  if not path.exists():
    formats.write_vectors(path, codec.centroids)
  return str(path)
