"""Inverted lists of faiss: what finds them, and what they hold, as arrays.

The lists belong to an index of `faiss_ivf`, whose coarse quantiser finds them.
faiss keeps a vector as the packed bits of its code and a byte for the squared
norm of the sum of its codewords.
"""

import functools
from typing import NamedTuple

import faiss
import numpy as np

from vqjax.codecs.additive import AdditiveParams, split_centre
from vqjax.codecs.distances import centre_of
from vqjax.codecs.rq import RQParams
from vqjax.core import check_range
from vqjax.data import formats
from vqjax.interop import faiss_io
from vqjax.interop.faiss_io import float_rows

BLOCK = 16384  # Vectors whose reconstructions exist at a time.
COARSE = ("hnsw", "flat")
_L2 = faiss.METRIC_L2
_NUM_LINKS = 32  # Of a codeword in the graph, and how hard they are looked for:
_EF_CONSTRUCTION = 200
_EFFORT = 64  # To find the list of a vector in a graph; misses few.


class Contents(NamedTuple):
  """What an index holds, list after list; vectors of a list as added.

  Byte b of `norm_N`, of list l, stands for `low_L[l] + b * step_L[l]`: what the
  codewords add to the squared norm of the centroid, which suits tables of a
  query that serve all lists. (The bytes in the file are of the codewords
  alone.) That norm is of the centroid less `centre_D`, see `ivf.make_lists`.
  The centroids are those that are added to the codewords: if the codes are
  of whole vectors zeros, or the centre of the codewords, which these are then
  without.
  """

  starts: np.ndarray  # `[L + 1]` int64: first row of each list, then N.
  ids_N: np.ndarray  # int64.
  codes_NM: np.ndarray  # uint8; uint16 for more than 256 codewords.
  norm_N: np.ndarray  # uint8.
  low_L: np.ndarray  # float32.
  step_L: np.ndarray  # float32.
  codebooks_MKD: np.ndarray
  centroids_LD: np.ndarray
  centre_D: np.ndarray


def make_coarse(
  centroids_LD: np.ndarray,
  kind: str = "hnsw",
  metric: str = "l2",
  *,
  progress=None,
) -> faiss.Index:
  """Returns an index that finds the lists of vectors.

  Args:
    centroids_LD: Centroids, in data units.
    kind: "flat" compares with all of them; "hnsw" walks a graph, made here in
      minutes for a million centroids, and may miss the nearest.
    metric: "l2" or "ip".
    progress: Called from time to time with `(centroids done, all centroids)`.
  """
  if kind not in COARSE:
    raise ValueError(f"coarse must be one of {COARSE}, got {kind!r}.")
  kind_of_metric = faiss_io.metric_type(metric)
  formats.check_vectors(centroids_LD, name="centroids")
  dim = centroids_LD.shape[1]
  if kind == "flat":
    coarse = faiss.IndexFlat(dim, kind_of_metric)
  else:
    coarse = faiss.IndexHNSWFlat(dim, _NUM_LINKS, kind_of_metric)
    coarse.hnsw.efConstruction = _EF_CONSTRUCTION
  num_lists = len(centroids_LD)
  for i in range(0, num_lists, BLOCK):
    coarse.add(float_rows("centroids", centroids_LD[i : i + BLOCK]))
    if progress is not None:
      progress(coarse.ntotal, num_lists)
  return coarse


def rotate(coarse: faiss.Index, turn) -> None:
  """Rotates centroids in place; a graph of them stays what it is."""
  move(coarse, turn.apply(coarse.reconstruct_n(0, coarse.ntotal)))


def move(coarse: faiss.Index, centroids_LD: np.ndarray) -> faiss.Index:
  """Gives a coarse index other centroids in place; a graph keeps its links."""
  found = faiss.downcast_index(coarse)  # Not its owner.
  is_graph = isinstance(found, faiss.IndexHNSW)
  flat = faiss.downcast_index(found.storage) if is_graph else found
  flat.reset()
  flat.add(float_rows("centroids", centroids_LD))
  return coarse


def hand_over(part, owner) -> None:
  """Makes faiss free `part` together with `owner`."""
  part.this.disown()
  owner.own_fields = True


