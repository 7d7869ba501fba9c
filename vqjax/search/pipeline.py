"""From queries to neighbours in four stages, each dearer and truer.

  coarse    the lists nearest to a query
  scan      all their codes, by tables of the additive decoder (`ivf.py`), and
            the `num_signs` best of those by their signs, if any (`signs.py`);
            or by a filter, other codes of the same vectors
  words     the `num_words` best of a filter, by what their words add up to
  pairwise  the `num_aq` best of those, by tables over pairs of codes
  network   the `num_short` best of those, decoded; exact distances to that

Every stage after the scan puts the head of the list of candidates in a better
order and leaves the tail as it is. A stage whose number is 0 is left out. Signs
and filters say of a vector what its codes do not, so that what follows them has
a share in the distances instead of replacing them.

  searcher = pipeline.Searcher(parts)
  result = searcher.search(xq_QD, k=10, nprobe=16, num_short=20)
  result.ids_QR, result.distances_QR

Nothing here knows a codec: what decodes comes as functions. Reference: arXiv
2501.03078, section 3.4.
"""

import time
from collections.abc import Callable
from concurrent import futures
from functools import partial
from typing import NamedTuple

import numpy as np

from vqjax import devices
from vqjax.core import check_range
from vqjax.data.formats import check_vectors
from vqjax.search import ivf
from vqjax.search.signs import Signs

STAGES = ("coarse", "scan", "words", "pairwise", "network")
_DECODE_ROWS = 4096  # Vectors that are decoded at once.
_TABLE_BYTES = 2 << 20  # Of one scan; these should stay in the caches.
_LEAST_QUERIES = 32  # In one scan, where tables are larger.
_SLOT_BYTES = 64 << 20  # Of the slots of one scan, at most.
_SCANS_AT_ONCE = 8
_LEAST_PART = 256  # Queries that a thread is worth.
_WORD_ROWS = 4096  # Candidates whose words are added up at once.
_RERANKED = 1 << 18  # Candidates that are decoded before any is dropped.
_SHARE = 0.4  # Of the network, where signs have the rest: docs/ivf.md.


class Filter(NamedTuple):
  """Other codes of the vectors, which are scanned instead of the lists.

  Shares, 0 to 1, are those that words and network have in the distances.
  """

  scan_fn: Callable  # (xq_QD, probes_QP, k) -> rows and distances [Q, k].
  words_fn: Callable  # Rows [n] -> x_nD, what their words add up to.
  map_fn: Callable  # As `map`, in threads, in each of which these use one.
  words_share: float
  network_share: float


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
  filter: Filter | None = None  # Instead of signs.


