"""Folders that appear whole, with all their files, or not at all."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from vqjax.data import files, json_files
from vqjax.data import temporary as temporary_files

MANIFEST = "manifest.json"


def is_of(folder, name: str) -> bool:
  """Whether a folder has a manifest of the format of this name."""
  try:
    found = json_files.read_json(files.user_path(folder) / MANIFEST)
  except (ValueError, OSError):
    return False
  return found.get("format") == name


@contextlib.contextmanager
def new_folder(
  path, name: str, *, overwrite: bool = False
) -> Iterator[pathlib.Path]:
  """Yields a temporary folder that becomes `path` when the block ends.

  Raises:
    FileExistsError: There is something already, and not `overwrite`; or it is
      no folder of the format `name`, which is never replaced.
  """
  path = files.user_path(path)
  check_new(path, name, overwrite=overwrite)
  files.check_folder(path.parent, name=path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with temporary_files.folder_beside(path) as temporary:
    yield temporary
    check_new(path, name, overwrite=overwrite)
    if path.exists():
      with temporary_files.folder_beside(path) as old:
        os.replace(path, old / path.name)
        try:
          os.replace(temporary, path)
        except BaseException:
          os.replace(old / path.name, path)
          raise
    else:
      os.replace(temporary, path)


def check_new(path, name: str, *, overwrite: bool = False) -> None:
  """Raises FileExistsError unless `new_folder` may write there."""
  path = files.user_path(path)
  if not path.exists():
    return
  if not overwrite:
    raise FileExistsError(
      f"{path} exists already; choose another folder, or allow replacing it: "
      "--overwrite, overwrite=True in Python."
    )
  if not is_of(path, name):
    raise FileExistsError(
      f"{path} exists and is no {name.removeprefix('vqjax ')}, so it is not "
      "replaced; choose another folder."
    )
