"""From queries to neighbours in four stages, each dearer and truer.

  coarse    the lists nearest to a query
  scan      all their codes, by tables of the additive decoder (`ivf.py`), and
            the `num_signs` best of those by their signs, if any (`signs.py`)
  pairwise  the `num_aq` best of those, by tables over pairs of codes
  network   the `num_short` best of those, decoded; exact distances to that

Every stage after the scan puts the head of the list of candidates in a better
order and leaves the tail as it is. A stage whose number is 0 is left out. Signs
say of a vector what its codes do not, so that the network, where it follows
them, has a share in the distances instead of replacing them.

  searcher = pipeline.Searcher(parts)
  result = searcher.search(xq_QD, k=10, nprobe=16, num_short=20)
  result.ids_QR, result.distances_QR

Nothing here knows a codec: what decodes comes as functions. Reference: arXiv
2501.03078, section 3.4.
"""

import time
from collections.abc import Callable
from concurrent import futures
from typing import NamedTuple

import numpy as np

from vqjax import devices
from vqjax.core import check_range
from vqjax.data.formats import check_vectors
from vqjax.search import ivf
from vqjax.search.signs import Signs

STAGES = ("coarse", "scan", "pairwise", "network")
_DECODE_ROWS = 4096  # Vectors that are decoded at once.
_TABLE_BYTES = 2 << 20  # Of one scan; these should stay in the caches.
_LEAST_QUERIES = 32  # In one scan, where tables are larger.
_SLOT_BYTES = 64 << 20  # Of the slots of one scan, at most.
_SCANS_AT_ONCE = 8
_RERANKED = 1 << 18  # Candidates that are decoded before any is dropped.
_SHARE = 0.4  # Of the network, where signs have the rest: docs/ivf.md.


class Parts(NamedTuple):
  """What a search is put together from.

  `decode_fn` and `pairwise_fn` are compiled functions of codes `[n, M]` and
  lists `[n]`, int32; `coarse_fn` and `distances_fn` run on the host.
  """

  lists: ivf.Lists
  ids_N: np.ndarray  # Id of each row of `lists`.
  coarse_fn: Callable  # (xq_QD, nprobe, ef_search) -> lists and distances.
  decode_fn: Callable  # -> x_ND, by the network.
  pairwise_fn: Callable | None  # -> x_ND, by the pairwise decoder.
  distances_fn: Callable  # (xq_QD, x_UD, rows_QR) -> squared distances [Q, R].
  signs: Signs | None = None  # Of the rows of `lists`, on the device.


