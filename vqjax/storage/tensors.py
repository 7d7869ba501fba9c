"""Frozen dataclasses of arrays in .safetensors files, under a JSON header.

Arrays are stored under the names of their fields (`blocks.codebooks_TKD` in a
nested one; None is left out). The header is JSON text under `vqjax` in the
file's metadata. It says its `format` and `version`, holds the fields that are
no arrays (`static`) and what the caller knows (`info`), a `fingerprint` of
arrays and static values, and an `info_digest`, by which a changed file is found
out.
"""

import dataclasses
import datetime
import hashlib
import json
import pathlib
import typing

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from safetensors import numpy as safetensors_numpy

from vqjax import __version__
from vqjax.data import files, json_files
from vqjax.data.files import atomic_output


def flatten(params, prefix: str = "") -> tuple[dict, dict]:
  """Splits parameters into arrays and static values by field path.

  The entries of a tuple are numbered: `layers.0`, `layers.1`.
  """
  arrays, static = {}, {}

  def add(name, value):
    if isinstance(value, tuple):
      for at, each in enumerate(value):
        add(f"{name}.{at}", each)
    elif dataclasses.is_dataclass(value):
      inner = flatten(value, f"{name}.")
      arrays.update(inner[0])
      static.update(inner[1])
    elif value is not None:
      arrays[name] = np.asarray(value, order="C")

  for field in dataclasses.fields(params):
    value, name = getattr(params, field.name), prefix + field.name
    if field.metadata.get("pytree_node", True):
      add(name, value)
    else:
      static[name] = value
  return arrays, static


def rebuild(cls: type, arrays: dict, static: dict, prefix: str = ""):
  """Inverse of `flatten`; takes what it uses out of the dicts."""
  hints, values = typing.get_type_hints(cls), {}

  def take(hint, name):
    if typing.get_origin(hint) is tuple:
      return tuple(
        take(typing.get_args(hint)[0], f"{name}.{at}")
        for at in range(_count(arrays, name))
      )
    if dataclasses.is_dataclass(hint):
      return rebuild(hint, arrays, static, f"{name}.")
    if name in arrays:
      return jnp.asarray(arrays.pop(name))
    if type(None) in typing.get_args(hint):
      return None
    raise ValueError(f"it lacks the array {name}")

  for field in dataclasses.fields(cls):
    name = prefix + field.name
    if field.metadata.get("pytree_node", True):
      values[field.name] = take(hints[field.name], name)
    elif name in static:
      values[field.name] = static.pop(name)
    else:
      raise ValueError(f"its header lacks the value {name}")
  if not prefix and (arrays or static):
    names = ", ".join(sorted([*arrays, *static]))
    raise ValueError(f"{cls.__name__} has no field for {names}")
  return cls(**values)


def _count(arrays: dict, name: str) -> int:
  """Entries of a tuple: numbers that follow its name, from 0 on."""
  start = f"{name}."
  tails = [key[len(start) :] for key in arrays if key.startswith(start)]
  found = {tail.partition(".")[0] for tail in tails}
  return next(at for at in range(len(found) + 1) if str(at) not in found)


def by_name(tree, name: str = "") -> dict:
  """Returns the arrays in nested dicts and lists by the names of `flatten`."""
  if isinstance(tree, dict | list | tuple):
    parts = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found = [by_name(each, f"{name}.{key}") for key, each in parts]
    return {key: x for each in found for key, x in each.items()}
  return {} if tree is None else {name[1:]: tree}


def digest(arrays: dict, static: dict) -> str:
  """Returns 16 hex digits that tell any two sets of arrays apart."""
  sha = hashlib.sha256(json.dumps(static, sort_keys=True).encode())
  for name, x in sorted(arrays.items()):
    sha.update(f"\n{name} {x.dtype.name} {x.shape}\n".encode())
    sha.update(x.astype(x.dtype.newbyteorder("<"), copy=False).tobytes())
  return sha.hexdigest()[:16]


