"""Through faiss: exact search, OPQ, classical codecs, export of ours.

Only `vqjax/interop/faiss_*.py` import faiss. Vectors go in and out as float32
in data units, codes as int32 `[N, M]`; faiss keeps the bits of a code packed.
"""

import concurrent.futures
import contextlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

import faiss
import numpy as np

from vqjax.codecs.additive import AdditiveParams
from vqjax.codecs.distances import centre_of
from vqjax.codecs.pq import PQParams
from vqjax.codecs.rq import RQParams
from vqjax.core import check_range, check_shape
from vqjax.data import values
from vqjax.data.files import atomic_output

METRICS = {"l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT}
ADDITIVE = ("PQ", "OPQ", "RQ", "LSQ")
# Numbers of a batch of queries from which on faiss takes matrix products: by
# itself 128,000, with which 32 to 999 queries of 128 dimensions take twice as
# long.
_LEAST_PRODUCT = 2560
faiss.cvar.distance_compute_blas_threshold = min(
  faiss.cvar.distance_compute_blas_threshold, _LEAST_PRODUCT
)


class FaissCodec(NamedTuple):
  """A faiss index used as a codec.

  The index is of vectors less a centre, which encode and decode take care of.
  """

  index: faiss.Index
  encode: Callable[[np.ndarray], np.ndarray]  # x_ND to codes_NM, int32.
  decode: Callable[[np.ndarray], np.ndarray]  # codes_NM to x_ND.


def knn(
  queries_QD: np.ndarray,
  base: np.ndarray | Iterable[np.ndarray],
  k: int,
  metric: str = "l2",
) -> tuple[np.ndarray, np.ndarray]:
  """Exact search: distances `[Q, k]` float32 and ids `[Q, k]` int64.

  Squared distances are taken of vectors less the centre of the queries, if
  these lie far from the origin (`distances.centre_of`).

  Args:
    queries_QD: Queries, of any numeric type.
    base: `[N, D]`, or an iterable of its blocks of rows in order, for a base
      that does not fit in memory. Of any numeric type.
    k: Results per query, best first. If the base has fewer vectors, the
      slots left are id -1, at distance inf (-inf for "ip").
    metric: "l2" for squared distances, "ip" for inner products.

  Raises:
    ValueError: If the metric is unknown or dimensions differ.
  """
  kind = metric_type(metric)
  check_range("k", k, 1, 2**31 - 1)
  queries_QD = float_rows("queries", queries_QD)
  is_ip = metric == "ip"
  centre_D = None if is_ip else far_centre(queries_QD)
  queries_QD = less(queries_QD, centre_D)
  heap = faiss.ResultHeap(len(queries_QD), k, keep_max=is_ip)
  num_seen = 0
  for block in [base] if hasattr(base, "shape") else base:
    block_ND = float_rows("base", block, queries_QD.shape[1])
    if not len(block_ND):
      continue
    num_here = min(k, len(block_ND))
    block_ND = less(block_ND, centre_D)
    found = faiss.knn(queries_QD, block_ND, num_here, metric=kind)
    heap.add_result(found[0], found[1] + num_seen)
    num_seen += len(block_ND)
  heap.finalize()
  worst = -np.inf if is_ip else np.inf
  return np.where(heap.I < 0, worst, heap.D).astype(np.float32), heap.I


def distances_to(
  queries_QD: np.ndarray, base_ND: np.ndarray, rows_QR: np.ndarray
) -> np.ndarray:
  """Squared distances `[Q, R]` of each query to its own rows of the base.

  A negative row stands for none and is at distance inf.

  Raises:
    ValueError: If shapes do not fit, or a row is beyond the base.
  """
  queries_QD = float_rows("queries", queries_QD)
  base_ND = float_rows("base", base_ND, queries_QD.shape[1])
  check_shape("rows", rows_QR, (len(queries_QD), None))
  rows_QR = np.ascontiguousarray(rows_QR, np.int64)
  if rows_QR.size and rows_QR.max() >= len(base_ND):
    raise ValueError(
      f"Rows must lie below {len(base_ND)}, got {rows_QR.max()}."
    )
  found_QR = np.empty(rows_QR.shape, np.float32)
  faiss.fvec_L2sqr_by_idx(
    *map(faiss.swig_ptr, (found_QR, queries_QD, base_ND, rows_QR)),
    queries_QD.shape[1],
    *rows_QR.shape,
  )
  return np.where(rows_QR < 0, np.float32(np.inf), found_QR)


def fit_kmeans(
  x_ND: np.ndarray,
  num_codewords: int,
  *,
  num_iterations: int = 10,
  seed: int = 0,
  start_KD: np.ndarray | None = None,
) -> np.ndarray:
  """Codewords `[K, D]` that faiss's k-means finds in all the vectors `[N, D]`.

  No sample is taken. `seed` draws the start, rows at random, if there is no
  `start_KD`, and splits empty codewords.

  Raises:
    ValueError: If a size makes no sense.
  """
  x_ND = float_rows("x", x_ND)
  n, d = x_ND.shape
  check_range(
    "num_codewords",
    num_codewords,
    1,
    n,
    f"{n} vectors cannot fill {num_codewords} codewords",
  )
  check_range("num_iterations", num_iterations, 1, 100_000)
  if start_KD is not None:
    check_shape("start", start_KD, (num_codewords, d))
    start_KD = float_rows("start", start_KD)
  centre_D = far_centre(x_ND)
  kmeans = faiss.Kmeans(
    d,
    num_codewords,
    niter=num_iterations,
    seed=seed,
    min_points_per_centroid=1,
    max_points_per_centroid=-(-n // num_codewords),
  )
  if start_KD is not None:
    start_KD = less(start_KD, centre_D)
  kmeans.train(less(x_ND, centre_D), init_centroids=start_KD)
  if centre_D is None:
    return kmeans.centroids
  return kmeans.centroids + centre_D


def thread_pool() -> concurrent.futures.ThreadPoolExecutor:
  """Threads that each run faiss alone, as many as faiss would use at once.

  For many small problems: threads that share one lose more by waiting for
  each other than they gain, above all on a busy machine.
  """
  return concurrent.futures.ThreadPoolExecutor(
    faiss.omp_get_max_threads(),
    "vqjax-faiss",
    initializer=faiss.omp_set_num_threads,
    initargs=(1,),
  )


def train_opq(
  x_ND: np.ndarray,
  num_codes: int,
  num_bits: int = 8,
  *,
  num_iterations: int = 50,
  max_vectors: int = 65536,
) -> np.ndarray:
  """Orthonormal `[D, D]` that makes slices of `x_ND @ rotation` easy to code.

  Goes to `pq.fit(..., rotation=)`. faiss keeps the transpose.

  Slices, of which there are `num_codes`, are coded by `2 ** num_bits` codewords
  in training; the right rotation depends on it. `num_iterations` are rounds of
  codebooks and rotation in turn.
  """
  x_ND = float_rows("x", x_ND)
  d = x_ND.shape[1]
  _check_training(len(x_ND), d, num_codes, num_bits, has_slices=True)
  opq, slices = _new_opq(d, num_codes, num_bits)
  opq.niter, opq.max_train_points = num_iterations, max_vectors
  opq.train(less(x_ND, far_centre(x_ND)))
  del slices  # Was borrowed by `opq` until here.
  return faiss.vector_to_array(opq.A).reshape(d, d).T.copy()


def fit_additive(
  name: str,
  x_ND: np.ndarray,
  num_codes: int,
  num_bits: int = 8,
  *,
  beam_size: int = 5,
) -> FaissCodec:
  """Trains a classical codec of faiss, to compare with.

  `name` is "PQ", "OPQ", "RQ" or "LSQ"; "RQ" trains and encodes with
  `beam_size`.

  Raises:
    ValueError: If a name or a size makes no sense.
  """
  if name not in ADDITIVE:
    raise ValueError(f"name must be one of {ADDITIVE}, got {name!r}.")
  x_ND = float_rows("x", x_ND)
  n, d = x_ND.shape
  centre_D = far_centre(x_ND)
  x_ND = less(x_ND, centre_D)
  has_slices = name in ("PQ", "OPQ")
  _check_training(n, d, num_codes, num_bits, has_slices=has_slices)
  if has_slices:
    index = faiss.IndexPQ(d, num_codes, num_bits)
    index.pq.cp.min_points_per_centroid = 1
  elif name == "RQ":
    index = faiss.IndexResidualQuantizer(d, num_codes, num_bits)
    index.rq.max_beam_size = beam_size
    index.rq.cp.min_points_per_centroid = 1
  else:
    index = faiss.IndexLocalSearchQuantizer(d, num_codes, num_bits)
  if name == "OPQ":
    opq, slices = _new_opq(d, num_codes, num_bits)
    index = faiss.IndexPreTransform(opq, index)
    index.train(x_ND)
    opq.pq = None  # Do not outlive the loan.
    del slices
  else:
    index.train(x_ND)
  return to_codec(index, num_codes, num_bits, centre_D=centre_D)


def pq_to_faiss(params: PQParams, *, metric: str = "l2") -> faiss.Index:
  """A trained, empty `IndexPQ`, behind the rotation if there is one."""
  m, k, s = params.codebooks_MKS.shape
  index = faiss.IndexPQ(m * s, m, _num_bits(k), metric_type(metric))
  codewords = np.ascontiguousarray(params.codebooks_MKS, np.float32)
  faiss.copy_array_to_vector(codewords.ravel(), index.pq.centroids)
  index.is_trained = True
  if params.rotation_DD is None:
    return index
  turn = faiss.LinearTransform(m * s, m * s, False)
  matrix_DD = np.ascontiguousarray(np.asarray(params.rotation_DD).T, np.float32)
  faiss.copy_array_to_vector(matrix_DD.ravel(), turn.A)
  turn.is_trained = True
  turn.set_is_orthonormal()
  if not turn.is_orthonormal:
    raise ValueError(
      "rotation must be orthonormal, got a matrix that is not; decoding "
      "rotates back by its transpose."
    )
  return faiss.IndexPreTransform(turn, index)


def rq_to_faiss(
  params: RQParams | AdditiveParams,
  *,
  beam_size: int = 5,
  metric: str = "l2",
) -> faiss.Index:
  """A trained, empty `IndexResidualQuantizer` that encodes with a beam.

  It searches by distances to decoded vectors. Codewords that were fitted to
  codes decode these, but a beam through them finds poorer ones.
  """
  m, k, d = params.codebooks_MKD.shape
  index = faiss.IndexResidualQuantizer(d, m, _num_bits(k), metric_type(metric))
  codewords = np.ascontiguousarray(params.codebooks_MKD, np.float32)
  faiss.copy_array_to_vector(codewords.ravel(), index.rq.codebooks)
  index.rq.max_beam_size = beam_size
  index.rq.is_trained = index.is_trained = True
  return index


def normalise_first(index: faiss.Index) -> faiss.IndexPreTransform:
  """The index, behind a step that makes vectors and queries of length 1."""
  if not isinstance(index, faiss.IndexPreTransform):
    inner, index = index, faiss.IndexPreTransform(index)
    inner.this.disown()
    index.own_fields = True
  turn = faiss.NormalizationTransform(index.d, 2.0)
  index.prepend_transform(turn)
  turn.this.disown()
  return index


def to_codec(
  index: faiss.Index,
  num_codes: int,
  num_bits: int,
  *,
  centre_D: np.ndarray | None = None,
) -> FaissCodec:
  """Wraps a trained index whose codes have `num_codes` equal positions.

  It codes vectors minus `centre_D`.
  """
  dim = index.d
  code_size = (num_codes * num_bits + 7) // 8
  if index.sa_code_size() != code_size:
    raise ValueError(
      f"{num_codes} positions of {num_bits} bits make {code_size} bytes, but "
      f"the codes of this index have {index.sa_code_size()}."
    )

  def encode(x_ND):
    packed = index.sa_encode(less(float_rows("x", x_ND, dim), centre_D))
    return faiss.unpack_bitstrings(packed, num_codes, num_bits).astype(np.int32)

  def decode(codes_NM):
    check_shape("codes", codes_NM, (None, num_codes))
    packed = faiss.pack_bitstrings(np.asarray(codes_NM, np.int32), num_bits)
    x_ND = index.sa_decode(packed)
    return x_ND if centre_D is None else x_ND + centre_D

  return FaissCodec(index, encode, decode)


def add_codes(index: faiss.Index, codes_NM: np.ndarray) -> None:
  """Adds vectors by their very codes to an index of `*_to_faiss`."""
  inner = _coded(index)
  m, num_bits = _code_sizes(inner)
  check_shape("codes", codes_NM, (None, m))
  packed = faiss.pack_bitstrings(np.asarray(codes_NM, np.int32), num_bits)
  inner.add_sa_codes(packed)
  index.ntotal = inner.ntotal  # Of the transform in front.


@contextlib.contextmanager
def write_index(
  index: faiss.Index,
  path,
  *,
  overwrite: bool = False,
  description: dict | None = None,
):
  """Yields an index file under a temporary name, to look at before it counts.

  It becomes `path` when the block ends, and is gone after an error. Its
  `description` is written as by `files.atomic_output`.
  """
  with atomic_output(path, overwrite, description=description) as temporary:
    try:
      faiss.write_index(index, str(temporary))
    except RuntimeError as error:
      raise OSError(
        f"faiss could not write {path}; is the disk full? ({error})"
      ) from error
    yield temporary


def read_index(path) -> faiss.Index:
  """Reads an index file of any kind."""
  return faiss.read_index(str(path))


def _coded(index: faiss.Index) -> faiss.Index:
  """The part of an index that holds codes."""
  index = faiss.downcast_index(index)
  if isinstance(index, faiss.IndexPreTransform):
    return faiss.downcast_index(index.index)
  return index


def _code_sizes(inner: faiss.Index) -> tuple[int, int]:
  """Code positions and bits of each."""
  if isinstance(inner, faiss.IndexPQ):
    return inner.pq.M, inner.pq.nbits
  return inner.rq.M, inner.rq.nbits.at(0)


def float_rows(name: str, x_ND, dim: int | None = None) -> np.ndarray:
  """A contiguous float32 matrix, as faiss wants it.

  Raises ValueError for another shape, and for numbers too large to be squared:
  the k-means of faiss would end the whole program.
  """
  check_shape(name, x_ND, (None, dim))
  x_ND = np.ascontiguousarray(x_ND, np.float32)
  values.check_size(x_ND, name=name)
  return x_ND


def far_centre(x_ND: np.ndarray) -> np.ndarray | None:
  """The centre of float32 rows, None if they lie near the origin."""
  centre_D = centre_of(x_ND) if len(x_ND) else np.zeros(1)
  return centre_D if centre_D.any() else None


def less(x_ND: np.ndarray, centre_D: np.ndarray | None) -> np.ndarray:
  """The rows less the centre, if there is any."""
  return x_ND if centre_D is None else x_ND - centre_D


def metric_type(metric: str) -> int:
  """What faiss calls a metric; raises ValueError if it has none."""
  if metric not in METRICS:
    raise ValueError(f"metric must be one of {tuple(METRICS)}, got {metric!r}.")
  return METRICS[metric]


def _num_bits(num_codewords: int) -> int:
  if num_codewords < 2 or num_codewords & (num_codewords - 1):
    raise ValueError(
      "faiss needs a power of two as the number of codewords per position, "
      f"got {num_codewords}."
    )
  return num_codewords.bit_length() - 1


def _new_opq(dim: int, num_codes: int, num_bits: int):
  """An untrained OPQ and the quantiser that it borrows for its training."""
  slices = faiss.ProductQuantizer(dim, num_codes, num_bits)
  slices.cp.min_points_per_centroid = 1  # faiss warns below 39.
  opq = faiss.OPQMatrix(dim, num_codes)
  opq.pq = slices
  return opq, slices


def check_parts(name: str, dim: int, num_codes: int) -> None:
  """Raises ValueError if the baseline `name` cannot cut vectors as it must.

  Product quantisers cut `dim` dimensions into `num_codes` equal parts.
  """
  if dim % num_codes:
    raise ValueError(
      f"{name} cuts vectors into equal parts, but {dim} dimensions cannot be "
      f"cut into {num_codes}; leave {name} out of the baselines."
    )


def _check_training(n, dim, num_codes, num_bits, *, has_slices):
  """Raises ValueError if a codec of these sizes cannot be trained."""
  check_range("num_codes", num_codes, 1, 4096)
  check_range("num_bits", num_bits, 1, 16)
  check_range(
    "the number of vectors",
    n,
    2**num_bits,
    np.inf,
    f"each position has 2^{num_bits} codewords",
  )
  if has_slices and dim % num_codes:
    raise ValueError(
      f"num_codes must divide the {dim} dimensions of the vectors, "
      f"got {num_codes}."
    )
