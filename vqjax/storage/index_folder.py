"""Folders of indexes: a manifest that names the files of an index.

  manifest.json  {"files": {"codec": "codec.safetensors",
                            "index": "index.faiss", ...}, ...}

Names are relative to the folder. Which files belong together is checked as they
are opened: the description of the index has the fingerprint of the codec, and
refiners have the checksum of the index.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterator

from vqjax import __version__
from vqjax.data import files
from vqjax.data import temporary as temporary_files

MANIFEST = "manifest.json"
_KIND = ("vqjax index folder", 1)
ROLES = ("codec", "index", "decoders", "refiner")


def is_folder(path) -> bool:
  """Whether a path is a folder with the manifest of an index."""
  return (files.user_path(path) / MANIFEST).is_file()


def write_manifest(
  folder, paths: dict[str, str], info: dict, *, overwrite: bool = False
) -> None:
  """Writes the manifest: last, when all files are there.

  Args:
    folder: The folder.
    paths: Names of files in it by their role, one of `ROLES`.
    info: What else the manifest says, plain values.
    overwrite: Replaces an existing manifest.
  """
  unknown = set(paths) - set(ROLES)
  if unknown:
    raise ValueError(f"Files of an index are {ROLES}, got {sorted(unknown)}.")
  value = {
    "format": _KIND[0],
    "version": _KIND[1],
    "files": paths,
    **info,
    "vqjax_version": __version__,
  }
  files.write_json(pathlib.Path(folder) / MANIFEST, value, overwrite=overwrite)


def read_manifest(folder) -> tuple[dict[str, str], dict]:
  """Returns the paths of the files by role, and what else the manifest says.

  Raises:
    FileNotFoundError: There is no such folder, manifest, or file.
    ValueError: The manifest is damaged.
  """
  folder = files.user_path(folder)
  path = folder / MANIFEST
  if not path.is_file():
    raise FileNotFoundError(
      f"{folder} is no folder of an index: it has no {MANIFEST}. Index.save, "
      "vqjax build_index --num_lists and vqjax ivf_pipeline make one."
    )
  info = files.parse_description(path, _KIND)
  names = info.pop("files", None)
  if not isinstance(names, dict) or not {"codec", "index"} <= set(names):
    raise ValueError(
      f"{path} is damaged: it must name the files of a codec and an index."
    )
  found = {}
  for role, name in names.items():
    if role not in ROLES or not _is_inside(name):
      raise ValueError(
        f"{path} is damaged: it names {name!r} as {role!r}; names must be "
        "files of the folder."
      )
    found[role] = str(folder / name)
    if not os.path.exists(found[role]):
      raise FileNotFoundError(f"{folder} lacks {name}, its {role}.")
  return found, info


def _is_inside(name) -> bool:
  """Whether a name stays in the folder."""
  if not isinstance(name, str) or os.path.isabs(name):
    return False
  return ".." not in pathlib.PurePath(name).parts


@contextlib.contextmanager
def new_folder(path, *, overwrite: bool = False) -> Iterator[pathlib.Path]:
  """Yields a temporary folder that becomes `path` when the block ends.

  Raises:
    FileExistsError: There is something already, and not `overwrite`; or it is
      no folder of an index, which is never replaced.
  """
  path = files.user_path(path)
  _check_new(path, overwrite)
  files.check_folder(path.parent, name=path)
  path.parent.mkdir(parents=True, exist_ok=True)
  with temporary_files.folder_beside(path) as temporary:
    yield temporary
    _check_new(path, overwrite)
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


def _check_new(path: pathlib.Path, overwrite: bool) -> None:
  if not path.exists():
    return
  if not overwrite:
    raise FileExistsError(
      f"{path} exists already; choose another folder, or allow replacing it by "
      "overwrite=True."
    )
  if not is_folder(path):
    raise FileExistsError(
      f"{path} exists and is no folder of an index, so it is not replaced; "
      "choose another folder."
    )
