"""Folders of indexes: a manifest that names the files of an index.

  manifest.json  {"files": {"codec": "codec.safetensors",
                            "index": "index.faiss", ...}, ...}

Names are relative to the folder. Which files belong together is checked as they
are opened: the description of the index has the fingerprint of the codec, and
refiners have the checksum of the index.

An index that grows or is made again gets another generation: a folder of an
index in this folder, `generation-00002`, whose files the manifest names. It is
written whole, then the manifest is replaced, so that a kill at any time leaves
an index that can be searched.
"""

import os
import pathlib
import shutil

from vqjax import __version__
from vqjax.data import files, json_files
from vqjax.storage.folders import MANIFEST, is_of

KIND = ("vqjax index folder", 1)
ROLES = ("codec", "index", "decoders", "refiner")
_OF_FORMAT = ("format", "version", "vqjax_version")
_GENERATION = "generation-{:05d}"
_FIELDS = {
  "generation": (int, "an integer"),
  "added": (list, "a list"),
  "encode": (dict, "an object"),
}


def write_manifest(
  folder, paths: dict[str, str], info: dict, *, overwrite: bool = False
) -> None:
  """Writes the manifest: last, when all files are there.

  `paths` are names of files in the folder by their role, one of `ROLES`; `info`
  is what else the manifest says, plain values.
  """
  unknown = set(paths) - set(ROLES)
  if unknown:
    raise ValueError(f"Files of an index are {ROLES}, got {sorted(unknown)}.")
  value = {
    "format": KIND[0],
    "version": KIND[1],
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
  info = files.parse_description(path, KIND)
  for name, (kind, what) in _FIELDS.items():
    if type(info.get(name, kind())) is not kind:
      raise ValueError(
        f"{path} is damaged: {name!r} must be {what}, got {info[name]!r:.50}."
      )
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


def generation_of(folder) -> int:
  """Returns the number of the generation; 1 for a folder that has but one."""
  try:
    info = json_files.read_json(files.user_path(folder) / MANIFEST)
  except (OSError, ValueError):
    return 1
  return info.get("generation", 1)


def next_generation(folder) -> pathlib.Path:
  """Returns the folder that the next generation of an index is written to."""
  name = _GENERATION.format(generation_of(folder) + 1)
  return files.user_path(folder) / name


def switch(folder, generation: pathlib.Path, info: dict) -> None:
  """Makes a finished `generation` the one that the folder stands for.

  `info` is what the manifest says besides, with that of the generation itself.
  """
  paths, own = read_manifest(generation)
  names = {
    role: f"{generation.name}/{pathlib.Path(path).name}"
    for role, path in paths.items()
  }
  info = {**own, **info, "generation": int(generation.name[-5:])}
  info = {k: v for k, v in info.items() if k not in _OF_FORMAT}
  write_manifest(folder, names, info, overwrite=True)


def remove_generations(folder, keep: int = 2) -> list[str]:
  """Removes all generations but the last ones; returns the names removed.

  The first one is no folder of its own, and stays.
  """
  folder, removed = files.user_path(folder), []
  for number in range(2, generation_of(folder) - keep + 1):
    path = folder / _GENERATION.format(number)
    if is_of(path, KIND[0]):
      shutil.rmtree(path)
      removed.append(path.name)
  return removed


def _is_inside(name) -> bool:
  """Whether a name stays in the folder."""
  if not isinstance(name, str) or os.path.isabs(name):
    return False
  return ".." not in pathlib.PurePath(name).parts
