"""Residual bits of the vectors of an index, in a `refiner.safetensors`.

  refiner_file.save("refiner.safetensors", bits, of_index=info["sha256"],
                    info={})
  bits = refiner_file.load("refiner.safetensors", info)

They are in the order of the rows of that index, and of no other. Arrays lie
under the names of the fields of `residual_bits.ResidualBits`. The header says,
in addition to what `tensors` needs:

  of_index                checksum of the index file
  vqjax_version, created
  info                    what the caller knows
"""

import pathlib

from vqjax.search.residual_bits import WORD, ResidualBits, num_numbers
from vqjax.storage import tensors

SUFFIX = ".safetensors"
_FORMAT, _VERSION = "vqjax residual bits", 1


def num_bytes(dim: int) -> int:
  """Bytes that the residual bits of a vector take."""
  return num_numbers(dim) * WORD // 8 + 2


def check_path(path) -> None:
  """Raises ValueError unless residual bits may be written under this name."""
  if pathlib.Path(path).suffix != SUFFIX:
    raise ValueError(f"A rabitq refiner must be a file *{SUFFIX}, got {path}.")


def save(
  path,
  bits: ResidualBits,
  *,
  of_index: str,
  info: dict,
  overwrite: bool = False,
) -> None:
  """Writes residual bits, whole or not at all.

  `of_index` is the checksum of the index, `sha256` of its description; `info`
  is what else to keep, plain JSON values.
  """
  check_path(path)
  tensors.save(
    path,
    *tensors.flatten(bits),
    overwrite=overwrite,
    info=info,
    format=_FORMAT,
    version=_VERSION,
    of_index=of_index,
  )


def describe(path) -> dict:
  """Returns what a file of residual bits says of itself.

  Raises ValueError if it is no such file, damaged or changed.
  """
  header, _ = _load(path)
  return {**header["info"], "of_index": header.get("of_index")}


def _load(path) -> tuple[dict, dict]:
  return tensors.load(
    path,
    format=_FORMAT,
    version=_VERSION,
    what="file of residual bits",
    missing="vqjax refiner --kind=rabitq makes it.",
  )


def load(path, index_info: dict) -> ResidualBits:
  """Loads the residual bits of the index of this description.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is no such file, damaged, changed, or of another index.
  """
  header, arrays = _load(path)
  if header.get("of_index") != index_info.get("sha256"):
    raise ValueError(
      f"{path} belongs to an index with checksum {header.get('of_index')}, "
      f"but this index has {index_info.get('sha256')}; make its own by vqjax "
      "refiner --kind=rabitq."
    )
  try:
    return tensors.rebuild(ResidualBits, arrays, dict(header["static"]))
  except ValueError as error:
    raise ValueError(
      f"{path} is no valid file of residual bits: {error}."
    ) from error
