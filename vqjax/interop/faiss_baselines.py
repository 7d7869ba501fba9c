"""Inverted lists of faiss's own codes, to compare an index of ours with.

They share lists, coarse quantiser and metric with the index they stand next to:

  IVF-PQ      product codes of as many positions and codewords, by residual
  IVF-RQ      residual codes of the same sizes, a byte for the norm
  IVF-RaBitQ  a bit for each dimension of the rotated vector, and 8 bytes

RaBitQ needs its random rotation: without it the 1-recall@1 of SIFT vectors is a
third lower. Reference: arXiv 2405.12497 for RaBitQ.
"""

from collections.abc import Iterable

import faiss
import numpy as np

from vqjax.core import check_range
from vqjax.interop import faiss_io, faiss_lists

NAMES = ("IVF-PQ", "IVF-RQ", "IVF-RaBitQ")
QUERY_BITS = (4, 8)  # Of RaBitQ's queries: faster or better.


def fit(name: str, like: faiss.Index, x_ND: np.ndarray) -> faiss.Index:
  """Trains an empty index on vectors `[N, D]` in data units.

  Args:
    name: One of `NAMES`.
    like: From `faiss_ivf.load`; its lists, coarse quantiser, metric, positions
      and codewords are taken. It may be emptied afterwards.
    x_ND: Training vectors, of any numeric type.

  Raises:
    ValueError: If a name is unknown or a size does not fit.
  """
  if name not in NAMES:
    raise ValueError(f"A baseline must be one of {NAMES}, got {name!r}.")
  dim, num_lists, metric = like.d, like.nlist, like.metric_type
  num_codes, num_bits = like.rq.M, int(like.rq.nbits.at(0))
  x_ND = faiss_io.float_rows("vectors", x_ND, dim)
  check_range(
    "the number of training vectors", len(x_ND), 1 << num_bits, np.inf
  )
  coarse = faiss.clone_index(like.quantizer)
  sizes = (dim, num_lists)
  if name == "IVF-PQ":
    faiss_io.check_parts(name, dim, num_codes)
    lists = faiss.IndexIVFPQ(coarse, *sizes, num_codes, num_bits, metric)
    lists.pq.cp.min_points_per_centroid = 1  # faiss warns below 39.
  elif name == "IVF-RQ":
    lists = faiss.IndexIVFResidualQuantizer(
      *(coarse, *sizes, num_codes, num_bits, metric),
      faiss.AdditiveQuantizer.ST_norm_qint8,
    )
    lists.rq.cp.min_points_per_centroid = 1
  else:
    turn = faiss.RandomRotationMatrix(dim, dim)
    turn.init(0)
    faiss_lists.rotate(coarse, turn)
    lists = faiss.IndexIVFRaBitQFastScan(coarse, *sizes, metric)
  faiss_lists.hand_over(coarse, lists)
  if name == "IVF-RaBitQ":
    index = faiss.IndexPreTransform(turn, lists)
    faiss_lists.hand_over(turn, index)
    faiss_lists.hand_over(lists, index)
  else:
    index = lists
  index.train(x_ND)
  return index


def add(index: faiss.Index, blocks: Iterable[np.ndarray]) -> None:
  """Adds blocks of vectors `[n, D]`; ids count from 0."""
  for x_ND in blocks:
    index.add(faiss_io.float_rows("vectors", x_ND, index.d))


def search(
  index: faiss.Index,
  queries_QD: np.ndarray,
  k: int,
  *,
  nprobe: int,
  ef_search: int | None = None,
  query_bits: int = QUERY_BITS[-1],
) -> np.ndarray:
  """Ids `[Q, k]` of the nearest found, -1 if there are no more.

  Args:
    index: From `fit`.
    queries_QD: Float32.
    k: Results.
    nprobe: Lists looked into.
    ef_search: Effort of a coarse quantiser that is a graph; None for its own.
    query_bits: For each dimension of a query, RaBitQ alone.
  """
  lists = lists_of(index)
  graph = None
  if ef_search and isinstance(
    faiss.downcast_index(lists.quantizer), faiss.IndexHNSW
  ):
    graph = faiss.SearchParametersHNSW(efSearch=ef_search)
  common = {"nprobe": nprobe, "quantizer_params": graph}
  if isinstance(lists, faiss.IndexIVFRaBitQFastScan):
    params = faiss.SearchParametersPreTransform(
      index_params=faiss.IVFRaBitQSearchParameters(qb=query_bits, **common)
    )
  else:
    params = faiss.SearchParametersIVF(**common)
  return index.search(
    faiss_io.float_rows("vectors", queries_QD, index.d), k, params=params
  )[1]


def lists_of(index: faiss.Index):
  """The inverted lists; `code_size` is the number of bytes of a vector."""
  index = faiss.downcast_index(index)
  if isinstance(index, faiss.IndexPreTransform):
    return faiss.downcast_index(index.index)
  return index
