"""Small inputs, and the commands of which every output is attacked."""

import functools
import importlib
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

import vqjax
from experiments import (
  build_index,
  decode,
  encode,
  export,
  ivf_centroids,
  pairwise_decoder,
  refiner,
  train,
)
from experiments.lib import cli, codecs
from tests import fits, qinco_cases
from vqjax.codecs import rq
from vqjax.storage import codec_file, decoder_file

D, K, M, L, NUM = 8, 8, 3, 5, 260


class Subject(NamedTuple):
  """A command: `run(inputs, folder, overwrite)` writes into a folder."""

  run: Callable
  is_described: bool = True  # Every output has a description beside it.
  overwrites: bool = True  # It has --overwrite.
  is_one: bool = False  # All files appear at once.


def _command(module, outputs: str, **options):
  """Runs a command; options in capitals are names of inputs."""

  def run(inputs, folder, overwrite=False, **others):
    values = {
      name: str(inputs / value[1:]) if str(value).startswith("@") else value
      for name, value in {**options, **others}.items()
    }
    if "overwrite" in module.OPTIONS:
      values["overwrite"] = overwrite
    config = cli.get_config(
      module.OPTIONS, **values, output=str(folder / outputs)
    )
    module.run(config)

  return run


def _train(inputs, folder, overwrite=False):
  config = importlib.import_module("configs.rq").get_config("smoke")
  config.data.update(
    name=None, train=str(inputs / "x.npy"), num_train=None, base=None
  )
  config.model.update(num_codes=2, codebook_size=4, beam_size=2)
  config.init.num_iterations = 2
  train.run(config, folder)


@functools.cache
def _index(inputs):
  return vqjax.build_index(
    str(inputs / "rq"), str(inputs / "x.npy"), refiner="rabitq"
  )


def _save_index(inputs, folder, overwrite=False):
  overwrite = overwrite or (folder / "index").exists()
  _index(inputs).save(folder / "index", overwrite=overwrite)


_ENCODE = dict(codec="@rq", data="@x.npy")
_IVF = dict(codec="@ivf", codes="@codes.npy")
COMMANDS = {
  "encode": Subject(_command(encode, "codes.npy", **_ENCODE)),
  "encode --raw": Subject(_command(encode, "codes.bin", raw=True, **_ENCODE)),
  "encode --shards": Subject(
    _command(encode, "codes", shards=2, **_ENCODE),
    is_described=False,
    overwrites=False,
  ),
  "decode": Subject(
    _command(decode, "xhat.npy", codec="@rq", codes="@rq_codes.npy")
  ),
  "build_index": Subject(
    _command(build_index, "i.faiss", decoders="@decoders.safetensors", **_IVF)
  ),
  "pairwise_decoder": Subject(
    _command(
      pairwise_decoder, "d.safetensors", data="@x.npy", num_tables=2, **_IVF
    ),
    is_described=False,
  ),
  "refiner rabitq": Subject(
    _command(
      refiner,
      "r.safetensors",
      kind="rabitq",
      index="@index.faiss",
      data="@x.npy",
    ),
    is_described=False,
  ),
  "refiner fastscan": Subject(
    _command(
      refiner,
      "r.faiss",
      kind="fastscan",
      codec="@ivf",
      index="@index.faiss",
      data="@x.npy",
    )
  ),
  "ivf_centroids": Subject(
    _command(
      ivf_centroids,
      "c.npy",
      data="@x.npy",
      num_centroids=L,
      num_iterations=2,
    )
  ),
  "export": Subject(
    _command(export, "rq.faiss", codec="@rq", codes="@rq_codes.npy")
  ),
  "Index.save": Subject(_save_index, is_described=False, is_one=True),
  "train": Subject(_train, is_described=False, overwrites=False),
}


def make_inputs(folder: pathlib.Path, seed: int) -> pathlib.Path:
  """Writes vectors, two codecs, their codes, decoders and an index."""
  folder.mkdir()
  rng = np.random.default_rng(seed)
  np.save(folder / "x.npy", rng.normal(size=(NUM, D)).astype(np.float32))
  words_MKD = rng.normal(size=(M, K, D)).astype(np.float32)
  params = {
    "rq": rq.RQParams(words_MKD),
    "ivf": qinco_cases.make_params(
      seed, dim=D, num_networks=M, num_codewords=K, num_lists=L
    ),
  }
  encodes = {
    "rq": {"beam_size": 2},
    "ivf": {"beam_size": 2, "num_candidates": 3},
  }
  for name, value in params.items():
    info = {"encode": encodes[name], "metric": "l2", "scale": 1.0}
    kind = {"ivf": "qinco"}.get(name, name)
    codec_file.save_codec(folder / name, kind, value, info=info)
  for name, output in (("rq", "rq_codes.npy"), ("ivf", "codes.npy")):
    _command(encode, output, codec=f"@{name}", data="@x.npy")(folder, folder)
  codec = codecs.open_codec(str(folder / "ivf"))
  codes_NM = np.load(folder / "codes.npy")
  left_ND = np.load(folder / "x.npy") - codec.centroids[codes_NM[:, 0]]
  decoder_file.save(
    folder / "decoders.safetensors",
    fits.additive(codes_NM[:, 1:], left_ND, K),
    codec_fingerprint=codec.fingerprint,
    info={},
  )
  COMMANDS["build_index"].run(folder, folder)
  for suffix in ("", ".json"):
    (folder / f"i.faiss{suffix}").rename(folder / f"index.faiss{suffix}")
  return folder