class Result(NamedTuple):
  """Neighbours, nearest first; -1 and inf where there are no more.

  A distance is that of the last stage that saw the candidate. `seconds` are
  those of the stages, `num_decoded` the vectors that the network decoded.
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
    self._pool = futures.ThreadPoolExecutor(
      min(devices.num_cpus(), _SCANS_AT_ONCE)
    )

  @property
  def dim(self) -> int:
    """Dimensions of the vectors."""
    return self.parts.lists.words_DC.shape[0]

  def search(
    self,
    queries_QD,
    k: int = 10,
    *,
    nprobe: int | None = None,
    ef_search: int | None = None,
    max_ratio: float | None = None,
    num_signs: int | None = None,
    num_aq: int = 0,
    num_short: int = 20,
  ) -> Result:
    """Finds `k` neighbours of each query.

    Args:
      queries_QD: Queries `[Q, D]` in data units, or one `[D]`.
      k: Results.
      nprobe: Lists that are looked into; 16 or, where there are fewer, all
        for None.
      ef_search: Effort of a coarse quantiser that is a graph; None for its
        own.
      max_ratio: Of the `nprobe` lists those are left out whose centroid lies
        at more than so many times the squared distance of the nearest: queries
        amid a list need few others. None for no limit.
      num_signs: Candidates of the scan that their signs put in order; None for
        `max(k, num_short)` where there are signs, else 0.
      num_aq: Candidates that the pairwise decoder puts in order; 0 with signs,
        which know better.
      num_short: Candidates that the network decodes, with signs at most
        `num_signs`.

    Raises:
      ValueError: Where a number or a dimension does not fit.
    """
    queries_QD = np.atleast_2d(np.asarray(queries_QD, np.float32))
    check_vectors(queries_QD, dim=self.dim, name="queries")
    check_range("the number of queries", len(queries_QD), 1, 2**31 - 1)
    nprobe = min(16, len(self._tiles_L)) if nprobe is None else nprobe
    if num_signs is None:
      num_signs = max(k, num_short) if self.parts.signs and not num_aq else 0
    self._check_setting(k, nprobe, max_ratio, num_signs, num_aq, num_short)
    seconds, began = {}, time.perf_counter()

    def lap(stage):
      nonlocal began
      now = time.perf_counter()
      seconds[stage], began = now - began, now

    probes_QP, distances_QP = self._find_lists(
      queries_QD, nprobe, ef_search, max_ratio
    )
    lap("coarse")
    num_best = max(k, num_signs, num_aq, num_short)
    found = self._scan(queries_QD, probes_QP, distances_QP, num_best, num_signs)
    lap("scan")
    num_decoded = 0
    if num_aq:
      found, _ = self._rerank(self.parts.pairwise_fn, queries_QD, found, num_aq)
      lap("pairwise")
    if num_short:
      found, num_decoded = self._rerank(
        self.parts.decode_fn,
        *(queries_QD, found, num_short),
        share=_SHARE if num_signs else 1.0,
      )
      lap("network")
    rows_QR = found.rows_QC[:, :k]
    ids_QR = np.where(rows_QR < 0, -1, self.parts.ids_N[rows_QR])
    return Result(ids_QR, found.distances_QC[:, :k], seconds, num_decoded)

  def _check_setting(
    self, k, nprobe, max_ratio, num_signs, num_aq, num_short
  ) -> None:
    """Raises ValueError where a number does not fit the index, or another."""
    check_range("nprobe", nprobe, 1, len(self._tiles_L), "lists of the index")
    if max_ratio is not None:
      check_range("max_ratio", max_ratio, 1, 1e6)
    check_range("k", k, 1, len(self.parts.ids_N), "vectors in the index")
    for name, value in (
      ("num_signs", num_signs),
      ("num_aq", num_aq),
      ("num_short", num_short),
    ):
      check_range(name, value, 0, 1 << 20)
    if num_signs and self.parts.signs is None:
      raise ValueError(
        f"num_signs={num_signs} asks for signs, but none were opened: make "
        "them with python -m experiments.signs, or set num_signs=0."
      )
    if num_signs and (num_aq or num_short > num_signs):
      raise ValueError(
        "With signs num_aq must be 0, and num_short at most num_signs; got "
        f"num_signs={num_signs}, num_aq={num_aq} and num_short={num_short}."
      )
    if num_aq and self.parts.pairwise_fn is None:
      raise ValueError(
        f"num_aq={num_aq} asks for the pairwise decoder, but the file of "
        "decoders has none; set num_aq=0."
      )

  def _find_lists(self, queries_QD, nprobe, ef_search, max_ratio):
    """Lists of each query, -1 for those left out, and their distances."""
    probes_QP, distances_QP = self.parts.coarse_fn(
      queries_QD, nprobe, ef_search
    )
    if max_ratio is not None:
      limit_Q1 = max_ratio * distances_QP[:, :1]
      probes_QP = np.where(distances_QP <= limit_Q1, probes_QP, -1)
    return probes_QP, distances_QP

  def _scan(
    self, queries_QD, probes_QP, distances_QP, num_best, num_signs
  ) -> Candidates:
    """Candidates of the scan, in blocks of queries with lists alike in size."""
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
        self.parts.signs if num_signs else None,
        num_tiles=block.num_tiles,
        num_best=num_best,
        num_signs=num_signs,
      )
      for whole, part in zip(out, found, strict=True):
        whole[block.rows] = np.asarray(part)[: len(block.rows)]

    num_words = self.parts.lists.words_DC.shape[1]
    most = max(_TABLE_BYTES // (4 * num_words), _LEAST_QUERIES)
    if num_signs:  # Unpacked, signs are as large as vectors.
      most = min(most, max(_SLOT_BYTES // (4 * self.dim * num_signs), 1))
    blocks = _blocks(order_Q, tiles_Q, num_best, most)
    # Side by side: XLA does the selection of one block on one core.
    map_fn = self._pool.map if len(blocks) > 1 else map
    for _ in map_fn(scan, blocks):
      pass  # Raises what a block raised.
    return out

  def _rerank(self, decode_fn, queries_QD, found, num_head, share=1.0):
    """Puts the first `num_head` candidates in the order of exact distances.

    These have a `share` in the new distances, those so far the rest. In blocks
    of queries, or all vectors of a large batch would be in memory. Also returns
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
        *(num_head, share),
      )
      blocks.append(block)
      num_decoded += num
    return Candidates(*map(np.concatenate, zip(*blocks, strict=True))), (
      num_decoded
    )

  def _rerank_block(self, decode_fn, queries_QD, found, num_head, share):
    """`_rerank` of some queries."""
    head = Candidates(*(x_QC[:, :num_head] for x_QC in found))
    is_there = head.rows_QC >= 0
    rows_U, first_U, back = np.unique(
      head.rows_QC[is_there], return_index=True, return_inverse=True
    )
    if not len(rows_U):
      return found, 0
    x_UD = self._decode(decode_fn, rows_U, head.lists_QC[is_there][first_U])
    at_QC = np.full(head.rows_QC.shape, -1, np.int64)
    at_QC[is_there] = back
    distances_QC = self.parts.distances_fn(queries_QD, x_UD, at_QC)
    if share < 1:
      distances_QC *= share
      distances_QC += (1 - share) * head.distances_QC
    distances_QC = np.where(is_there, distances_QC, np.inf)
    head = head._replace(distances_QC=distances_QC)
    order_QC = np.argsort(distances_QC, axis=1, kind="stable")
    merged = []
    for x_QC, whole_QC in zip(head, found, strict=True):
      sorted_QC = np.take_along_axis(x_QC, order_QC, axis=1)
      merged.append(np.hstack([sorted_QC, whole_QC[:, num_head:]]))
    return Candidates(*merged), len(rows_U)

  def _decode(self, decode_fn, rows_U, lists_U) -> np.ndarray:
    """Vectors `[U, D]` of rows, in blocks of few sizes."""
    out_UD = np.empty((len(rows_U), self.dim), np.float32)
    waiting = []
    for start in range(0, len(rows_U), _DECODE_ROWS):
      block = slice(start, min(start + _DECODE_ROWS, len(rows_U)))
      size = block.stop - start
      pad = (0, _round_up(size) - size)
      codes_NM = ivf.codes_at(
        self.parts.lists, np.pad(rows_U[block], pad, "edge")
      )
      x_ND = decode_fn(codes_NM, np.pad(lists_U[block], pad, "edge"))
      waiting.append((block, x_ND))
    for block, x_ND in waiting:
      out_UD[block] = np.asarray(x_ND)[: block.stop - block.start]
    return out_UD


