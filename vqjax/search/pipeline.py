"""From queries to neighbours in stages of growing cost and accuracy.

  coarse    finds the lists nearest to a query
  scan      compares all their codes, by tables of the additive decoder
            (`ivf.py`), or by the codes of a fastscan refiner
  refine    re-orders the `num_refined` best by codewords and refiner together
  pairwise  re-orders the `num_pairwise` best by tables over pairs of codes
  network   decodes the `num_network` best and computes exact distances to that

Every stage after the scan re-orders the head of the list of candidates and
leaves the tail as it is. A stage whose number is 0 is left out.

  searcher = pipeline.Searcher(parts)
  result = searcher.search(xq_QD, k=10, nprobe=16, num_network=20)
  result.ids_QR, result.distances_QR

Nothing here knows a codec: what decodes comes as functions.

Reference: arXiv 2501.03078, section 3.4.
"""

import time
from collections.abc import Callable
from concurrent import futures
from functools import partial
from typing import NamedTuple

import numpy as np

from vqjax import devices
from vqjax.core import check_range
from vqjax.data import row_ids, unit
from vqjax.data.formats import check_vectors, to_float32
from vqjax.search import footprint, ivf
from vqjax.search.footprint import Footprint
from vqjax.search.refiners import Refiner, round_up, weighted

STAGES = ("coarse", "scan", "refine", "pairwise", "network")
_DECODE_ROWS = 4096  # Vectors that are decoded at once.
_TABLE_BYTES = 2 << 20  # Of one scan; these should stay in the caches.
_LEAST_QUERIES = 32  # In one scan, if tables are larger.
_SLOT_BYTES = 64 << 20  # Of the slots of one scan, at most.
_SCANS_AT_ONCE = 8
_LEAST_PART = 256  # Queries that a thread is worth.
_REFINED_ROWS = 4096  # Candidates that are refined at once.
_RERANKED = 1 << 18  # Candidates that are decoded before any is dropped.


class Parts(NamedTuple):
  """What a search is put together from.

  `decode_fn` and `pairwise_fn` are compiled functions of codes `[n, M]` and
  lists `[n]`, int32; `coarse_fn` and `distances_fn` run on the host.
  """

  lists: ivf.Lists
  ids_N: np.ndarray  # Id of each row of `lists`; may be memory-mapped.
  coarse_fn: Callable  # (xq_QD, nprobe, ef_search) -> lists and distances.
  decode_fn: Callable  # -> x_ND, by the network.
  pairwise_fn: Callable | None  # -> x_ND, by the pairwise decoder.
  distances_fn: Callable  # (xq_QD, x_ND, rows_QR) -> squared distances [Q, R].
  refiner: Refiner | None = None  # Of the rows of `lists`.
  # For "ip" all distances are -2 times inner products: the remainder of squared
  # distances without the norms.
  metric: str = "l2"
  is_cosine: bool = False  # Vectors are of length 1; queries are made so.
  # Bytes in memory of what the functions above keep, see `footprint`.
  bytes_fn: Callable[[], dict[str, int]] = dict


class Result(NamedTuple):
  """Neighbours, nearest first; id -1 if there are no more.

  Distances are squared, inf if there are no more; for "ip" they are inner
  products, the largest first and -inf if there are no more.

  A distance is from the last stage that saw the candidate, but never less
  than the distance of a result before it: a stage orders its own candidates,
  and all that it did not see come after them. `seconds` are by stage,
  `num_decoded` counts the vectors that the network decoded.
  """

  ids_QR: np.ndarray
  distances_QR: np.ndarray
  seconds: dict[str, float]
  num_decoded: int


class Candidates(NamedTuple):
  """Rows of the lists, the list of each, distances; -1, -1, inf for none."""

  rows_QC: np.ndarray
  lists_QC: np.ndarray
  distances_QC: np.ndarray


