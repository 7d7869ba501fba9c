"""Inverted lists of codes as an index of stock faiss: make, fill, read, search.

The index is an `IVF{L},RQ{M}x{bits}_Nqint8` or `IVF{L}_HNSW32,...`: its lists
hold codes of any codec and a byte for a norm, its codewords are from an
additive decoder, so that a sum r of codewords stands for what the centroid c
leaves of a vector. faiss computes from them, without vqjax,

  |x - c - r|^2 = |x - c|^2 - 2 <x - c, r> + |r|^2

The byte stands for |r|^2. (Inner products, of "ip", need no norm.) A
codec without lists has one list, whose centroid is zero, or the centre of
vectors far from the origin: |r|^2 would be too large for a byte there. Beside
the file, its description `index.faiss.json` says which codec made the codes,
and `index.faiss.order.npy` repeats the ids in list order, to be mapped.

Reference: arXiv 2501.03078, section 3.4.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import faiss
import numpy as np

from vqjax.codecs.additive import AdditiveParams, split_centre
from vqjax.core import check_range, check_shape
from vqjax.data import codes, files, row_ids
from vqjax.interop import faiss_files, faiss_io, faiss_lists
from vqjax.interop.faiss_io import METRICS, float_rows
from vqjax.interop.faiss_lists import assign_lists as assign_lists
from vqjax.interop.faiss_lists import contents as contents
from vqjax.interop.faiss_lists import make_coarse as make_coarse
from vqjax.interop.faiss_lists import make_rows_fn as make_rows_fn

_KIND = ("vqjax index", 1)
_LEAST_RANGE = 1e-6  # Of norms, relative; the byte divides by the range.


MANY_LISTS = 16384  # From here on a graph finds the lists of a query sooner.


def default_coarse(num_lists: int) -> str:
  """Returns how this number of lists is found best: "flat" or "hnsw"."""
  return "flat" if num_lists < MANY_LISTS else "hnsw"


class Loaded(NamedTuple):
  """An index from a file and its description, {} if there is none."""

  index: faiss.Index
  info: dict


def make_index(
  centroids_LD: np.ndarray,
  codebooks_MKD: np.ndarray,
  *,
  coarse: str = "hnsw",
  metric: str = "l2",
  by_residual: bool = True,
  graph: faiss.Index | None = None,
  progress=None,
) -> faiss.Index:
  """Returns an empty index, to be filled by `add_codes`, then `fit_norms`.

  Args:
    centroids_LD: Of the lists, in data units; `[1, D]` zeros for a codec
      without lists and an index of one.
    codebooks_MKD: Codewords of the additive decoder; K a power of two. A centre
      of their sums (`additive.split_centre`) is moved to the centroids if
      codes are of residuals.
    coarse: See `make_coarse`.
    metric: "l2" or "ip".
    by_residual: Codes are of the residual of a vector after its centroid;
      False: of the vector itself, which is how a codec without lists is put
      into lists.
    graph: For "hnsw" by "l2" a graph of the centroids, which becomes part of
      the index; None to make it.
    progress: See `make_coarse`.

  Raises:
    ValueError: If sizes do not fit each other, or faiss.
  """
  m, k, d = codebooks_MKD.shape
  check_shape("centroids", centroids_LD, (None, d))
  codewords = AdditiveParams(codebooks_MKD)
  if by_residual:
    centre_D, codewords = split_centre(codewords)
    codebooks_MKD = np.asarray(codewords.codebooks_MKD)
    if np.any(centre_D):
      centroids_LD = centroids_LD + np.asarray(centre_D)
  codewords = faiss_io.rq_to_faiss(codewords)
  if graph is None:
    quantizer = make_coarse(centroids_LD, coarse, metric, progress=progress)
  else:
    quantizer = faiss_lists.move(graph, centroids_LD)
  index = faiss.IndexIVFResidualQuantizer(
    *(quantizer, d, len(centroids_LD), m, k.bit_length() - 1, METRICS[metric]),
    faiss.AdditiveQuantizer.ST_norm_qint8,
  )
  faiss_lists.hand_over(quantizer, index)
  rq = index.rq
  rq.codebooks = codewords.rq.codebooks
  # Tables of (M K)^2 numbers, which no search needs, made by whoever reads it.
  rq.train_type |= faiss.ResidualQuantizer.Skip_codebook_tables
  set_norm_range(index, 0.0, _largest_norm(codebooks_MKD))
  rq.is_trained = index.is_trained = True
  index.by_residual = by_residual
  return index


def _largest_norm(codebooks_MKD) -> float:
  """A bound of the squared norm of any sum of codewords."""
  norm_MK = np.linalg.norm(np.asarray(codebooks_MKD, float), axis=-1)
  return float(norm_MK.max(axis=1).sum() ** 2)


def set_norm_range(index, low: float, high: float) -> None:
  """Sets the least and the largest squared norm that the byte can say."""
  # Relative alone: vectors may be of any scale.
  high = max(high, low * (1 + _LEAST_RANGE), float(np.finfo(np.float32).tiny))
  index.rq.norm_min, index.rq.norm_max = low, high


def fit_norms(index: faiss.Index, *, progress=None) -> tuple[float, float]:
  """Gives the byte of the norm the exact range of all vectors of the index.

  Call it when all are added: it goes over the lists twice, to find the range
  and to write the bytes anew. Returns the range, least and largest squared norm
  of the sums of codewords.

  The lists must be in memory; `progress` is called with `(vectors done, twice
  the number of vectors)`.
  """
  index = faiss_lists.check_index(index)
  if not index.ntotal:
    return index.rq.norm_min, index.rq.norm_max
  low, high, done = np.inf, 0.0, 0
  for _, packed in faiss_lists.blocks(index):
    norm_N = np.square(index.rq.decode(packed)).sum(axis=1)
    low, high = min(low, float(norm_N.min())), max(high, float(norm_N.max()))
    done += len(packed)
    if progress is not None:
      progress(done, 2 * index.ntotal)
  set_norm_range(index, low, high)
  for parts, packed in faiss_lists.blocks(index):
    faiss_lists.write(index, parts, faiss_lists.repack(index, packed))
    done += len(packed)
    if progress is not None:
      progress(done, 2 * index.ntotal)
  return low, high


def add_codes(
  index: faiss.Index,
  lists_N: np.ndarray,
  codes_NM: np.ndarray,
  ids_N: np.ndarray,
) -> None:
  """Adds codes to their lists, under ids from 0 to 2^63 - 1.

  What is stored is what faiss stores for vectors that it gives these codes.

  Raises:
    ValueError: If shapes do not fit, or a number is out of range; nothing
      is added then.
  """
  index = faiss_lists.check_index(index)
  m, k, _ = faiss_lists.sizes_of(index)
  check_shape("codes", codes_NM, (None, m))
  check_shape("lists", lists_N, (len(codes_NM),))
  check_shape("ids", ids_N, (len(codes_NM),))
  if not len(codes_NM):
    return
  codes.check_ids(codes_NM, [k] * m)
  for name, x_N, stop in (
    ("lists", lists_N, index.nlist),
    ("ids", ids_N, 2**63),
  ):
    check_range(f"The least of the {name}", x_N.min(), 0, stop - 1)
    check_range(f"The largest of the {name}", x_N.max(), 0, stop - 1)
  for i in range(0, len(codes_NM), faiss_lists.BLOCK):
    rows = slice(i, i + faiss_lists.BLOCK)
    list_bytes = np.ascontiguousarray(lists_N[rows], "<i8")[:, None].view("u1")
    packed = np.hstack(
      [
        list_bytes[:, : index.coarse_code_size()],
        faiss_lists.pack(index, codes_NM[rows]),
      ]
    )
    index.add_sa_codes(packed, np.ascontiguousarray(ids_N[rows], np.int64))


def merge(parts: Iterable[faiss.Index]) -> faiss.Index:
  """Moves all vectors into the first index, which it returns, with their ids.

  The other parts are left empty; none needs to exist before its turn. The
  range of the norms becomes the one of all parts, see `fit_norms`.

  Raises:
    ValueError: A part has other centroids or codewords than the first.
  """
  parts = map(faiss_lists.check_index, parts)
  merged = next(parts, None)
  if merged is None:
    raise ValueError("Merging needs at least 1 index, got 0.")
  wanted = _identity(merged)
  for number, part in enumerate(parts, 1):
    for name, value in _identity(part).items():
      if not np.array_equal(value, wanted[name]):
        raise ValueError(
          f"Part {number} has other {name} than part 0, so they cannot be "
          "merged; build all parts with the same options."
        )
    merged.merge_from(part, 0)
  fit_norms(merged)
  return merged


def keep_coarse(index: faiss.Index) -> faiss.Index:
  """Empties the index, to free the memory of its lists, and returns it."""
  index = faiss_lists.check_index(index)
  empty = faiss.ArrayInvertedLists(index.nlist, index.code_size)
  index.replace_invlists(empty, True)
  empty.this.disown()
  index.ntotal = 0
  return index


def coarse_search(
  index: faiss.Index,
  queries_QD: np.ndarray,
  nprobe: int,
  ef_search: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
  """Finds the nearest lists of queries, int32 `[Q, P]`, and their distances.

  Distances are squared; for "ip" they are inner products. A graph may find
  fewer lists than asked for; the slots left are -1.

  `ef_search` is the effort in a graph, None for the file's; a flat quantiser
  takes no notice of it.
  """
  index = faiss_lists.check_index(index)
  queries_QD = float_rows("queries", queries_QD, index.d)
  coarse = faiss.downcast_index(index.quantizer)
  return faiss_lists.nearest(coarse, queries_QD, nprobe, ef_search)


def describe(index: faiss.Index) -> dict:
  """Returns the sizes of an index, as its description has them."""
  index = faiss_lists.check_index(index)
  m, k, d = faiss_lists.sizes_of(index)
  coarse = faiss.downcast_index(index.quantizer)
  (metric,) = [name for name, m_ in METRICS.items() if m_ == index.metric_type]
  return {
    "dim": d,
    "metric": metric,
    "num_vectors": index.ntotal,
    "num_codes": m,
    "codebook_size": k,
    "num_lists": index.nlist,
    "coarse": "hnsw" if isinstance(coarse, faiss.IndexHNSW) else "flat",
    "by_residual": bool(index.by_residual),
  }


def code_bytes(info: dict) -> int:
  """Returns the bytes of a vector in a described index: codes and norm."""
  bits = (info["codebook_size"] - 1).bit_length()
  return math.ceil(info["num_codes"] * bits / 8) + 1


def save(
  index: faiss.Index, path, info: dict, *, overwrite: bool = False
) -> dict:
  """Writes index and description, each whole or not at all.

  The ids of the rows are written beside them, see `row_ids`. Returns the
  description.

  `info` is what else the description says, plain values, such as
  `codec_fingerprint`.
  """
  info = {**info, **describe(index)}
  row_ids.save_beside(path, faiss_lists.ids_of(index), overwrite=overwrite)
  return faiss_files.save(index, path, info, kind=_KIND, overwrite=overwrite)


def load(path, *, mmap: bool = False, describe_fn=None) -> Loaded:
  """Reads an index file and its description, and compares them.

  For `mmap` see `faiss_files.load`. `describe_fn` makes the description of an
  index that has none beside it.

  Raises:
    FileNotFoundError: One of them is missing.
    ValueError: The file is damaged, or no index of this kind.
  """
  index, info = faiss_files.load(path, kind=_KIND, mmap=mmap)
  index = faiss_lists.check_index(index, path)
  if not info and describe_fn is not None:
    info = describe_fn(index)
  if not info:
    raise FileNotFoundError(
      f"{path} has no description {files.description_path(path).name} next to "
      "it, so its codec is unknown. Give --codec, which is then compared with "
      "its codes; or copy the description too, or build the index again."
    )
  found = describe(index)
  wanted = {name: info.get(name, value) for name, value in found.items()}
  if found != wanted:
    raise ValueError(f"{path} has {found}, but its description says {wanted}.")
  return Loaded(index, info)


def check_codec(path, info: dict, fingerprint: str) -> None:
  """Raises ValueError if an index is of another codec than `fingerprint`."""
  found = info.get("codec_fingerprint")
  if found != fingerprint:
    raise ValueError(
      f"{path} holds codes of codec {found}, but the codec is {fingerprint}; "
      "search with the codec that made them, or build the index again."
    )


def _identity(index) -> dict:
  """What indexes must share to be merged."""
  return {
    "metric": index.metric_type,
    "kind of residual": bool(index.by_residual),
    "centroids": faiss_lists.centroids_of(index),
    "words": faiss_lists.words_of(index.rq),
  }
