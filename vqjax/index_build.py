"""Builds an index: encodes vectors, finds their lists, fits decoders.

index = vqjax.build_index(codec, x, num_lists=1024)
"""

import math
import os

import jax
import numpy as np

from vqjax.codec import Codec
from vqjax.codec import load as load_codec
from vqjax.codecs import additive, kmeans
from vqjax.codecs import decoders as decoders_lib
from vqjax.core import check_range, check_shape
from vqjax.data import batches, item_ids
from vqjax.index import METRICS, Index, check_ids, open_for
from vqjax.interop import faiss_fastscan, faiss_ivf
from vqjax.search import refiners

_ARGUMENTS = (  # Of `build_index`, for whoever misspells one.
  *("num_lists", "ids", "metric", "refiner", "coarse", "num_tables", "seed"),
  *("progress", "codes"),
)
_PER_LIST = 256  # Vectors that k-means looks at, for each list.
_LEAST_PER_LIST = 39  # Fewer make poor centroids.
_ONE_LIST = 2_500  # Below this number of vectors lists save no time.
_MOST_FITTED = 200_000  # Vectors that decoders are fitted to.


def build_index(
  codec,
  x,
  num_lists: int | None = None,
  *,
  ids=None,
  metric: str | None = None,
  refiner: str | None = None,
  coarse: str | None = None,
  num_tables: int | None = None,
  seed: int = 0,
  progress: bool = False,
  codes=None,
  **settings,
) -> Index:
  """Encodes vectors and puts their codes into inverted lists.

  Args:
    codec: A `vqjax.Codec`, or the path of one.
    x: Vectors `[N, D]`: an array, a memory map, or a path.
    num_lists: L. A codec with lists has its own number. For others the vectors
      get lists by k-means; None for about four times the square root of N, and
      one list for fewer than 2,500 vectors.
    ids: Distinct integers `[N]`, 0 or more, or text; a column of the Parquet
      file `x`, or a file, see `vqjax.data.item_ids`; None for 0, 1, ...
    metric: "l2", "ip" or "cosine"; None for the codec's.
    refiner: "rabitq" for more recall, "fastscan" for more speed, or None.
    coarse: "flat" or "hnsw", how lists are found; None for flat below 16,384.
    num_tables: Tables of the pairwise decoder, which only codecs that are no
      sums of codewords have; None for those that pay on held-out vectors.
    seed: Of k-means and of the rotation of rabitq.
    progress: Shows progress lines.
    codes: Codes `[N, M]` of the vectors by the codec, if they are known.
    **settings: Fields of `vqjax.codecs.rule.SearchRule`, see `Codec.encode`.

  Raises:
    ValueError: Vectors, ids or settings do not fit; before any work.
  """
  codec = codec if isinstance(codec, Codec) else load_codec(codec)
  metric = metric or codec.info.get("metric") or "l2"
  _check_choices(metric=(metric, METRICS), refiner=(refiner, refiners.KINDS))
  _check_metric(codec, metric)
  codec.check_settings(settings, _ARGUMENTS)
  decoders_lib.check_sizes(codec.codebook_sizes[codec.is_ivf :], codec.name)
  vectors = open_for(x, codec.dim, metric)
  items_N = _read_items(ids, x, len(vectors))
  ids = ids if items_N is None else None
  ids_N = check_ids(ids, len(vectors), np.empty(0, np.int64))
  num_lists = _check_lists(codec, num_lists, len(vectors))
  _check_refiner(refiner, metric, codec, len(vectors))
  if codes is not None:
    check_shape("codes", codes, (len(vectors), len(codec.codebook_sizes)))
    codes_NM = np.asarray(codes)
  else:
    codes_NM = codec.encode(vectors, progress=progress, **settings)
  centroids_LD = _centroids(codec, vectors, num_lists, seed)
  codewords, tables = _fit_decoders(codec, vectors, codes_NM, num_tables)
  faiss_index = faiss_ivf.make_index(
    centroids_LD,
    np.asarray(codewords.codebooks_MKD),
    coarse=coarse or faiss_ivf.default_coarse(num_lists),
    metric="ip" if metric == "ip" else "l2",
    by_residual=codec.is_ivf,
  )
  index = Index(
    *(codec, faiss_index, metric, tables), settings=settings, items_N=items_N
  )
  index.append(vectors, codes_NM, ids_N)
  if refiner is not None:
    index.make_refiner(refiner, vectors, ids_N, seed)
  return index


