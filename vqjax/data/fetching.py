"""Fetches a file: resumed, checked, unpacked; whole or not at all.

`transfer` keeps what has come. When all is there, and is as large as the server
said, it is put in the place of the file. A `.gz` or `.tar.gz` is unpacked while
it comes; its packed bytes stay until that is done, since a later run can go on
from them alone.

`NAME.download.json` then says where the file is from, its bytes and checksums.
If the file is fetched once more, it must have these again.
"""

import contextlib
import datetime
import gzip
import hashlib
import os
import pathlib
import tarfile
import zlib
from collections.abc import Callable

from absl import logging

from vqjax import __version__
from vqjax.data import files, json_files, transfer
from vqjax.data import temporary as temporary_files
from vqjax.data.transfer import Order as Order
from vqjax.data.transfer import size_of as size_of

_KIND = ("vqjax download", 1)


def record_path(path) -> pathlib.Path:
  """Returns where the record of a fetched file lies."""
  return pathlib.Path(f"{os.fspath(path)}.download.json")


def find(order: Order, *, is_thorough: bool = False) -> dict | None:
  """Returns the record of a file that was fetched already, None if it was not.

  `is_thorough` reads the file for its checksum.

  Raises:
    ValueError: It is of another address, or not as it was fetched.
  """
  beside = record_path(order.path)
  if not beside.is_file() or not order.path.exists():
    return None
  found = _read_record(beside)
  if found["source"] not in (order.source, *order.also):
    raise FileExistsError(
      f"{order.path} was fetched from {found['source']}, not from "
      f"{order.source}: choose another --data_root, or add --overwrite."
    )
  for name, (size, checksum) in found["files"].items():
    path = order.path.parent / name
    at = path.stat().st_size if path.is_file() else None
    if at != size or (is_thorough and files.sha256(path) != checksum):
      raise ValueError(
        f"{path} is not what was fetched: it must have {size} bytes and the "
        f"checksum in {beside.name}, and has "
        + ("other content" if at == size else f"{at or 'no'} bytes")
        + ". Add --overwrite to fetch it again."
      )
  return found


def _read_record(path: pathlib.Path) -> dict:
  found = files.parse_description(path, _KIND)
  fields = {"source": str, "bytes": int, "sha256": str, "files": dict}
  json_files.check_fields(path, found, fields)
  good = all(
    isinstance(value, list) and [type(v) for v in value] == [int, str]
    for value in found["files"].values()
  )
  if not good:
    raise ValueError(f"{path} is damaged; remove it, and fetch the file again.")
  return found


def num_here(order: Order) -> int:
  """Returns how many bytes of a file have come already."""
  part = transfer.part_path(order)
  return part.stat().st_size if part.is_file() else 0


def fetch(order: Order, *, overwrite: bool = False) -> dict:
  """Fetches a file, goes on with what has come of it; returns its record.

  Raises:
    FileNotFoundError: The server does not have it.
    FileExistsError: Something lies in its place.
    ValueError: It is not what it was before, or no archive.
    OSError: The server does not answer or refuses; the disk is full.
  """
  path = order.path
  if order.pack != "tar" and path.exists() and not overwrite:
    raise FileExistsError(
      f"{path} exists already; choose another --data_root, or add --overwrite."
    )
  path.parent.mkdir(parents=True, exist_ok=True)
  beside, earlier = record_path(path), None
  if beside.is_file() and not overwrite:
    earlier = _read_record(beside)
  with transfer.locked(transfer.part_path(order)) as part:
    reach = transfer.Reach()
    while True:
      try:
        with transfer.Stream(order, part, reach) as stream:
          found = _unpack(order, stream, part, overwrite, earlier)
        break
      except transfer.Restart as reason:
        logging.info("%s: %s; it starts anew.", path.name, reason)
        transfer.forget(part)
    files.write_json(beside, found, overwrite=True)
    transfer.forget(part)
  return found


