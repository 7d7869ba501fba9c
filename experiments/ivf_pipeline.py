r"""Trains, indexes and searches an IVF-QINCo2 in one go.

  vqjax ivf_pipeline --config=ivf_qinco2_s
  vqjax ivf_pipeline --config=ivf_qinco2_xs \
      --config.data.train=learn.fvecs --config.data.base=base.fvecs \
      --config.data.queries=query.fvecs --workdir=runs/mine

runs these commands, each of which can be run alone, and writes into --workdir:

  centroids   ivf_centroids      centroids.npy
  codec       train              codec/
  codes       encode             codes/, of the base, and train_codes/
  decoders    pairwise_decoder   decoders.safetensors
  index       build_index        index.faiss
  refiner     refiner            refiner.safetensors or refiner.faiss, with
                                 --refiner=rabitq|fastscan
  search      search             search.json, search.png

Each command knows the output that it has made, so that the same command resumes
where it was stopped. Output that was made of other files is refused; a file
without its description is made again. The base is encoded by config.encode; the
training vectors, of which the decoders need many, by the smaller search of
config.model. Of a folder that index_add has changed since, the first generation
is searched: its vectors are the base.
"""

import copy
import math
import pathlib
import shlex
import tempfile

from absl import logging

from experiments import (
  build_index,
  encode,
  ivf_centroids,
  pairwise_decoder,
  refiner,
  search,
  train,
)
from experiments.lib import (
  cli,
  errors,
  plan,
  plan_training,
  search_data,
  train_run,
  truth,
)
from vqjax import recipe_qinco
from vqjax.codec import Codec
from vqjax.data import batches, datasets, files, formats, item_ids, json_files
from vqjax.interop import faiss_io
from vqjax.search import refiners
from vqjax.storage import index_folder
from vqjax.training import writers

_NUM_FITTED = 1_000_000  # Training vectors for the decoders.
_SHARD_ROWS = 100_000  # Of the codes; as many are lost by a stop.
OPTIONS = {
  name: search.OPTIONS[name]
  for name in (
    "k",
    "nprobe",
    "num_refined",
    "num_pairwise",
    "num_network",
    "threads",
    "baselines",
  )
} | {
  "ids": cli.Option(str, None, f"{item_ids.FLAG_HELP} Of the base."),
  "refiner": cli.Option(
    str,
    None,
    "Also make a refiner: rabitq, for more recall, or fastscan, for more speed "
    "(see the command refiner).",
  ),
  "plan": plan.OPTION,
}


