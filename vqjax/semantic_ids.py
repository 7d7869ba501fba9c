"""Semantic ids: a short discrete id for each item, of its codes by a codec.

  ids = vqjax.make_ids(codec, x, ids=item_ids)
  ids.tokens[0]          # ["<a_12>", "<b_7>", "<c_201>"]
  ids.save("ids")
  more = vqjax.load_ids("ids").append(new_x, new_ids, codec=codec)

Codes of similar items are the same to begin with, and some are the same to the
end. `vqjax.ids.resolver.Resolver` says how those are told apart, the report how
good the ids are.
"""

import dataclasses
import hashlib
import pathlib

import numpy as np

from vqjax import id_making, id_reports
from vqjax.codec import Codec, open_array
from vqjax.data import files, item_ids, unit
from vqjax.ids import pictures
from vqjax.ids.resolver import Resolver
from vqjax.storage import id_folder


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class SemanticIds:
  """Ids of items, and a report on them; from `make_ids` or `load_ids`."""

  items: np.ndarray  # [N], int64 or text.
  codes: np.ndarray  # int32 [N, L], -1 for a token that an id does not have.
  sizes: tuple[int, ...]  # Codewords at each level.
  report: dict
  info: dict  # What made them: codec, data, resolver.
  checksums: np.ndarray  # uint64 [N], of the vectors.
  num_published: int = 0  # Items that were there before `append`.
  raw_codes: np.ndarray | None = None  # Of the codec, before they were unique.
  codec: Codec | None = None

  def __len__(self) -> int:
    """Number of items."""
    return len(self.items)

  def __repr__(self) -> str:
    """Says what they are in a line."""
    after = self.report["after"]
    return (
      f"SemanticIds({len(self):,} items, {after['distinct']:,} distinct ids of "
      f"{self.codes.shape[1]} tokens, collision rate "
      f"{after['collision_rate']:.4f}, {self.info['resolver']['resolve']})"
    )

  @property
  def tokens(self) -> list[list[str]]:
    """Tokens of each item, `["<a_12>", "<b_7>", "<c_201>"]`."""
    return [id_folder.tokens_of(codes_L) for codes_L in self.codes.tolist()]

  @property
  def token_numbers(self) -> np.ndarray:
    """Numbers `[N, L]` of the tokens, different at all levels; -1 for none."""
    return id_folder.token_numbers(self.codes, self.sizes)

  def save(self, folder, *, overwrite: bool = False) -> pathlib.Path:
    """Writes the folder, whole or not at all, and returns its path.

    Raises:
      FileExistsError: There is something already, and not `overwrite`.
    """
    id_folder.save(
      folder,
      self.items,
      self.codes,
      sizes=self.sizes,
      checksums_N=self.checksums,
      report=self.report,
      info=self.info,
      num_published=self.num_published,
      picture_fn=lambda path: pictures.draw(
        path, self.codes, self.report, before_NL=self.raw_codes
      ),
      overwrite=overwrite,
    )
    return files.user_path(folder)

  def append(
    self, x, ids=None, *, codec: Codec | None = None, progress: bool = False
  ) -> "SemanticIds":
    """Returns the published ids, unchanged, followed by ids of new items.

    New items are made unique by the same resolver; `sinkhorn`, which would move
    published ids, is replaced by `nearest`. `append` in the report compares the
    new items with the published ones.

    Args:
      x: Vectors `[N, D]` of the new items.
      ids: Their item ids; None goes on counting.
      codec: What made the ids; needed if they were loaded.
      progress: Shows progress lines.

    Raises:
      ValueError: It is another codec, an item has an id already, or vectors do
        not fit.
    """
    codec = codec or self.codec
    if codec is None:
      raise ValueError("append needs codec=, the codec that made these ids.")
    vectors = open_vectors(codec, x)
    new_N = item_ids.check_items(ids, len(vectors), self.items)
    info = self.appended_info(codec, vectors, new_N)
    resolver, settings = Resolver(**info["resolver"]), info["encode"]
    made = id_making.make(codec, vectors, resolver, settings, self, progress)
    items_N = np.concatenate([self.items, new_N])
    report = id_reports.of_appended(made, items_N, info["published"])
    return SemanticIds(
      items_N,
      made.codes_NL,
      made.sizes,
      report,
      info,
      made.checksums_N,
      num_published=len(self),
      codec=codec,
    )

  def appended_info(self, codec: Codec, vectors, items_N) -> dict:
    """Returns the `info` of these ids with new items behind them.

    Raises:
      ValueError: It is another codec.
    """
    if codec.fingerprint != self.info["codec_fingerprint"]:
      raise ValueError(
        f"These ids are of codec {self.info['codec_fingerprint']}, but this "
        f"is codec {codec.fingerprint}, whose codes mean something else; give "
        "the codec that made the ids, or make all ids anew."
      )
    resolver = Resolver(**self.info["resolver"])
    if resolver.resolve == "sinkhorn":
      resolver = dataclasses.replace(resolver, resolve="nearest")
    new = describe(codec, vectors, items_N, resolver, self.info["encode"])
    return {
      **self.info,
      "resolver": new["resolver"],
      "appended_to": _checksum_of(self.items, self.codes),
      "appended": {"data": new["data"], "items": new["items_checksum"]},
    }