def search_lists(
  index, queries_QD: np.ndarray, lists_QP: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
  """Distances and ids `[Q, k]`, as faiss has them, in lists that are given.

  For codes that are not of residuals: distances to centroids are not needed.
  """
  num, nprobe = lists_QP.shape
  lists_QP = np.ascontiguousarray(lists_QP, np.int64)
  distances_QK = np.empty((num, k), np.float32)
  ids_QK = np.empty((num, k), np.int64)
  unused_QP = np.zeros((num, nprobe), np.float32)
  index.search_preassigned_c(
    *(num, faiss.swig_ptr(queries_QD), k),
    *map(faiss.swig_ptr, (lists_QP, unused_QP, distances_QK, ids_QK)),
    False,
    faiss.SearchParametersIVF(nprobe=nprobe),
    None,
  )
  return distances_QK, ids_QK


def assign_lists(coarse: faiss.Index, x_ND: np.ndarray) -> np.ndarray:
  """Finds the list of each vector, of any numeric type: int32 `[N]`."""
  blocks = [
    nearest(coarse, float_rows("x", x_ND[i : i + BLOCK], coarse.d), 1, _EFFORT)
    for i in range(0, len(x_ND), BLOCK)
  ]
  lists = [lists_N1[:, 0] for lists_N1, _ in blocks]
  return np.concatenate([np.empty(0, np.int32), *lists])


def contents(index: faiss.Index) -> Contents:
  """Reads all lists of an index into arrays."""
  index = check_index(index)
  m, k, _ = sizes_of(index)
  starts, packed, ids_N = _join_lists(index)
  if k == 256:
    codes_NM = packed[:, :m]
  else:
    codes_NM = np.empty((len(packed), m), np.uint8 if k <= 256 else np.uint16)
    bits = [k.bit_length() - 1] * m + [8]
    for i in range(0, len(packed), BLOCK):
      rows = slice(i, i + BLOCK)
      codes_NM[rows] = faiss.unpack_bitstrings(packed[rows], bits)[:, :m]
  words_MKD, centroids_LD = words_of(index.rq), centroids_of(index)
  if not index.by_residual:
    centroids_LD = np.zeros_like(centroids_LD)
    if index.metric_type == _L2:
      shift_D, codewords = split_centre(AdditiveParams(words_MKD))
      words_MKD = np.asarray(codewords.codebooks_MKD)
      centroids_LD += np.asarray(shift_D)
  centre_D = centre_of(centroids_LD)
  near_LD = centroids_LD - centre_D if centre_D.any() else centroids_LD
  norms = _norms(starts, codes_NM, words_MKD, near_LD)
  return Contents(
    starts, ids_N, codes_NM, *norms, words_MKD, centroids_LD, centre_D
  )


def lists_of(contents: Contents, rows_N: np.ndarray) -> np.ndarray:
  """Returns the list of each row, `[N]`."""
  return np.searchsorted(contents.starts, rows_N, "right") - 1


def check_index(index, name="The index") -> faiss.IndexIVFResidualQuantizer:
  """The index; raises ValueError if it is of another kind."""
  kind = faiss.IndexIVFResidualQuantizer
  if (
    not isinstance(index, kind)
    or index.rq.search_type != faiss.AdditiveQuantizer.ST_norm_qint8
    or len(set(faiss.vector_to_array(index.rq.nbits).tolist())) != 1
  ):
    raise ValueError(
      f"{name} must be inverted lists of residual codes with a byte for the "
      f"norm, as IVF1024,RQ8x8_Nqint8; got {type(index).__name__}."
    )
  return index


def sizes_of(index) -> tuple[int, int, int]:
  """M, K and D of an index."""
  return index.rq.M, 1 << int(index.rq.nbits.at(0)), index.d


def words_of(rq) -> np.ndarray:
  """The codewords of a quantiser, `[M, K, D]`."""
  codewords = faiss.vector_to_array(rq.codebooks)
  return codewords.reshape(rq.M, -1, rq.d)


def centroids_of(index) -> np.ndarray:
  """The centroids of the lists, `[L, D]`."""
  return index.quantizer.reconstruct_n(0, index.nlist)


def make_decode_fn(codebooks_MKD):
  """Returns `codes_NM -> r_ND`, the sums of their codewords."""
  m, k, _ = codebooks_MKD.shape
  codewords = faiss_io.rq_to_faiss(RQParams(codebooks_MKD))
  return faiss_io.to_codec(codewords, m, k.bit_length() - 1).decode


def make_rows_fn(contents: Contents):
  """Returns `rows_N -> x_ND`: what centroid and codewords of rows add up to.

  The list is packed into the bits of the code, as its first position.
  """
  num_lists, dim = contents.centroids_LD.shape
  num_codes, num_codewords, _ = contents.codebooks_MKD.shape
  num_bits = faiss.UInt64Vector()
  list_bits = max((num_lists - 1).bit_length(), 1)
  for bits in (list_bits, *[num_codewords.bit_length() - 1] * num_codes):
    num_bits.push_back(bits)
  padding = np.zeros(((1 << list_bits) - num_lists, dim), np.float32)
  codewords = [contents.centroids_LD, padding, *contents.codebooks_MKD]
  rq = faiss.ResidualQuantizer(dim, num_bits)
  codewords = np.concatenate(codewords).astype(np.float32)
  faiss.copy_array_to_vector(codewords.ravel(), rq.codebooks)
  rq.is_trained = True
  packed = np.empty((len(contents.codes_NM), rq.code_size), np.uint8)
  for i in range(0, len(packed), BLOCK):
    part = packed[i : i + BLOCK]
    rows = np.arange(i, i + len(part))
    lists = lists_of(contents, rows)
    codes = np.column_stack([lists, contents.codes_NM[rows]]).astype(np.int32)
    rq.pack_codes(len(part), faiss.swig_ptr(codes), faiss.swig_ptr(part))

  def decode(packed, rows_N):
    return rq.decode(packed[rows_N])

  return functools.partial(decode, packed)


def pack(index, codes_NM) -> np.ndarray:
  """The bytes of codes and of their norms, as faiss keeps them."""
  codes_NM = np.ascontiguousarray(codes_NM, np.int32)
  packed = np.empty((len(codes_NM), index.code_size), np.uint8)
  index.rq.pack_codes(
    len(codes_NM), faiss.swig_ptr(codes_NM), faiss.swig_ptr(packed)
  )
  return packed


def unpack(index, packed) -> np.ndarray:
  """The codes `[n, M]` of packed ones, without the byte of the norm."""
  m, k, _ = sizes_of(index)
  bits = [k.bit_length() - 1] * m + [8]
  return faiss.unpack_bitstrings(packed, bits)[:, :m]


def repack(index, packed) -> np.ndarray:
  """Packed codes with their norms in the range that the index has."""
  return pack(index, unpack(index, packed))


def blocks(index):
  """Yields the packed codes of all lists, about `BLOCK` rows at a time.

  With each block `[(list, first row, number of rows)]`, for `write`.
  """
  parts, views, num = [], [], 0
  for number in range(index.nlist):
    rows = _view(index, number)
    for first in range(0, len(rows), BLOCK):
      view = rows[first : first + BLOCK]
      parts.append((number, first, len(view)))
      views.append(view)
      num += len(view)
      if num >= BLOCK:
        yield parts, np.concatenate(views)
        parts, views, num = [], [], 0
  if parts:
    yield parts, np.concatenate(views)


def sample(index, num: int) -> tuple[np.ndarray, np.ndarray]:
  """Lists and packed codes of up to `num` vectors, spread over all lists."""
  sizes_L = np.array(list(map(index.invlists.list_size, range(index.nlist))))
  starts_L = np.cumsum(sizes_L) - sizes_L
  num_all = int(sizes_L.sum())
  at_n = np.unique(np.linspace(0, max(num_all - 1, 0), num, dtype=np.int64))
  at_n = at_n[:num_all]
  lists_n = np.searchsorted(starts_L + sizes_L, at_n, "right")
  packed = [
    _view(index, int(number))[row : row + 1]
    for number, row in zip(lists_n, at_n - starts_L[lists_n], strict=True)
  ]
  return lists_n, np.concatenate(
    [np.empty((0, index.code_size), "u1"), *packed]
  )


def write(index, parts, packed) -> None:
  """Writes a block of `blocks` back to where it was."""
  at = 0
  for number, first, num in parts:
    _view(index, number)[first : first + num] = packed[at : at + num]
    at += num


def _view(index, number: int) -> np.ndarray:
  """The packed codes of a list, in the memory of faiss."""
  num, size = index.invlists.list_size(number), index.code_size
  if not num:
    return np.empty((0, size), np.uint8)
  ptr = index.invlists.get_codes(number)
  return faiss.rev_swig_ptr(ptr, num * size).reshape(num, size)


def _join_lists(index) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Starts, packed codes and ids of all lists, one after the other."""
  lists, size = index.invlists, index.code_size
  counts = map(lists.list_size, range(index.nlist))
  starts = np.zeros(index.nlist + 1, np.int64)
  np.cumsum(np.fromiter(counts, np.int64, index.nlist), out=starts[1:])
  packed = np.empty((starts[-1], size), np.uint8)
  ids_N = np.empty(starts[-1], np.int64)
  flat, stops = packed.reshape(-1), starts[1:].tolist()
  first = 0
  for number, stop in enumerate(stops):
    if stop > first:
      code_ptr, id_ptr = lists.get_codes(number), lists.get_ids(number)
      num_bytes = (stop - first) * size
      flat[first * size : stop * size] = faiss.rev_swig_ptr(code_ptr, num_bytes)
      ids_N[first:stop] = faiss.rev_swig_ptr(id_ptr, stop - first)
      first = stop
  return starts, packed, ids_N


def ids_of(index) -> np.ndarray:
  """Ids of all rows, int64 `[N]`, list after list."""
  lists = index.invlists
  parts = [
    faiss.rev_swig_ptr(lists.get_ids(number), num).copy()
    for number in range(index.nlist)
    if (num := lists.list_size(number))
  ]
  return np.concatenate([np.empty(0, np.int64), *parts])


def _norms(starts, codes_NM, words_MKD, centroids_LD):
  """`norm_N`, `low_L` and `step_L` of `Contents`.

  Every list has a range of its own: one vector far out costs no other list
  its precision.
  """
  decode_fn = make_decode_fn(words_MKD)
  num = len(codes_NM)
  added_N = np.empty(num, np.float32)
  for i in range(0, num, BLOCK):
    rows = slice(i, min(i + BLOCK, num))
    lists_n = np.searchsorted(starts, np.arange(i, rows.stop), "right") - 1
    words_nD = decode_fn(codes_NM[rows])
    # |c + r|^2 - |c|^2
    both_nD = 2 * centroids_LD[lists_n] + words_nD
    added_N[rows] = np.einsum("nd,nd->n", both_nD, words_nD)
  low_L, step_L = np.zeros((2, len(centroids_LD)), np.float32)
  sizes_L = np.diff(starts)
  has_L = sizes_L > 0
  if num:
    first = starts[:-1][has_L]
    low_L[has_L] = np.minimum.reduceat(added_N, first)
    step_L[has_L] = (np.maximum.reduceat(added_N, first) - low_L[has_L]) / 255
  at_N = added_N - np.repeat(low_L, sizes_L)
  at_N /= np.repeat(np.where(step_L > 0, step_L, 1), sizes_L)
  return np.clip(np.rint(at_N), 0, 255).astype(np.uint8), low_L, step_L


def nearest(coarse, x_ND, num: int, ef_search):
  """Nearest centroids `[N, num]`, int32, and their distances."""
  check_range("nprobe", num, 1, coarse.ntotal, "lists of the index")
  coarse = faiss.downcast_index(coarse)
  if isinstance(coarse, faiss.IndexFlat) and coarse.metric_type == _L2:
    # faiss expands these distances, which cancel far from the origin. (Those
    # in a graph are sums of squared differences.)
    num_floats = coarse.ntotal * coarse.d
    rows_LD = faiss.rev_swig_ptr(coarse.get_xb(), num_floats)
    rows_LD = rows_LD.reshape(-1, coarse.d)
    centre_D = faiss_io.far_centre(rows_LD)
    if centre_D is not None:
      found = faiss.knn(x_ND - centre_D, rows_LD - centre_D, num)
      return found[1].astype(np.int32), found[0]
  params = graph_params(coarse, ef_search)
  distances_NP, lists_NP = coarse.search(x_ND, num, params=params)
  return lists_NP.astype(np.int32), distances_NP


def graph_params(coarse, ef_search: int | None):
  """Options of a search in a graph; None for its own, or for no graph."""
  if ef_search is None or not isinstance(coarse, faiss.IndexHNSW):
    return None
  check_range("ef_search", ef_search, 1, 2**31 - 1)
  return faiss.SearchParametersHNSW(efSearch=ef_search)
