"""Inverted lists of stock faiss, to compare those of `vqjax.fast_ivf` with.

They have the same centroids, so that the same lists hold the same vectors:

  IVFFlat       whole vectors
  IVFPQfs+RFlat product codes of 16 codewords, by fast scan, and whole vectors
                that score the best of them
  IVFPQ+RFlat   product codes of 256 codewords in as many bytes, the same
"""

import faiss
import numpy as np

from vqjax.interop import faiss_fast_ivf, faiss_io

NAMES = ("IVFFlat", "IVFPQfs+RFlat", "IVFPQ+RFlat")


def has_codes(name: str) -> bool:
  """Whether codes find candidates, which whole vectors score."""
  return "PQ" in name


def fit(
  name: str,
  centroids_LD: np.ndarray,
  x_ND: np.ndarray,
  metric: str,
  num_subvectors: int,
) -> faiss.Index:
  """Trains an empty index.

  Args:
    name: One of `NAMES`.
    centroids_LD: Of the lists; of length 1 for "cosine" and "ip".
    x_ND: Vectors to train codewords with; of length 1 for "cosine".
    metric: "l2", "ip" or "cosine".
    num_subvectors: Of codes of 16 codewords; those of 256 have half as many,
      or if that does not divide D the next number below that does.

  Raises:
    ValueError: A name is unknown, or there are too few vectors.
  """
  if name not in NAMES:
    raise ValueError(f"A baseline must be one of {NAMES}, got {name!r}.")
  num_lists, dim = centroids_LD.shape
  codes, num_words = "Flat", 1
  if name == "IVFPQfs+RFlat":
    codes, num_words = f"PQ{num_subvectors}x4fs,RFlat", 16
  elif name == "IVFPQ+RFlat":
    num_words, num = 256, max(num_subvectors // 2, 1)
    num = next(m for m in range(num, 0, -1) if dim % m == 0)
    codes = f"PQ{num}x8,RFlat"
  if len(x_ND) < num_words:
    raise ValueError(
      f"The baseline {name} needs {num_words} vectors to learn codewords from, "
      f"got {len(x_ND)}; leave it out of --baselines."
    )
  kind = faiss_fast_ivf.kind_of(metric)
  index = faiss.index_factory(dim, f"IVF{num_lists},{codes}", kind)
  lists = faiss.downcast_index(faiss.extract_index_ivf(index))
  lists.quantizer.add(np.ascontiguousarray(centroids_LD, np.float32))
  if has_codes(name):
    lists.pq.cp.min_points_per_centroid = 1  # faiss warns below 39.
  index.train(faiss_io.float_rows("vectors", x_ND, dim))
  return index


def search(
  index: faiss.Index,
  queries_QD: np.ndarray,
  k: int,
  *,
  nprobe: int,
  num_candidates: int | None = None,
) -> np.ndarray:
  """Ids `[Q, k]` of the nearest found, -1 if there are no more.

  `num_candidates` are the codes that are scored exactly, at least k.
  """
  params = faiss.SearchParametersIVF(nprobe=nprobe)
  if num_candidates is not None:
    params = faiss.IndexRefineSearchParameters(
      k_factor=max(num_candidates / k, 1), base_index_params=params
    )
  queries_QD = faiss_io.float_rows("queries", queries_QD, index.d)
  return index.search(queries_QD, k, params=params)[1]
