"""A codec opened from any source, run over arrays or files of any size.

  codec = vqjax.load("runs/qinco2_s")
  codes = codec.encode(x)
  xhat = codec.decode(codes)

Vectors are an array, a memory map, anything that becomes an array, or the path
of a file of vectors; results are numpy arrays.
"""

import dataclasses
import functools
import os
import pathlib
import shlex
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import evaluation, quality, shipped
from vqjax import progress as progress_lib
from vqjax.codecs import qinco_ranker, registry, runner
from vqjax.codecs import rule as rule_lib
from vqjax.codecs.codec import CodecSpec
from vqjax.codecs.rule import SearchRule
from vqjax.core import check_range, check_shape
from vqjax.data import batches, formats, unit
from vqjax.data import codes as codes_lib
from vqjax.interop import faiss_assign, faiss_graph
from vqjax.search import truth_check
from vqjax.storage import codec_file


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Codec:
  """A trained codec: parameters, and the settings that are stored with them."""

  name: str  # In `vqjax.codecs.registry`.
  params: Any
  info: dict = dataclasses.field(default_factory=dict)
  ranker: Any = None  # Of `with_ranker`.
  fingerprint: str | None = None  # Of the parameters; found if left out.
  graph_file: pathlib.Path | None = None  # Of a run folder with lists.

  def __post_init__(self):
    """Finds the fingerprint, 16 hex digits."""
    if self.fingerprint is None:
      found = codec_file.fingerprint(self.params)
      object.__setattr__(self, "fingerprint", found)

  def __repr__(self) -> str:
    """Says what it is in a line."""
    data = self.info.get("data", {})
    trained_on = data.get("train") or data.get("name")
    lists = ""
    if self.is_ivf:
      lists = progress_lib.count(self.codebook_sizes[0], "list") + ", "
    return (
      f"Codec({self.title}, {self.dim} dimensions, {lists}{self.num_codes} "
      f"codes, {self.num_bytes:g} bytes, fingerprint {self.fingerprint}"
      + (f", trained on {trained_on})" if trained_on else ")")
    )

  @property
  def title(self) -> str:
    """What people call this kind of codec, as "qinco2"."""
    return self.spec.title(self.params) or self.name

  @property
  def spec(self) -> CodecSpec:
    """The functions of this kind of codec."""
    return registry.get(self.name)

  @functools.cached_property
  def tables(self):
    """What encode and decode need."""
    tables = jax.jit(self.spec.prepare)(self.params)
    if self.ranker is None:
      return tables
    return tables.replace(steps=tables.steps.replace(ranker=self.ranker))

  @functools.cached_property
  def rule(self) -> SearchRule:
    """The search that is stored with the codec."""
    return rule_lib.from_dict(self.info.get("encode", {}), self.spec.rule)

  @property
  def dim(self) -> int:
    """Dimensions of the vectors."""
    return self.spec.dim(self.params)

  @property
  def is_ivf(self) -> bool:
    """Whether the first code is the number of a list."""
    return self.spec.is_ivf(self.params)

  @property
  def codebook_sizes(self) -> tuple[int, ...]:
    """Codewords at each position of a code; lists first if there are any."""
    return self.spec.codebook_sizes(self.params)

  @property
  def num_codes(self) -> int:
    """Code positions, the list number not counted."""
    return len(self.codebook_sizes) - self.is_ivf

  @property
  def num_bytes(self) -> float:
    """Bytes of a code, in bits packed; an index keeps the list number."""
    sizes = self.codebook_sizes[self.is_ivf :]
    return sum(int(size - 1).bit_length() for size in sizes) / 8

  @property
  def centroids(self) -> np.ndarray:
    """Centroids of the lists, float32 `[L, D]` in data units.

    A codec without lists has one, whose centroid is zero.
    """
    if not self.is_ivf:
      return np.zeros((1, self.dim), np.float32)
    return np.asarray(self.spec.centroids(self.params))

  def with_rule(self, **settings) -> "Codec":
    """Returns the codec with these settings of its search, to be saved.

    Those that are left out stay as they are; the fingerprint stays too.

    Raises:
      ValueError: The codec has no such setting, or a value does not fit.
    """
    self.check_rule(self.rule.replace(**self.check_settings(settings)))
    stored = {**self.info.get("encode", {}), **settings}
    return dataclasses.replace(self, info={**self.info, "encode": stored})

  def with_ranker(
    self, x_ND, *, progress: Callable | None = None, **settings
  ) -> "Codec":
    """Returns the codec with a ranker and the search that it is for.

    A ranker drops most candidates before the network sees them; it pays for
    deep networks, see `vqjax.codecs.qinco_ranker`. It is stored with the codec.

    Args:
      x_ND: Vectors to fit it to, in memory; a few hundred will do.
      progress: Is told of the vectors done, and of all.
      **settings: As for `with_rule`, `num_ranked` and `num_joint_candidates`
        among them.
    """
    rule = self.rule.replace(**self.check_settings(settings))
    tables = qinco_ranker.fit(
      self.tables,
      x_ND,
      beam_size=rule.beam_size,
      num_joint_candidates=rule.num_joint_candidates,
      dtype=rule.dtype,
      progress=progress,
    )
    codec = dataclasses.replace(self, ranker=tables.steps.ranker)
    return codec.with_rule(**settings)

  def check_rule(self, rule: SearchRule, path: str = "FOLDER") -> None:
    """Raises ValueError unless the codec, of a path, can search by a rule."""
    self.spec.check_rule(self.params, rule)
    if rule.num_ranked and self.ranker is None:
      raise ValueError(
        f"num_ranked={rule.num_ranked} needs a ranker, which this codec has "
        f"not. vqjax tradeoff --codec={shlex.quote(path)} "
        "--output=tradeoff.png --write fits one and stores it if it pays; in "
        "Python codec.with_ranker does."
      )

  def describe_search(self, rule: SearchRule, assign: str = "auto") -> dict:
    """Returns what codes depend on besides parameters and vectors.

    The steps are in the shape of the codes.
    """
    found = rule.to_dict(self.spec.knobs)
    found.pop("num_steps", None)
    if rule.num_ranked:
      found["ranker"] = codec_file.fingerprint(self.ranker)
    return found | ({"assign": "hnsw"} if self.takes_graph(assign) else {})

  def takes_graph(self, assign: str = "auto") -> bool:
    """Whether the lists of vectors are found by a graph of the centroids."""
    return self.is_ivf and faiss_assign.takes_graph(
      assign, self.codebook_sizes[0]
    )

  @functools.cached_property
  def _compiled(self) -> dict:
    return {}

  def encoder(
    self, rule: SearchRule, assign: str = "auto", *, is_shown: bool = False
  ) -> tuple[Callable, int]:
    """Returns `x_ND -> codes_NM`, compiled, and how many vectors to give it.

    Args:
      rule: The search.
      assign: As for `encode`.
      is_shown: Shows a progress line while a graph of the centroids is made.
    """
    key = "encode", rule, assign
    if key not in self._compiled:
      self.check_rule(rule)
      self._compiled[key] = runner.make_encode_fn(
        self.spec, self.tables, rule, self._make_assign_fn(assign, is_shown)
      )
    return self._compiled[key], runner.encode_block(
      self.spec, self.tables, rule
    )

  def _make_assign_fn(self, assign: str, is_shown: bool) -> Callable | None:
    """Returns `x_ND -> (x_ND, lists_N)`; None if encoding compares all."""
    if not self.takes_graph(assign):
      return None
    with progress_lib.progress(
      self.codebook_sizes[0], "graph", unit="list", is_shown=is_shown
    ) as done:
      assign_fn, _ = faiss_assign.make_assign_fn(
        self.centroids, "hnsw", graph_file=self.graph_file, progress=done
      )
    return lambda x_ND: (x_ND, assign_fn(x_ND))

  def decoder(
    self, dtype: str = "float32", block_size: int | None = None
  ) -> Callable:
    """Returns `codes_NM -> x_ND` for any number of codes, compiled."""
    key = "decode", dtype, block_size
    if key not in self._compiled:
      self._compiled[key] = runner.make_decode_fn(
        self.spec, self.tables, dtype=dtype, block_size=block_size
      )
    return self._compiled[key]

  def code_sizes(self, rule: SearchRule) -> tuple[int, ...]:
    """Codewords at each position of the codes that a rule makes."""
    sizes = self.codebook_sizes
    return sizes[: rule.num_steps and rule.num_steps + self.is_ivf]

  def encode_blocks(
    self,
    vectors,
    rule: SearchRule,
    assign: str = "auto",
    *,
    rows: range | None = None,
    block_size: int | None = None,
    progress: Callable | None = None,
  ) -> Iterator[np.ndarray]:
    """Yields int32 codes `[n, M]` of consecutive rows of open vectors.

    Args:
      vectors: Array, memory map or open file; NaN is refused by its row.
      rule: The search.
      assign: As for `encode`.
      rows: Consecutive rows; None for all.
      block_size: Vectors at once; it changes no codes.
      progress: Called with `(rows done, rows in all)`.
    """
    encode_fn, default_size = self.encoder(rule, assign)
    size = default_size if block_size is None else block_size
    check_range("block_size", size, 1, 1 << 30)
    blocks = batches.map_blocks(
      encode_fn, vectors, block_size=size, rows=rows, progress=progress
    )
    return (codes_NM for _, codes_NM in blocks)

  def decode_blocks(
    self,
    codes,
    dtype: str = "float32",
    *,
    num_codes: int | None = None,
    block_size: int | None = None,
    progress: Callable | None = None,
  ) -> Iterator[np.ndarray]:
    """Yields float32 vectors `[n, D]` of consecutive rows of codes `[N, M]`.

    Args:
      codes: An array or `vqjax.data.codes.Codes`.
      dtype: Type of the factors of a network's products.
      num_codes: Decodes this many columns, the list number among them.
      block_size: Codes that go through the network at once.
      progress: Called with `(rows done, rows in all)`.

    Raises:
      ValueError: A code is not below the size of its codebook; its row is
        named.
    """
    sizes = self.codebook_sizes[: num_codes or codes.shape[1]]
    decode_fn, num = self.decoder(dtype, block_size), len(codes)
    size = block_size or runner.decode_block()
    at_once = min(8 * size, num)
    for start in range(0, num, at_once or 1):
      block_NM = np.asarray(codes[start : start + at_once])[:, : len(sizes)]
      codes_lib.check_ids(block_NM, sizes, start)
      count = len(block_NM)
      # The last rows fill a block: one program for all.
      missing = min(-count % size, at_once - count)
      block_NM = np.pad(block_NM, ((0, missing), (0, 0)), "edge")
      yield np.asarray(decode_fn(block_NM.astype(np.int32)))[:count]
      if progress:
        progress(start + count, num)

  def encode(
    self,
    x,
    *,
    assign: str = "auto",
    block_size: int | None = None,
    progress: bool = False,
    **settings,
  ) -> np.ndarray:
    """Finds codes `[N, M]`, unsigned, of the smallest type that fits.

    Args:
      x: Vectors `[N, D]`: an array, a memory map, or a path.
      assign: How an IVF model finds the list of a vector: "blocks", "hnsw" or
        "auto", see `vqjax.interop.faiss_assign`.
      block_size: Vectors at once; it changes no codes.
      progress: Shows a progress line.
      **settings: Fields of `vqjax.codecs.rule.SearchRule` that take the place
        of those stored with the codec, as `beam_size=64`.

    Raises:
      ValueError: Vectors are not finite or of another dimension, or a setting
        does not fit.
    """
    vectors = self.open_vectors(x)
    rule = self.rule.replace(**self.check_settings(settings))
    self.check_rule(rule)
    sizes, row = self.code_sizes(rule), 0
    codes_NM = np.empty((len(vectors), len(sizes)), smallest_type(sizes))
    if not len(vectors):
      return codes_NM
    with progress_lib.progress(
      len(vectors), "encode", is_shown=progress
    ) as done:
      for block_NM in self.encode_blocks(
        vectors, rule, assign, block_size=block_size, progress=done
      ):
        codes_NM[row : row + len(block_NM)] = block_NM
        row += len(block_NM)
    return codes_NM

  def decode(
    self,
    codes,
    *,
    dtype: str = "float32",
    block_size: int | None = None,
    progress: bool = False,
  ) -> np.ndarray:
    """Returns the vectors of codes `[N, M]`: float32 `[N, D]`.

    Args:
      codes: Integers, an array or the path of a .npy file or a folder of
        shards. If a prefix of a code is a code, fewer columns are allowed.
      dtype: Type of the factors of a network's products.
      block_size: Codes at once; it changes no vectors.
      progress: Shows a progress line.

    Raises:
      TypeError: Codes are no integers.
      ValueError: A code is not below the size of its codebook.
    """
    if isinstance(codes, str | os.PathLike):
      codes = codes_lib.open_codes(codes)
    elif not isinstance(codes, codes_lib.Codes):
      codes = np.asarray(codes)
      if codes.dtype.kind not in "iu":
        raise TypeError(f"codes must be integers, got {codes.dtype}.")
    sizes = self.codebook_sizes
    if len(codes.shape) != 2 or not 1 <= codes.shape[1] <= len(sizes):
      raise ValueError(
        f"codes must have shape (N, 1 to {len(sizes)}), got {codes.shape}."
      )
    x_ND, row = np.empty((len(codes), self.dim), np.float32), 0
    with progress_lib.progress(len(codes), "decode", is_shown=progress) as done:
      for block_ND in self.decode_blocks(
        codes, dtype, block_size=block_size, progress=done
      ):
        x_ND[row : row + len(block_ND)] = block_ND
        row += len(block_ND)
    return x_ND

  evaluate = quality.evaluate

  def open_truth(self, base, queries, true_ids, metric, is_shown):
    """Queries and their neighbours; raises where `true_ids` are not these."""
    if true_ids is not None:
      true_ids = open_array(true_ids, name="true_ids")
    names = {"queries": "queries", "base": "base", "groundtruth": "true_ids"}
    files = truth_check.Files(
      self.open_vectors(queries, "queries"), base, true_ids, metric, names
    )
    return evaluation.open_truth(
      files, len(base), base, num=1, is_shown=is_shown
    )

  def open_vectors(self, x, name: str = "x"):
    """Opens vectors, which are of length 1 for a codec of the cosine."""
    vectors = open_array(x, self.dim, name)
    is_raw = not isinstance(vectors, unit.UnitVectors)
    if self.metric == "cosine" and is_raw:
      return unit.UnitVectors(vectors)
    return vectors

  @property
  def metric(self) -> str:
    """Metric of the data that the codec was trained on; "l2" if not known."""
    return self.info.get("metric") or "l2"

  def save(self, path, *, overwrite: bool = False) -> pathlib.Path:
    """Writes codec.safetensors and codec.json into a folder; returns the file.

    Raises:
      FileExistsError: There is a codec already, and not `overwrite`.
    """
    return codec_file.save_codec(
      path,
      self.name,
      self.params,
      info=self.info,
      ranker=self.ranker,
      overwrite=overwrite,
    )

  def check_settings(
    self, settings: dict, others: tuple[str, ...] = ()
  ) -> dict:
    """Returns the settings; raises ValueError unless the codec has them all.

    `others` are arguments that a caller takes besides, for the message.
    """
    knobs = self.spec.knobs
    for name in settings:
      if name not in knobs:
        near = shipped.did_you_mean(name, (*knobs, *others))
        raise ValueError(
          f"{name} means nothing to a {self.name} codec{near} It has "
          f"{', '.join(knobs)}."
        )
    return settings


