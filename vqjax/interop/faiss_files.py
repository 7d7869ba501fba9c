"""Index files of faiss with their descriptions next to them, `NAME.json`.

The description says what the file is of, and its checksum. Each is written
whole or not at all.
"""

import faiss

from vqjax import __version__
from vqjax.data import files, json_files
from vqjax.interop import faiss_io


def save(
  index: faiss.Index,
  path,
  info: dict,
  *,
  kind: tuple[str, int],
  overwrite: bool = False,
) -> dict:
  """Writes index and description; returns the description.

  `info` is what the description says, plain values; `kind` is name and version
  of the format.
  """
  meta = {
    **dict(zip(("format", "version"), kind, strict=True)),
    **info,
    "vqjax_version": __version__,
    "faiss_version": faiss.__version__,
  }
  with faiss_io.write_index(index, path, overwrite=overwrite, description=meta):
    pass
  return meta


def load(
  path, *, kind: tuple[str, int], mmap: bool = False
) -> tuple[faiss.Index, dict]:
  """Reads an index file and its description, {} if there is none.

  `mmap` leaves lists on disk, read-only, until they are searched. The checksum,
  which would read them all, is not compared then.

  Raises:
    FileNotFoundError: There is no index file.
    ValueError: One of them is damaged, or the description of another kind.
  """
  path = files.user_path(path)
  if not path.is_file():
    raise FileNotFoundError(f"There is no file {path}; check the name.")
  info = files.read_description(path, kind)
  if info:
    described = files.description_path(path)
    json_files.check_fields(described, info, {"bytes": int, "sha256": str})
    files.check_file(path, info, is_thorough=not mmap)
  flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if mmap else 0
  try:
    return faiss.read_index(str(path), flags), info
  except (RuntimeError, MemoryError) as error:
    raise ValueError(f"{path} is no index file, or is truncated.") from error