def _unpack(order, stream, part, overwrite: bool, earlier) -> dict:
  """Takes all of the stream; puts what it holds in its place."""
  check = lambda: _check_sent(order, stream, earlier)
  stream.connect()  # And finds room on the disk, or none.
  name, output = order.path.name, files.atomic_output(order.path, overwrite)
  if order.pack == "tar":
    made = _unpack_tar(order, stream, check, overwrite)
  elif order.pack:
    with output as temporary:
      made = {name: _unpack_gz(order, stream, temporary)}
      check()
  else:
    _drain(stream)
    check()
    made = {name: [stream.position, stream.hash.hexdigest()]}
    with output as temporary:
      os.rename(part, temporary)
  return {
    "format": _KIND[0],
    "version": _KIND[1],
    "source": order.source,
    "url": order.url,
    "bytes": stream.position,
    "sha256": stream.hash.hexdigest(),
    "files": made,
    "created": datetime.datetime.now(datetime.UTC).isoformat("T", "seconds"),
    "vqjax_version": __version__,
  }


def _drain(stream) -> None:
  while stream.read(transfer.CHUNK):
    pass


def _check_sent(order: Order, stream, earlier: dict | None) -> None:
  """Raises ValueError if what has come is not what it must be."""
  wanted, said = order.sha256, "its publisher says"
  if wanted is None and earlier and earlier["source"] == order.source:
    wanted, said = earlier["sha256"], f"it had on {earlier['created'][:10]}"
  found = stream.hash.hexdigest()
  if wanted in (None, found):
    return
  stream.give_up()
  raise ValueError(
    f"{order.url} has the checksum {found[:16]}..., not the {wanted[:16]}... "
    f"that {said}: it was changed there, or damaged on the way. The same "
    "command fetches it again; --overwrite takes it as it is."
  )


@contextlib.contextmanager
def _packed_well(order: Order, stream):
  """Turns what damaged archives raise into a sentence."""
  try:
    yield
  except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as error:
    stream.give_up()
    raise ValueError(
      f"{order.url} is damaged, or no {order.pack} archive: {error}. The same "
      "command fetches it again."
    ) from error


def _unpack_gz(order: Order, stream, temporary) -> list:
  """Writes the unpacked file; returns its bytes and checksum."""
  total, checksum = 0, hashlib.sha256()
  with (
    _packed_well(order, stream),
    gzip.GzipFile(fileobj=stream) as packed,
    open(temporary, "xb") as output,
  ):
    while data := packed.read(transfer.CHUNK):
      output.write(data)
      checksum.update(data)
      total += len(data)
    _drain(stream)
  return [total, checksum.hexdigest()]


def _unpack_tar(order: Order, stream, check: Callable, overwrite: bool) -> dict:
  """Unpacks into a folder beside `order.path`, then moves its files there."""
  made = {}
  with temporary_files.folder_beside(order.path) as folder:
    with (
      _packed_well(order, stream),
      tarfile.open(fileobj=stream, mode="r|gz") as archive,
    ):
      archive.extractall(folder, filter="data")
    _drain(stream)
    check()
    inner = folder / order.path.name  # Archives mostly hold their own folder.
    top = inner if inner.is_dir() and len(os.listdir(folder)) == 1 else folder
    for path in sorted(path for path in top.rglob("*") if path.is_file()):
      target = order.path / path.relative_to(top)
      about = [path.stat().st_size, files.sha256(path)]
      _move(path, target, about, overwrite)
      made[target.relative_to(order.path.parent).as_posix()] = about
  return made


def _move(path, target, about: list, overwrite: bool) -> None:
  """Puts an unpacked file in its place, unless it is there already."""
  at = target.is_file() and [target.stat().st_size, files.sha256(target)]
  if at == about and not overwrite:
    return
  with files.atomic_output(target, overwrite) as temporary:
    os.rename(path, temporary)
