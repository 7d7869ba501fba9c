"""Files that leave a program: whole or not at all, and saying what they are.

Every output is written under a temporary name and renamed. Next to it, in
`NAME.json`, lies its description: shapes, the codec and the data that made it,
and the bytes and the checksum of the file.

A file and its description appear in this order: the finished file under its
temporary name; an earlier file is removed if it is to be replaced; the
description; the file. So a program that is killed leaves a description without
its file at worst, which counts as no output. A file without a description was
made elsewhere.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re

import numpy as np

from vqjax import __version__
from vqjax.data import temporary as temporary_files
from vqjax.data import unit
from vqjax.data.json_files import read_json
from vqjax.data.temporary import remove_stale

try:
  import fcntl
except ImportError:  # Not POSIX.
  fcntl = None

NOT_COMPARED = ("command", "vqjax_version")  # Kept for people.
_SAMPLE_ROWS = 256  # Of the data, for their checksum.
_OURS = "vqjax "  # Begins the format of our descriptions.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FULL_WORDS = re.compile(  # Of libraries that lose the number of the error.
  r"No space left|StorageFull|Os \{ code: (28|122|27)\b|errno = (28|122|27)\b"
  r"|Disk quota|File too large|requested and \d+ written"
)


def user_path(path) -> pathlib.Path:
  """Returns a path with `~` at its start replaced by the home folder."""
  return pathlib.Path(os.path.expanduser(path))


@contextlib.contextmanager
def atomic_output(
  path, overwrite: bool = False, *, description: dict | None = None
):
  """Yields a temporary path whose file becomes `path` when the block ends.

  The file appears whole or not at all: after an error the temporary file is
  removed and an earlier `path` is untouched. Missing folders are created, a
  symbolic link is followed. Of two writers without `overwrite` one succeeds.

  A `description` is written next to the file, with its `bytes` and `sha256`,
  which are added to this dict; the block may add to it too.

  Raises:
    FileExistsError: There is such a file already.
    OSError: The disk is full.
  """
  path = user_path(path)
  _refuse(path, overwrite)
  if description is not None:
    _refuse_foreign(path, overwrite)
  target = pathlib.Path(os.path.realpath(path))
  _at_point("make folder", target.parent)
  target.parent.mkdir(parents=True, exist_ok=True)
  remove_stale(target.parent)
  with temporary_files.beside(target) as temporary:
    try:
      mode = _touch(temporary)
      _at_point("write", temporary)
      yield temporary
      if temporary.stat().st_mode != mode:  # Some libraries: private files.
        temporary.chmod(mode & 0o777)
      with open(temporary, "rb+") as f:
        os.fsync(f.fileno())
      if description is None:
        _place(temporary, path, target, overwrite)
      else:
        _place_described(temporary, path, target, overwrite, description)
    except Exception as error:
      if not is_full_disk(error):
        raise
      raise _full(path, temporary) from error


def _at_point(name: str, path) -> None:
  temporary_files.at_point(name, path)


def _place(temporary, path, target, overwrite: bool) -> None:
  """Puts a finished file in its place, without a description of another."""
  beside = description_path(path)
  with _locked(target.parent) as sync:
    if beside.is_file() and _is_ours(beside):
      _refuse(path, overwrite)
      _at_point("remove", beside)
      beside.unlink(missing_ok=True)
    _rename(temporary, target, overwrite)
    sync()


def _place_described(temporary, path, target, overwrite, description) -> None:
  """Puts a finished file in its place, behind its description."""
  description |= {
    "bytes": temporary.stat().st_size,
    "sha256": sha256(temporary),
  }
  beside = pathlib.Path(os.path.realpath(description_path(path)))
  with (
    temporary_files.beside(beside) as text,
    _locked(target.parent) as sync,
  ):
    _at_point("describe", text)
    with open(text, "x", encoding="utf-8") as f:
      f.write(_to_text(description))
      f.flush()
      os.fsync(f.fileno())
    _refuse(path, overwrite)
    if overwrite:
      _at_point("remove", target)
      target.unlink(missing_ok=True)
    _at_point("rename", beside)
    os.replace(text, beside)
    sync()
    _rename(temporary, target, overwrite)
    sync()


def _rename(temporary, target, overwrite: bool) -> None:
  """Renames; without `overwrite` never onto a file that has appeared since."""
  _at_point("rename", target)
  if overwrite:
    os.replace(temporary, target)
    return
  try:
    os.link(temporary, target)
  except FileExistsError:
    _refuse(target, overwrite)
    raise
  except OSError:  # A file system without links.
    _refuse(target, overwrite)
    os.replace(temporary, target)


@contextlib.contextmanager
def _locked(folder: pathlib.Path):
  """Yields a function that writes the folder to disk; alone in it if it can.

  The lock is gone with the process, however that ends.
  """
  try:
    fd = os.open(folder, os.O_RDONLY)
  except OSError:  # No folder can be opened on this system.
    yield lambda: None
    return

  def sync():
    with contextlib.suppress(OSError):
      os.fsync(fd)

  try:
    if fcntl is not None:
      with contextlib.suppress(OSError):  # Some network file systems.
        fcntl.flock(fd, fcntl.LOCK_EX)
    yield sync
  finally:
    os.close(fd)


def _touch(temporary: pathlib.Path) -> int:
  """Returns the mode that the umask leaves a new file."""
  temporary.touch(exist_ok=False)
  mode = temporary.stat().st_mode
  temporary.unlink()
  return mode


def is_full_disk(error: BaseException) -> bool:
  """Whether a disk, or what a user may put on it, is full."""
  is_known = isinstance(error, OSError) and error.errno in _FULL
  return is_known or bool(_FULL_WORDS.search(str(error)))


def _full(path: pathlib.Path, temporary: pathlib.Path) -> OSError:
  size = temporary.stat().st_size if temporary.exists() else 0
  return OSError(
    errno.ENOSPC,
    f"The disk is full: could not write {path}, stopped after {size} bytes "
    "(removed again); free some space or choose another folder.",
  )


def check_output(
  path, overwrite: bool = False, *, num_bytes: int = 0, described: bool = False
) -> None:
  """Raises unless a file can be written at `path`; leaves nothing behind.

  It is tried in that folder, or in the nearest one that exists.

  `num_bytes` is what the file is going to take; a guess may be too small. If it
  is `described`, an existing file with a description is no error: `find_made`
  tells what it is.

  Raises:
    FileExistsError: There is such a file already.
    OSError: Nothing can be written there, or not that much.
  """
  path = user_path(path)
  if described:
    _refuse_foreign(path, overwrite)
  is_described = described and description_path(path).is_file()
  _refuse(path, overwrite or is_described)
  target = pathlib.Path(os.path.realpath(path))
  check_folder(target.parent, num_bytes=num_bytes, name=path)


def _refuse_foreign(path, overwrite: bool) -> None:
  """Raises if what lies in the place of a description is none of ours."""
  beside = description_path(path)
  if not overwrite and beside.exists() and not _is_ours(beside):
    raise FileExistsError(
      f"{beside} exists already and is damaged, or not of vqjax, but the "
      f"description of {path} would go there; choose another name, remove it, "
      "or add --overwrite."
    )


def _is_ours(path) -> bool:
  """Whether a JSON file is a description that vqjax has written."""
  try:
    return str(read_json(path).get("format")).startswith(_OURS)
  except (ValueError, OSError):
    return False


def check_folder(folder, *, num_bytes: int = 0, name=None) -> None:
  """Raises OSError unless files can be written into `folder`.

  The folder need not exist. `name` is what the message calls the output.
  """
  name = folder if name is None else name
  folder = user_path(folder).absolute()
  while not folder.exists() and folder != folder.parent:
    folder = folder.parent
  if not folder.is_dir():
    raise NotADirectoryError(
      f"{name} cannot be written: {folder} is a file, not a folder."
    )
  remove_stale(folder)
  with temporary_files.beside(folder / "try") as temporary:
    try:
      with open(temporary, "xb") as file:
        file.write(b"0")
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
      if is_full_disk(error):
        raise _full(name, temporary) from error
      raise OSError(
        f"{name} cannot be written: {error.strerror or error} in {folder}; "
        "choose another folder, or change its permissions."
      ) from error
  check_space(folder, num_bytes, name)


def check_space(folder, num_bytes: int, name) -> None:
  """Raises OSError if a folder has no room; `name` is of the output."""
  if not hasattr(os, "statvfs"):
    return
  found = os.statvfs(folder)
  free = found.f_bavail * found.f_frsize
  if free < num_bytes:
    raise OSError(
      errno.ENOSPC,
      f"{name} will take about {num_bytes / 1e6:,.1f} MB, but {folder} has "
      f"{free / 1e6:,.1f} MB free; free some space or choose another folder.",
    )


def _refuse(path: pathlib.Path, overwrite: bool) -> None:
  """Raises if the path exists or cannot be a file."""
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
  is_unit, vectors = isinstance(vectors, unit.UnitVectors), unit.raw(vectors)
  sample_ND = np.ascontiguousarray(vectors[rows], np.float32)
  return {
    "dim": dim,
    "dtype": np.dtype(vectors.dtype).name,
    "checksum_of_sample": hashlib.sha256(sample_ND).hexdigest()[:16],
    **({"is_unit": True} if is_unit else {}),  # The same file, normalised.
  }


def differences(found: dict, wanted: dict, prefix: str = ""):
  """Yields `(name, found, wanted)` of what differs, `a.b` of dicts in dicts."""
  for name in [*wanted, *sorted(set(found) - set(wanted))]:
    a, b = found.get(name), wanted.get(name)
    if isinstance(a, dict) and isinstance(b, dict):
      yield from differences(a, b, f"{prefix}{name}.")
    elif a != b and name not in NOT_COMPARED:
      yield f"{prefix}{name}", a, b


def check_same(where, found: dict, wanted: dict) -> None:
  """Raises ValueError if codes differ from those wanted, and names it."""
  for name, a, b in differences(found, wanted):
    raise ValueError(
      f"{where} holds other codes: their {name} is {a}, now it is {b}."
    )


def find_made(
  path, wanted: dict, overwrite: bool = False, *, read_fn=None
) -> dict | None:
  """Returns the description of an output that was made of `wanted` already.

  None if there is no complete output, or if it is to be replaced.

  `wanted` is what a new description would say, results left out. `read_fn`
  returns what the file says of itself, if that is not next to it, and raises
  ValueError if it is no such file.

  Raises:
    FileExistsError: It was made of something else, which the message names, or
      of unknown origin.
    ValueError: It is damaged.
  """
  path = pathlib.Path(path)
  if overwrite or not path.is_file():
    return None
  if read_fn is not None:
    try:
      found = read_fn(path)
    except ValueError as error:
      raise FileExistsError(
        f"{path} exists already and is something else ({error}); choose "
        "another name, or add --overwrite."
      ) from error
  elif description_path(path).is_file():
    found = read_json(description_path(path))
  else:
    raise FileExistsError(
      f"{path} exists already, without a description that says what it is of; "
      "choose another name, or add --overwrite."
    )
  wanted = json.loads(json.dumps(wanted))  # Lists for tuples.
  known = {name: found.get(name) for name in wanted}
  for name, a, b in differences(known, wanted):
    raise FileExistsError(
      f"{path} exists already and was made with {name}={a}, now it is {b}; "
      "choose another name, or add --overwrite."
    )
  if read_fn is None:
    check_file(path, found)
  return found


def description_path(path) -> pathlib.Path:
  """Returns where the description of a file lies."""
  return pathlib.Path(f"{os.fspath(path)}.json")


def read_description(path, kind: tuple[str, int]) -> dict:
  """Returns the description next to a file, empty without one.

  Raises ValueError if it is damaged, of another kind, or of a file of
  another size; `check_file` compares the checksum, too.
  """
  beside = description_path(path)
  if not beside.is_file():
    return {}
  found = parse_description(beside, kind)
  check_file(path, found, is_thorough=False)
  return found


def check_file(path, found: dict, *, is_thorough: bool = True) -> None:
  """Raises ValueError if a file is not the one that `found` describes.

  Old descriptions have no bytes or checksum: nothing is compared then.

  `is_thorough` reads the file for its checksum.
  """
  size, wanted = os.path.getsize(path), found.get("bytes")
  if wanted is not None and size != wanted:
    raise ValueError(
      f"{path} is truncated or of another run: it has {size} bytes, its "
      f"description {description_path(path).name} says {wanted}. Make it "
      "again, or remove the description if the file is from elsewhere."
    )
  wanted = found.get("sha256")
  if is_thorough and wanted is not None and sha256(path) != wanted:
    raise ValueError(
      f"{path} is damaged, or was changed after it was written: it does not "
      f"match the checksum in its description {description_path(path).name}. "
      "Make it again, or remove the description if the file is from elsewhere."
    )


def parse_description(path: pathlib.Path, kind: tuple[str, int]) -> dict:
  """Returns the description in a file; `kind` is name and version of a format.

  Raises ValueError if it is damaged, or of another kind.
  """
  found = read_json(path)
  check_kind(path, found, kind)
  return found


def check_kind(path, found: dict, kind: tuple[str, int]) -> None:
  """Raises ValueError unless a description has this format and version."""
  name, version = kind
  if found.get("format") != name:
    raise ValueError(f"{path} must have format {name!r}: it is not of vqjax.")
  if found.get("version") != version:
    raise ValueError(
      f"{path} has version {found.get('version')!r}, this vqjax {__version__} "
      f"reads version {version}; use the vqjax that wrote it, "
      f"{found.get('vqjax_version')}."
    )


def write_json(path, value: dict, *, overwrite: bool = False) -> None:
  """Writes a description or record, whole or not at all."""
  with atomic_output(path, overwrite) as temporary:
    temporary.write_text(_to_text(value), encoding="utf-8")


def _to_text(value: dict) -> str:
  return json.dumps(value, indent=2) + "\n"
