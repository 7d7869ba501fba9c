"""Decoders of codes without a network, in one `decoders.safetensors`.

  decoders = decoder_file.load("decoders.safetensors")
  decoder_file.check_codec(decoders, codec.fingerprint)
  pairwise.decode(decoders.pairwise, codes_NM, lists_N)

Both decode what the centroid of a list leaves; a codec without lists has one
list, whose centroid is zero. Arrays lie under `additive.` and `pairwise.` and
the names of their fields. The header says, in addition to what `tensors` needs:

  codec_fingerprint   of the codec whose codes these decode
  num_codes, codebook_size, dim, num_lists   sizes; num_lists 0 without lists
  vqjax_version, created
  info                what the caller knows: number of training codes, errors
                      on held-out vectors
"""

import pathlib
from typing import NamedTuple

import numpy as np

from vqjax.codecs.additive import AdditiveParams
from vqjax.codecs.pairwise import PairwiseParams
from vqjax.core import check_shape
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

  Args:
    path: file to write, `*.safetensors`.
    additive: least-squares codewords.
    pairwise: tables for the same codes, or None.
    codec_fingerprint: of the codec that made the codes.
    info: what else to keep, plain JSON values.
    made_of: data and options, for `describe`; plain JSON values.
    overwrite: replaces a file that is there instead of refusing.

  Raises:
    ValueError: If the two do not fit each other.
  """
  check_path(path)
  sizes = _check_sizes(additive, pairwise)
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
    **sizes,
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
  additive, pairwise = _rebuild(path, arrays, dict(header["static"]))
  try:
    sizes = _check_sizes(additive, pairwise)
  except ValueError as error:
    raise ValueError(f"{path} is no valid file of decoders: {error}") from error
  wanted = {name: header.get(name) for name in sizes}
  if sizes != wanted or not isinstance(header.get("codec_fingerprint"), str):
    raise ValueError(
      f"{path} has a header that does not fit its arrays: they have {sizes}, "
      f"it says {wanted}."
    )
  fingerprint = header["codec_fingerprint"]
  info = header["info"]
  return Decoders(additive, pairwise, info, fingerprint, str(path)), header


def check_codec(decoders: Decoders, fingerprint: str) -> None:
  """Raises ValueError unless the decoders are for codes of this codec."""
  if decoders.codec_fingerprint != fingerprint:
    raise ValueError(
      f"{decoders.path} decodes codes of codec {decoders.codec_fingerprint}, "
      f"but this is codec {fingerprint}; make its own by python -m "
      "vqjax pairwise_decoder."
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


def _check_sizes(additive, pairwise) -> dict:
  """Sizes for the header; raises ValueError where shapes or ids do not fit."""
  check_shape(
    "The additive codewords", additive.codebooks_MKD, (None, None, None)
  )
  m, k, d = additive.codebooks_MKD.shape
  sizes = {"num_codes": m, "codebook_size": k, "dim": d, "num_lists": 0}
  if pairwise is None:
    return sizes
  check_shape("The pairs", pairwise.pairs_R2, (None, 2))
  r = pairwise.pairs_R2.shape[0]
  check_shape("The tables", pairwise.tables_RKKD, (r, k, k, d))
  check_shape("The scales", pairwise.scale_R, (r,))
  if pairwise.num_codes != m:
    raise ValueError(
      f"The tables are for {pairwise.num_codes} codes, the additive "
      f"codewords for {m}."
    )
  if pairwise.list_codes_LV is not None:
    check_shape("The codes of the lists", pairwise.list_codes_LV, (None, None))
    sizes["num_lists"], num_more = pairwise.list_codes_LV.shape
    _check_ids("The codes of the lists", pairwise.list_codes_LV, k)
    m += num_more
  _check_ids("The pairs", pairwise.pairs_R2, m)
  return sizes


def _check_ids(name: str, ids, size: int) -> None:
  ids = np.asarray(ids)
  if ids.dtype.kind != "i" or ids.min() < 0 or ids.max() >= size:
    raise ValueError(
      f"{name} must be integers from 0 to {size - 1}, got {ids.dtype} from "
      f"{ids.min()} to {ids.max()}."
    )
