"""Index files of faiss with their descriptions beside them, `NAME.json`.

The description says what the file is of, and its checksum. Each is written
whole or not at all.
"""

import pathlib

import faiss

from vqjax import __version__
from vqjax.data import files
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

  Args:
    index: Any.
    path: The index file.
    info: What the description says, plain values.
    kind: Name and version of the format.
    overwrite: Replaces existing files instead of refusing.
  """
  meta = {
    **dict(zip(("format", "version"), kind, strict=True)),
    **info,
    "vqjax_version": __version__,
    "faiss_version": faiss.__version__,
  }
  beside = files.description_path(path)
  files.check_output(beside, overwrite)
  with faiss_io.write_index(index, path, overwrite=overwrite) as temporary:
    meta |= {
      "bytes": temporary.stat().st_size,
      "sha256": files.sha256(temporary),
    }
  files.write_json(beside, meta, overwrite=True)
  return meta


def load(
  path, *, kind: tuple[str, int], mmap: bool = False
) -> tuple[faiss.Index, dict]:
  """Reads an index file and its description, {} where there is none.

  Args:
    path: The index file.
    kind: As in `save`.
    mmap: Leaves lists on disk, read-only, until they are searched. The
      checksum, which would read them all, is not compared then.

  Raises:
    FileNotFoundError: There is no index file.
    ValueError: One of them is damaged, or the description of another kind.
  """
  path = pathlib.Path(path)
  if not path.is_file():
    raise FileNotFoundError(f"There is no file {path}; check the name.")
  beside = files.description_path(path)
  info = files.parse_description(beside, kind) if beside.is_file() else {}
  if info:
    _check_file(path, info, is_thorough=not mmap)
  flags = faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY if mmap else 0
  try:
    return faiss.read_index(str(path), flags), info
  except (RuntimeError, MemoryError) as error:
    raise ValueError(f"{path} is no index file, or is truncated.") from error


def _check_file(path: pathlib.Path, info: dict, *, is_thorough: bool) -> None:
  """Raises ValueError where the file is not the one described."""
  size = path.stat().st_size
  if size != info.get("bytes"):
    raise ValueError(
      f"{path} is truncated or of another run: it has {size} bytes, its "
      f"description says {info.get('bytes')}."
    )
  if is_thorough and files.sha256(path) != info.get("sha256"):
    raise ValueError(
      f"{path} is damaged, or was changed after it was written: it does not "
      "match the checksum in its description."
    )
