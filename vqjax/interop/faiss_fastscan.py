"""A fastscan refiner: 4-bit codes of the vectors of an index, scanned faster.

The index of a codec (`faiss_ivf`) keeps M codewords of 8 bits for each vector,
and scanning them takes M lookups in tables that do not fit into registers. A
fastscan refiner holds the same vectors in the same lists, rotated by a learned
rotation and cut into parts of 4 bits, and a byte for the norm. faiss compares
32 of these at a time in registers. With parts of 4 dimensions they take
D / 8 + 1 bytes a vector and give better distances than the codewords do.

The file is an ordinary index of faiss, `OPQ{P},IVF{L},PRQ{P}x1x4fs_Nrq2x4`,
which any faiss searches by itself.

References: arXiv 1704.07355 for the scan in registers, CVPR 2013 (Ge et al.)
for the rotation.
"""

import hashlib
import json
from typing import NamedTuple

import faiss
import numpy as np

from vqjax.core import check_range, check_shape
from vqjax.data import formats
from vqjax.interop import faiss_files, faiss_io, faiss_lists
from vqjax.interop.faiss_io import float_rows

_KIND = ("vqjax fastscan refiner", 1)
_NUM_BITS = 4  # A fast scan has no other.
_PART_DIM = 4  # Dimensions of a part, unless asked for otherwise.
_LEAST_TRAINING = 1 << 2 * _NUM_BITS  # Norms have a byte.
_WARNS_BELOW = 39 << _NUM_BITS
_OPQ_ITERATIONS = 20


class Loaded(NamedTuple):
  """A refiner from a file, and its description."""

  index: faiss.Index
  info: dict


def fit(
  like: faiss.Index, x_ND: np.ndarray, *, num_parts: int | None = None
) -> faiss.Index:
  """Learns rotation and codewords of an empty refiner.

  Args:
    like: From `faiss_ivf.load`; its lists and its coarse quantiser are taken.
    x_ND: Training vectors, of any numeric type.
    num_parts: P, a divisor of D; None for parts of 4 dimensions.

  Raises:
    ValueError: If sizes do not fit each other, or the metric is not l2.
  """
  dim = like.d
  num_parts = check_parts(dim, num_parts)
  if like.metric_type != faiss.METRIC_L2:
    raise ValueError("A fastscan refiner needs an index of metric l2.")
  x_ND = float_rows("vectors", x_ND, dim)
  check_range(
    "the number of training vectors", len(x_ND), _LEAST_TRAINING, np.inf
  )
  x_ND = np.resize(x_ND, (max(len(x_ND), _WARNS_BELOW), dim))  # Repeated.
  coarse = faiss.clone_index(like.quantizer)
  rotation_DD = faiss_io.train_opq(
    _left_of(coarse, x_ND),
    num_parts,
    _NUM_BITS,
    num_iterations=_OPQ_ITERATIONS,
  )
  # Around the mean of the vectors, so that a byte suffices for the norm.
  turn = faiss.LinearTransform(dim, dim, True)
  for value, field in (
    (rotation_DD.T, turn.A),
    (-x_ND.mean(axis=0) @ rotation_DD, turn.b),
  ):
    faiss.copy_array_to_vector(np.ascontiguousarray(value).ravel(), field)
  turn.is_trained = turn.is_orthonormal = True
  faiss_lists.rotate(coarse, turn)
  lists = faiss.IndexIVFProductResidualQuantizerFastScan(
    *(coarse, dim, like.nlist, num_parts, 1, _NUM_BITS, faiss.METRIC_L2),
    faiss.AdditiveQuantizer.ST_norm_rq2x4,
  )
  # Scaled norms lose recall, and `search_preassigned` does not undo it.
  lists.rescale_norm = False
  faiss_lists.hand_over(coarse, lists)
  index = faiss.IndexPreTransform(turn, lists)
  faiss_lists.hand_over(turn, index)
  faiss_lists.hand_over(lists, index)
  lists.train(turn.apply(x_ND))
  index.is_trained = True
  return index