class Searcher:
  """Answers batches of queries; opens and compiles its parts once."""

  def __init__(self, parts: Parts):
    """Takes the parts as they are."""
    self.parts = parts
    sizes_L = np.diff(np.asarray(parts.lists.starts_L1))
    self._tiles_L = ivf.count_tiles(sizes_L)
    if self._has_own_scan:
      lists_L = np.arange(len(sizes_L), dtype=np.int32)
      self._list_of_N = np.repeat(lists_L, sizes_L)
    self._pool = futures.ThreadPoolExecutor(
      min(devices.num_cpus(), _SCANS_AT_ONCE)
    )

  @property
  def _has_own_scan(self) -> bool:
    return self.parts.refiner is not None and bool(self.parts.refiner.scan_fn)

  @property
  def dim(self) -> int:
    """Dimensions of the vectors."""
    return self.parts.lists.words_DZ.shape[0]

  def footprint(self, disk: dict[str, int] | None = None) -> Footprint:
    """Returns the bytes it takes; `disk` are those of the files, by part."""
    lists, ids = self.parts.lists, row_ids.num_bytes(self.parts.ids_N)
    tables = lists.words_DZ.nbytes
    norms = lists.norm_N.nbytes if self.parts.metric != "ip" else 0
    codes = lists.packed_NW.nbytes
    rest = footprint.array_bytes(lists) - tables - norms - codes
    ram = {"codes": codes, "norms": norms, "ids": ids["ram"]}
    ram |= {"centroids": rest, "tables": tables}
    if self._has_own_scan:
      ram["rows"] = self._list_of_N.nbytes
    refiner = self.parts.refiner
    sizes = [self.parts.bytes_fn(), (refiner and refiner.num_bytes) or {}]
    for name, size in (item for found in sizes for item in found.items()):
      ram[name] = ram.get(name, 0) + size
    ram = {name: size for name, size in ram.items() if size}
    return Footprint(len(self.parts.ids_N), ram, disk or {})

  def search(
    self,
    queries_QD,
    k: int = 10,
    *,
    nprobe: int | None = None,
    ef_search: int | None = None,
    num_refined: int | None = None,
    num_pairwise: int = 0,
    num_network: int = 20,
  ) -> Result:
    """Finds `k` neighbours of each query.

    Args:
      queries_QD: Queries `[Q, D]` in data units, or one `[D]`.
      k: Results.
      nprobe: Lists that are searched; None for 16, or all if there are fewer.
      ef_search: Effort in a graph of centroids; None for its own.
      num_refined: Candidates that the refiner re-orders, at least as many as
        the network decodes, or 0. None for `max(k, num_network)`; 0 without a
        refiner, and for one that is scanned if the network follows.
      num_pairwise: Candidates that the pairwise decoder re-orders; must be 0
        with `num_refined`, which is more accurate.
      num_network: Candidates that the network decodes.

    Raises:
      ValueError: A number or a dimension does not fit.
    """
    queries_QD = self._check_queries(queries_QD)
    nprobe = min(16, len(self._tiles_L)) if nprobe is None else nprobe
    if num_refined is None:
      num_refined = self._default_refined(k, num_pairwise, num_network)
    self._check_setting(k, nprobe, num_refined, num_pairwise, num_network)
    clock = _Clock()
    num_best = max(k, num_refined, num_pairwise, num_network)
    find_fn = partial(self.parts.coarse_fn, nprobe=nprobe, ef_search=ef_search)
    scan_fn = self._scan_refiner if self._has_own_scan else self._scan
    found = scan_fn(clock, queries_QD, find_fn, num_best)
    network_weight = 1.0
    if num_refined or self._has_own_scan:
      network_weight = self.parts.refiner.network_weight
    if num_refined:
      found = self._refine(queries_QD, found, num_refined)
      clock.lap("refine")
    num_decoded = 0
    if num_pairwise:
      pairwise_fn = self.parts.pairwise_fn
      found, _ = self._rerank(pairwise_fn, queries_QD, found, num_pairwise)
      clock.lap("pairwise")
    if num_network:
      found, num_decoded = self._rerank(
        self.parts.decode_fn, queries_QD, found, num_network, network_weight
      )
      clock.lap("network")
    rows_QR = found.rows_QC[:, :k]
    ids_QR = row_ids.pick(self.parts.ids_N, rows_QR)
    distances_QR = np.maximum.accumulate(found.distances_QC[:, :k], axis=1)
    if self.parts.metric == "ip":
      distances_QR = distances_QR / -2
    return Result(ids_QR, distances_QR, clock.seconds, num_decoded)

  def decode_rows(self, rows_N) -> np.ndarray:
    """Returns the vectors `[N, D]` that codes in these rows stand for."""
    starts_L1 = np.asarray(self.parts.lists.starts_L1)
    lists_N = np.searchsorted(starts_L1, rows_N, side="right") - 1
    return self._decode(self.parts.decode_fn, rows_N, lists_N.astype(np.int32))

  def _check_queries(self, queries_QD) -> np.ndarray:
    """Queries as float32 `[Q, D]`, of length 1 for the cosine."""
    queries_QD = np.atleast_2d(np.asarray(queries_QD))
    queries_QD = to_float32(queries_QD, name="queries")
    check_vectors(queries_QD, dim=self.dim, name="queries")
    check_range("the number of queries", len(queries_QD), 1, 2**31 - 1)
    if self.parts.is_cosine:
      queries_QD = unit.normalise(queries_QD, name="queries")
    return queries_QD

  def _default_refined(self, k, num_pairwise, num_network) -> int:
    if self.parts.refiner is None or num_pairwise:
      return 0
    if self._has_own_scan and num_network:
      return 0
    return max(k, num_network)

  def _check_setting(
    self, k, nprobe, num_refined, num_pairwise, num_network
  ) -> None:
    """Raises ValueError if a number does not fit the index, or another."""
    check_range("nprobe", nprobe, 1, len(self._tiles_L), "lists of the index")
    check_range("k", k, 1, len(self.parts.ids_N), "vectors in the index")
    for name, value in (
      ("num_refined", num_refined),
      ("num_pairwise", num_pairwise),
      ("num_network", num_network),
    ):
      check_range(name, value, 0, 1 << 20)
    if num_refined and self.parts.refiner is None:
      raise ValueError(
        f"num_refined={num_refined} needs a refiner, but none was opened: make "
        "one with vqjax refiner, or set num_refined=0."
      )
    if num_refined and num_network > num_refined:
      raise ValueError(
        "num_network must be at most num_refined, or num_refined 0; got "
        f"num_refined={num_refined} and num_network={num_network}."
      )
    if num_pairwise and (num_refined or self._has_own_scan):
      raise ValueError(
        "The pairwise decoder knows less than a refiner: num_pairwise must be "
        f"0 with it; got num_refined={num_refined} and "
        f"num_pairwise={num_pairwise}."
      )
    if num_pairwise and self.parts.pairwise_fn is None:
      raise ValueError(
        f"num_pairwise={num_pairwise} needs the pairwise decoder, but no "
        "decoders were opened, or they have none; set num_pairwise=0."
      )

  def _scan(self, clock, queries_QD, find_fn, num_best) -> Candidates:
    """Candidates of the scan, in blocks of queries with lists alike in size."""
    probes_QP, distances_QP = find_fn(queries_QD)
    clock.lap("coarse")
    tiles_QP = np.where(probes_QP < 0, 0, self._tiles_L[probes_QP])
    tiles_Q = tiles_QP.sum(axis=1)
    order_Q = np.argsort(-tiles_Q, kind="stable")
    shape = (len(order_Q), num_best)
    out = Candidates(
      np.empty(shape, np.int32),
      np.empty(shape, np.int32),
      np.empty(shape, np.float32),
    )

    def scan(block):
      take = lambda x: x[block.padded]
      found = ivf.scan(
        self.parts.lists,
        take(queries_QD),
        take(probes_QP),
        take(distances_QP),
        num_tiles=block.num_tiles,
        num_best=num_found,
      )
      for whole, part in zip(out, found, strict=True):
        whole[block.rows] = np.asarray(part)[: len(block.rows), :num_best]

    # Of few sizes, or each k would compile the scan anew.
    num_found = round_up(num_best, num_steps=4)
    num_codewords = self.parts.lists.words_DZ.shape[1]
    most = max(_TABLE_BYTES // (4 * num_codewords), _LEAST_QUERIES)
    blocks = _blocks(order_Q, tiles_Q, num_found, most)
    # Side by side: XLA does the selection of one block on one core.
    map_fn = self._pool.map if len(blocks) > 1 else map
    for _ in map_fn(scan, blocks):
      pass  # Raises what a block raised.
    clock.lap("scan")
    return out

  def _scan_refiner(self, clock, queries_QD, find_fn, num_best) -> Candidates:
    """Candidates by the codes of the refiner.

    As many parts of the queries as there are threads are searched in parallel.
    Seconds are the mean over the parts.
    """
    num = len(queries_QD)
    size = max(-(-num // devices.num_cpus()), _LEAST_PART)
    starts = range(0, num, size)

    def run(start):
      part_QD = queries_QD[start : start + size]
      own = _Clock()
      probes_QP, _ = find_fn(part_QD)
      own.lap("coarse")
      rows_QC, distances_QC = self.parts.refiner.scan_fn(
        part_QD, probes_QP, num_best
      )
      lists_QC = np.where(rows_QC < 0, -1, self._list_of_N[rows_QC])
      own.lap("scan")
      return Candidates(rows_QC, lists_QC, distances_QC), own.seconds

    map_fn = self.parts.refiner.map_fn if len(starts) > 1 else map
    parts, seconds = zip(*map_fn(run, starts), strict=True)
    clock.skip({s: np.mean([at[s] for at in seconds]) for s in seconds[0]})
    return Candidates(*map(np.concatenate, zip(*parts, strict=True)))

  def _refine(self, queries_QD, found, num_head) -> Candidates:
    """Re-orders the head by the refiner, in blocks that fit the caches."""
    refiner, size = self.parts.refiner, max(_REFINED_ROWS // num_head, 1)

    def run(start):
      rows = slice(start, start + size)
      part = Candidates(*(x_QC[rows] for x_QC in found))
      head = Candidates(*(x_QC[:, :num_head] for x_QC in part))
      distances_QC = refiner.distances_fn(
        queries_QD[rows], head.rows_QC, head.distances_QC
      )
      return _reorder(part, distances_QC)

    starts = range(0, len(queries_QD), size)
    map_fn = refiner.map_fn or self._pool.map
    blocks = list((map_fn if len(starts) > 1 else map)(run, starts))
    return Candidates(*map(np.concatenate, zip(*blocks, strict=True)))

  def _rerank(self, decode_fn, queries_QD, found, num_head, weight=1.0):
    """Puts the first `num_head` candidates in the order of exact distances.

    The new distances are averaged with those so far by `weight`. In blocks of
    queries, or all vectors of a large batch would be in memory. Also returns
    how many vectors were decoded.
    """
    size = max(_RERANKED // num_head, 1)
    blocks, num_decoded = [], 0
    for start in range(0, len(queries_QD), size):
      rows = slice(start, start + size)
      block, num = self._rerank_block(
        decode_fn,
        queries_QD[rows],
        Candidates(*(x_QC[rows] for x_QC in found)),
        num_head,
        weight,
      )
      blocks.append(block)
      num_decoded += num
    return Candidates(*map(np.concatenate, zip(*blocks, strict=True))), (
      num_decoded
    )

  def _rerank_block(self, decode_fn, queries_QD, found, num_head, weight):
    """`_rerank` of some queries."""
    head = Candidates(*(x_QC[:, :num_head] for x_QC in found))
    is_there = head.rows_QC >= 0
    rows_N, first_N, back = np.unique(
      head.rows_QC[is_there], return_index=True, return_inverse=True
    )
    if not len(rows_N):
      return found, 0
    x_ND = self._decode(decode_fn, rows_N, head.lists_QC[is_there][first_N])
    at_QC = np.full(head.rows_QC.shape, -1, np.int64)
    at_QC[is_there] = back
    distances_QC = self.parts.distances_fn(queries_QD, x_ND, at_QC)
    return _reorder(found, distances_QC, weight), len(rows_N)

  def _decode(self, decode_fn, rows_N, lists_N) -> np.ndarray:
    """Vectors `[N, D]` of rows, in blocks of few sizes."""
    out_ND = np.empty((len(rows_N), self.dim), np.float32)
    waiting = []
    for start in range(0, len(rows_N), _DECODE_ROWS):
      block = slice(start, min(start + _DECODE_ROWS, len(rows_N)))
      size = block.stop - start
      pad = (0, round_up(size) - size)
      codes_NM = ivf.codes_at(
        self.parts.lists, np.pad(rows_N[block], pad, "edge")
      )
      x_ND = decode_fn(codes_NM, np.pad(lists_N[block], pad, "edge"))
      waiting.append((block, x_ND))
    for block, x_ND in waiting:
      out_ND[block] = np.asarray(x_ND)[: block.stop - block.start]
    return out_ND


class _Clock:
  """Seconds of the stages, one after the other."""

  def __init__(self):
    self.seconds, self._began = {}, time.perf_counter()

  def lap(self, stage: str) -> None:
    """All time since the last stage went into this one."""
    now = time.perf_counter()
    self.seconds[stage], self._began = now - self._began, now

  def skip(self, seconds: dict[str, float]) -> None:
    """It went into stages that were timed elsewhere."""
    self.seconds |= seconds
    self._began = time.perf_counter()


def _reorder(found, distances_QC, weight: float = 1.0) -> Candidates:
  """Puts the head, which these distances are of, in order.

  They are averaged with those so far by their `weight`.
  """
  num_head = distances_QC.shape[1]
  head = Candidates(*(x_QC[:, :num_head] for x_QC in found))
  distances_QC = weighted(distances_QC, head.distances_QC, weight)
  distances_QC = np.where(head.rows_QC < 0, np.float32(np.inf), distances_QC)
  head = head._replace(distances_QC=distances_QC)
  order_QC = np.argsort(distances_QC, axis=1, kind="stable")
  merged = []
  for x_QC, whole_QC in zip(head, found, strict=True):
    sorted_QC = np.take_along_axis(x_QC, order_QC, axis=1)
    merged.append(np.hstack([sorted_QC, whole_QC[:, num_head:]]))
  return Candidates(*merged)


class _Block(NamedTuple):
  """Queries of a block, the same padded to a size of few, tiles they need."""

  rows: np.ndarray
  padded: np.ndarray
  num_tiles: int


def _blocks(order_Q, tiles_Q, num_best: int, num_queries: int) -> list[_Block]:
  """All queries, in falling order of tiles, in blocks of limited size."""
  least = -(-num_best // ivf.TILE)
  blocks, start = [], 0
  while start < len(order_Q):
    # The queries that follow need as many tiles or fewer.
    needed = int(tiles_Q[order_Q[start]])
    num_tiles = round_up(max(needed, least), num_steps=4)
    slot_bytes = 32 * ivf.TILE * num_tiles
    most = min(max(_SLOT_BYTES // slot_bytes, 1), num_queries)
    rows = order_Q[start : start + most]
    rows = rows[2 * np.maximum(tiles_Q[rows], least) >= needed]
    pad = (0, min(round_up(len(rows)), most) - len(rows))
    blocks.append(_Block(rows, np.pad(rows, pad, "edge"), num_tiles))
    start += len(rows)
  return blocks
