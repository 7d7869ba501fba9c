"""Product codes of whole vectors in lists, by faiss: train, scan, export.

The index of codes is an `IVF{L},PQ{M}x{bits}` whose codes are of the vectors
themselves, not of residuals, or for 16 codewords an `IVF{L},PQ{M}x4fs`, which
compares 32 codes at a time in registers and rounds the tables to bytes. Its ids
say where a vector is: the number of its list times 2^32, plus its place there.

Reference: arXiv 1704.07355 for the scan in registers.
"""

from typing import NamedTuple

import faiss
import numpy as np

from vqjax.core import check_range, check_shape
from vqjax.data import files
from vqjax.interop import faiss_fast_ivf, faiss_files, faiss_io, faiss_lists

ENGINES = ("tables", "fastscan")
_LANES = 32  # Codes of a block of a fast scan.
_FAR = 1e15  # Of codewords that only fill up the tables.
_ITERATIONS = 25
_MOST_PER_WORD = 256  # Training vectors.
_OVER_PROBES = 3  # Of faiss: threads share queries and lists.


def fit_codebooks(
  x_ND: np.ndarray, num_subvectors: int, num_words: int, *, seed: int = 0
) -> np.ndarray:
  """Codewords `[M, K, S]` of the sub-vectors, by faiss's k-means.

  Raises:
    ValueError: There are fewer vectors than codewords.
  """
  check_range(
    "pq_num_centroids",
    num_words,
    1,
    len(x_ND),
    f"{len(x_ND)} vectors to learn from",
  )
  x_ND = faiss_io.float_rows("x", x_ND)
  return np.stack(
    [
      faiss_io.fit_kmeans(
        part_NS, num_words, num_iterations=_ITERATIONS, seed=seed
      )
      for part_NS in np.split(x_ND, num_subvectors, axis=1)
    ]
  )


def num_training(num_words: int) -> int:
  """Vectors that are enough to train so many codewords."""
  return max(_MOST_PER_WORD * num_words, 1 << 15)