def check_parts(dim: int, num_parts: int | None) -> int:
  """Returns the number of parts; raises ValueError if it does not fit."""
  if num_parts is None:
    num_parts = max(dim // _PART_DIM, 1)
  check_range("num_parts", num_parts, 1, dim, "dimensions of the vectors")
  if dim % num_parts:
    fitting = [str(p) for p in range(1, dim + 1) if dim % p == 0]
    raise ValueError(
      f"num_parts must divide the {dim} dimensions of the vectors, got "
      f"{num_parts}; {', '.join(fitting)} do."
    )
  return num_parts


def add(index: faiss.Index, x_ND: np.ndarray, ids_N: np.ndarray) -> None:
  """Adds vectors under the ids that they have in the index."""
  check_shape("ids", ids_N, (len(x_ND),))
  formats.check_vectors(x_ND, dim=index.d, name="vectors")
  ids_N = np.ascontiguousarray(ids_N, np.int64)
  index.add_with_ids(float_rows("vectors", x_ND, index.d), ids_N)


def reconstruct(index: faiss.Index, x_ND: np.ndarray) -> np.ndarray:
  """Vectors `[N, D]` encoded and decoded, in data units."""
  turn, lists = _parts(index)
  x_ND = turn.apply(float_rows("vectors", x_ND, index.d))
  left_ND = _left_of(lists.quantizer, x_ND)
  words_ND = lists.prq.decode(lists.prq.compute_codes(left_ND))
  return turn.reverse_transform(x_ND - left_ND + words_ND)


def scan(
  index: faiss.Index, queries_QD: np.ndarray, probes_QP: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Ids `[Q, k]` of the nearest in the probed lists, and squared distances.

  The nearest come first; if there are no more, id -1 is at distance inf.

  Lists of -1, for none, may stand in the last columns of `probes_QP` alone.
  """
  turn, lists = _parts(index)
  turned_QD = turn.apply(float_rows("queries", queries_QD, index.d))
  ids_QK = np.full((len(turned_QD), k), -1, np.int64)
  distances_QK = np.empty(ids_QK.shape, np.float32)
  # faiss reads uninitialised memory if some of the lists are -1.
  num_Q = np.count_nonzero(probes_QP >= 0, axis=1)
  for num in np.unique(num_Q[num_Q > 0]):
    rows = np.flatnonzero(num_Q == num)
    found = _scan(lists, turned_QD[rows], probes_QP[rows, :num], k)
    ids_QK[rows], distances_QK[rows] = found
  # faiss leaves the part of the query out of all.
  distances_QK += np.einsum("qd,qd->q", turned_QD, turned_QD)[:, None]
  return ids_QK, np.where(ids_QK < 0, np.float32(np.inf), distances_QK)


def _scan(lists, queries_QD, probes_QP, k: int):
  """Ids and distances, as faiss has them, if no list is -1."""
  distances_QK, ids_QK = faiss_lists.search_lists(
    lists, queries_QD, probes_QP, k
  )
  return ids_QK, distances_QK


def describe(index: faiss.Index) -> dict:
  """Returns the sizes of a refiner, as its description has them."""
  _, lists = _parts(index)
  return {
    "dim": index.d,
    "num_vectors": index.ntotal,
    "num_lists": lists.nlist,
    "num_parts": int(lists.prq.nsplits),
    "code_bytes": lists.code_size,
  }


def save(
  index: faiss.Index,
  path,
  *,
  of_index: str,
  info: dict,
  overwrite: bool = False,
) -> dict:
  """Writes a refiner and its description, which it returns.

  `of_index` is the checksum of the index it belongs to, `sha256` of its
  description; `info` is what else the description says, plain values.
  """
  meta = {**info, "of_index": of_index, **describe(index)}
  meta["weights_digest"] = _digest_weights(info)
  return faiss_files.save(index, path, meta, kind=_KIND, overwrite=overwrite)


def load(path, index_info: dict) -> Loaded:
  """Reads the refiner of the index of this description.

  Raises:
    FileNotFoundError: There is no such file, or no description next to it.
    ValueError: It is damaged, no such refiner, or of another index.
  """
  index, info = faiss_files.load(path, kind=_KIND)
  if not info:
    raise FileNotFoundError(
      f"{path} has no description {path}.json, so its index is unknown: copy "
      "it too, or make the refiner again by vqjax refiner --kind=fastscan."
    )
  if info.get("of_index") != index_info.get("sha256"):
    raise ValueError(
      f"{path} belongs to an index with checksum {info.get('of_index')}, but "
      f"this index has {index_info.get('sha256')}; make its own by vqjax "
      "refiner --kind=fastscan."
    )
  wanted = info.get("weights_digest")  # Older descriptions have none.
  if wanted is not None and wanted != _digest_weights(info):
    raise ValueError(
      f"{path}.json is damaged: its weights do not match their checksum. Make "
      "the refiner again by vqjax refiner --kind=fastscan."
    )
  return Loaded(index, info)


def _digest_weights(info: dict) -> str:
  """A checksum of what nothing else in a description can tell."""
  weights = {k: v for k, v in info.items() if k.endswith("_weight")}
  text = json.dumps(weights, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _parts(index):
  """The rotation and the lists."""
  index = faiss.downcast_index(index)
  turn = faiss.downcast_VectorTransform(index.chain.at(0))
  return turn, faiss.downcast_index(index.index)


def _left_of(coarse: faiss.Index, x_ND: np.ndarray) -> np.ndarray:
  """Residuals of vectors after the centroids of their lists."""
  coarse = faiss.downcast_index(coarse)
  lists_N = faiss_lists.assign_lists(coarse, x_ND)
  return x_ND - coarse.reconstruct_batch(lists_N.astype(np.int64))