def run(config, workdir, **options):
  """Returns what `search.run` does; None if training was interrupted.

  Args:
    config: A configuration, or its name or file, as --config takes it.
    workdir: The run folder.
    **options: Of `OPTIONS`.
  """
  config, workdir = cli.config_of(config), pathlib.Path(workdir)
  options = cli.get_config(OPTIONS, **options).to_dict()
  if not (config.ivf.num_lists or config.ivf.centroids):
    raise ValueError(
      "The configuration is of a codec without lists; take one of "
      "configs/ivf_*.py, or set --config.ivf.num_lists."
    )
  if options["refiner"] not in (None, *refiners.KINDS):
    raise ValueError(
      f"--refiner must be one of {', '.join(refiners.KINDS)}; got "
      f"{options['refiner']!r}."
    )
  writers.check_tracker(config.train.tracker)
  config = copy.deepcopy(config)  # It is told where the centroids are.
  dataset = _resolve(config)
  if (options["refiner"], dataset.metric) == ("fastscan", "ip"):
    raise ValueError(
      "A fastscan refiner is for l2 and cosine; take --refiner=rabitq for ip."
    )
  _check_baselines(config, dataset, options)
  _check_ids(dataset, options["ids"])
  truth.check_dataset(dataset)  # Before hours of training.
  if options.pop("plan"):
    return _plan(config, dataset)
  files.check_folder(workdir)
  _check_epochs(config, workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  _find_centroids(config, workdir, dataset)
  codec = workdir / "codec"
  has_begun = (codec / "config.json").exists()
  with errors.without_next_steps():
    if train.run(config, str(codec), resume=has_begun) is None:
      return None
  _encode(config, workdir, dataset, options.pop("ids"))
  _fit_decoders(config, workdir, dataset)
  _build_index(workdir, dataset)
  if options["refiner"]:
    options["refiner"] = _make_refiner(workdir, dataset, options["refiner"])
  _write_manifest(workdir, dataset, options["refiner"])
  return _search(workdir, options)


def _plan(config, dataset) -> dict:
  """What the pipeline would take, of a codec that has learned nothing yet."""
  xt_ND = datasets.open_split(dataset, "train")
  base_ND = datasets.open_split(dataset, "base")
  with tempfile.TemporaryDirectory(prefix="vqjax-plan-") as folder:
    num_rows, _ = batches.split(len(xt_ND), config.data.validation_size)
    stages, lists = [], config.ivf.num_lists
    if not config.ivf.centroids:
      stages = ivf_centroids.plan_stages(
        xt_ND[:num_rows], lists, config.ivf.num_iterations
      )
      config.ivf.centroids = f"{folder}/centroids.npy"
      words_KD = batches.subsample(xt_ND, lists, 0, num_rows=num_rows)
      formats.write_vectors(config.ivf.centroids, words_KD)
    this = train_run.look(config, pathlib.Path(folder) / "run", dataset, xt_ND)
    found, params, num_bytes = plan_training.stages(config, xt_ND, this)
  codec = Codec(config.codec, params, {"encode": config.encode.to_dict()})
  small = codec.check_settings(_small_search(config))
  most = min(len(xt_ND), dataset.num_train or _NUM_FITTED, _NUM_FITTED)
  for name, x_ND, rule, num in (
    ("encode the base", base_ND, codec.rule, len(base_ND)),
    ("encode for decoders", xt_ND, codec.rule.replace(**small), most),
  ):
    blocks = map(len, codec.encode_blocks(x_ND, rule))
    found.append(plan.measure(name, blocks, num))
  code_bytes = len(codec.codebook_sizes) + 3
  return plan.report(
    stages + found,
    rows=len(base_ND),
    num_bytes=num_bytes + (2 * len(base_ND) + most) * code_bytes,
    more_bytes=2 * len(base_ND) * code_bytes,
    left_out="decoders and their tables, lists, refiner, search",
  )


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


def _check_epochs(config, workdir) -> None:
  """Refuses to train a codec on whose codes are made already."""
  record = workdir / "codec" / "config.json"
  if not (record.exists() and (workdir / "codes").exists()):
    return
  before = json_files.read_json(record).get("train", {}).get("num_epochs")
  if before not in (None, config.train.num_epochs):
    raise ValueError(
      f"{record.parent} was started with train.num_epochs={before}, and the "
      f"base is encoded by it; now it is {config.train.num_epochs}: choose "
      "another --workdir."
    )


def _check_baselines(config, dataset, options) -> None:
  """Refuses baselines of these sizes before anything is trained."""
  asked = cli.get_config(search.OPTIONS, baselines=options["baselines"])
  if "IVF-PQ" in search_data.baseline_names(asked):
    faiss_io.check_parts("IVF-PQ", dataset.dim, config.model.num_steps)


def _check_ids(dataset, ids: str | None) -> None:
  """Refuses item ids that do not fit the base before anything is trained."""
  if ids:
    x_ND = datasets.open_split(dataset, "base")
    is_part = dataset.num_base is not None
    item_ids.read(ids, len(x_ND), data=dataset.base, may_be_longer=is_part)


def _find_centroids(config, workdir, dataset) -> None:
  """Makes centroids.npy unless they are given, and hands them to training."""
  if config.ivf.centroids:
    return
  path = workdir / "centroids.npy"
  xt_ND = datasets.open_split(dataset, "train")
  num_rows, _ = batches.split(len(xt_ND), config.data.validation_size)
  values = dict(
    data=dataset.train,
    num_vectors=num_rows,
    metric="cosine" if dataset.metric == "cosine" else "l2",
    num_centroids=config.ivf.num_lists,
    num_iterations=config.ivf.num_iterations,
    seed=config.seed,
    output=str(path),
  )
  _run(ivf_centroids, **values)
  config.ivf.centroids = str(path)


def _encode(config, workdir, dataset, ids: str | None) -> None:
  """Encodes base and training vectors, in shards: finished ones are kept."""
  most = min(dataset.num_train or _NUM_FITTED, _NUM_FITTED)
  for part, num_vectors, folder, knobs in (
    ("base", dataset.num_base, "codes", {"ids": ids}),
    ("train", most, "train_codes", _small_search(config)),
  ):
    x_ND = datasets.open_split(dataset, part, max_vectors=num_vectors)
    _run(
      encode,
      codec=str(workdir / "codec"),
      data=getattr(dataset, part),
      num_vectors=num_vectors,
      **knobs,
      output=str(workdir / folder),
      shards=math.ceil(len(x_ND) / _SHARD_ROWS),
    )


def _small_search(config) -> dict:
  return {name: config.model[name] for name in recipe_qinco.SEARCH}


def _fit_decoders(config, workdir, dataset) -> None:
  num_vectors = min(dataset.num_train or _NUM_FITTED, _NUM_FITTED)
  x_ND = datasets.open_split(dataset, "train", max_vectors=num_vectors)
  num_rows, _ = batches.split(len(x_ND), config.data.validation_size)
  _run(
    pairwise_decoder,
    codec=str(workdir / "codec"),
    data=dataset.train,
    num_vectors=num_vectors,
    num_held_out=len(x_ND) - num_rows,
    codes=str(workdir / "train_codes"),
    output=str(workdir / "decoders.safetensors"),
  )


def _build_index(workdir, dataset) -> None:
  _run(
    build_index,
    codec=str(workdir / "codec"),
    codes=str(workdir / "codes"),
    decoders=str(workdir / "decoders.safetensors"),
    # Vectors of the cosine have length 1 and are compared by l2.
    metric="ip" if dataset.metric == "ip" else "l2",
    output=str(workdir / "index.faiss"),
  )


def _make_refiner(workdir, dataset, kind: str) -> str:
  """Returns the file of the refiner, which is made if it is missing."""
  suffix = {"rabitq": ".safetensors", "fastscan": ".faiss"}[kind]
  path = str(workdir / f"refiner{suffix}")
  values = {"codec": str(workdir / "codec")} if kind == "fastscan" else {}
  _run(
    refiner,
    kind=kind,
    index=str(workdir / "index.faiss"),
    data=dataset.base,
    output=path,
    **values,
  )
  return path


def _write_manifest(workdir, dataset, refiner_path: str | None) -> None:
  """Makes the folder one that `vqjax.load_index` and `search` open.

  A later generation of `index_add` stays what the folder stands for.
  """
  if index_folder.generation_of(workdir) > 1:
    return
  paths = {
    "codec": "codec",
    "index": "index.faiss",
    "decoders": "decoders.safetensors",
  }
  if refiner_path:
    paths["refiner"] = pathlib.Path(refiner_path).name
  info = {"metric": dataset.metric, "encode": {}}
  index_folder.write_manifest(workdir, paths, info, overwrite=True)


def _search(workdir, options):
  options = {name: value for name, value in options.items() if value}
  found = _run(
    search,
    codec=str(workdir / "codec"),
    index=str(workdir / "index.faiss"),
    decoders=str(workdir / "decoders.safetensors"),
    output=str(workdir / "search.json"),
    **options,
  )
  number = index_folder.generation_of(workdir)
  if number > 1:
    logging.warning(
      "This is the search of the first generation, whose vectors are the base. "
      "The folder stands for generation %d, of index_add. To search that:\n"
      "  vqjax search --index=%s --queries=QUERIES --data=ALL-VECTORS",
      *(number, shlex.quote(str(workdir))),
    )
  return found


def _run(command, **values):
  """Runs a command as its flags would.

  An output without its description, which a killed run of an earlier version
  may have left, is made again.
  """
  output = pathlib.Path(values["output"])
  is_alone = output.exists() and not files.description_path(output).exists()
  if output.suffix in (".npy", ".faiss") and is_alone:
    logging.warning("%s has no description: it is made again.", output)
    values["overwrite"] = True
  flags = [
    f"--{name}={value}"
    for name, value in values.items()
    if value != command.OPTIONS[name].default
  ]
  name = command.__spec__.name.rpartition(".")[2]
  logging.info("%s", shlex.join(["vqjax", name, *flags]))
  try:
    with errors.without_next_steps():
      return command.run(values)
  except FileExistsError as error:
    said = str(error).partition("; choose another name")[0]
    raise ValueError(
      f"{said}: remove it, and the same command makes it anew."
    ) from error


if __name__ == "__main__":
  cli.run_config(
    run, OPTIONS, "Name or file of a configuration: ivf_qinco2_s[:smoke]."
  )
