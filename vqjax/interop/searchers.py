"""Opens codec, index and decoders from their files, ready to search.

  searcher = open_searcher("runs/ivf", "index.faiss", "decoders.safetensors")
  result = searcher.search(xq_QD, k=10, nprobe=16, num_network=20)

`vqjax.search.pipeline` says what the options mean. Build it once; it answers
batches of any size without compiling anew for each.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vqjax.codecs import additive, pairwise, registry, runner
from vqjax.data import item_ids, row_ids
from vqjax.interop import (
  faiss_bytes,
  faiss_fastscan,
  faiss_io,
  faiss_ivf,
  faiss_lists,
  foreign_index,
  torch_pairwise,
)
from vqjax.search import footprint, ivf, pipeline, refiners, residual_bits
from vqjax.storage import codec_file, decoder_file, refiner_file


def open_searcher(
  codec: str,
  index: str,
  decoders: str | None = None,
  refiner: str | None = None,
  *,
  dtype: str = "float32",
) -> pipeline.Searcher:
  """Opens the files of a search and checks that they belong together.

  Args:
    codec: Run folder, codec.safetensors or released checkpoint.
    index: File of `vqjax build_index`, or a released .faissindex.
    decoders: File of `vqjax pairwise_decoder`, for the pairwise stage, or a
      released .pt of a pairwise decoder.
    refiner: File of `vqjax refiner`, of either kind.
    dtype: Type of the products of the scan and of the network, "float32" or
      "bfloat16"; sums are float32.

  Raises:
    FileNotFoundError: A file is not there.
    ValueError: A file is damaged, or of another codec.
  """
  loaded = codec_file.load_codec(codec)
  decode_fn = make_decode_fn(loaded, dtype)
  faiss_index, meta, _ = foreign_index.open_index(index, loaded, decode_fn)
  pairwise_params, added_LD = None, None
  if decoders is not None and str(decoders).endswith(torch_pairwise.SUFFIX):
    sample = foreign_index.sample(faiss_index, loaded, decode_fn)
    pairwise_params, added_LD = torch_pairwise.load(decoders, sample)
  elif decoders is not None:
    found = decoder_file.load(decoders)
    decoder_file.check_codec(found, loaded.fingerprint)
    pairwise_params = found.pairwise
  return make_searcher(
    faiss_index,
    meta["metric"],
    decode_fn,
    pairwise_params=pairwise_params,
    pairwise_added_LD=added_LD,
    refiner=None if refiner is None else load_refiner(refiner, meta),
    is_cosine=loaded.info.get("metric") == "cosine",
    dtype=dtype,
    keep_codes=False,
    ids_of=index,
  )


def make_searcher(
  index,
  metric: str,
  decode_fn,
  *,
  pairwise_params: pairwise.PairwiseParams | None = None,
  pairwise_added_LD: np.ndarray | None = None,
  refiner=None,
  is_cosine: bool = False,
  dtype: str = "float32",
  keep_codes: bool = True,
  ids_of=None,
) -> pipeline.Searcher:
  """Puts a searcher together from parts in memory.

  `decode_fn` is from `make_decode_fn`, a refiner from `load_refiner`. What the
  pairwise decoder leaves out is `pairwise_added_LD`, of each list; None for the
  centroids, as `pairwise.fit` does. For
  `is_cosine` vectors are of length 1, and queries are made so. `dtype` is the
  type of the products of the scan. `keep_codes` False empties the index, whose
  codes the searcher has; `refill` puts them back. `ids_of` is the file of the
  index, whose ids are mapped then; None to keep them in memory.
  """
  decode_fn = at_length_1(decode_fn) if is_cosine else decode_fn
  contents = faiss_ivf.contents(index)
  if not keep_codes:
    index = faiss_ivf.keep_coarse(index)
  ids_N = row_ids.narrow(contents.ids_N)
  if ids_of is not None:
    ids_N = row_ids.open_beside(ids_of, contents.ids_N)
  pairwise_fn = None
  if pairwise_params is not None:
    pairwise_fn = partial(
      pairwise.decode,
      pairwise_params,
      centroids_LD=_left_out(index, contents, pairwise_params)
      if pairwise_added_LD is None
      else jnp.asarray(pairwise_added_LD),
    )
    pairwise_fn = at_length_1(pairwise_fn) if is_cosine else pairwise_fn
  is_ip = metric == "ip"
  norm = 0 if is_ip else 1
  lists = ivf.make_lists(
    contents.starts,
    contents.codes_NM,
    contents.norm_N * norm,
    contents.low_L * norm,
    contents.step_L * norm,
    contents.codebooks_MKD,
    None if is_ip else contents.centre_D,
    dtype=dtype,
  )
  return pipeline.Searcher(
    pipeline.Parts(
      lists=lists,
      ids_N=ids_N,
      coarse_fn=_make_coarse_fn(index, metric, contents.centre_D),
      decode_fn=decode_fn,
      pairwise_fn=pairwise_fn,
      distances_fn=inner_products_to if is_ip else faiss_io.distances_to,
      refiner=None if refiner is None else make_refiner(refiner, contents),
      metric=metric,
      is_cosine=is_cosine,
      bytes_fn=partial(_bytes, index, decode_fn, pairwise_fn),
    )
  )


def _bytes(index, decode_fn, pairwise_fn) -> dict[str, int]:
  """Bytes in memory of index, codec and pairwise decoder."""
  found = faiss_bytes.by_part(index)
  found["tables"] += footprint.array_bytes(pairwise_fn)
  return found | {"codec": footprint.array_bytes(decode_fn)}


def disk_bytes(codec, index, decoders=None, refiner=None) -> dict[str, int]:
  """Returns the bytes of the files of a search, ids with those of rows."""
  beside = (row_ids.path_beside(index), item_ids.path_beside(index))
  return {
    "codec": codec_file.num_bytes(codec),
    "index": footprint.file_bytes(index),
    "ids": footprint.file_bytes(*beside),
    "decoders": footprint.file_bytes(decoders),
    "refiner": footprint.file_bytes(refiner),
  }


def refill(index, searcher: pipeline.Searcher) -> None:
  """Puts all codes of a searcher back into the index it was made of."""
  index = faiss_ivf.keep_coarse(index)
  lists, ids_N = searcher.parts.lists, searcher.parts.ids_N
  lists_N = np.repeat(np.arange(index.nlist), np.diff(lists.starts_L1))
  faiss_ivf.add_codes(
    index, lists_N, ivf.codes_of(lists), ids_N.astype(np.int64)
  )
  faiss_ivf.fit_norms(index)


def _left_out(index, contents, pairwise_params):
  """What the pairwise decoder leaves out of vectors, for each list `[L, D]`."""
  centroids_LD = jnp.asarray(contents.centroids_LD)
  if pairwise_params.list_codes_LV is not None:
    return centroids_LD
  codewords = additive.AdditiveParams(faiss_lists.words_of(index.rq))
  centre_D, _ = additive.split_centre(codewords)
  return jnp.broadcast_to(centre_D, centroids_LD.shape)


def _make_coarse_fn(coarse, metric: str, centre_D):
  """Returns what finds the lists of queries and their part of distances.

  That part is the squared distance to the centroid if codes are of residuals,
  else the squared norm of the query, less the centre that the scan subtracts;
  for inner products see `pipeline.Parts`.
  """

  def find(queries_QD, nprobe, ef_search):
    lists_QP, of_list_QP = faiss_ivf.coarse_search(
      coarse, queries_QD, nprobe, ef_search
    )
    if metric == "ip":
      return lists_QP, -2 * of_list_QP * bool(coarse.by_residual)
    if not coarse.by_residual:
      norm_Q1 = np.sum((queries_QD - centre_D) ** 2, axis=1, keepdims=True)
      of_list_QP = np.broadcast_to(norm_Q1, of_list_QP.shape)
    return lists_QP, of_list_QP

  return find


def inner_products_to(queries_QD, base_ND, rows_QR) -> np.ndarray:
  """-2 times inner products `[Q, R]` of queries and their rows of the base.

  A negative row stands for none and is at inf.
  """
  at_QRD = base_ND[np.maximum(rows_QR, 0)]
  found_QR = -2 * np.einsum("qd,qrd->qr", queries_QD, at_QRD)
  return np.where(rows_QR < 0, np.float32(np.inf), found_QR)


def load_refiner(path, index_info: dict):
  """Reads a refiner: `ResidualBits`, or `faiss_fastscan.Loaded`.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is damaged, or belongs to another index than this.
  """
  if str(path).endswith(refiner_file.SUFFIX):
    return refiner_file.load(path, index_info)
  return faiss_fastscan.load(path, index_info)


def make_refiner(found, contents) -> refiners.Refiner:
  """Returns what a search needs of a loaded refiner, given its index."""
  if isinstance(found, residual_bits.ResidualBits):
    return refiners.rabitq(jax.tree.map(jnp.asarray, found))
  rows_fn = _make_rows_of(contents.ids_N)

  def scan(queries_QD, probes_QP, k):
    ids_QK, distances_QK = faiss_fastscan.scan(
      found.index, queries_QD, probes_QP, k
    )
    return rows_fn(ids_QK), distances_QK

  codewords_fn = faiss_ivf.make_rows_fn(contents)
  num_bytes = faiss_bytes.by_part(found.index)
  num_bytes["refiner"] = num_bytes.pop("codes")
  num_bytes["rows"] = footprint.array_bytes(rows_fn, codewords_fn)
  return refiners.fastscan(
    scan,
    codewords_fn,
    faiss_io.distances_to,
    faiss_io.thread_pool().map,
    codewords_weight=found.info["codewords_weight"],
    network_weight=found.info["network_weight"],
    num_bytes=num_bytes,
  )


def _make_rows_of(ids_N):
  """Returns `ids -> rows`, int32; -1 stays -1."""
  most = int(ids_N.max()) + 1
  if most <= 4 * len(ids_N):  # Several times as fast as to search.
    row_of_id = np.full(most + 1, -1, np.int32)
    row_of_id[ids_N] = np.arange(len(ids_N), dtype=np.int32)
    return partial(np.take, row_of_id, mode="wrap")
  order_N = np.argsort(ids_N).astype(np.int32)

  def rows(sorted_N, order_N, ids):
    at = np.searchsorted(sorted_N, np.maximum(ids, sorted_N[0]))
    return np.where(ids < 0, -1, order_N[at])

  return partial(rows, ids_N[order_N], order_N)


def refiner_bytes(path, index_info: dict) -> int:
  """Returns the bytes of a vector in the refiner of this index."""
  if str(path).endswith(refiner_file.SUFFIX):
    return refiner_file.num_bytes(index_info["dim"])
  return faiss_fastscan.load(path, index_info).info["code_bytes"]


def make_decode_fn(loaded: codec_file.LoadedCodec, dtype: str):
  """Returns the codec's decoder of codes `[n, M]` and lists `[n]`, compiled.

  A codec without lists takes no notice of them, one without a network none of
  the `dtype`.
  """
  spec = registry.get(loaded.name)
  decode_fn = runner.decoder(spec, dtype)
  tables = jax.jit(spec.prepare)(loaded.params)

  @jax.jit
  def decode(tables, codes_NM, lists_N):
    if spec.is_ivf(tables):
      codes_NM = jnp.column_stack([lists_N, codes_NM])
    return decode_fn(tables, codes_NM)

  return partial(decode, tables)


def at_length_1(decode_fn):
  """Returns the decoder with vectors of length 1, for the cosine.

  Codes of vectors of length 1 stand for shorter ones, and cosines compare
  directions alone. Zeros stay zeros.
  """
  return partial(_decode_scaled, decode_fn)


def _decode_scaled(decode_fn, codes_NM, lists_N):
  return _scale(decode_fn(codes_NM, lists_N))


@jax.jit
def _scale(x_ND):
  norm_N1 = jnp.linalg.norm(x_ND, axis=1, keepdims=True)
  return x_ND / jnp.maximum(norm_N1, jnp.finfo(jnp.float32).tiny)
