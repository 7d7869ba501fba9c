"""Vectors cut into parts, in a folder that says how; see `pq_qinco`."""

import os
import pathlib
import shlex
import time

import numpy as np
from absl import logging

from experiments.lib import cli
from vqjax.core import check_range
from vqjax.data import batches, files, formats, json_files
from vqjax.interop import faiss_io

PREPARED_NAME, ROTATION_NAME = "prepared.json", "rotation.npy"
_FORMAT = "vqjax parts"
_FIELDS = {
  "source": str,
  "num_vectors": int,
  "dim": int,
  "num_blocks": int,
  "opq": bool,
  "seed": int,
}
_BLOCK = 16384  # Vectors that are cut at once.
_OPQ_VECTORS, _OPQ_BITS = 65536, 8


def part_path(folder, block: int) -> pathlib.Path:
  """Returns the file of the vectors of one part."""
  return pathlib.Path(folder) / f"part-{block}.npy"


def codec_path(folder, block: int) -> pathlib.Path:
  """Returns the run folder of the codec of one part."""
  return pathlib.Path(folder) / f"codec-{block}"


def prepare(config) -> dict:
  """Writes the parts that are missing and says how to train them."""
  cli.require(config, "data", "num_blocks")
  vectors = formats.open_vectors(
    config.data, max_vectors=config.num_vectors, role="--data"
  )
  folder, (num, dim) = pathlib.Path(config.output), vectors.shape
  check_range("--num_blocks", config.num_blocks, 2, dim)
  if dim % config.num_blocks:
    raise ValueError(
      f"--num_blocks must divide the {dim} dimensions of {config.data}, got "
      f"{config.num_blocks}."
    )
  batches.check_training(vectors)
  record = {
    "format": _FORMAT,
    "source": os.path.abspath(config.data),
    "num_vectors": num,
    **files.identify(vectors),
    "num_blocks": config.num_blocks,
    "opq": config.opq,
    "seed": config.seed,
  }
  files.check_folder(folder, num_bytes=4 * num * dim)
  record, rotation_DD = _claim(folder, record, vectors)
  began = time.perf_counter()
  written = _write_parts(folder, record, vectors, rotation_DD)
  logging.info(
    "%d parts of %d vectors, %d dimensions each, in %s: %d made in %.1f s.\n"
    "Next, train each of them (a code has %d x config.model.num_steps "
    "positions):\n  %s\nThen:\n"
    "  vqjax pq_qinco --recombine --output=%s",
    *(config.num_blocks, num, dim // config.num_blocks, folder, written),
    *(time.perf_counter() - began, config.num_blocks),
    "\n  ".join(_train_command(folder, p) for p in range(config.num_blocks)),
    shlex.quote(str(folder)),
  )
  return record


def _claim(folder, record: dict, vectors):
  """Gives `folder` to `record`; returns it as written, and the rotation."""
  path = folder / PREPARED_NAME
  if path.exists():
    found = load_prepared(folder)
    for name, value in record.items():
      if name != "source" and found.get(name) != value:
        raise ValueError(
          f"{path} is of parts with {name}={found.get(name)}, now it is "
          f"{value}: choose another --output, or remove that folder."
        )
    return found, load_rotation(folder, found)
  rotation = folder / ROTATION_NAME
  is_kept = files.description_path(rotation).exists()
  for stray in (*(() if is_kept else (rotation,)), part_path(folder, 0)):
    if stray.exists():
      raise FileExistsError(
        f"There is {stray}, but no {PREPARED_NAME} that says what it is: "
        "choose another --output, or remove it."
      )
  rotation_DD = _find_rotation(rotation, record, vectors)
  files.write_json(path, record)
  return record, rotation_DD


def _find_rotation(path, record: dict, vectors) -> np.ndarray | None:
  """The rotation of these parts, which a killed run may have left."""
  if not record["opq"]:
    return None
  meta = record | {"format": "vqjax rotation"}
  del meta["source"]
  if files.find_made(path, meta):
    return np.array(formats.open_vectors(path), np.float32)
  rotation_DD = _fit_rotation(vectors, record["num_blocks"], record["seed"])
  with files.atomic_output(path, description=meta) as temporary:
    formats.write_vectors(temporary, rotation_DD)
  return rotation_DD


def _fit_rotation(vectors, num_blocks: int, seed: int) -> np.ndarray:
  """OPQ of a sample, without the vectors that training holds out."""
  num_rows, _ = batches.split(len(vectors))
  x_ND = batches.subsample(vectors, _OPQ_VECTORS, seed, num_rows=num_rows)
  logging.info("OPQ of %d vectors; takes a minute or two.", len(x_ND))
  return faiss_io.train_opq(x_ND, num_blocks, _OPQ_BITS)


def _write_parts(folder, record: dict, vectors, rotation_DD) -> int:
  """Writes the parts that are not there yet; returns how many."""
  num, size = len(vectors), record["dim"] // record["num_blocks"]
  todo = []
  for block in range(record["num_blocks"]):
    path = part_path(folder, block)
    if not path.exists():
      todo.append(block)
    elif formats.open_vectors(path).shape != (num, size):
      raise ValueError(
        f"{path} must have shape {(num, size)}, got "
        f"{formats.open_vectors(path).shape}; remove it to make it again."
      )
  with cli.progress(num * len(todo), "parts") as done:
    for at, block in enumerate(todo):
      blocks = batches.map_blocks(
        _cut_fn(rotation_DD, slice(block * size, (block + 1) * size)),
        vectors,
        block_size=_BLOCK,
        progress=lambda rows, _, before=at * num: done(before + rows, None),
      )
      formats.write_vectors(
        part_path(folder, block), (x_NS for _, x_NS in blocks)
      )
  return len(todo)


def _cut_fn(rotation_DD, of_part: slice):
  """Returns `x_ND -> x_NS`: the dimensions of one part, rotated first."""
  if rotation_DD is None:
    return lambda x_ND: x_ND[:, of_part]
  rotation_DS = rotation_DD[:, of_part]
  return lambda x_ND: x_ND @ rotation_DS


def _train_command(folder, block: int) -> str:
  return (
    "vqjax train --config=qinco2_s "
    f"--config.data.train={shlex.quote(str(part_path(folder, block)))} "
    f"--workdir={shlex.quote(str(codec_path(folder, block)))}"
  )


def load_prepared(folder) -> dict:
  path = pathlib.Path(folder) / PREPARED_NAME
  found = json_files.read_json(path)
  if found.get("format") != _FORMAT:
    raise ValueError(f"{path} must have the format {_FORMAT!r}.")
  json_files.check_fields(path, found, _FIELDS)
  return found


def load_rotation(folder, prepared: dict) -> np.ndarray | None:
  """The rotation that the parts were made with."""
  if not prepared["opq"]:
    return None
  path = pathlib.Path(folder) / ROTATION_NAME
  files.check_file(path, json_files.read_json(files.description_path(path)))
  return np.array(formats.open_vectors(path), np.float32)
