"""Codes on disk: shards made apart from each other, and one reader for all.

A folder of shards is filled by any number of processes, in any order:

  manifest.json              what the codes are; the same whoever writes it
  codes-00003-of-00016.npy   codes of rows 3*N//16 to 4*N//16, uint8
  codes-00003-of-00016.json  its checksum; with it the shard is finished

A killed process may leave a hidden .codes-*.tmp-* behind, which counts for
nothing; a later one removes it.

In a shard each code takes the whole bytes that its codebook needs, low byte
first. For 256 codewords that is the code itself, uint8 `[n, M]`, a quarter of
int32. With a million lists in front a row takes 3 + M bytes; one type
for all columns would take 4 + 4M. Packed bits would be smaller only below 8
bits; whole bytes can be read by any program.

A file of codes has the same description next to it, in `codes.npy.json`, with
its bytes and its checksum; one without was made elsewhere.
"""

import contextlib
import functools
import hashlib
import json
import math
import pathlib

import numpy as np

from vqjax import __version__
from vqjax.core import check_range
from vqjax.data import files, formats, json_files, npz_codes

MANIFEST_NAME = "manifest.json"
KIND = ("vqjax codes", 1)  # Of manifest and description.
_MAX_ID = npz_codes.MAX_ID
_FOREIGN = "is of another codec, data file or options; remove it first"
_DAMAGED = "is damaged: it does not match its checksum"


def describe(
  vectors, *, codec, fingerprint, codebook_sizes, encode, command, num_shards=0
) -> dict:
  """Returns what a manifest, or the description next to a file, says.

  Args:
    vectors: what is encoded, `[N, D]`; a few rows are read.
    codec: name of the codec.
    fingerprint: of its parameters.
    codebook_sizes: codewords at each of the M positions of a code.
    encode: options of the search, plain values.
    command: makes these codes; kept for people, not compared.
    num_shards: shards that the rows are cut into; 0 for a single file.
  """
  shape = [len(vectors), len(codebook_sizes)]
  shards = {}
  if num_shards:
    check_num_shards(num_shards, shape[0])
    row_bytes = len(_kept_bytes(codebook_sizes))
    shards = {
      "num_shards": num_shards,
      "dtype": "uint8",
      "row_bytes": row_bytes,
    }
  return {
    "format": KIND[0],
    "version": KIND[1],
    "shape": shape,
    **shards,
    "codebook_sizes": [int(size) for size in codebook_sizes],
    "codec": codec,
    "codec_fingerprint": fingerprint,
    "encode": encode,
    "data": files.identify(vectors),
    "command": command,
    "vqjax_version": __version__,
  }


def check_num_shards(num_shards: int, num_vectors: int) -> None:
  """Raises ValueError if a shard would be empty."""
  check_range(
    "The number of shards", num_shards, 1, num_vectors, "none is empty"
  )