class Result(NamedTuple):
  """Neighbours, nearest first; -1 and inf where there are no more.

  A distance is that of the last stage that saw the candidate, but never less
  than that of a result before it: a stage orders its own candidates, and those
  that it did not see come after them. `seconds` are those of the stages,
  `num_decoded` the vectors that the network decoded.
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
    if parts.signs is not None and parts.filter is not None:
      raise ValueError("Signs order the scan that a filter replaces; open one.")
    sizes_L = np.diff(np.asarray(parts.lists.starts_L1))
    self._tiles_L = ivf.count_tiles(sizes_L)
    if parts.filter is not None:
      lists_L = np.arange(len(sizes_L), dtype=np.int32)
      self._list_of_N = np.repeat(lists_L, sizes_L)
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
    num_words: int = 0,
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
      num_words: Candidates of a filter that their words put in order, 0 where
        the network decodes any; 5 are nearly as good as more.
      num_aq: Candidates that the pairwise decoder puts in order; 0 with signs
        or a filter, which know better.
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
    self._check_setting(
      k, nprobe, max_ratio, num_signs, num_words, num_aq, num_short
    )
    clock = _Clock()
    num_best = max(k, num_signs, num_words, num_aq, num_short)
    probing = {"nprobe": nprobe, "ef_search": ef_search, "max_ratio": max_ratio}
    find_fn = partial(self._find_lists, **probing)
    if self.parts.filter is None:
      share = _SHARE if num_signs else 1.0
      found = self._scan(clock, queries_QD, find_fn, num_best, num_signs)
    else:
      share = self.parts.filter.network_share
      found = self._filter(clock, queries_QD, find_fn, num_best, num_words)
    num_decoded = 0
    if num_aq:
      found, _ = self._rerank(self.parts.pairwise_fn, queries_QD, found, num_aq)
      clock.lap("pairwise")
    if num_short:
      found, num_decoded = self._rerank(
        self.parts.decode_fn, queries_QD, found, num_short, share
      )
      clock.lap("network")
    rows_QR = found.rows_QC[:, :k]
    ids_QR = np.where(rows_QR < 0, -1, self.parts.ids_N[rows_QR])
    distances_QR = np.maximum.accumulate(found.distances_QC[:, :k], axis=1)
    return Result(ids_QR, distances_QR, clock.seconds, num_decoded)

  def _check_setting(
    self, k, nprobe, max_ratio, num_signs, num_words, num_aq, num_short
  ) -> None:
    """Raises ValueError where a number does not fit the index, or another."""
    check_range("nprobe", nprobe, 1, len(self._tiles_L), "lists of the index")
    if max_ratio is not None:
      check_range("max_ratio", max_ratio, 1, 1e6)
    check_range("k", k, 1, len(self.parts.ids_N), "vectors in the index")
    for name, value in (
      ("num_signs", num_signs),
      ("num_words", num_words),
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
    if num_words and self.parts.filter is None:
      raise ValueError(
        f"num_words={num_words} asks for a filter, but none was opened: make "
        "one with python -m experiments.filter, or set num_words=0."
      )
    if self.parts.filter is not None and (num_aq or num_words and num_short):
      raise ValueError(
        "With a filter num_aq must be 0, and one of num_words and num_short; "
        f"got num_aq={num_aq}, num_words={num_words} and num_short={num_short}."
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
    self, clock, queries_QD, find_fn, num_best, num_signs
  ) -> Candidates:
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
    clock.lap("scan")
    return out

  def _filter(
    self, clock, queries_QD, find_fn, num_best, num_words
  ) -> Candidates:
    """Candidates of the filter, some in the order of their words.

    As many parts of the queries as there are threads go through all of it side
    by side. Seconds are those of a part, the mean of all.
    """
    num = len(queries_QD)
    size = max(-(-num // devices.num_cpus()), _LEAST_PART)
    starts = range(0, num, size)

    def run(start):
      part_QD = queries_QD[start : start + size]
      own = _Clock()
      probes_QP, _ = find_fn(part_QD)
      own.lap("coarse")
      rows_QC, distances_QC = self.parts.filter.scan_fn(
        part_QD, probes_QP, num_best
      )
      lists_QC = np.where(rows_QC < 0, -1, self._list_of_N[rows_QC])
      found = Candidates(rows_QC, lists_QC, distances_QC)
      own.lap("scan")
      if num_words:
        found = self._order_by_words(part_QD, found, num_words)
        own.lap("words")
      return found, own.seconds

    map_fn = self.parts.filter.map_fn if len(starts) > 1 else map
    parts, seconds = zip(*map_fn(run, starts), strict=True)
    clock.skip({s: np.mean([at[s] for at in seconds]) for s in seconds[0]})
    return Candidates(*map(np.concatenate, zip(*parts, strict=True)))

  def _order_by_words(self, queries_QD, found, num_head) -> Candidates:
    """Puts the head in order by its words, in blocks that fit the caches.

    Vectors of several queries are decoded for each: it costs less than to find
    them.
    """
    size = max(_WORD_ROWS // num_head, 1)
    blocks = []
    for start in range(0, len(queries_QD), size):
      part = Candidates(*(x_QC[start : start + size] for x_QC in found))
      rows_QC = part.rows_QC[:, :num_head]
      x_ND = self.parts.filter.words_fn(np.maximum(rows_QC, 0).ravel())
      at_QC = np.arange(rows_QC.size).reshape(rows_QC.shape)
      distances_QC = self.parts.distances_fn(
        queries_QD[start : start + size],
        x_ND,
        np.where(rows_QC < 0, -1, at_QC),
      )
      share = self.parts.filter.words_share
      blocks.append(_reorder(part, distances_QC, share))
    return Candidates(*map(np.concatenate, zip(*blocks, strict=True)))

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
    return _reorder(found, distances_QC, share), len(rows_U)

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


def _reorder(found, distances_QC, share: float) -> Candidates:
  """Puts the head, which these distances are of, in order.

  They have a `share` in the new distances, those so far the rest.
  """
  num_head = distances_QC.shape[1]
  head = Candidates(*(x_QC[:, :num_head] for x_QC in found))
  if share < 1:
    distances_QC = share * distances_QC + (1 - share) * head.distances_QC
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
