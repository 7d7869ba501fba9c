"""Damaged files: refused in words that name them, or read as before.

Never another result without a word, never a traceback, never a crash. Files of
others that have no checksum may hold other numbers: nothing in them could tell.
"""

import functools
import json
import pathlib
import shutil
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

from experiments.lib import codecs, errors
from experiments.lib import inputs as inputs_lib
from tests.campaign import outcomes, subjects
from vqjax.data import formats
from vqjax.interop import (
  faiss_fastscan,
  faiss_ivf,
  hakes_files,
  torch_qinco,
)
from vqjax.storage import codec_file, decoder_file, refiner_file
from vqjax.training import writers

GOLDEN = pathlib.Path(__file__).parents[2] / "third_party" / "golden"
COLUMNS = ["damages", "same", "refused", "other numbers", "FORBIDDEN"]
_FEW, _MANY = 20, 400


class Target(NamedTuple):
  """A file to damage, and what a program makes of it."""

  file: str  # In the folder that `read_fn` gets.
  read_fn: Callable  # Folder to what is compared, arrays and plain values.
  has_checksum: bool = True  # Else other numbers cannot be noticed.


def _damage(raw: bytes, rng) -> bytes:
  """One of the things that disks, copies and editors do to a file."""
  raw, at = bytearray(raw), int(rng.integers(len(raw)))
  kind = rng.integers(8)
  if kind in (0, 1, 2):  # Near the start lie headers.
    at = at if kind else int(rng.integers(min(len(raw), 200)))
    raw[at] ^= 1 << int(rng.integers(8))
  elif kind == 3:
    del raw[at:]
  elif kind == 4:
    raw[at : at + 64] = bytes(len(raw[at : at + 64]))
  elif kind == 5:
    raw += rng.bytes(int(rng.integers(1, 100)))
  elif kind == 6:
    raw[at : at + 8] = rng.bytes(len(raw[at : at + 8]))
  else:
    del raw[at : at + int(rng.integers(1, 9))]
  return bytes(raw)


def _attack(table, name, target, source, tmp_path, number: int) -> None:
  """Damages a file in many ways, and reads it."""
  whole = (source / target.file).read_bytes()
  wanted = _flat(target.read_fn(source))
  rng = np.random.default_rng([number, *name.encode()])
  for i in range(number):
    folder = tmp_path / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder)
    raw = _damage(whole, rng)
    if raw == whole:
      continue
    (folder / target.file).write_bytes(raw)
    outcome, detail = _read(target, folder, wanted)
    table.add(name, "damages")
    table.add(name, outcome, detail and f"damage {i}: {detail}")


def _read(target, folder, wanted) -> tuple[str, str | None]:
  """The class of what a program makes of a damaged file."""
  try:
    found = _flat(target.read_fn(folder))
  except Exception as error:
    text = str(error)
    said = f"{type(error).__name__}: {text[:300]}"
    if not errors.is_for_user(error):
      return "FORBIDDEN", f"traceback: {said}"
    if target.file.partition("/")[0].removesuffix(".json") not in text:
      return "FORBIDDEN", f"not named: {said}"
    return "refused", None
  if found == wanted:
    return "same", None
  if target.has_checksum:
    return "FORBIDDEN", "another result without a word"
  return "other numbers", None


def _flat(value):
  """Arrays as bytes, so that == compares all."""
  if isinstance(value, dict):
    return {key: _flat(x) for key, x in value.items()}
  if isinstance(value, list | tuple):
    return [_flat(x) for x in value]
  if value is None or isinstance(value, str | int | float | bool):
    return value
  if hasattr(value, "__dataclass_fields__"):
    return {k: _flat(getattr(value, k)) for k in value.__dataclass_fields__}
  value = np.asarray(value)
  return value.dtype.name, value.shape, value.tobytes()


def _codec(folder):
  found = codec_file.load_codec(folder / "rq")
  return found.name, found.params, found.info


def _decoders(folder):
  found = decoder_file.load(folder / "decoders.safetensors")
  decoder_file.check_codec(found, _codec_of(folder).fingerprint)
  return found.additive, found.pairwise


def _codec_of(folder, name="ivf"):
  return codecs.open_codec(str(folder / name))


def _index(folder):
  found = faiss_ivf.load(folder / "index.faiss")
  faiss_ivf.check_codec(
    folder / "index.faiss", found.info, _codec_of(folder).fingerprint
  )
  _vectors(folder, found.info)
  return tuple(faiss_ivf.contents(found.index))


def _vectors(folder, info):
  config = _Config(
    data=str(folder / "x.npy"), index=str(folder / "index.faiss")
  )
  return inputs_lib.of_index(config, info)


class _Config(dict):
  """Settings as attributes."""

  __getattr__ = dict.__getitem__


def _codes(name: str, codec: str, folder):
  config = _Config(
    codes=str(folder / name), codec=codec, data=str(folder / "x.npy")
  )
  vectors = formats.open_vectors(folder / "x.npy")
  codec = _codec_of(folder, codec)
  found = inputs_lib.of_codec(config, codec, vectors)
  return np.concatenate(
    list(inputs_lib.blocks(found, codec.codebook_sizes, 64))
  )


def _rabitq(folder):
  info = faiss_ivf.load(folder / "index.faiss").info
  return refiner_file.load(folder / "r.safetensors", info)


