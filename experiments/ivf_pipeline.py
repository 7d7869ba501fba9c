r"""From vectors to searched operating points: an IVF-QINCo2 in one go.

  python -m experiments.ivf_pipeline --config=configs/ivf_qinco2_s.py
  python -m experiments.ivf_pipeline --config=configs/ivf_qinco2_xs.py \
      --config.data.train=learn.fvecs --config.data.base=base.fvecs \
      --config.data.queries=query.fvecs --workdir=runs/mine

runs the commands below, each of which can be run by itself, into --workdir:

  centroids   ivf_centroids      centroids.npy
  codec       train              codec/
  codes       encode             codes/, of the base, and train_codes/
  decoders    pairwise_decoder   decoders.safetensors
  index       build_index        index.faiss
  search      search             search.json, search.png

A step whose output is there is skipped, so that the same command goes on where
it was stopped. What the base is encoded by is config.encode; the training
vectors, of which the decoders need many, are encoded by the smaller search of
config.model.
"""

import pathlib

from absl import logging

from experiments import (
  build_index,
  common,
  encode,
  ivf_centroids,
  pairwise_decoder,
  search,
  train,
)
from vqjax.data import datasets

_NUM_FITTED = 1_000_000  # Training vectors for the decoders.
OPTIONS = {
  name: search.OPTIONS[name]
  for name in ("k", "nprobe", "num_aq", "num_short", "threads", "baselines")
}


def run(config, workdir: str, **options):
  """Returns what `search.run` does; None when the training was interrupted."""
  workdir = pathlib.Path(workdir)
  if not (config.ivf.num_lists or config.ivf.centroids):
    raise ValueError(
      "The configuration is of a codec without lists; take one of "
      "configs/ivf_*.py, or set --config.ivf.num_lists."
    )
  dataset = _resolve(config)
  workdir.mkdir(parents=True, exist_ok=True)
  _find_centroids(config, workdir, dataset)
  codec = workdir / "codec"
  has_begun = (codec / "config.json").exists()
  if train.run(config, str(codec), resume=has_begun) is None:
    return None
  _encode(config, workdir, dataset)
  _fit_decoders(config, workdir, dataset)
  _build_index(workdir)
  return _search(workdir, dataset, options)


def _resolve(config) -> datasets.Dataset:
  """The data; it must have a base and queries, or nothing can be searched."""
  names = config.data.to_dict()
  names.pop("validation_size")
  dataset = datasets.resolve(**names)
  for part in ("base", "queries"):
    if not getattr(dataset, part):
      raise ValueError(
        f"There are no {part} to search: set --config.data.{part}=FILE."
      )
  return dataset


def _find_centroids(config, workdir, dataset) -> None:
  """Makes centroids.npy unless they are given, and tells the training."""
  path = workdir / "centroids.npy"
  if config.ivf.centroids:
    return
  if not _is_there(path):
    xt_ND = datasets.open_split(dataset, "train")
    num_rows = len(xt_ND) - min(config.data.validation_size, len(xt_ND) // 2)
    _run(
      ivf_centroids,
      data=dataset.train,
      num_vectors=num_rows,
      num_centroids=config.ivf.num_lists,
      num_iterations=config.ivf.num_iterations,
      seed=config.seed,
      output=str(path),
    )
  config.ivf.centroids = str(path)


def _encode(config, workdir, dataset) -> None:
  """Encodes base and training vectors, in shards: finished ones are kept."""
  codec = str(workdir / "codec")
  num_train = dataset.num_train or _NUM_FITTED
  _run(
    encode,
    codec=codec,
    data=dataset.base,
    num_vectors=dataset.num_base,
    output=str(workdir / "codes"),
    shards=1,
  )
  _run(
    encode,
    codec=codec,
    data=dataset.train,
    num_vectors=min(num_train, _NUM_FITTED),
    **_small_search(config),
    output=str(workdir / "train_codes"),
    shards=1,
  )


def _small_search(config) -> dict:
  return {name: config.model[name] for name in train.SEARCH}


def _fit_decoders(config, workdir, dataset) -> None:
  path = workdir / "decoders.safetensors"
  if _is_there(path):
    return
  _run(
    pairwise_decoder,
    codec=str(workdir / "codec"),
    data=dataset.train,
    num_vectors=min(dataset.num_train or _NUM_FITTED, _NUM_FITTED),
    num_held_out=config.data.validation_size,
    codes=str(workdir / "train_codes"),
    output=str(path),
  )


def _build_index(workdir) -> None:
  path = workdir / "index.faiss"
  if _is_there(path):
    return
  _run(
    build_index,
    codec=str(workdir / "codec"),
    codes=str(workdir / "codes"),
    decoders=str(workdir / "decoders.safetensors"),
    output=str(path),
  )


def _search(workdir, dataset, options):
  options = {name: value for name, value in options.items() if value}
  if "baselines" in options:  # They are filled with the base.
    options |= dict(
      data=dataset.base,
      queries=dataset.queries,
      groundtruth=dataset.groundtruth,
    )
  return _run(
    search,
    codec=str(workdir / "codec"),
    index=str(workdir / "index.faiss"),
    decoders=str(workdir / "decoders.safetensors"),
    output=str(workdir / "search.json"),
    resume=(workdir / "search.json").exists(),
    **options,
  )


def _is_there(path) -> bool:
  if path.exists():
    logging.info("%s is there already.", path)
  return path.exists()


def _run(command, **values):
  """Runs a command as its flags would."""
  shown = " ".join(f"--{name}={value}" for name, value in values.items())
  logging.info("python -m %s %s", command.__spec__.name, shown)
  return command.run(common.get_config(command.OPTIONS, **values))


if __name__ == "__main__":
  common.run_config(
    run, OPTIONS, "Configuration, configs/ivf_qinco2_s.py[:smoke]."
  )
