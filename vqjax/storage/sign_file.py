"""Signs of the vectors of an index, in a `signs.safetensors`.

  sign_file.save("signs.safetensors", signs, of_index=info["sha256"], info={})
  signs = sign_file.load("signs.safetensors", info)

They are in the order of the rows of that index, and of no other. Arrays lie
under the names of the fields of `vqjax.search.signs.Signs`. The header says,
beside what `tensors` needs:

  of_index                checksum of the index file
  vqjax_version, created
  info                    what the caller knows
"""

import pathlib

from vqjax.core import check_shape
from vqjax.search.signs import WORD, Signs, num_words
from vqjax.storage import tensors

SUFFIX = ".safetensors"
_FORMAT, _VERSION = "vqjax signs", 1


def num_bytes(dim: int) -> int:
  """Bytes that the signs of a vector take."""
  return num_words(dim) * WORD // 8 + 2


def check_path(path) -> None:
  """Raises ValueError unless signs may be written under this name."""
  if pathlib.Path(path).suffix != SUFFIX:
    raise ValueError(f"Signs go into a file *{SUFFIX}, got {path}.")


def save(
  path, signs: Signs, *, of_index: str, info: dict, overwrite: bool = False
) -> None:
  """Writes signs, whole or not at all.

  Args:
    path: File to write, `*.safetensors`.
    signs: From `make_signs`.
    of_index: Checksum of the index, `sha256` of its description.
    info: What else to keep, plain JSON values.
    overwrite: Replaces a file that is there instead of refusing.
  """
  check_path(path)
  tensors.save(
    path,
    *tensors.flatten(signs),
    overwrite=overwrite,
    info=info,
    format=_FORMAT,
    version=_VERSION,
    of_index=of_index,
  )


def load(path, index_info: dict) -> Signs:
  """Loads the signs of the index of this description, onto the device.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is no file of signs, damaged, changed, or of another index.
  """
  header, arrays = tensors.load(
    path,
    format=_FORMAT,
    version=_VERSION,
    what="file of signs",
    missing="python -m experiments.signs makes the signs of an index.",
  )
  if header.get("of_index") != index_info.get("sha256"):
    raise ValueError(
      f"{path} holds signs of an index with checksum {header.get('of_index')}, "
      f"but this index has {index_info.get('sha256')}; make its own by python "
      "-m experiments.signs."
    )
  try:
    signs = tensors.rebuild(Signs, arrays, dict(header["static"]))
    _check(signs, index_info["num_vectors"], index_info["dim"])
  except ValueError as error:
    raise ValueError(f"{path} is no valid file of signs: {error}.") from error
  return signs


def _check(signs: Signs, num_vectors: int, dim: int) -> None:
  """Raises ValueError where arrays are not of this many vectors."""
  words = num_words(dim)
  for name, shape in (
    ("bits_NW", (num_vectors, words)),
    ("scale_N", (num_vectors,)),
    ("offset_N", (num_vectors,)),
    ("range_22", (2, 2)),
    ("rotation_DE", (dim, words * WORD)),
  ):
    check_shape(name, getattr(signs, name), shape)
