"""Portable codecs: `codec.safetensors` and `codec.json`, without pickle.

The arrays of the parameters are stored under the names of their fields
(`blocks.codebooks_TKD` in a nested one; None is left out), those of a ranker
(`vqjax.codecs.qinco_ranker`) under `ranker.`. The header, which says what codec
it is and how it was made, is in the metadata of the .safetensors, so that this
file alone is a codec, and for people and other programs once more in
codec.json:

  format, version    "vqjax codec" and the version of this layout
  codec, static      name in the registry; fields that are no arrays
  dim, codebook_sizes
  fingerprint        of the parameters; checked whenever a codec is loaded
  ranker             fingerprint of the ranker, if there is one; checked too
  info_digest        of info; checked then too
  vqjax_version, created
  info               what the caller knows: encode (keyword arguments of
                     `encode`), metric, scale and unit of reports, training
"""

import datetime
import json
import pathlib
from typing import Any, NamedTuple

from absl import logging

from vqjax import __version__
from vqjax.codecs import qinco_search, registry
from vqjax.data import files, hub
from vqjax.data.files import atomic_output
from vqjax.interop import rqvae_files, torch_qinco
from vqjax.storage import tensors
from vqjax.storage.tensors import digest as _digest
from vqjax.storage.tensors import flatten as _flatten
from vqjax.storage.tensors import rebuild as _rebuild
from vqjax.training import checkpoints

TENSORS_NAME = "codec.safetensors"
HEADER_NAME = "codec.json"
_FORMAT = "vqjax codec"
_VERSION = 1
_RELEASED = (".pt", ".pth")
_RANKER = "ranker."  # Before the names of its arrays.


class LoadedCodec(NamedTuple):
  """A codec from a file; `registry.get(name)` has its functions."""

  name: str
  params: Any
  info: dict
  fingerprint: str
  ranker: Any = None  # `qinco_search.Ranker`.


def fingerprint(params) -> str:
  """Returns 16 hex digits that tell any two sets of parameters apart.

  They depend on the names, types, shapes and numbers of all arrays and on the
  static fields, and are the same on every machine.
  """
  return _digest(*_flatten(params))


def _make_header(name: str, params, info: dict) -> dict:
  module = registry.get(name)
  if not isinstance(params, module.Params):
    raise TypeError(
      f"Codec {name!r} has parameters {module.Params.__name__}, got "
      f"{type(params).__name__}."
    )
  return {
    "format": _FORMAT,
    "version": _VERSION,
    "codec": name,
    "dim": module.dim(params),
    "codebook_sizes": list(module.codebook_sizes(params)),
    "static": _flatten(params)[1],
    "fingerprint": fingerprint(params),
    "vqjax_version": __version__,
    "created": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
    "info": info,
    "info_digest": tensors.digest_info(info),
  }


def save_codec(
  folder,
  codec_name: str,
  params,
  *,
  info: dict,
  ranker=None,
  overwrite: bool = False,
) -> pathlib.Path:
  """Writes a codec into a folder, whole or not at all; returns its file.

  `codec_name` is in the registry; `info` is what else to keep, plain JSON
  values, see the file's docstring; `ranker` is of `qinco_ranker.fit`, or None.
  """
  folder = files.user_path(folder)
  header = _make_header(codec_name, params, info)
  arrays = _flatten(params)[0]
  if ranker is not None:
    header["ranker"] = fingerprint(ranker)
    arrays |= _flatten(ranker, _RANKER)[0]
  text = tensors.to_json(header)
  # The inner file appears first: a codec.json has its arrays next to it, and
  # the one of an earlier codec is gone before.
  with atomic_output(folder / HEADER_NAME, overwrite) as header_path:
    header_path.write_text(text + "\n", encoding="utf-8")
    with atomic_output(folder / TENSORS_NAME, overwrite) as tensors_path:
      tensors.write(tensors_path, arrays, text)
      (folder / HEADER_NAME).unlink(missing_ok=True)
  return folder / TENSORS_NAME


def _local(path) -> pathlib.Path:
  """A path on this machine; the file in the cache for one of the hub."""
  if hub.is_address(path):
    return hub.fetch(path, TENSORS_NAME)
  return files.user_path(path)


def _find(path: pathlib.Path) -> pathlib.Path:
  """The file of a codec, given that file or the folder it is in."""
  if path.is_file():
    return path
  if not path.exists():
    raise FileNotFoundError(
      f"There is no {path}; expected a run folder, a {TENSORS_NAME} or a "
      "released .pt checkpoint."
    )
  if (path / TENSORS_NAME).is_file():
    return path / TENSORS_NAME
  if (path / "checkpoints").is_dir() or (path / "config.json").is_file():
    raise FileNotFoundError(
      f"{path} has no {TENSORS_NAME} and no checkpoint yet: the training run "
      "has not come that far. Run its command again to resume: "
      f"vqjax train --config=CONFIG --workdir={path}."
    )
  suffixes = (".safetensors", *_RELEASED)
  found = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
  if len(found) != 1:
    names = ", ".join(p.name for p in found[:5]) or "none"
    raise FileNotFoundError(
      f"Folder {path} must hold {TENSORS_NAME}, or exactly one .safetensors "
      f"or .pt file; found {len(found)}: {names}."
    )
  return found[0]


