"""Decoders of codes without a network, in one `decoders.safetensors`.

  decoders = decoder_file.load("decoders.safetensors")
  decoder_file.check_codec(decoders, codec.fingerprint)
  pairwise.decode(decoders.pairwise, codes_NM, lists_N)

Both decode what the centroid of a list leaves; a codec without lists has one
list, whose centroid is zero. Arrays lie under `additive.` and `pairwise.` and
the names of their fields. The header says, in addition to what `tensors` needs:

  codec_fingerprint   of the codec whose codes these decode
  vqjax_version, created
  info                what the caller knows: number of training codes, errors
                      on held-out vectors
"""

import pathlib
from typing import NamedTuple

from vqjax.codecs.additive import AdditiveParams
from vqjax.codecs.pairwise import PairwiseParams
from vqjax.data import json_files
from vqjax.storage import tensors

SUFFIX = ".safetensors"
_FORMAT, _VERSION = "vqjax decoders", 1


class Decoders(NamedTuple):
  """Decoders of the codes of one codec; `pairwise` None if it is left out.

  `path` is the file they are from.
  """

  additive: AdditiveParams
  pairwise: PairwiseParams | None
  info: dict
  codec_fingerprint: str
  path: str


def save(
  path,
  additive: AdditiveParams,
  pairwise: PairwiseParams | None = None,
  *,
  codec_fingerprint: str,
  info: dict,
  made_of: dict | None = None,
  overwrite: bool = False,
) -> None:
  """Writes decoders, whole or not at all.

  `info` is what else to keep, `made_of` data and options for `describe`, plain
  JSON values both.
  """
  check_path(path)
  arrays, static = tensors.flatten(additive, "additive.")
  if pairwise is not None:
    more = tensors.flatten(pairwise, "pairwise.")
    arrays, static = arrays | more[0], static | more[1]
  tensors.save(
    path,
    *(arrays, static),
    overwrite=overwrite,
    info=info,
    format=_FORMAT,
    version=_VERSION,
    codec_fingerprint=codec_fingerprint,
    made_of=made_of or {},
  )


def describe(path) -> dict:
  """Returns what a file of decoders was made of, and its `info`.

  Raises ValueError if it is no such file, damaged or changed.
  """
  found, header = _load(path)
  made_of = header.get("made_of")
  return {
    **(made_of if isinstance(made_of, dict) else {}),
    "codec_fingerprint": found.codec_fingerprint,
    "info": found.info,
  }


def check_path(path) -> None:
  """Raises ValueError unless decoders may be written under this name."""
  if pathlib.Path(path).suffix != SUFFIX:
    raise ValueError(f"Decoders go into a file *{SUFFIX}, got {path}.")


def load(path) -> Decoders:
  """Loads decoders.

  Raises:
    FileNotFoundError: If there is no such file.
    ValueError: If it is no file of decoders, damaged or changed.
  """
  return _load(path)[0]


def _load(path) -> tuple[Decoders, dict]:
  """Decoders, and the header of their file."""
  header, arrays = tensors.load(
    path,
    format=_FORMAT,
    version=_VERSION,
    what="file of decoders",
    missing="vqjax pairwise_decoder makes the decoders of a codec.",
  )
  json_files.check_fields(path, header, {"codec_fingerprint": str})
  found = _rebuild(path, arrays, dict(header["static"]))
  rest = header["info"], header["codec_fingerprint"], str(path)
  return Decoders(*found, *rest), header


def check_codec(decoders: Decoders, fingerprint: str) -> None:
  """Raises ValueError unless the decoders are for codes of this codec."""
  if decoders.codec_fingerprint != fingerprint:
    raise ValueError(
      f"{decoders.path} decodes codes of codec {decoders.codec_fingerprint}, "
      f"but this is codec {fingerprint}; make its own by vqjax "
      "pairwise_decoder."
    )


def _rebuild(path, arrays: dict, static: dict):
  """The decoders of a file; all of its arrays must belong to them."""
  try:
    additive = tensors.rebuild(AdditiveParams, arrays, static, "additive.")
    pairwise = None
    if any(name.startswith("pairwise.") for name in arrays):
      pairwise = tensors.rebuild(PairwiseParams, arrays, static, "pairwise.")
    if arrays or static:
      raise ValueError(f"{', '.join([*arrays, *static])} is of neither")
  except ValueError as error:
    raise ValueError(
      f"{path} is no valid file of decoders: {error}."
    ) from error
  return additive, pairwise