def shard_rows(num_vectors: int, num_shards: int, shard: int) -> range:
  """Returns the rows of shard `shard`, counted from 0."""
  check_range("The shard", shard, 0, num_shards - 1)
  first, stop = (num_vectors * i // num_shards for i in (shard, shard + 1))
  return range(first, stop)


def shard_path(folder, num_shards: int, shard: int) -> pathlib.Path:
  """Returns the array file of a shard; its record ends in .json."""
  return pathlib.Path(folder) / f"codes-{shard:05d}-of-{num_shards:05d}.npy"


def claim(folder, manifest: dict) -> dict:
  """Gives `folder` to `manifest`, which it returns as written.

  Many processes may do so at once: the manifest of one counts for all.

  Raises:
    ValueError: The folder holds other codes; the message names what differs.
  """
  with contextlib.suppress(FileExistsError):  # Another process was first.
    files.write_json(pathlib.Path(folder) / MANIFEST_NAME, manifest)
  found = load_manifest(folder)
  try:
    files.check_same(folder, found, manifest)
  except ValueError as error:
    raise ValueError(
      f"{error} Choose another --output, or remove those codes."
    ) from error
  return found


def load_manifest(folder) -> dict:
  """Returns the manifest of a folder of shards."""
  path = pathlib.Path(folder) / MANIFEST_NAME
  if not path.is_file():
    raise FileNotFoundError(
      f"{folder} is no folder of codes: it has no {MANIFEST_NAME}."
    )
  manifest = parse_description(path)
  if not manifest.get("num_shards"):
    raise ValueError(f"{path} describes a single file, not a folder of shards.")
  fields = {"num_shards": int, "row_bytes": int}
  json_files.check_fields(path, manifest, fields)
  num, row_bytes = (
    manifest["shape"][0],
    len(_kept_bytes(manifest["codebook_sizes"])),
  )
  if manifest["row_bytes"] != row_bytes or manifest["num_shards"] > num:
    raise ValueError(
      f"{path} is damaged: {num} codes of {row_bytes} bytes cannot be in "
      f"{manifest['num_shards']} shards of {manifest['row_bytes']} bytes each."
    )
  return manifest


def parse_description(path) -> dict:
  """Returns a manifest, or the description of a file of codes.

  Raises ValueError if it is damaged, or of another kind.
  """
  found = files.parse_description(path, KIND)
  fields = {"shape": [int], "codebook_sizes": [int], "encode": dict}
  fields |= {"codec": str, "codec_fingerprint": str, "command": str}
  json_files.check_fields(path, found, fields | {"data": dict})
  shape, sizes = found["shape"], found["codebook_sizes"]
  if len(shape) != 2 or shape[0] < 1 or shape[1] != len(sizes):
    raise ValueError(
      f"{path} is damaged: shape {shape} does not fit {len(sizes)} codebooks."
    )
  if not sizes or min(sizes) < 1 or max(sizes) > _MAX_ID + 1:
    raise ValueError(f"{path} is damaged: its codebook sizes are {sizes}.")
  return found


def read_description(path) -> dict:
  """Returns the description next to a file of codes, empty without one.

  Raises ValueError if it is damaged, or of a file of another size.
  """
  beside = files.description_path(path)
  if not beside.is_file():
    return {}
  found = parse_description(beside)
  files.check_file(path, found, is_thorough=False)
  return found


def write_shard(folder, manifest: dict, shard: int, blocks) -> None:
  """Writes a shard from blocks of codes `[n, M]`, whole or not at all."""
  num_vectors, num_shards = manifest["shape"][0], manifest["num_shards"]
  rows = shard_rows(num_vectors, num_shards, shard)
  path = shard_path(folder, num_shards, shard)
  sizes = manifest["codebook_sizes"]
  bytes_fn = lambda codes_NM: to_bytes(codes_NM, sizes)
  num = formats.write_vectors(
    path, map(bytes_fn, blocks), dtype=np.uint8, overwrite=True
  )
  if num != len(rows):
    path.unlink()
    raise ValueError(f"{path} must get {len(rows)} codes, got {num}.")
  record = {
    "rows": [rows.start, rows.stop],
    "bytes": path.stat().st_size,
    "sha256": files.sha256(path),
    "manifest": _digest(manifest),
  }
  files.write_json(path.with_suffix(".json"), record, overwrite=True)


def unfinished(folder, manifest: dict, shards) -> list[int]:
  """Returns which of `shards` are still to be made, or made again.

  Raises:
    ValueError: A shard is of another codec, data file or options.
  """
  todo = []
  for shard in shards:
    problem = _problem(folder, manifest, shard, is_thorough=True)
    if problem == _FOREIGN:
      path = shard_path(folder, manifest["num_shards"], shard)
      raise ValueError(f"{path} {_FOREIGN}.")
    todo += [shard] if problem else []
  return todo


def find_problems(folder, *, is_thorough: bool = True, progress=None) -> dict:
  """Returns `{shard: what is wrong with it}`; empty if all is well.

  Args:
    folder: a folder of shards.
    is_thorough: reads the shards, to compare their checksums and ranges.
    progress: called with `(shards done, shards in all)`.
  """
  manifest, problems = load_manifest(folder), {}
  num_shards = manifest["num_shards"]
  for shard in range(num_shards):
    problem = _problem(folder, manifest, shard, is_thorough)
    problems |= {shard: problem} if problem else {}
    if progress is not None:
      progress(shard + 1, num_shards)
  return problems


def _problem(folder, manifest, shard: int, is_thorough: bool) -> str | None:
  """Says what is wrong with a shard, None for nothing."""
  num_vectors, num_shards = manifest["shape"][0], manifest["num_shards"]
  path = shard_path(folder, num_shards, shard)
  rows = shard_rows(num_vectors, num_shards, shard)
  if not path.is_file():
    return "is missing"
  try:
    record = _read_record(path)
  except FileNotFoundError:
    return "is not finished: it has no record"
  except ValueError:
    return "has a damaged record"
  belongs = [record["rows"], record["manifest"]]
  wanted, checksum = record["bytes"], record["sha256"]
  if belongs != [[rows.start, rows.stop], _digest(manifest)]:
    return _FOREIGN
  if path.stat().st_size != wanted:
    return f"has {path.stat().st_size} bytes, expected {wanted}"
  if is_thorough and files.sha256(path) != checksum:
    return _DAMAGED
  try:
    codes = Codes([_open_shard(path, manifest, len(rows))], manifest)
    for _ in codes.blocks(1 << 16) if is_thorough else ():
      pass
  except ValueError as error:
    return f"is damaged: {error}"
  return None


def _read_record(path: pathlib.Path) -> dict:
  """The record of a shard; raises ValueError if it is damaged."""
  path = path.with_suffix(".json")
  record = json_files.read_json(path)
  fields = {"rows": [int], "manifest": str, "bytes": int, "sha256": str}
  json_files.check_fields(path, record, fields)
  return record


class Codes:
  """Codes `[N, M]` on disk: `codes[start:stop]` reads them as int32.

  `meta` is their description, empty if there is none.
  """

  def __init__(
    self,
    parts,
    meta: dict,
    *,
    sizes=None,
    unpack_fn=None,
    check_fn=None,
    paths=(),
  ):
    """Joins arrays of rows; for shards `unpack_fn` follows from `meta`.

    Args:
      parts: arrays `[n, ...]`, the rows of one after the other.
      meta: description of the codes.
      sizes: codebook sizes, if `meta` does not have them.
      unpack_fn: turns rows of a part into codes `[n, M]`.
      check_fn: called with the number of a part before its rows are first
        read; raises if they must not be.
      paths: files of codes without a description.
    """
    self.meta, self.paths = meta, tuple(paths)
    self.codebook_sizes = tuple(meta.get("codebook_sizes", sizes))
    self._unpack_fn = unpack_fn or self._from_bytes
    # Once for each part: what is cached is that nothing was raised.
    self._check_fn = functools.cache(check_fn or (lambda part: None))
    self._parts = parts
    self._starts = np.cumsum([0, *map(len, parts)])
    self.shape = (int(self._starts[-1]), len(self.codebook_sizes))

  def _from_bytes(self, raw) -> np.ndarray:
    return from_bytes(raw, self.codebook_sizes)

  def __len__(self) -> int:
    """Number of codes."""
    return self.shape[0]

  def __getitem__(self, rows: slice) -> np.ndarray:
    """Reads consecutive rows, int32 `[n, M]`."""
    start, stop, step = rows.indices(len(self))
    if step != 1:
      raise ValueError(f"Codes are read in steps of 1, got {step}.")
    found = [np.empty((0, self.shape[1]), np.int32)]
    i = int(np.searchsorted(self._starts, start, "right")) - 1
    while start < stop:
      part, first = self._parts[i], self._starts[i]
      self._check_fn(i)
      raw = part[start - first : stop - first]
      codes_NM = self._unpack_fn(raw)
      check_ids(codes_NM, self.codebook_sizes, start)
      found.append(codes_NM.astype(np.int32, order="C"))
      start, i = start + len(raw), i + 1
    return np.concatenate(found) if len(found) > 2 else found[-1]

  def blocks(self, block_size: int):
    """Yields all codes in order, `block_size` at a time; the last may be less.

    Blocks run on from one shard into the next.
    """
    if block_size < 1:
      raise ValueError(f"block_size must be at least 1, got {block_size}.")
    starts = range(0, len(self), block_size)
    return (self[start : start + block_size] for start in starts)


def open_codes(path) -> Codes:
  """Opens a folder of shards, or a table of integers `[N, M]`, for reading.

  Or the codes of the program released with QINCo2, see `npz_codes`.

  Opening is cheap: the checksum of a shard is compared when its first codes are
  read, as of a file; ranges are as codes are read.

  Raises:
    FileNotFoundError: There is nothing.
    ValueError: Shards are missing or of another run, or the file is no codes.
      If a shard is damaged, reading raises it.
  """
  path = files.user_path(path)
  if path.is_dir():
    return _open_folder(path)
  if not path.exists():
    raise FileNotFoundError(
      f"There is no file or folder {path}; codes are a folder of shards or a "
      ".npy of vqjax encode."
    )
  if npz_codes.is_head(path):
    parts, sizes, paths = npz_codes.open_parts(path)
    return Codes(parts, {}, sizes=sizes, unpack_fn=np.asarray, paths=paths)
  codes_NM, meta = formats.open_vectors(path), read_description(path)
  if codes_NM.dtype.kind not in "iu":
    raise TypeError(f"{path} must hold integer codes, got {codes_NM.dtype}.")
  check_described(path, meta, codes_NM.shape)
  sizes = [_MAX_ID + 1] * codes_NM.shape[1]
  return Codes(
    [codes_NM],
    meta,
    sizes=sizes,
    unpack_fn=np.asarray,
    check_fn=lambda part: files.check_file(path, meta),
    paths=(path,),
  )


def _open_folder(folder: pathlib.Path) -> Codes:
  manifest = load_manifest(folder)
  num_vectors, num_shards = manifest["shape"][0], manifest["num_shards"]
  if problems := find_problems(folder, is_thorough=False):
    shard, problem = min(problems.items())
    raise ValueError(
      f"{folder} lacks {len(problems)} of its {num_shards} shards: "
      f"{shard_path('', num_shards, shard)} {problem}. {_how_to_mend(folder)}"
    )
  path_fn = functools.partial(shard_path, folder, num_shards)
  rows_fn = functools.partial(shard_rows, num_vectors, num_shards)
  parts = [
    _open_shard(path_fn(shard), manifest, len(rows_fn(shard)))
    for shard in range(num_shards)
  ]

  def check(shard):
    path = path_fn(shard)
    if files.sha256(path) != _read_record(path)["sha256"]:
      raise ValueError(f"{path} {_DAMAGED}. {_how_to_mend(folder)}")

  return Codes(parts, manifest, check_fn=check)


def _how_to_mend(folder) -> str:
  return (
    f"vqjax encode --verify --output={folder} says how to make "
    "what is not whole."
  )


def _open_shard(path, manifest: dict, num: int) -> np.ndarray:
  raw = formats.open_vectors(path)
  wanted = (num, manifest["row_bytes"])
  if raw.shape != wanted or raw.dtype != np.uint8:
    raise ValueError(
      f"{path} must hold uint8 {wanted}, got {raw.dtype} {raw.shape}."
    )
  return raw


def check_described(path, meta: dict, shape) -> None:
  """Raises ValueError if a description is of another file of codes."""
  if meta and meta["shape"] != list(shape):
    raise ValueError(
      f"{files.description_path(path)} describes codes of shape "
      f"{meta['shape']}, but {path} has {list(shape)}; remove the description "
      "if the codes were made elsewhere."
    )


def check_ids(codes_NM, sizes, first_row: int = 0) -> None:
  """Raises ValueError if a code is not an id of its codebook.

  Args:
    codes_NM: integers of any type.
    sizes: codewords in each of the M codebooks.
    first_row: number of the first row, for the message.
  """
  bad = (codes_NM < 0) | (codes_NM >= np.array(sizes))
  if bad.any():
    row, column = np.argwhere(bad)[0]
    raise ValueError(
      f"Code {codes_NM[row, column]} in row {first_row + row}, column {column} "
      f"must lie between 0 and {sizes[column] - 1}: the codes are of another "
      "codec, or damaged."
    )


def to_bytes(codes_NM, sizes) -> np.ndarray:
  """Cuts codes to the whole bytes they need, uint8 `[N, row_bytes]`."""
  check_ids(codes_NM, sizes)
  raw = np.ascontiguousarray(codes_NM, "<i4").view(np.uint8)
  return raw[:, _kept_bytes(sizes)]


def from_bytes(raw, sizes) -> np.ndarray:
  """Inverse of `to_bytes`: int32 codes `[N, M]`."""
  wide = np.zeros((len(raw), 4 * len(sizes)), np.uint8)
  wide[:, _kept_bytes(sizes)] = raw
  return wide.view("<i4")


def _kept_bytes(sizes) -> np.ndarray:
  """Which of the 4M bytes of int32 codes a shard keeps."""
  num_bytes_M = [
    max(1, math.ceil(int(size - 1).bit_length() / 8)) for size in sizes
  ]
  return np.flatnonzero(np.arange(4) < np.array(num_bytes_M)[:, None])


def _digest(manifest: dict) -> str:
  """A checksum of all in a manifest that is compared."""
  kept = {k: v for k, v in manifest.items() if k not in files.NOT_COMPARED}
  text = json.dumps(kept, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]