def num_bytes(path) -> int:
  """Returns the bytes of the file of a codec; 0 if it is a checkpoint."""
  try:
    return _find(_local(path)).stat().st_size
  except FileNotFoundError:
    return 0


def _parse_header(path: pathlib.Path, text: bytes | str | None) -> dict:
  """Reads and checks the header of `path`."""
  header = tensors.parse_header(
    path, text, format=_FORMAT, version=_VERSION, what="codec"
  )
  if header.get("codec") not in registry.names():
    raise ValueError(
      f"{path} holds codec {header.get('codec')!r}, which this vqjax does not "
      f"know; it has {', '.join(registry.names())}."
    )
  return header


def _check_json(path: pathlib.Path, header: dict) -> None:
  """Refuses a codec.json that describes another codec than its neighbour."""
  json_path = path.with_name(HEADER_NAME)
  if path.name != TENSORS_NAME or not json_path.is_file():
    return
  described = _parse_header(json_path, json_path.read_bytes())
  if described["fingerprint"] != header["fingerprint"]:
    raise ValueError(
      f"{json_path} describes codec {described['fingerprint']}, but "
      f"{path.name} next to it is codec {header['fingerprint']}; remove "
      f"{HEADER_NAME} to use {path.name}, which is complete without it."
    )
  for name, a, b in files.differences(described["info"], header["info"]):
    raise ValueError(
      f"{json_path} says {name}={a}, but {path.name} next to it says {b}; "
      f"remove {HEADER_NAME} to use {path.name}, which is complete without it."
    )


def load_codec(path) -> LoadedCodec:
  """Loads a codec: a run folder, a .safetensors, a released .pt, .pth or .npz.

  A folder may hold `codec.safetensors`, or else one such file of any name.
  `hf://owner/name[@revision]` is a codec on the Hugging Face hub.
  Of a training run that has not finished it is the best checkpoint.

  Raises:
    FileNotFoundError: If there is no codec.
    ConnectionError: If the hub does not answer, and the cache has no codec.
    ValueError: If the file is no codec, damaged or changed.
  """
  path = _local(path)
  if (unfinished := _of_unfinished(path)) is not None:
    return unfinished
  path = _find(path)
  if path.suffix.lower() in _RELEASED:
    name, params, info = torch_qinco.load_checkpoint(path)
    return LoadedCodec(name, params, info, fingerprint(params))
  if path.suffix.lower() == ".npz":
    name, params, info = rqvae_files.load_npz(path)
    return LoadedCodec(name, params, info, fingerprint(params))
  if path.suffix.lower() != ".safetensors":
    raise ValueError(
      f"{path} must be a run folder, a .safetensors file, a .pt or .pth "
      f"checkpoint or an .npz of codebooks, got suffix {path.suffix!r}."
    )
  text, arrays = tensors.read(path)
  header = _parse_header(path, text)
  _check_json(path, header)
  ranker = _take_ranker(path, header, arrays)
  found = tensors.check_digest(path, arrays, header)
  params = _make_params(path, header, arrays)
  return LoadedCodec(header["codec"], params, header["info"], found, ranker)


def _take_ranker(path: pathlib.Path, header: dict, arrays: dict):
  """The ranker, which it takes out of the arrays; None without one."""
  names = [name for name in arrays if name.startswith(_RANKER)]
  taken = {name.removeprefix(_RANKER): arrays.pop(name) for name in names}
  wanted = header.get("ranker")
  if (_digest(taken, {}) if taken else None) != wanted:
    raise ValueError(
      f"{path} was changed after it was written: its ranker does not match its "
      "fingerprint."
    )
  return _rebuild(qinco_search.Ranker, taken, {}) if taken else None


def _make_params(path: pathlib.Path, header: dict, arrays: dict):
  """Builds the parameters and compares their sizes with the header."""
  module = registry.get(header["codec"])
  try:
    params = _rebuild(module.Params, arrays, dict(header["static"]))
    sizes = [module.dim(params), list(module.codebook_sizes(params))]
  except (ValueError, TypeError, AttributeError, IndexError) as error:
    raise ValueError(
      f"{path} is no codec {header['codec']!r}: {error}."
    ) from error
  wanted = [header.get("dim"), header.get("codebook_sizes")]
  if sizes != wanted:
    raise ValueError(
      f"{path} has a header that does not fit its arrays: dim and "
      f"codebook_sizes are {sizes}, expected {wanted}."
    )
  return params


def _of_unfinished(folder: pathlib.Path) -> LoadedCodec | None:
  """The best checkpoint of a run without a codec; None if there is none."""
  if (folder / TENSORS_NAME).exists() or not (folder / "checkpoints").is_dir():
    return None
  try:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    made = config["derived"]["codec"]
    name, static, info = made["name"], made["static"], made["info"]
    params_class = registry.get(name).Params
  except (OSError, ValueError, KeyError, TypeError, RecursionError):
    return None  # Of an older version, or damaged.
  saved = checkpoints.Checkpoints(folder / "checkpoints", read_only=True)
  try:
    found = saved.restore_best()
  finally:
    saved.close()
  if found is None:
    return None
  step, state = found
  arrays = tensors.by_name(state["params"])
  params = _rebuild(params_class, arrays, static)
  logging.warning(
    "The training run in %s has not finished. Using its best checkpoint, of "
    "step %d.",
    *(folder, step),
  )
  return LoadedCodec(name, params, info, fingerprint(params))
