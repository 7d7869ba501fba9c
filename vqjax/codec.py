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
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import evaluation, shipped
from vqjax import progress as progress_lib
from vqjax.codecs import registry, runner
from vqjax.codecs import rule as rule_lib
from vqjax.codecs.codec import CodecSpec
from vqjax.codecs.rule import SearchRule
from vqjax.core import check_range, check_shape
from vqjax.data import batches, formats, unit
from vqjax.data import codes as codes_lib
from vqjax.interop import faiss_assign, faiss_io
from vqjax.search import truth_check
from vqjax.storage import codec_file

_BLOCK = 16384  # Vectors decoded and searched at once.


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Codec:
  """A trained codec: parameters, and the settings that are stored with them.

  `ready` are tables that know more than those of `prepare`, as a ranker.
  """

  name: str  # In `vqjax.codecs.registry`.
  params: Any
  info: dict = dataclasses.field(default_factory=dict)
  ready: Any = None
  fingerprint: str | None = None  # Of the parameters; found where left out.

  def __post_init__(self):
    """Finds the fingerprint, 16 hex digits."""
    if self.fingerprint is None:
      found = codec_file.fingerprint(self.params)
      object.__setattr__(self, "fingerprint", found)

  def __repr__(self) -> str:
    """Says what it is in a line."""
    data = self.info.get("data", {})
    trained_on = data.get("train") or data.get("name")
    lists = f"{self.codebook_sizes[0]:,} lists, " if self.is_ivf else ""
    return (
      f"Codec({self.name}, {self.dim} dimensions, {lists}{self.num_codes} "
      f"codes, {self.num_bytes:g} bytes, fingerprint {self.fingerprint}"
      + (f", trained on {trained_on})" if trained_on else ")")
    )

  @property
  def spec(self) -> CodecSpec:
    """The functions of this kind of codec."""
    return registry.get(self.name)

  @functools.cached_property
  def _prepared(self):
    return jax.jit(self.spec.prepare)(self.params)

  @property
  def tables(self):
    """What encode and decode need, made once."""
    return self._prepared if self.ready is None else self.ready

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
    rule = self.rule.replace(**self.check_settings(settings))
    self.spec.check_rule(self.params, rule)
    if rule.num_ranked:
      raise ValueError(
        "A ranker is not stored with a codec: give num_ranked to each command "
        f"that encodes, not to with_rule; got {rule.num_ranked}."
      )
    stored = {**self.info.get("encode", {}), **settings}
    return dataclasses.replace(self, info={**self.info, "encode": stored})

  def with_tables(self, tables) -> "Codec":
    """Returns the codec with these tables."""
    return dataclasses.replace(self, ready=tables)

  def takes_graph(self, assign: str = "auto") -> bool:
    """Whether the lists of vectors are found by a graph of the centroids."""
    return self.is_ivf and faiss_assign.takes_graph(
      assign, self.codebook_sizes[0]
    )

  def make_assign_fn(
    self, assign: str = "auto", progress: Callable | None = None
  ) -> Callable | None:
    """Returns `x_ND -> (x_ND, lists_N)`; None if encoding compares all.

    A graph of a million centroids takes minutes: make it once.
    """
    if not self.takes_graph(assign):
      return None
    assign_fn, _ = faiss_assign.make_assign_fn(
      self.centroids, "hnsw", progress=progress
    )
    return lambda x_ND: (x_ND, assign_fn(x_ND))

  @functools.cached_property
  def _compiled(self) -> dict:
    return {}

  def _encode_fn(self, rule: SearchRule, assign: str) -> Callable:
    """The encoder of this search, made once."""
    key = "encode", rule, assign
    if key not in self._compiled:
      assign_fn = self.make_assign_fn(assign)
      self._compiled[key] = runner.make_encode_fn(
        self.spec, self.tables, rule, assign_fn
      )
    return self._compiled[key]

  def _decode_fn(self, dtype: str, block_size: int | None = None) -> Callable:
    """The decoder of this type, made once."""
    key = "decode", dtype, block_size
    if key not in self._compiled:
      self._compiled[key] = runner.make_decode_fn(
        self.spec, self.tables, dtype=dtype, block_size=block_size
      )
    return self._compiled[key]

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
    vectors = self._open(x)
    rule = self.rule.replace(**self.check_settings(settings))
    encode_fn = self._encode_fn(rule, assign)
    sizes = self.codebook_sizes
    if rule.num_steps is not None:
      sizes = sizes[: rule.num_steps + self.is_ivf]
    dtype = smallest_type(sizes)
    codes_NM = np.empty((len(vectors), len(sizes)), dtype)
    if not len(vectors):
      return codes_NM
    row = 0
    with progress_lib.progress(
      len(vectors), "encode", is_shown=progress
    ) as done:
      for block_NM in runner.encode(
        self.spec,
        self.tables,
        vectors,
        rule,
        block_size=block_size,
        progress=done,
        encode_fn=encode_fn,
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
      for block_ND in runner.decode(
        self.spec,
        self.tables,
        codes,
        block_size=block_size,
        progress=done,
        decode_fn=self._decode_fn(dtype, block_size),
      ):
        x_ND[row : row + len(block_ND)] = block_ND
        row += len(block_ND)
    return x_ND

  def evaluate(
    self,
    base,
    *,
    queries=None,
    true_ids=None,
    metric: str | None = None,
    ranks: tuple[int, ...] = (1, 10, 100),
    progress: bool = False,
    **settings,
  ) -> dict:
    """Measures error, time, and the recall of exact search in decoded vectors.

    Args:
      base: Vectors `[N, D]`, an array, a memory map or a path.
      queries: `[Q, D]`, of the same kind, for the recall.
      true_ids: Ids `[Q, G]` of their true neighbours, nearest first, -1 for
        none; an array or a path. Found by exact search where left out.
      metric: "l2", "ip", or "cosine" for a codec that was trained for it; None
        for the codec's.
      ranks: R of each 1-recall@R, the share of queries whose nearest neighbour,
        or a vector as near, is among the first R found.
      progress: Shows progress lines.
      **settings: As for `encode`.

    Returns:
      `mse`, the squared error per vector, summed over dimensions; `1-recall@R`
      with queries; `encode_us` and `decode_us`, microseconds per vector.
    """
    vectors, metric = self._open(base, "base"), metric or self.metric
    if metric == "cosine" != self.metric:
      raise ValueError(
        "The cosine needs a codec of vectors of length 1, but this one was "
        f"trained for {self.metric}; train it with metric cosine."
      )
    check_range("vectors of the base", len(vectors), 1, 1 << 40)
    rule = self.rule.replace(**self.check_settings(settings))
    first = runner.encode_block(self.spec, self.tables, rule)
    self.encode(vectors[:first], **settings)  # Compiles.
    began = time.perf_counter()
    codes_NM = self.encode(vectors, progress=progress, **settings)
    found = {"encode_us": (time.perf_counter() - began) / len(vectors) * 1e6}
    errors = _Errors(self, vectors, codes_NM, rule.dtype)
    recalls = {}
    if queries is None:
      for _ in errors:
        pass
    else:
      num = min(max(ranks), len(vectors))
      true = self._open_truth(vectors, queries, true_ids, metric, progress)
      ids_QR = faiss_io.knn(
        *(true.xq_QD, iter(errors), num, evaluation.faiss_metric(metric))
      )[1]
      names = {f"1-recall@{r}": f"1-recall@{min(r, num)}" for r in ranks}
      values = true.recalls(ids_QR, set(names.values()))
      recalls = {name: values[names[name]] for name in names}
    return {
      "mse": errors.total / len(vectors),
      **recalls,
      **found,
      "decode_us": errors.seconds / len(vectors) * 1e6,
    }

  def _open_truth(self, base, queries, true_ids, metric, is_shown):
    """Queries and their neighbours; raises where `true_ids` are not these."""
    if true_ids is not None:
      true_ids = open_array(true_ids, name="true_ids")
    names = {"queries": "queries", "base": "base", "groundtruth": "true_ids"}
    files = truth_check.Files(
      self._open(queries, "queries"), base, true_ids, metric, names
    )
    return evaluation.open_truth(
      files, len(base), base, num=1, is_shown=is_shown
    )

  def _open(self, x, name: str = "x"):
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
      path, self.name, self.params, info=self.info, overwrite=overwrite
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


class _Errors:
  """Decoded blocks, whose squared errors and seconds are summed on the way."""

  def __init__(self, codec, vectors, codes_NM, dtype):
    self._decode_fn = codec._decode_fn(dtype)
    self._vectors, self._codes_NM = vectors, codes_NM
    self._size = min(_BLOCK, len(codes_NM))
    self._decode(0)  # Compiles.
    self.total, self.seconds = 0.0, 0.0

  def _decode(self, start: int):
    codes_NM = self._codes_NM[start : start + self._size].astype(np.int32)
    missing = self._size - len(codes_NM)
    padded_NM = np.pad(codes_NM, ((0, missing), (0, 0)), "edge")
    return np.asarray(self._decode_fn(padded_NM))[: len(codes_NM)]

  def __iter__(self):
    for start in range(0, len(self._codes_NM), self._size):
      began = time.perf_counter()
      xhat_ND = self._decode(start)
      self.seconds += time.perf_counter() - began
      rows = range(start, start + len(xhat_ND))
      x_ND = batches.read_rows(self._vectors, rows)
      self.total += float(np.sum((x_ND - xhat_ND) ** 2, dtype=np.float64))
      yield xhat_ND


def load(path) -> Codec:
  """Opens a run folder, a .safetensors or a released .pt checkpoint.

  Raises:
    FileNotFoundError: There is no codec.
    ValueError: The file is no codec, damaged or changed.
  """
  found = codec_file.load_codec(path)
  return Codec(
    found.name, found.params, found.info, fingerprint=found.fingerprint
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