def load_ids(folder) -> SemanticIds:
  """Opens a folder that `SemanticIds.save` has written.

  Raises:
    FileNotFoundError: There is no such folder, or a file is missing.
    ValueError: A file is damaged, or was changed.
  """
  table, report, manifest = id_folder.load(folder)
  items_N = table["item"]
  if items_N.dtype.kind != "i":
    items_N = items_N.astype(object)
  known = ("format", "version", "num_items", "num_published", "sizes", "files")
  info = {k: v for k, v in manifest.items() if k not in known}
  return SemanticIds(
    items_N,
    table["codes"],
    tuple(manifest["sizes"]),
    report,
    info,
    table["checksum"],
    manifest["num_published"],
  )


def make_ids(
  codec: Codec,
  x,
  ids=None,
  resolve: str = "nearest",
  capacity: int = 1,
  *,
  token_for: str = "collided",
  separate_duplicates: str = "share",
  sk_epsilon: float | None = None,
  sk_iters: int | None = None,
  max_rounds: int = 20,
  is_balanced: bool | None = None,
  progress: bool = False,
  **settings,
) -> SemanticIds:
  """Gives every item an id: its codes by a codec, made unique.

  Args:
    codec: Any codec of at most 26 levels.
    x: Vectors `[N, D]` of the items: an array, a memory map, or a path.
    ids: Item ids `[N]`, integers or text; None for row numbers.
    resolve: How items with the same codes are told apart, see `Resolver`; so
      are `capacity`, `token_for`, `separate_duplicates`, `sk_epsilon`,
      `sk_iters` and `max_rounds`.
    capacity: Items that may share an id.
    token_for: Who gets the token of `resolve="token"`: "collided" or "all".
    separate_duplicates: "share", "token" or "backtrack".
    sk_epsilon: Blur of `resolve="sinkhorn"`.
    sk_iters: Its iterations.
    max_rounds: Its rounds.
    is_balanced: Gives each codeword of a level equally many items, see
      `vqjax.codecs.balanced`; None for what the codec was fitted with.
    progress: Shows progress lines.
    **settings: Of encoding, as `beam_size=16`.

  Raises:
    ValueError: Vectors are not finite or of another dimension, item ids are
      there twice, or a setting does not fit.
  """
  resolver = Resolver(
    resolve,
    capacity,
    token_for,
    separate_duplicates,
    sk_epsilon,
    sk_iters,
    max_rounds,
  ).of(codec.info)
  check_levels(codec, resolver)
  vectors = open_vectors(codec, x)
  items_N = item_ids.check_items(ids, len(vectors))
  settings = id_making.settings_of(codec, is_balanced, settings)
  made = id_making.make(codec, vectors, resolver, settings, None, progress)
  report = id_reports.of_all(made, vectors, items_N, codec)
  info = describe(codec, vectors, items_N, resolver, settings)
  before = report["before"]
  info["published"] = {name: before[name] for name in ("mse", "sharing_rate")}
  return SemanticIds(
    *(items_N, made.codes_NL, made.sizes, report, info, made.checksums_N),
    raw_codes=made.raw_NL,
    codec=codec,
  )


def check_levels(codec: Codec, resolver: Resolver) -> None:
  """Raises ValueError if there are more levels than letters for them."""
  num = len(codec.codebook_sizes) + resolver.adds_token
  if num > id_folder.MAX_LEVELS:
    raise ValueError(
      f"Ids have at most {id_folder.MAX_LEVELS} tokens, one letter each, got "
      f"{num}: {len(codec.codebook_sizes)} codes"
      + (" and one token more" if resolver.adds_token else "")
      + "; use a codec of fewer codes."
    )


def open_vectors(codec: Codec, x):
  """Returns the vectors of items, unread, as the codec takes them."""
  vectors = open_array(x, codec.dim)
  if not len(vectors):
    raise ValueError("There are no items: x has 0 rows.")
  is_raw = not isinstance(vectors, unit.UnitVectors)
  if codec.metric == "cosine" and is_raw:
    return unit.UnitVectors(vectors)
  return vectors


def describe(codec, vectors, items_N, resolver, settings: dict) -> dict:
  """Returns what ids follow from: the same again makes the same ids."""
  return {
    "codec": codec.name,
    "codec_fingerprint": codec.fingerprint,
    "data": {"num_vectors": len(vectors), **files.identify(vectors)},
    "items_checksum": item_ids.checksum(items_N),
    "resolver": dataclasses.asdict(resolver),
    "encode": dict(settings),
  }


def _checksum_of(items_N, codes_NL=()) -> str:
  found = hashlib.sha256("\n".join(map(str, items_N.tolist())).encode())
  found.update(np.ascontiguousarray(codes_NL, np.int64).tobytes())
  return found.hexdigest()[:16]