def make_codes(
  centroids_LD: np.ndarray,
  codebooks_MKS: np.ndarray,
  metric: str,
  engine: str = "tables",
) -> faiss.Index:
  """Returns an empty index of codes; `metric` is that of the lists."""
  m, num_words, s = codebooks_MKS.shape
  num_lists, dim = centroids_LD.shape
  check_shape("codebooks", codebooks_MKS, (m, num_words, dim // m))
  if engine not in ENGINES:
    raise ValueError(f"engine must be one of {ENGINES}, got {engine!r}.")
  coarse = faiss_fast_ivf.make_coarse(centroids_LD, metric)
  num_bits = max((num_words - 1).bit_length(), 1)
  sizes = coarse, dim, num_lists, m, num_bits
  if engine == "fastscan":
    check_engine(engine, num_words)
    index = faiss.IndexIVFPQFastScan(*sizes, faiss.METRIC_L2, _LANES)
  else:
    index = faiss.IndexIVFPQ(*sizes, faiss.METRIC_L2)
    index.use_precomputed_table = -1
  faiss_lists.hand_over(coarse, index)
  index.by_residual = False
  words_MKS = np.full((m, 1 << num_bits, s), _FAR, np.float32)
  words_MKS[:, :num_words] = codebooks_MKS
  faiss.copy_array_to_vector(words_MKS.ravel(), index.pq.centroids)
  index.is_trained = True
  index.parallel_mode = _OVER_PROBES
  return index


def check_engine(engine: str, num_words: int) -> None:
  """Raises ValueError if an engine is unknown, or cannot scan such codes."""
  if engine not in ENGINES:
    raise ValueError(
      f"engine must be one of {', '.join(ENGINES)}; got {engine!r}."
    )
  if engine == "fastscan" and num_words != 16:
    raise ValueError(
      f"engine='fastscan' needs pq_num_centroids=16, got {num_words}; take "
      "more sub-vectors of 16 centroids, or engine='tables'."
    )


def codebooks_of(index, num_words: int) -> np.ndarray:
  """The codewords `[M, K, S]` of an index of codes."""
  m, s = index.pq.M, index.pq.dsub
  words = faiss.vector_to_array(index.pq.centroids)
  return words.reshape(m, -1, s)[:, :num_words].copy()


def add(index, x_ND, lists_N, places_N) -> None:
  """Encodes vectors into lists, where they have these places."""
  x_ND = np.ascontiguousarray(x_ND, np.float32)
  lists_N = np.ascontiguousarray(lists_N, np.int64)
  at_N = np.ascontiguousarray((lists_N << 32) | places_N, np.int64)
  if isinstance(index, faiss.IndexIVFPQFastScan):
    index.add_with_ids(x_ND, at_N)
  else:
    index.add_core(len(x_ND), *map(faiss.swig_ptr, (x_ND, at_N, lists_N)))


def search(
  index, queries_QD: np.ndarray, lists_QP: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Squared distances to decoded vectors, lists and places `[Q, k]`.

  The least come first; if there are no more, list -1 is at distance inf. Lists
  of -1, for none, may stand in the last columns of `lists_QP` alone.
  """
  distances_QK, at_QK = faiss_lists.search_lists(index, queries_QD, lists_QP, k)
  is_none_QK = at_QK < 0
  distances_QK[is_none_QK] = np.inf
  found_QK = np.where(is_none_QK, -1, at_QK >> 32)
  return distances_QK, found_QK, np.where(is_none_QK, 0, at_QK & 0xFFFFFFFF)


def num_bytes(index) -> int:
  """Bytes in memory of codes and their ids, codewords and centroids."""
  sizes_L = np.array([index.invlists.list_size(l) for l in range(index.nlist)])
  if isinstance(index, faiss.IndexIVFPQFastScan):
    stored = (-(-sizes_L // _LANES) * _LANES).sum() * (-(-index.M2 // 2))
  else:
    stored = sizes_L.sum() * index.code_size
  tables = 4 * (index.pq.centroids.size() + index.nlist * index.d)
  return int(stored + 8 * sizes_L.sum() + tables)


class Stored(NamedTuple):
  """What the file of an index holds."""

  codes: faiss.Index  # Whose ids are rows of the vectors.
  centroids_LD: np.ndarray
  lists_N: np.ndarray  # Of each row, int32.
  ids_N: np.ndarray
  x_ND: np.ndarray


def export(index, rows_fn, x_ND, ids_N, metric: str, nprobe: int):
  """Returns an index of stock faiss: codes, exact scores of the found, ids.

  `rows_fn(lists_n, places_n)` says which rows of `x_ND` and `ids_N` they are.
  """
  codes = faiss.clone_index(index)
  codes.nprobe = nprobe
  _renumber(codes, lambda at_n: rows_fn(at_n >> 32, at_n & 0xFFFFFFFF))
  kind = faiss_fast_ivf.kind_of(metric)
  full = faiss.IndexFlat(index.d, kind)
  full.add(np.ascontiguousarray(x_ND, np.float32))
  full.metric_type = codes.metric_type  # What the constructor wants.
  refine = faiss.IndexRefine(codes, full)
  refine.metric_type = full.metric_type = kind
  refine.k_factor = 1
  full.this.disown()
  refine.own_refine_index = True
  faiss_lists.hand_over(codes, refine)
  refine.ntotal = 0  # What the constructor wants.
  named = faiss.IndexIDMap(refine)
  faiss_lists.hand_over(refine, named)
  faiss.copy_array_to_vector(
    np.ascontiguousarray(ids_N, np.int64), named.id_map
  )
  refine.ntotal = named.ntotal = len(ids_N)
  return faiss_io.normalise_first(named) if metric == "cosine" else named


def read(path, engine: str) -> Stored:
  """Reads the file of `export`.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is damaged, or of another kind.
  """
  index, info = faiss_files.load(path, kind=faiss_fast_ivf.KIND)
  files.check_file(path, info)
  named = faiss.downcast_index(index)
  if isinstance(named, faiss.IndexPreTransform):
    named = faiss.downcast_index(named.index)
  refine = named
  if isinstance(named, faiss.IndexIDMap):
    refine = faiss.downcast_index(named.index)
  wanted = {
    "tables": faiss.IndexIVFPQ,
    "fastscan": faiss.IndexIVFPQFastScan,
  }[engine]
  codes = getattr(refine, "base_index", None)
  codes = None if codes is None else faiss.downcast_index(codes)
  if not isinstance(codes, wanted):
    raise ValueError(
      f"{path} must hold product codes and vectors in lists, as "
      f"IDMap,IVF1024,PQ32,RFlat; got {type(refine).__name__}."
    )
  full = faiss.downcast_index(refine.refine_index)
  x_ND = full.reconstruct_n(0, full.ntotal)
  ids_N = faiss.vector_to_array(named.id_map)
  lists_N = np.empty(len(ids_N), np.int32)
  for l in range(codes.nlist):
    lists_N[_ids_of(codes, l)] = l
  codes = faiss.clone_index(codes)
  codes.parallel_mode = _OVER_PROBES
  return Stored(codes, faiss_lists.centroids_of(codes), lists_N, ids_N, x_ND)


def place(stored: Stored, lists_N, places_N) -> faiss.Index:
  """Returns the codes of a file, whose rows have these lists and places."""
  at_N = (lists_N.astype(np.int64) << 32) | places_N
  _renumber(stored.codes, lambda rows_n: at_N[rows_n])
  return stored.codes


def _ids_of(index, number: int) -> np.ndarray:
  """The ids of a list, in the memory of faiss."""
  size = index.invlists.list_size(number)
  if not size:
    return np.zeros(0, np.int64)
  return faiss.rev_swig_ptr(index.invlists.get_ids(number), size)


def _renumber(index, fn) -> None:
  """Replaces the ids in all lists."""
  for number in range(index.nlist):
    ids_n = _ids_of(index, number)
    ids_n[:] = fn(ids_n.copy())
