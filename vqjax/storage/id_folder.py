"""Folders of semantic ids: what a recommender reads, and what append needs.

  index.json        {"ITEM": ["<a_12>", "<b_7>", "<c_201>"], ...}
  id_to_items.json  {"<a_12><b_7><c_201>": ["ITEM", ...], ...}
  ids.npy           a row per item: `item`; `codes`, -1 for a token it lacks;
                    `tokens`, numbers of tokens that are different at all
                    levels; `checksum` of the vector
  ids.parquet       the same without checksums, if pyarrow is installed
  report.json, report.png
  delta.json        as index.json, of the items that were appended
  manifest.json     last: what made the ids, and the checksums of the files

The letters are of the levels; the first level is a.
"""

import contextlib
import json
import string
from collections.abc import Callable

import numpy as np

from vqjax import __version__
from vqjax.data import files
from vqjax.storage import folders

KIND = ("vqjax semantic ids", 1)
MAX_LEVELS = len(string.ascii_lowercase)
_LINES = 1 << 14  # Written at once.


def tokens_of(codes_L) -> list[str]:
  """Returns the tokens of a code, `<a_12>` for 12 at the first level."""
  return [
    f"<{letter}_{code}>"
    for letter, code in zip(string.ascii_lowercase, codes_L, strict=False)
    if code >= 0
  ]


def token_numbers(codes_NL, sizes) -> np.ndarray:
  """Returns codes `[N, L]` plus the sizes of the levels before; -1 stays."""
  offset_L = np.cumsum((0, *sizes))[: codes_NL.shape[1]]
  return np.where(codes_NL >= 0, codes_NL + offset_L, -1).astype(np.int32)


def save(
  folder,
  items_N,
  codes_NL,
  *,
  sizes,
  checksums_N,
  report: dict,
  info: dict,
  num_published: int = 0,
  picture_fn: Callable | None = None,
  overwrite: bool = False,
) -> list[str]:
  """Writes the folder, whole or not at all; returns the names of its files.

  Args:
    folder: The folder.
    items_N: Item ids, int64 or text.
    codes_NL: Their codes.
    sizes: Codewords at each level.
    checksums_N: Of the vectors, uint64.
    report: Plain values.
    info: What made the ids, plain values.
    num_published: Items that were there before; the others go to delta.json.
    picture_fn: Draws the report into a path.
    overwrite: Replaces a folder of ids.
  """
  with folders.new_folder(folder, KIND[0], overwrite=overwrite) as path:
    _write_index(path / "index.json", items_N, codes_NL)
    if num_published:
      new = slice(num_published, None)
      _write_index(path / "delta.json", items_N[new], codes_NL[new])
    _write_lookup(path / "id_to_items.json", items_N, codes_NL)
    table = make_table(items_N, codes_NL, sizes, checksums_N)
    np.save(path / "ids.npy", table, allow_pickle=False)
    _write_parquet(path / "ids.parquet", table, items_N)
    files.write_json(path / "report.json", report)
    if picture_fn is not None:
      picture_fn(path / "report.png")
    names = sorted(file.name for file in path.iterdir())
    manifest = {
      "format": KIND[0],
      "version": KIND[1],
      **info,
      "num_items": len(items_N),
      "num_published": num_published,
      "sizes": list(sizes),
      "files": {name: files.sha256(path / name) for name in names},
      "vqjax_version": __version__,
    }
    files.write_json(path / folders.MANIFEST, manifest)
  return names


def make_table(items_N, codes_NL, sizes, checksums_N) -> np.ndarray:
  """Returns the rows of ids.npy."""
  items_N = np.array(items_N.tolist()) if len(items_N) else items_N
  width = codes_NL.shape[1:]
  kinds = [("codes", np.int32, width), ("tokens", np.int32, width)]
  kinds = [("item", items_N.dtype), *kinds, ("checksum", np.uint64)]
  table = np.empty(len(items_N), kinds)
  table["item"], table["codes"] = items_N, codes_NL
  table["tokens"] = token_numbers(codes_NL, sizes)
  table["checksum"] = checksums_N
  return table


def has_parquet() -> bool:
  """Whether pyarrow is there to write Parquet files."""
  with contextlib.suppress(ImportError):
    import pyarrow.parquet

    return pyarrow is not None
  return False


def _write_parquet(path, table, items_N) -> None:
  if not has_parquet():
    return
  import pyarrow as pa
  import pyarrow.parquet

  def lists(codes_NL):
    is_there_NL = codes_NL >= 0
    ends_N = is_there_NL.sum(axis=1).cumsum()
    return pa.ListArray.from_arrays(
      np.r_[0, ends_N].astype(np.int32), codes_NL[is_there_NL]
    )

  columns = {
    "item": pa.array(items_N.tolist()),
    "codes": lists(table["codes"]),
    "tokens": lists(table["tokens"]),
  }
  pyarrow.parquet.write_table(pa.table(columns), path)


def _write_index(path, items_N, codes_NL) -> None:
  pairs = (
    (str(item), tokens_of(codes))
    for item, codes in zip(items_N.tolist(), codes_NL.tolist(), strict=True)
  )
  _write_object(path, pairs)


def _write_lookup(path, items_N, codes_NL) -> None:
  """Items of each id, ids in the order of their first item."""
  found = {}
  for item, codes in zip(items_N.tolist(), codes_NL.tolist(), strict=True):
    found.setdefault("".join(tokens_of(codes)), []).append(str(item))
  _write_object(path, found.items())


def _write_object(path, pairs) -> None:
  """Writes a JSON object, a line for each pair of it."""
  with open(path, "x", encoding="utf-8") as file:
    lines, before = [], "{\n"
    for name, value in pairs:
      lines.append(f"{before}{json.dumps(name)}: {json.dumps(value)}")
      before = ",\n"
      if len(lines) == _LINES:
        file.writelines(lines)
        lines = []
    file.writelines([*lines, "\n}\n" if before != "{\n" else "{}\n"])


def describe(folder) -> dict:
  """Returns the manifest of a folder of ids.

  Raises:
    FileNotFoundError: There is no such folder, or it has no manifest.
    ValueError: The manifest is damaged, or of something else.
  """
  path = files.user_path(folder) / folders.MANIFEST
  if not path.is_file():
    raise FileNotFoundError(
      f"{folder} is no folder of semantic ids: it has no {folders.MANIFEST}. "
      "vqjax semantic_ids --output makes one."
    )
  return files.parse_description(path, KIND)


def load(folder) -> tuple[np.ndarray, dict, dict]:
  """Returns the rows of ids.npy, the report and the manifest.

  Raises:
    FileNotFoundError: There is no such folder, or a file is missing.
    ValueError: A file is damaged, or was changed.
  """
  info, path = describe(folder), files.user_path(folder)
  checksums = info.get("files")
  checksums = checksums if isinstance(checksums, dict) else {}
  for name in ("ids.npy", "report.json"):
    if not (path / name).is_file():
      raise FileNotFoundError(f"{folder} lacks {name}; bring back a copy.")
    if files.sha256(path / name) != checksums.get(name):
      raise ValueError(
        f"{path / name} is damaged, or was changed after it was written: it "
        f"does not match its checksum in {folders.MANIFEST}. Bring back a copy."
      )
  table = np.load(path / "ids.npy", allow_pickle=False)
  return table, files.read_json(path / "report.json"), info
