"""Whole vectors in lists as an index of stock faiss, and faiss's own kernels.

The file is an `IVF{L},Flat`, behind a step that makes vectors of length 1 if
the metric is the cosine. Any faiss program searches it with the same result,
up to rounding.
"""

from collections.abc import Iterable
from typing import NamedTuple

import faiss
import numpy as np

from vqjax.data import files
from vqjax.interop import faiss_files, faiss_io, faiss_lists

KIND = ("vqjax fast_ivf file", 1)


def kind_of(metric: str) -> int:
  """What faiss calls the metric of lists."""
  return faiss_io.metric_type("ip" if metric == "cosine" else metric)


def num_threads() -> int:
  """Threads that faiss takes: OMP_NUM_THREADS, or all processors."""
  return faiss.omp_get_max_threads()


def make_coarse(centroids_LD: np.ndarray, metric: str) -> faiss.IndexFlat:
  """Returns an index of centroids, for `best_lists`."""
  coarse = faiss.IndexFlat(centroids_LD.shape[1], kind_of(metric))
  coarse.add(np.ascontiguousarray(centroids_LD, np.float32))
  return coarse


def best_lists(
  coarse: faiss.IndexFlat, x_ND: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray]:
  """Scores and numbers `[N, num]` of the best lists, the best first.

  Scores are inner products or squared distances. Of equal ones the lower list
  comes first, and stays if there is no room for both.
  """
  wanted = min(num + 1, coarse.ntotal)  # One more shows what is equal.
  scores_NP = np.empty((len(x_ND), wanted), np.float32)
  lists_NP = np.empty(scores_NP.shape, np.int64)
  pointers = map(faiss.swig_ptr, (scores_NP, lists_NP))
  coarse.search_c(len(x_ND), faiss.swig_ptr(x_ND), wanted, *pointers)
  is_equal_N = (scores_NP[:, 1:] == scores_NP[:, :-1]).any(axis=1)
  for row in np.flatnonzero(is_equal_N):
    scores_NP[row], lists_NP[row] = _best_of_all(coarse, x_ND[row], wanted)
  return scores_NP[:, :num], lists_NP[:, :num]


def _best_of_all(coarse, x_D, num: int):
  """Scores and numbers of the best lists, by way of the scores of all."""
  scores, lists = coarse.search(x_D[None], coarse.ntotal)
  sign = 1 if coarse.metric_type == faiss.METRIC_L2 else -1
  order = np.lexsort((lists[0], sign * scores[0]))[:num]
  return scores[0, order], lists[0, order]


def exact_scores(
  queries_QD: np.ndarray, x_ND: np.ndarray, rows_QR: np.ndarray, metric: str
) -> np.ndarray:
  """Scores `[Q, R]` of each query and its rows, more for the better.

  That is inner products, or for "l2" squared distances less than zero; -inf for
  row -1. All arrays are float32 or int64 and contiguous.
  """
  found_QR = np.empty(rows_QR.shape, np.float32)
  is_l2 = metric == "l2"
  score = faiss.fvec_L2sqr_by_idx if is_l2 else faiss.fvec_inner_products_by_idx
  threads = faiss.omp_get_max_threads()
  if len(rows_QR) == 1:  # It would wait for threads that have nothing to do.
    faiss.omp_set_num_threads(1)
  score(
    *map(faiss.swig_ptr, (found_QR, queries_QD, x_ND, rows_QR)),
    *(queries_QD.shape[1], *rows_QR.shape),
  )
  faiss.omp_set_num_threads(threads)
  if is_l2:
    np.negative(found_QR, out=found_QR)
  found_QR[rows_QR < 0] = -np.inf
  return found_QR


class Stored(NamedTuple):
  """What the file of an index holds, list after list."""

  centroids_LD: np.ndarray
  sizes_L: np.ndarray  # int64.
  ids_N: np.ndarray  # int64.
  index: faiss.IndexIVFFlat  # Whose memory the vectors are in.


def make_flat(
  centroids_LD: np.ndarray, parts: Iterable, metric: str
) -> faiss.Index:
  """Returns an index with the vectors of `parts` in it.

  `parts` are number, ids and vectors of lists. For the metric "cosine" vectors
  and centroids are of length 1, and the index makes queries so.
  """
  coarse = make_coarse(centroids_LD, metric)
  num_lists, dim = centroids_LD.shape
  index = faiss.IndexIVFFlat(coarse, dim, num_lists, kind_of(metric))
  faiss_lists.hand_over(coarse, index)
  index.is_trained = True
  for number, ids_n, x_nD in parts:
    ids_n = np.ascontiguousarray(ids_n, np.int64)
    codes = np.ascontiguousarray(x_nD, np.float32).view(np.uint8)
    index.invlists.add_entries(
      number, len(ids_n), faiss.swig_ptr(ids_n), faiss.swig_ptr(codes)
    )
    index.ntotal += len(ids_n)
  return faiss_io.normalise_first(index) if metric == "cosine" else index


