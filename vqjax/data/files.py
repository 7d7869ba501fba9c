"""Files that leave a program: whole or not at all, and saying what they are.

Every output is written under a temporary name and renamed. Beside it, in
`NAME.json`, lies its description: shapes, the codec and the data that made it.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import secrets

import numpy as np

from vqjax import __version__
from vqjax.data import unit

NOT_COMPARED = ("command", "vqjax_version")  # Kept for people.
_SAMPLE_ROWS = 256  # Of the data, for their checksum.


def user_path(path) -> pathlib.Path:
  """Returns a path with `~` at its start replaced by the home folder."""
  return pathlib.Path(os.path.expanduser(path))


@contextlib.contextmanager
def atomic_output(path, overwrite: bool = False):
  """Yields a temporary path whose file becomes `path` when the block ends.

  The file appears whole or not at all: after an error the temporary file is
  removed and an earlier `path` is untouched. Missing folders are created. A
  symbolic link stays: what it points to is replaced.
  """
  path = user_path(path)
  check_output(path, overwrite)
  if path.is_symlink():
    path = path.resolve()
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(
    f".{path.stem}.tmp-{secrets.token_hex(4)}{path.suffix}"
  )
  try:
    temporary.touch()
    mode = temporary.stat().st_mode  # What the umask leaves.
    temporary.unlink()
    yield temporary
    if temporary.stat().st_mode != mode:  # Some libraries make private files.
      temporary.chmod(mode & 0o777)
    with open(temporary, "rb+") as f:
      os.fsync(f.fileno())
    check_output(path, overwrite)
    os.replace(temporary, path)
  except OSError as e:
    if e.errno != errno.ENOSPC:
      raise
    size = temporary.stat().st_size if temporary.exists() else 0
    raise OSError(
      errno.ENOSPC,
      f"The disk is full: could not write {path}, stopped after {size} bytes "
      "(removed again); free some space or choose another folder.",
    ) from e
  finally:
    temporary.unlink(missing_ok=True)


def check_output(path, overwrite: bool = False) -> None:
  """Raises unless a file may be written at `path`; nothing is written."""
  path = user_path(path)
  if path.exists() and not path.is_file():
    raise ValueError(f"{path} must name a regular file to write, not a folder.")
  if path.exists() and not overwrite:
    raise FileExistsError(
      f"{path} exists already; choose another name, or allow replacing it: "
      "--overwrite, overwrite=True in Python."
    )


def sha256(path) -> str:
  """Returns the checksum of a whole file, in hexadecimal."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def identify(vectors) -> dict:
  """Returns what tells these vectors `[N, D]` from others of their shape.

  The checksum covers rows spread over the file, not a change between them: a
  terabyte is not read twice.
  """
  num, dim = vectors.shape
  rows = np.unique(np.linspace(0, num - 1, _SAMPLE_ROWS, dtype=np.int64))
  vectors = unit.raw(vectors)  # A cosine changes no file.
  sample_ND = np.ascontiguousarray(vectors[rows], np.float32)
  return {
    "dim": dim,
    "dtype": np.dtype(vectors.dtype).name,
    "checksum_of_sample": hashlib.sha256(sample_ND).hexdigest()[:16],
  }


def check_same(where, found: dict, wanted: dict, prefix: str = "") -> None:
  """Raises ValueError where codes differ from those wanted, and names it."""
  for name in [*wanted, *sorted(set(found) - set(wanted))]:
    a, b = found.get(name), wanted.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      check_same(where, a, b, f"{prefix}{name}.")
    elif a != b and name not in NOT_COMPARED:
      raise ValueError(
        f"{where} holds other codes: their {prefix}{name} is {a}, now it is "
        f"{b}."
      )


def description_path(path) -> pathlib.Path:
  """Returns where the description of a file of codes lies."""
  return pathlib.Path(f"{os.fspath(path)}.json")


def read_description(path, kind: tuple[str, int]) -> dict:
  """Returns the description beside a file of codes, empty without one."""
  path = description_path(path)
  return parse_description(path, kind) if path.is_file() else {}


def parse_description(path: pathlib.Path, kind: tuple[str, int]) -> dict:
  """Returns the description in a file; `kind` is name and version of a format.

  Raises ValueError where it is damaged, or of another kind.
  """
  name, version = kind
  try:
    found = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is damaged, or no JSON file: {error}.") from error
  if not isinstance(found, dict) or found.get("format") != name:
    raise ValueError(f"{path} must have format {name!r}: it is not of vqjax.")
  if found.get("version") != version:
    raise ValueError(
      f"{path} has version {found.get('version')!r}, this vqjax {__version__} "
      f"reads version {version}; use the vqjax that wrote it, "
      f"{found.get('vqjax_version')}."
    )
  return found


def write_json(path, value: dict, *, overwrite: bool = False) -> None:
  """Writes a description or record, whole or not at all."""
  with atomic_output(path, overwrite) as temporary:
    temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