def load(path) -> Codec:
  """Opens a run folder, a .safetensors or a released .pt checkpoint.

  Also `hf://owner/name[@revision]`, a codec on the Hugging Face hub.

  Raises:
    FileNotFoundError: There is no codec.
    ConnectionError: The hub does not answer, and the cache has no codec.
    ValueError: The file is no codec, damaged or changed.
  """
  found = codec_file.load_codec(path)
  return Codec(
    *(found.name, found.params, found.info, found.ranker),
    fingerprint=found.fingerprint,
    graph_file=faiss_graph.path_of(path),
  )


def open_array(x, dim: int | None = None, name: str = "x"):
  """Returns vectors `[N, D]` of an array, a memory map or a path, unread.

  Raises:
    TypeError: They are no numbers.
    ValueError: They have another shape.
  """
  if isinstance(x, str | os.PathLike):
    name, x = str(x), formats.open_vectors(x)
  elif type(x).__module__.partition(".")[0] != "vqjax":  # No open file.
    x = np.asarray(x)
  check_shape(name, x, (None, dim))
  kinds = jnp.integer, jnp.floating
  if not any(jnp.issubdtype(x.dtype, kind) for kind in kinds):
    raise TypeError(f"{name} must hold real numbers, got {x.dtype}.")
  return x


def smallest_type(sizes) -> np.dtype:
  """Returns the smallest unsigned type for codes below these sizes."""
  return np.min_scalar_type(max(sizes) - 1)