def make_joined(
  centroids_LD: np.ndarray,
  parts: Iterable,
  weight_DE: np.ndarray,
  bias_E: np.ndarray,
  metric: str,
) -> faiss.Index:
  """Returns an index whose lists are found by D numbers and scanned by E more.

  `parts` are number, ids and short vectors `[n, E]` of lists. Queries `[D]`
  become `[q, q W + b]`. Lists are those of the largest inner products with the
  centroids, or for "l2" of the least distances.
  """
  num_lists, dim = centroids_LD.shape
  reduced = len(bias_E)
  # q c - |c|^2 / 2 orders lists as distances do: one more number of a query,
  # which is always 1, carries the second term.
  extra = 1 if metric == "l2" else 0
  width = dim + extra + reduced
  coarse_LD = np.zeros((num_lists, width), np.float32)
  coarse_LD[:, :dim] = centroids_LD
  if extra:
    coarse_LD[:, dim] = -0.5 * np.einsum("ld,ld->l", centroids_LD, centroids_LD)
  coarse = make_coarse(coarse_LD, "ip")
  index = faiss.IndexIVFFlat(coarse, width, num_lists, kind_of("ip"))
  faiss_lists.hand_over(coarse, index)
  index.is_trained = True
  for number, ids_n, short_nE in parts:
    ids_n = np.ascontiguousarray(ids_n, np.int64)
    rows_nD = np.zeros((len(ids_n), width), np.float32)
    rows_nD[:, dim + extra :] = short_nE
    index.invlists.add_entries(
      *(number, len(ids_n), faiss.swig_ptr(ids_n)),
      faiss.swig_ptr(rows_nD.view(np.uint8)),
    )
    index.ntotal += len(ids_n)
  rows = [np.eye(dim), np.zeros((extra, dim)), weight_DE.T]
  bias = np.concatenate([np.zeros(dim), np.ones(extra), bias_E])
  linear = faiss.LinearTransform(dim, width, True)
  faiss.copy_array_to_vector(
    np.concatenate(rows).astype(np.float32).ravel(), linear.A
  )
  faiss.copy_array_to_vector(bias.astype(np.float32), linear.b)
  linear.is_trained = True
  joined = faiss.IndexPreTransform(linear, index)
  faiss_lists.hand_over(linear, joined)
  faiss_lists.hand_over(index, joined)
  return faiss_io.normalise_first(joined) if metric == "cosine" else joined


def set_nprobe(index: faiss.Index, nprobe: int) -> None:
  """Sets how many lists an index looks into by itself."""
  faiss.ParameterSpace().set_index_parameter(index, "nprobe", nprobe)


def read_flat(path, metric: str) -> Stored:
  """Reads an index file of `make_flat`; vectors stay on disk until read.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is damaged, or of another kind.
  """
  index, info = faiss_files.load(path, kind=KIND, mmap=True)
  files.check_file(path, info)
  lists = faiss.downcast_index(index)
  if isinstance(lists, faiss.IndexPreTransform):
    lists = faiss.downcast_index(lists.index)
  kind = kind_of(metric)
  if not isinstance(lists, faiss.IndexIVFFlat) or lists.metric_type != kind:
    raise ValueError(
      f"{path} must hold whole vectors in lists, as IVF1024,Flat, of metric "
      f"{metric}; got {type(lists).__name__}."
    )
  sizes = map(lists.invlists.list_size, range(lists.nlist))
  sizes_L = np.fromiter(sizes, np.int64, lists.nlist)
  ids = [
    faiss.rev_swig_ptr(lists.invlists.get_ids(l), int(sizes_L[l]))
    for l in np.flatnonzero(sizes_L).tolist()
  ]
  ids_N = np.concatenate([np.zeros(0, np.int64), *ids])
  return Stored(faiss_lists.centroids_of(lists), sizes_L, ids_N, index)


def read_rows(stored: Stored, start: int, stop: int) -> np.ndarray:
  """Returns vectors by their places, list after list: `[stop - start, D]`."""
  lists = faiss.downcast_index(stored.index)
  if isinstance(lists, faiss.IndexPreTransform):
    lists = faiss.downcast_index(lists.index)
  x_nD = np.empty((stop - start, lists.d), np.float32)
  ends_L = np.cumsum(stored.sizes_L)
  at = start
  for l in range(int(np.searchsorted(ends_L, start, "right")), lists.nlist):
    size, first = int(stored.sizes_L[l]), int(ends_L[l] - stored.sizes_L[l])
    if first >= stop:
      break
    if not size:
      continue
    codes = faiss.rev_swig_ptr(lists.invlists.get_codes(l), size * lists.d * 4)
    rows_ND = codes.view(np.float32).reshape(size, lists.d)
    end = min(stop, first + size)
    x_nD[at - start : end - start] = rows_ND[at - first : end - first]
    at = end
  return x_nD


def flat_bytes(num: int, num_lists: int, dim: int) -> int:
  """Bytes of the file of `make_flat`, but for a header."""
  return num * (4 * dim + 8) + num_lists * (4 * dim + 8)