def digest_info(info: dict) -> str:
  """Returns 16 hex digits that tell any two `info` of headers apart."""
  text = json.dumps(json.loads(to_json(info)), sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value):
  """Turns scalars of numpy and JAX into what JSON knows."""
  if isinstance(value, np.generic | np.ndarray | jax.Array):
    return np.asarray(value).tolist()
  raise TypeError(f"info must hold plain values, got {type(value).__name__}.")


def to_json(header: dict) -> str:
  """Returns the text of a header; numpy and JAX scalars may be in it."""
  try:
    return json.dumps(header, indent=2, default=_plain, allow_nan=False)
  except ValueError as error:
    raise ValueError(f"info must hold finite numbers ({error}).") from error


def write(path: pathlib.Path, arrays: dict, text: str) -> None:
  """Writes arrays under a header from `to_json`."""
  safetensors_numpy.save_file(arrays, path, metadata={"vqjax": text})


def read(path: pathlib.Path) -> tuple[str | None, dict]:
  """Returns the text of the header, None without one, and the arrays."""
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      text = (file.metadata() or {}).get("vqjax")
      names = file.keys()
      return text, {name: file.get_tensor(name) for name in names}
  except safetensors.SafetensorError as error:
    raise ValueError(
      f"{path} is truncated or no safetensors file ({error})."
    ) from error
  except (AttributeError, TypeError, KeyError) as error:
    raise ValueError(
      f"{path} holds numbers of a type that numpy does not have ({error}): "
      "expected float32, float16, bfloat16, integers or booleans."
    ) from error


def save(
  path, arrays: dict, static: dict, *, overwrite: bool, info: dict, **header
) -> None:
  """Writes arrays and static values, whole or not at all.

  Both are from `flatten`; `info` is what the caller knows, plain JSON values,
  and `header` has `format`, `version`, and what else this kind of file says.
  """
  header |= {
    "static": static,
    "fingerprint": digest(arrays, static),
    "vqjax_version": __version__,
    "created": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
    "info": info,
    "info_digest": digest_info(info),
  }
  text = to_json(header)
  with atomic_output(path, overwrite) as temporary:
    write(temporary, arrays, text)


def load(
  path, *, format: str, version: int, what: str, missing: str
) -> tuple[dict, dict]:
  """Reads what `save` wrote: the header, and the arrays.

  It must have this `format` and `version`. People read `what` it is, and what
  to do if it is `missing`.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is of another kind, damaged or changed.
  """
  path = files.user_path(path)
  if not path.is_file():
    raise FileNotFoundError(f"There is no file {path}; {missing}")
  text, arrays = read(path)
  header = parse_header(path, text, format=format, version=version, what=what)
  check_digest(path, arrays, header)
  return header, arrays


def parse_header(
  path: pathlib.Path,
  text: bytes | str | None,
  *,
  format: str,
  version: int,
  what: str,
) -> dict:
  """Reads a header and checks what all of them have; `what` is for people."""
  if text is None:
    raise ValueError(
      f"{path} is no {what} of vqjax: its metadata has no entry 'vqjax'. "
      "Expected a file that vqjax has written."
    )
  try:
    header = json_files.parse_json(text, "it")
  except ValueError as error:
    raise ValueError(f"{path} has a damaged header: {error}") from error
  files.check_kind(path, header, (format, version))
  for key, kind in (("static", dict), ("info", dict), ("fingerprint", str)):
    if not isinstance(header.get(key), kind):
      raise ValueError(f"{path} has a damaged header: no valid {key!r}.")
  return header


def check_digest(path: pathlib.Path, arrays: dict, header: dict) -> str:
  """Returns the fingerprint; raises ValueError unless it is the header's."""
  found = digest(arrays, header["static"])
  if found != header["fingerprint"]:
    raise ValueError(
      f"{path} was changed after it was written: its parameters have "
      f"fingerprint {found}, expected {header['fingerprint']}."
    )
  wanted = header.get("info_digest")  # None in files of vqjax 0.1.
  if wanted is not None and digest_info(header["info"]) != wanted:
    raise ValueError(
      f"{path} was changed after it was written: the options and figures in "
      "its header (info) do not match their checksum."
    )
  return found