def _fastscan(folder):
  info = faiss_ivf.load(folder / "index.faiss").info
  found = faiss_fastscan.load(folder / "r.faiss", info)
  weights = {k: v for k, v in found.info.items() if k.endswith("weight")}
  x_ND = np.load(folder / "x.npy")
  return weights, faiss_fastscan.reconstruct(found.index, x_ND)


def _centroids(folder):
  """The command that made them, once more."""
  subjects.COMMANDS["ivf_centroids"].run(folder, folder)
  return formats.open_vectors(folder / "c.npy")


def _run_folder(folder):
  """The training that made it, once more."""
  subjects.COMMANDS["train"].run(folder, folder / "run")
  found = codec_file.load_codec(folder / "run")
  return found.name, found.params


TARGETS = {
  "codec.safetensors": Target("rq/codec.safetensors", _codec),
  "codec.json": Target("rq/codec.json", _codec),
  "decoders.safetensors": Target("decoders.safetensors", _decoders),
  "index.faiss": Target("index.faiss", _index),
  "index.faiss.json": Target("index.faiss.json", _index),
  "codes.npy": Target(
    "codes.npy", functools.partial(_codes, "codes.npy", "ivf")
  ),
  "codes.npy.json": Target(
    "codes.npy.json", functools.partial(_codes, "codes.npy", "ivf")
  ),
  "a shard": Target(
    "codes/codes-00001-of-00002.npy", functools.partial(_codes, "codes", "rq")
  ),
  "record of a shard": Target(
    "codes/codes-00001-of-00002.json", functools.partial(_codes, "codes", "rq")
  ),
  "manifest.json": Target(
    "codes/manifest.json", functools.partial(_codes, "codes", "rq")
  ),
  "refiner.safetensors": Target("r.safetensors", _rabitq),
  "refiner.faiss": Target("r.faiss", _fastscan),
  "refiner.faiss.json": Target("r.faiss.json", _fastscan),
  "centroids.npy": Target("c.npy", _centroids),
  "centroids.npy.json": Target("c.npy.json", _centroids),
  "config.json": Target("run/config.json", _run_folder),
  "summary.json": Target("run/summary.json", _run_folder),
  "codec of a run": Target("run/codec.safetensors", _run_folder),
}


@pytest.fixture(scope="module")
def source(inputs, tmp_path_factory):
  """Inputs and outputs of the commands in one folder."""
  folder = tmp_path_factory.mktemp("damage") / "whole"
  shutil.copytree(inputs, folder)
  for name in (
    *("encode --shards", "refiner rabitq", "refiner fastscan"),
    "ivf_centroids",
  ):
    subjects.COMMANDS[name].run(folder, folder)
  subjects.COMMANDS["train"].run(folder, folder / "run")
  return folder


@pytest.mark.parametrize(
  "number", [_FEW, pytest.param(_MANY, marks=pytest.mark.slow)]
)
def test_damaged_files_of_ours(source, tmp_path, number):
  table = outcomes.Table("damage", COLUMNS)
  for name, target in TARGETS.items():
    _attack(table, name, target, source, tmp_path, number)
  table.check()


def _released(folder, name):
  name, params, info = torch_qinco.load_checkpoint(folder / name)
  return name, params, info["encode"]


def _metrics(folder):
  """What a resumed training takes from it; a damaged line is left out."""
  rows = writers.read_rows(folder / "metrics.jsonl")
  return [row for row in rows if row["step"] < 0]


def _vectors_in(name, folder):
  return np.asarray(formats.open_vectors(folder / name)[:])


def _write_vectors(folder) -> None:
  x_ND = np.random.default_rng(3).normal(size=(40, 6)).astype(np.float32)
  for suffix in (".npy", ".fvecs", ".fbin", ".h5"):
    formats.write_vectors(folder / f"x{suffix}", x_ND)
  np.savez(folder / "x.npz", x_ND)
  lines = [{"step": i, "loss": 0.5, "seconds": i} for i in range(9)]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (folder / "metrics.jsonl").write_text(text)


_PT = "ivf_qinco2_tiny.pt"
OTHERS = {
  "metrics.jsonl": Target("metrics.jsonl", _metrics),
  "released .pt": Target(_PT, functools.partial(_released, name=_PT)),
  "released .pt, QINCo1": Target(
    "v1_qinco.pt", functools.partial(_released, name="v1_qinco.pt")
  ),
  "findex.bin": Target(
    "hakes_l2_findex.bin",
    lambda folder: hakes_files.load(folder / "hakes_l2_findex.bin").side,
    has_checksum=False,
  ),
  **{
    name: Target(
      name, functools.partial(_vectors_in, name), has_checksum=name == "x.npz"
    )
    for name in ("x.npy", "x.fvecs", "x.fbin", "x.h5", "x.npz")
  },
}


@pytest.mark.parametrize(
  "number", [_FEW, pytest.param(_MANY, marks=pytest.mark.slow)]
)
def test_damaged_files_of_others(tmp_path, number):
  table = outcomes.Table("damage", COLUMNS)
  source = tmp_path / "whole"
  source.mkdir()
  _write_vectors(source)
  for name in (_PT, "v1_qinco.pt", "hakes_l2_findex.bin"):
    shutil.copy(GOLDEN / name, source)
  for name, target in OTHERS.items():
    _attack(table, name, target, source, tmp_path, number)
  table.check()
