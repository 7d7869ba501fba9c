"""The results of a search: ids and distances of each query, in a file."""

import pathlib

import numpy as np
from absl import logging

from vqjax.data import files, item_ids, parquet

SUFFIXES = (".npy", ".parquet")


def check_output(path, overwrite: bool) -> None:
  """Raises unless results may be written at `path`, or are there."""
  if pathlib.Path(path).suffix not in SUFFIXES:
    raise ValueError(
      f"--results must end in {' or '.join(SUFFIXES)}; got {path}."
    )
  files.check_output(path, overwrite, described=True)


def write(path, search_fn, setting: dict, info: dict, config) -> None:
  """Searches at a setting and writes what is found, under its item ids.

  Args:
    path: `.npy` gets ids `[Q, k]`, `.parquet` ids and distances.
    search_fn: Takes the setting, returns a `pipeline.Result`.
    setting: Of the search.
    info: Description of the index.
    config: Options of the command.
  """
  setting = {k: v for k, v in setting.items() if v is not None}
  wanted = {
    "format": "vqjax search results",
    "version": 1,
    "index": info["sha256"],
    "ids_checksum": info.get("ids_checksum"),
    "k": config.k,
    "setting": setting,
    "queries": info["queries"],
  }
  if files.find_made(path, wanted, config.overwrite):
    logging.info("%s is made already.", path)
    return
  found = search_fn(**setting)
  ids_QR = found.ids_QR
  ids_N = item_ids.load_beside(config.index, info, info["num_vectors"])
  if ids_N is not None:
    ids_QR = item_ids.pick(ids_N, ids_QR)
  with files.atomic_output(path, config.overwrite, description=wanted) as file:
    if pathlib.Path(path).suffix == ".parquet":
      columns = {"query": np.arange(len(ids_QR)), "ids": ids_QR}
      parquet.write(file, {**columns, "distances": found.distances_QR})
    else:
      if ids_QR.dtype == object:
        ids_QR = np.where(ids_QR == None, "", ids_QR).astype(str)  # noqa: E711
      np.save(file, ids_QR)
  at = ", ".join(f"{k}={v}" for k, v in setting.items())
  logging.info("Results at %s: %s", at, path)


def next_steps(config, folder, setting: dict, dtype: str) -> str:
  """How to search at a setting in Python, and to get results in a file.

  Args:
    config: Options of the command.
    folder: What `vqjax.load_index` opens; None if the files are apart.
    setting: Of the search.
    dtype: Type of the products that were measured.
  """
  at = ", ".join(f"{k}={v}" for k, v in setting.items() if v is not None)
  search = f"search(queries, k={config.k}, {at})"
  if folder:
    lines = [
      "To search with a setting, in Python:",
      f"  vqjax.load_index({str(folder)!r}).{search}",
    ]
    if dtype != "float32":
      lines.append(f"  # In float32; {dtype} was measured.")
  else:
    parts = [repr(config.codec), repr(config.index)]
    given = {"decoders": config.decoders, "refiner": config.refiner}
    given["dtype"] = None if dtype == "float32" else dtype
    parts += [f"{k}={v!r}" for k, v in given.items() if v]
    lines = [
      "To search with a setting, in Python; ids are row numbers:",
      "  from vqjax.interop.searchers import open_searcher",
      f"  searcher = open_searcher({', '.join(parts)})",
      f"  searcher.{search}",
    ]
  if not config.results:
    lines.append(
      "To write the results of these queries, with item ids if there are any: "
      "the same command with --results=results.npy"
    )
  return "\n".join(lines)