class _Block(NamedTuple):
  """Queries of a block, the same padded to a size of few, tiles they need."""

  rows: np.ndarray
  padded: np.ndarray
  num_tiles: int


def _blocks(order_Q, tiles_Q, num_best: int, num_queries: int) -> list[_Block]:
  """All queries, in falling order of tiles, at most so many in a block."""
  least = -(-num_best // ivf.TILE)
  blocks, start = [], 0
  while start < len(order_Q):
    # The queries that follow need as many tiles or fewer.
    needed = int(tiles_Q[order_Q[start]])
    num_tiles = _round_up(max(needed, least), num_steps=4)
    slot_bytes = 32 * ivf.TILE * num_tiles
    most = min(max(_SLOT_BYTES // slot_bytes, 1), num_queries)
    rows = order_Q[start : start + most]
    rows = rows[2 * np.maximum(tiles_Q[rows], least) >= needed]
    pad = (0, min(_round_up(len(rows)), most) - len(rows))
    blocks.append(_Block(rows, np.pad(rows, pad, "edge"), num_tiles))
    start += len(rows)
  return blocks


def _round_up(size: int, num_steps: int = 2) -> int:
  """The least of few sizes that is not below `size`, at least 1.

  They are `num_steps` to a doubling: 1, 2, 3, 4, 6, 8, 12, 16, ... for 2.
  """
  step = max((1 << max(size - 1, 0).bit_length()) // (2 * num_steps), 1)
  return max(-(-size // step) * step, 1)
