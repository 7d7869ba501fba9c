"""What only tests need: decoders of arrays, and the search of stock faiss."""

import faiss
import numpy as np

from vqjax.codecs import additive as additive_lib
from vqjax.codecs.distances import centre_of
from vqjax.interop import faiss_ivf


def additive(codes_NM, target_ND, codebook_size, *, block_size=65_536, **knobs):
  """`additive.fit` of all rows."""
  blocks = (
    (codes_NM[i : i + block_size], target_ND[i : i + block_size])
    for i in range(0, len(codes_NM), block_size)
  )
  centre_D = centre_of(target_ND)
  return additive_lib.fit(blocks, codebook_size, centre_D=centre_D, **knobs)


def stock_search(index, queries_QD, k, *, nprobe, ef_search=None):
  """Distances and ids, `[Q, k]`, as any faiss program finds them."""
  graph = None
  if ef_search is not None:
    graph = faiss.SearchParametersHNSW(efSearch=ef_search)
  params = faiss.SearchParametersIVF(nprobe=nprobe, quantizer_params=graph)
  queries_QD = np.ascontiguousarray(queries_QD, np.float32)
  return index.search(queries_QD, k, params=params)


def make_index(centroids_LD, codebooks_MKD, *, norm_range=None, **options):
  """`faiss_ivf.make_index`, whose byte has this range of norms."""
  index = faiss_ivf.make_index(centroids_LD, codebooks_MKD, **options)
  if norm_range is not None:
    faiss_ivf.set_norm_range(index, *norm_range)
  return index
