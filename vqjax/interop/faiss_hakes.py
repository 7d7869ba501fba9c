"""HAKES as an index of stock faiss: base parameters, index file, search.

An index is a linear transform with bias, inverted lists over 4-bit fast-scan
codes of the reduced vectors, and the full vectors to refine with. Its lists and
codes are made by the base side; its transform, centroids and codewords belong
to the side that searches. faiss reads and searches the file without vqjax, but
vectors are to be added by `add`, which takes the base side for it.
"""

from collections.abc import Iterable

import faiss
import numpy as np

from vqjax.codecs.hakes import HakesSide, check_side
from vqjax.core import check_range
from vqjax.interop import faiss_files, faiss_io
from vqjax.interop.faiss_io import METRICS, float_rows, metric_type

STORES = {  # Of the full vectors: name to faiss's quantiser, None for float32.
  "float32": None,
  "float16": faiss.ScalarQuantizer.QT_fp16,
  "sq8": faiss.ScalarQuantizer.QT_8bit,
}
_KIND = ("vqjax hakes index", 1)  # Of a description, which there is none of.
NUM_BITS = 4  # Of a code; fast scan has no other.


def fit_base(
  x_ND: np.ndarray,
  *,
  reduced_dim: int,
  num_codes: int,
  num_lists: int,
  metric: str = "l2",
  opq_iterations: int = 50,
  kmeans_iterations: int = 25,
  seed: int = 1234,
) -> HakesSide:
  """Base parameters of a sample `[N, D]`: OPQ that reduces, lists, codewords.

  Lists are by spherical k-means for "ip". Codewords are of reduced vectors.

  Raises:
    ValueError: If sizes do not fit each other or the sample.
  """
  metric_type(metric)
  x_ND = float_rows("x", x_ND)
  n, d = x_ND.shape
  check_range("reduced_dim", reduced_dim, 1, d, "dimensions of the vectors")
  check_range("num_lists", num_lists, 1, n, f"{n} vectors to learn from")
  check_range("the number of vectors", n, 1 << NUM_BITS, np.inf)
  if num_codes < 1 or reduced_dim % num_codes:
    raise ValueError(
      f"num_codes must divide the {reduced_dim} reduced dimensions, got "
      f"{num_codes}."
    )
  codewords = faiss.ProductQuantizer(reduced_dim, num_codes, NUM_BITS)
  codewords.cp.min_points_per_centroid = 1
  opq = faiss.OPQMatrix(d, num_codes, reduced_dim)
  opq.pq, opq.niter = codewords, opq_iterations
  opq.train(x_ND)
  opq.pq = None  # Do not outlive the loan.
  reduced_NE = opq.apply(x_ND)
  codewords.cp.niter = kmeans_iterations
  codewords.cp.max_points_per_centroid = -(-n // (1 << NUM_BITS))
  codewords.train(reduced_NE)
  clusters = faiss.Kmeans(
    reduced_dim,
    num_lists,
    niter=kmeans_iterations,
    seed=seed,
    spherical=metric == "ip",
    min_points_per_centroid=1,
  )
  clusters.train(reduced_NE)
  return HakesSide(
    faiss.vector_to_array(opq.A).reshape(reduced_dim, d).copy(),
    np.zeros(reduced_dim, np.float32),
    faiss.vector_to_array(codewords.centroids)
    .reshape(num_codes, 1 << NUM_BITS, -1)
    .copy(),
    clusters.centroids.copy(),
  )


def make_index(
  base: HakesSide,
  metric: str,
  *,
  store: str = "float32",
  sample_ND: np.ndarray | None = None,
) -> faiss.Index:
  """Returns an empty index that searches by the base side.

  For the cosine give vectors of length 1 and "ip". `sample_ND` shows the store
  "sq8" the range of each dimension.
  """
  metric_type(metric)
  check_side(base)
  if store not in STORES:
    raise ValueError(f"store must be one of {tuple(STORES)}, got {store!r}.")
  e, d = base.reduction_ED.shape
  m, k, _ = base.codebooks_MKS.shape
  if k != 1 << NUM_BITS:
    raise ValueError(f"Fast scan needs 16 codewords per position, got {k}.")
  num_lists = len(base.centroids_LE)
  quantizer = faiss.IndexFlat(e, METRICS[metric])
  lists = faiss.IndexIVFPQFastScan(
    quantizer, e, num_lists, m, NUM_BITS, METRICS[metric]
  )
  lists.by_residual = False
  transform = faiss.LinearTransform(d, e, True)
  transform.is_trained = True
  reduced = faiss.IndexPreTransform(transform, lists)
  if STORES[store] is None:
    full = faiss.IndexFlat(d, METRICS[metric])
  else:
    full = faiss.IndexScalarQuantizer(d, STORES[store], METRICS[metric])
    if store == "sq8":
      if sample_ND is None:
        raise ValueError("sq8 needs a sample, to learn each dimension's range.")
      full.train(float_rows("the sample", sample_ND, d))
    full.is_trained = True
  _put(transform, quantizer, lists, base)
  lists.is_trained = reduced.is_trained = True
  index = faiss.IndexRefine(reduced, full)
  index.is_trained = True
  return index


def set_side(index: faiss.Index, side: HakesSide) -> None:
  """Makes the index search by `side`; lists and codes stay as they are."""
  transform, quantizer, lists = _parts(index)
  e, d = side.reduction_ED.shape
  have = (transform.d_in, transform.d_out, lists.pq.M, lists.nlist)
  want = (d, e, len(side.codebooks_MKS), len(side.centroids_LE))
  check_side(side)
  if have != want:
    raise ValueError(
      "The index has dimensions, reduced ones, codes and lists "
      f"{have}, the parameters {want}."
    )
  _put(transform, quantizer, lists, side)


def side_of(index: faiss.Index) -> HakesSide:
  """Returns the side that the index searches by, as numpy arrays."""
  transform, quantizer, lists = _parts(index)
  e, d, m = transform.d_out, transform.d_in, lists.pq.M
  return HakesSide(
    faiss.vector_to_array(transform.A).reshape(e, d).copy(),
    faiss.vector_to_array(transform.b).copy(),
    faiss.vector_to_array(lists.pq.centroids)
    .reshape(m, 1 << NUM_BITS, -1)
    .copy(),
    quantizer.reconstruct_n(0, quantizer.ntotal),
  )


def add(
  index: faiss.Index, base: HakesSide, blocks: Iterable[np.ndarray]
) -> None:
  """Adds blocks of vectors `[n, D]` by the base side; ids count on."""
  searched_by = side_of(index)
  set_side(index, base)
  try:
    for x_ND in blocks:
      index.add(float_rows("x", x_ND, index.d))
  finally:
    set_side(index, searched_by)


def search(
  index: faiss.Index,
  queries_QD: np.ndarray,
  k: int,
  *,
  num_probes: int,
  refine_factor: float,
) -> np.ndarray:
  """Ids `[Q, k]` of the nearest found; -1 for empty slots.

  `num_probes` lists are looked into; `refine_factor` (k'/k) times k candidates
  are compared in full.
  """
  inner = faiss.SearchParametersPreTransform(
    index_params=faiss.SearchParametersIVF(nprobe=num_probes)
  )
  params = faiss.IndexRefineSearchParameters(
    k_factor=refine_factor, base_index_params=inner
  )
  queries_QD = float_rows("queries", queries_QD, index.d)
  return index.search(queries_QD, k, params=params)[1]


def fit_factory(name: str, x_ND: np.ndarray, metric: str) -> faiss.Index:
  """Trains an index by faiss's own name of it and adds the vectors.

  `search` takes it if it refines, as "OPQ48_96,IVF1024,PQ48x4fs,RFlat".
  """
  metric_type(metric)
  x_ND = float_rows("x", x_ND)
  try:
    index = faiss.index_factory(x_ND.shape[1], name, METRICS[metric])
  except RuntimeError as error:
    raise ValueError(f"faiss knows no index {name!r}.") from error
  _parts(index, name)
  index.train(x_ND)
  index.add(x_ND)
  return index


def save(
  index: faiss.Index, path, *, overwrite: bool = False, check_fn=None
) -> None:
  """Writes the index file, whole or not at all.

  `check_fn` gets the written file under a temporary name, before it counts; the
  file is gone if it raises.
  """
  with faiss_io.write_index(index, path, overwrite=overwrite) as temporary:
    if check_fn is not None:
      check_fn(temporary)


def load(path) -> faiss.Index:
  """Reads an index file that `save` wrote.

  Raises:
    ValueError: It is no index of this kind.
  """
  index, _ = faiss_files.load(path, kind=_KIND)
  _parts(index, path)
  return index


def set_num_threads(count: int | None) -> int:
  """Sets the threads of faiss, unless None; returns how many there are."""
  if count is not None:
    check_range("the number of threads", count, 1, 4096)
    faiss.omp_set_num_threads(count)
  return faiss.omp_get_max_threads()


def _parts(index, name="The index"):
  """The transform, the quantiser of lists and the lists of an index."""
  try:
    reduced = faiss.downcast_index(index.base_index)
    transform = faiss.downcast_VectorTransform(reduced.chain.at(0))
    lists = faiss.downcast_index(reduced.index)
    quantizer = faiss.downcast_index(lists.quantizer)
    is_ours = isinstance(lists, faiss.IndexIVFPQFastScan)
    is_ours &= isinstance(transform, faiss.LinearTransform)
  except (AttributeError, RuntimeError):
    is_ours = False
  if not is_ours or reduced.chain.size() != 1:
    raise ValueError(
      f"{name} must refine what a linear transform and 4-bit fast-scan lists "
      f"find, as OPQ48_96,IVF1024,PQ48x4fs,RFlat does; got "
      f"{type(index).__name__}."
    )
  return transform, quantizer, lists


def _put(transform, quantizer, lists, side: HakesSide) -> None:
  flat = lambda x: np.ascontiguousarray(x, np.float32).ravel()
  faiss.copy_array_to_vector(flat(side.reduction_ED), transform.A)
  faiss.copy_array_to_vector(flat(side.bias_E), transform.b)
  faiss.copy_array_to_vector(flat(side.codebooks_MKS), lists.pq.centroids)
  quantizer.reset()
  quantizer.add(np.ascontiguousarray(side.centroids_LE, np.float32))