def _read_items(ids, x, num: int) -> np.ndarray | None:
  """Item ids of text or of a file; None for ids that lists can hold."""
  if isinstance(ids, str | os.PathLike):
    data = x if isinstance(x, str | os.PathLike) else None
    return item_ids.read(ids, num, data=data)
  if ids is None or np.asarray(ids).dtype.kind not in "UO":
    return None
  return item_ids.check_items(ids, num)


def _check_choices(**values) -> None:
  """Raises ValueError unless each value is None or one of its choices."""
  for name, (value, choices) in values.items():
    if value is not None and value not in choices:
      raise ValueError(
        f"{name} must be one of {', '.join(choices)}; got {value!r}."
      )


def _check_metric(codec: Codec, metric: str) -> None:
  """Raises ValueError if the codec was trained for another kind of vectors."""
  own = codec.info.get("metric") or "l2"
  if (metric == "cosine") != (own == "cosine"):
    raise ValueError(
      f"metric={metric!r} does not fit a codec that was trained for {own}: for "
      "the cosine vectors are made of length 1. Train a codec for this metric."
    )


def _check_refiner(refiner: str | None, metric: str, codec, num: int) -> None:
  """Raises ValueError if vectors cannot have this refiner."""
  if refiner != "fastscan":
    return
  if metric == "ip":
    raise ValueError(
      "A fastscan refiner is for l2 and cosine; take refiner='rabitq' for ip."
    )
  faiss_fastscan.check_parts(codec.dim, None)
  check_range(
    "The number of vectors", num, 256, 1 << 40, "for a fastscan refiner"
  )


def _check_lists(codec: Codec, num_lists: int | None, num: int) -> int:
  """Returns L; raises ValueError if there are too few vectors for it."""
  check_range("The number of vectors", num, 1, 2**31 - 1)
  if codec.is_ivf:
    own = codec.codebook_sizes[0]
    if num_lists not in (None, own):
      raise ValueError(
        f"num_lists must be None or {own}, the number of lists that this codec "
        f"was trained with; got {num_lists}."
      )
    return own
  if num_lists is None:
    return default_lists(num)
  check_range("num_lists", num_lists, 1, num, "there are no more vectors")
  return num_lists


def default_lists(num: int) -> int:
  """Returns L for `num` vectors: about four times the square root, or one."""
  if num < _ONE_LIST:
    return 1
  power = round(math.log2(4 * math.sqrt(num)))
  return min(1 << power, max(num // _LEAST_PER_LIST, 1))


def _centroids(codec, vectors, num_lists: int, seed: int) -> np.ndarray:
  """The codec's own, or k-means of a sample."""
  if codec.is_ivf or num_lists == 1:
    return codec.centroids
  x_ND = batches.subsample(vectors, _PER_LIST * num_lists, seed)
  return np.asarray(kmeans.fit(jax.random.key(seed), x_ND, num_lists))


def _fit_decoders(codec: Codec, vectors, codes_NM, num_tables: int | None):
  """Codewords of the index, and the pairwise decoder or None."""
  sizes = codec.codebook_sizes[codec.is_ivf :]
  rows_N = batches.permute(
    np.arange(min(len(vectors), _MOST_FITTED)), len(vectors), 0, 0
  )
  target_ND = batches.read_rows(vectors, rows_N)
  codes_NM, lists_N = codes_NM[rows_N].astype(np.int32), None
  if codec.is_ivf:
    lists_N, codes_NM = codes_NM[:, 0], codes_NM[:, 1:]
    target_ND -= codec.centroids[lists_N]
  sample = decoders_lib.Sample(target_ND, codes_NM, lists_N)
  num_train, held_out = len(rows_N), None
  if len(rows_N) > 1:
    num_train, _ = batches.split(len(rows_N))
    held_out = sample.cut(slice(num_train, None))
  train = sample.cut(slice(num_train))
  codewords = decoders_lib.fit_additive(codec.params, sizes, train)
  if additive.from_codec(codec.params) is not None and num_tables is None:
    return codewords, None  # Exact already.
  num_lists = codec.codebook_sizes[0] if codec.is_ivf else 0
  most = decoders_lib.most_tables(sizes, num_lists, num_train, num_tables)
  if not most:
    return codewords, None
  tables = decoders_lib.fit_pairwise(
    codewords,
    sizes,
    train,
    None if num_tables else held_out,
    num_tables=most,
    centroids_LD=codec.centroids,
  )
  return codewords, tables
