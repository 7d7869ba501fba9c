"""The stages of a search, against loops over exact distances."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ivf_test import CENTROIDS_LD, _random_lists
from vqjax.search import ivf, pipeline, refiners, residual_bits

_NUM, _LISTS, _DIM = 90, 6, 5


class _Case:
  """A searcher on random codes, and what its stages should say."""

  def __init__(self, *, has_pairwise=True):
    rng = np.random.default_rng(3)
    self.arrays = arrays = _random_lists(rng, num=_NUM, num_lists=_LISTS)
    self.list_N = np.repeat(np.arange(_LISTS), np.diff(arrays["starts_L1"]))
    self.ids_N = rng.permutation(_NUM) + 1000
    self.xq_QD = rng.normal(size=(20, _DIM)).astype(np.float32)
    self.turn_DD = rng.normal(size=(_DIM, _DIM)).astype(np.float32)
    self.shapes, self.num_decoded = [], 0
    parts = pipeline.Parts(
      ivf.make_lists(**arrays),
      self.ids_N,
      self._coarse,
      self._counting_decode,
      (lambda *at: self.decode(*at) * 0.5) if has_pairwise else None,
      lambda xq_QD, x_UD, rows_QR: ((xq_QD[:, None] - x_UD[rows_QR]) ** 2).sum(
        axis=-1
      ),
    )
    self.searcher = pipeline.Searcher(parts)

  def _coarse(self, xq_QD, nprobe, ef_search):
    gap_QLD = xq_QD[:, None] - CENTROIDS_LD
    distances_QL = (gap_QLD**2).sum(axis=-1)
    probes_QP = np.argsort(distances_QL, axis=1)[:, :nprobe]
    return probes_QP.astype(np.int32), np.take_along_axis(
      distances_QL, probes_QP, axis=1
    )

  def decode(self, codes_NM, lists_N):
    """A network that is no sum of words."""
    arrays = self.arrays
    words = [
      book[np.asarray(codes_N)]
      for book, codes_N in zip(
        arrays["codebooks_MKD"], np.asarray(codes_NM).T, strict=True
      )
    ]
    x_ND = CENTROIDS_LD[np.asarray(lists_N)] + sum(words)
    return np.tanh(x_ND @ self.turn_DD)

  def _counting_decode(self, codes_NM, lists_N):
    self.shapes.append(len(codes_NM))
    self.num_decoded += len(np.unique(np.asarray(codes_NM), axis=0))
    return self.decode(codes_NM, lists_N)

  def exact(self, x_D, scale=1.0):
    """Squared distance of every row as the network, or pairwise, has it."""
    x_ND = self.decode(self.arrays["codes_NM"], self.list_N) * scale
    return ((x_ND - x_D) ** 2).sum(axis=1)


@pytest.fixture(name="case")
def _case():
  return _Case()


def test_all_lists_and_a_long_shortlist_are_exact_search(case):
  result = case.searcher.search(case.xq_QD, 7, nprobe=_LISTS, num_network=_NUM)
  for q, x_D in enumerate(case.xq_QD):
    exact_N = case.exact(x_D)
    want = np.argsort(exact_N)[:7]
    np.testing.assert_array_equal(result.ids_QR[q], case.ids_N[want])
    np.testing.assert_allclose(
      result.distances_QR[q], exact_N[want], rtol=1e-4, atol=1e-4
    )
  assert set(result.seconds) == {"coarse", "scan", "network"}


@pytest.mark.parametrize("num_network", [1, 3, 11])
def test_results_are_nearest_first_beyond_the_head(case, num_network):
  found = case.searcher.search(
    case.xq_QD, 12, nprobe=3, num_network=num_network
  )
  assert (np.diff(found.distances_QR, axis=1) >= 0).all()
  for q, x_D in enumerate(case.xq_QD):  # The head has its own distances.
    row_of = {name: row for row, name in enumerate(case.ids_N)}
    rows = [row_of[i] for i in found.ids_QR[q, :num_network]]
    want = case.exact(x_D)[rows]
    np.testing.assert_allclose(
      found.distances_QR[q, :num_network], want, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
  ("num_pairwise", "num_network"), [(9, 4), (9, 0), (0, 4)]
)
def test_each_stage_orders_the_head(case, num_pairwise, num_network):
  k = 12
  scanned = case.searcher.search(case.xq_QD, k, nprobe=3, num_network=0)
  result = case.searcher.search(
    case.xq_QD, k, nprobe=3, num_pairwise=num_pairwise, num_network=num_network
  )
  row_of = {name: row for row, name in enumerate(case.ids_N)}
  for q, x_D in enumerate(case.xq_QD):
    rows = [row_of[i] for i in scanned.ids_QR[q]]
    for size, scale in ((num_pairwise, 0.5), (num_network, 1.0)):
      exact_N = case.exact(x_D, scale)
      rows[:size] = sorted(rows[:size], key=lambda row: exact_N[row])
    np.testing.assert_array_equal(result.ids_QR[q], case.ids_N[rows])


def test_a_vector_of_several_queries_is_decoded_once(case):
  result = case.searcher.search(case.xq_QD, 3, nprobe=_LISTS, num_network=30)
  assert 20 * 30 > _NUM >= result.num_decoded
  assert sum(case.shapes) < 2 * result.num_decoded


def test_one_query_is_as_good_as_many(case):
  many = case.searcher.search(
    case.xq_QD, 5, nprobe=2, num_pairwise=8, num_network=3
  )
  for q, x_D in enumerate(case.xq_QD):
    one = case.searcher.search(x_D, 5, nprobe=2, num_pairwise=8, num_network=3)
    np.testing.assert_array_equal(one.ids_QR, many.ids_QR[q : q + 1])


def test_new_batch_sizes_compile_little(case, monkeypatch):
  traces = []

  @jax.jit
  def decode(codes_NM, lists_N):
    traces.append(codes_NM.shape)
    return jnp.zeros((len(codes_NM), _DIM)) + lists_N[:, None]

  monkeypatch.setattr(pipeline, "_DECODE_ROWS", 16)
  parts = case.searcher.parts._replace(decode_fn=decode)
  searcher = pipeline.Searcher(parts)
  for num in range(1, 21):
    searcher.search(case.xq_QD[:num], 3, nprobe=2, num_network=5)
  # Sizes 1, 2, 3, 4, 6, 8, 12, 16 at most.
  assert len(traces) <= 8


def test_where_lists_are_short_slots_stay_empty(case):
  x_D = CENTROIDS_LD[_LISTS - 1]  # Of the empty list.
  result = case.searcher.search(x_D, 4, nprobe=1, num_pairwise=6, num_network=5)
  assert (result.ids_QR == -1).all()
  assert np.isposinf(result.distances_QR).all()


def _limit_queries(case, monkeypatch, num):
  num_codewords = case.searcher.parts.lists.words_DZ.shape[1]
  monkeypatch.setattr(pipeline, "_TABLE_BYTES", 4 * num_codewords * num)
  monkeypatch.setattr(pipeline, "_LEAST_QUERIES", 1)


def test_blocks_change_nothing(case, monkeypatch):
  whole = case.searcher.search(case.xq_QD, 5, nprobe=3, num_network=4)
  _limit_queries(case, monkeypatch, 3)
  monkeypatch.setattr(pipeline, "_SLOT_BYTES", 64 * ivf.TILE * 12)
  monkeypatch.setattr(pipeline, "_DECODE_ROWS", 7)
  monkeypatch.setattr(pipeline, "_RERANKED", 12)
  blocks = case.searcher.search(case.xq_QD, 5, nprobe=3, num_network=4)
  np.testing.assert_array_equal(blocks.ids_QR, whole.ids_QR)


def test_an_error_in_a_block_is_not_lost(case, monkeypatch):
  _limit_queries(case, monkeypatch, 8)
  scan_fn, calls = ivf.scan, itertools.count()

  def scan(*args, **sizes):
    if next(calls) == 1:
      raise MemoryError("of the second block")
    return scan_fn(*args, **sizes)

  monkeypatch.setattr(ivf, "scan", scan)
  with pytest.raises(MemoryError, match="of the second block"):
    case.searcher.search(case.xq_QD, 5, nprobe=3)


def test_what_does_not_fit_is_refused(case):
  search = case.searcher.search
  with pytest.raises(ValueError, match="queries must have .*5.* got"):
    search(np.zeros((2, 4)), 3)
  with pytest.raises(ValueError, match="number of queries .* got 0"):
    search(np.zeros((0, 5)), 3)
  with pytest.raises(ValueError, match="queries.*row 1"):
    search(np.array([[0.0] * 5, [0, 0, np.nan, 0, 0]]), 3)
  with pytest.raises(ValueError, match="queries .* 16777217 in row 1"):
    search(np.array([[0] * 5, [0, 0, (1 << 24) + 1, 0, 0]]), 3)
  with pytest.raises(ValueError, match="nprobe must lie between 1 and 6"):
    search(case.xq_QD, 3, nprobe=7)
  with pytest.raises(ValueError, match="k must lie between 1 and 90, got 91"):
    search(case.xq_QD, 91, nprobe=1)
  with pytest.raises(ValueError, match="num_pairwise=5 needs the pairwise"):
    _Case(has_pairwise=False).searcher.search(
      case.xq_QD, 3, nprobe=1, num_pairwise=5
    )


class _BitsCase(_Case):
  """With residual bits of vectors near the sums of their codewords."""

  def __init__(self):
    super().__init__()
    words = [
      book_KD[codes_N]
      for book_KD, codes_N in zip(
        self.arrays["codebooks_MKD"], self.arrays["codes_NM"].T, strict=True
      )
    ]
    xhat_ND = CENTROIDS_LD[self.list_N] + sum(words)
    rng = np.random.default_rng(4)
    x_ND = xhat_ND + 0.5 * rng.normal(size=xhat_ND.shape).astype(np.float32)
    rotation_DE = residual_bits.random_rotation(_DIM)
    found = residual_bits.describe(
      x_ND, xhat_ND, (xhat_ND**2).sum(axis=1), rotation_DE
    )
    self.bits = residual_bits.make_bits(*map(np.asarray, found), rotation_DE)
    self.searcher = pipeline.Searcher(
      self.searcher.parts._replace(
        refiner=refiners.rabitq(jax.tree.map(jnp.asarray, self.bits))
      )
    )


@pytest.mark.parametrize(
  ("num_refined", "num_network"),
  [(9, 0), (9, 4), (9, 9), (None, 6), (None, 20)],
)
def test_distances_of_the_network_are_averaged_with_residual_bits(
  num_refined, num_network
):
  case, k = _BitsCase(), 12
  at = dict(nprobe=3, num_network=0)
  size = max(k, num_network) if num_refined is None else num_refined
  scanned = case.searcher.search(case.xq_QD, max(k, size), **at, num_refined=0)
  result = case.searcher.search(
    case.xq_QD, k, nprobe=3, num_refined=num_refined, num_network=num_network
  )
  assert "refine" in result.seconds
  row_of = {name: row for row, name in enumerate(case.ids_N)}
  for q, x_D in enumerate(case.xq_QD):
    rows = [row_of[i] for i in scanned.ids_QR[q]]
    head = np.array([rows[:size]])
    refined = residual_bits.distances(
      case.bits, x_D[None], head, scanned.distances_QR[q : q + 1, :size]
    )
    of = dict(zip(rows[:size], np.asarray(refined)[0].tolist(), strict=True))
    rows[:size] = sorted(rows[:size], key=of.get)
    exact_N = case.exact(x_D)
    both = {
      row: 0.4 * exact_N[row] + 0.6 * of[row] for row in rows[:num_network]
    }
    rows[:num_network] = sorted(rows[:num_network], key=both.get)
    np.testing.assert_array_equal(result.ids_QR[q], case.ids_N[rows[:k]])
    want = [{**of, **both}.get(row, np.nan) for row in rows[:k]]
    known = ~np.isnan(want)
    want = np.fmax.accumulate(want)  # A later stage may find them farther.
    np.testing.assert_allclose(
      result.distances_QR[q][known], np.array(want)[known], rtol=1e-3, atol=1e-3
    )


class _FastscanCase(_Case):
  """With a refiner that knows vectors near the sums of their codewords."""

  def __init__(self):
    super().__init__()
    arrays, rng = self.arrays, np.random.default_rng(4)
    words = zip(arrays["codebooks_MKD"], arrays["codes_NM"].T, strict=True)
    self.sums_ND = CENTROIDS_LD[self.list_N] + sum(b[c] for b, c in words)
    noise_ND = rng.normal(size=self.sums_ND.shape).astype(np.float32)
    self.known_ND = self.sums_ND + 0.5 * noise_ND
    self.num_maps, self.num_queries = 0, []
    parts = self.searcher.parts
    self.searcher = pipeline.Searcher(
      parts._replace(
        refiner=refiners.fastscan(
          self._scan,
          lambda rows_N: self.sums_ND[rows_N],
          parts.distances_fn,
          self._map,
          codewords_weight=0.3,
          network_weight=0.6,
        )
      )
    )

  def _scan(self, xq_QD, probes_QP, k):
    self.num_queries.append(len(xq_QD))
    sq_QN = ((xq_QD[:, None] - self.known_ND[None]) ** 2).sum(axis=-1)
    in_QN = (probes_QP[:, :, None] == self.list_N).any(axis=1)
    sq_QN = np.where(in_QN, sq_QN, np.inf).astype(np.float32)
    rows_QK = np.argsort(sq_QN, axis=1, kind="stable")[:, :k].astype(np.int32)
    sq_QK = np.take_along_axis(sq_QN, rows_QK, axis=1)
    return np.where(np.isinf(sq_QK), -1, rows_QK), sq_QK

  def _map(self, fn, items):
    self.num_maps += 1
    return map(fn, items)


@pytest.mark.parametrize(
  ("num_refined", "num_network"), [(0, 0), (6, 0), (25, 0), (0, 6), (0, 25)]
)
def test_distances_after_a_fastscan_are_averaged(num_refined, num_network):
  case, k = _FastscanCase(), 9
  result = case.searcher.search(
    case.xq_QD,
    k,
    nprobe=2,
    num_refined=num_refined,
    num_network=num_network,
  )
  stages = ["coarse", "scan"] + ["refine"] * (num_refined > 0)
  assert list(result.seconds) == stages + ["network"] * (num_network > 0)
  assert (result.num_decoded > 0) == (num_network > 0)
  num, moved = num_refined or num_network, 0
  for q, x_D in enumerate(case.xq_QD):
    gap_L = ((CENTROIDS_LD - x_D) ** 2).sum(axis=1)
    near = np.argsort(gap_L)[:2]
    of_N = ((case.known_ND - x_D) ** 2).sum(axis=1)
    rows = [row for row in np.argsort(of_N) if case.list_N[row] in near]
    rows, of = rows[: max(k, num)], dict(enumerate(of_N.tolist()))
    sums_N = ((case.sums_ND - x_D) ** 2).sum(axis=1)
    then_N, weight = (sums_N, 0.3) if num_refined else (case.exact(x_D), 0.6)
    for row in rows[:num]:
      of[row] = weight * then_N[row] + (1 - weight) * of[row]
    wanted = [*sorted(rows[:num], key=of.get), *rows[num:]][:k]
    moved += wanted != rows[:k]
    missing = [-1] * (k - len(wanted))
    ids = [*case.ids_N[wanted].tolist(), *missing]
    np.testing.assert_array_equal(result.ids_QR[q], ids)
    want = [*(of[row] for row in wanted), *(np.inf for _ in missing)]
    want = np.maximum.accumulate(want)
    np.testing.assert_allclose(result.distances_QR[q], want, rtol=1e-4)
  assert (moved > 0) == (num > 0)


def test_a_fastscan_searches_parts_of_a_batch_in_parallel(monkeypatch):
  case, at = _FastscanCase(), dict(nprobe=3, num_refined=5, num_network=0)
  whole = case.searcher.search(case.xq_QD, 7, **at)
  assert (case.num_maps, case.num_queries) == (0, [20])
  monkeypatch.setattr(pipeline.devices, "num_cpus", lambda: 3)
  monkeypatch.setattr(pipeline, "_LEAST_PART", 2)
  monkeypatch.setattr(pipeline, "_REFINED_ROWS", 11)  # Two queries in a block.
  parts = case.searcher.search(case.xq_QD, 7, **at)
  assert (case.num_maps, case.num_queries[1:]) == (2, [7, 7, 6])
  np.testing.assert_array_equal(parts.ids_QR, whole.ids_QR)
  np.testing.assert_array_equal(parts.distances_QR, whole.distances_QR)
  assert sum(parts.seconds.values()) > 0


@pytest.mark.parametrize("case_fn", [_BitsCase, _FastscanCase])
def test_blocks_change_nothing_with_a_refiner(case_fn, monkeypatch):
  case, at = case_fn(), dict(nprobe=3, num_refined=9, num_network=3)
  whole = case.searcher.search(case.xq_QD, 5, **at)
  monkeypatch.setattr(pipeline, "_REFINED_ROWS", 20)
  blocks = case.searcher.search(case.xq_QD, 5, **at)
  np.testing.assert_array_equal(blocks.ids_QR, whole.ids_QR)


def test_what_a_refiner_does_by_default():
  for case_fn, num_network, want in (
    (_BitsCase, 20, True),
    (_BitsCase, 0, True),
    (_FastscanCase, 20, False),  # The network is the better of the two.
    (_FastscanCase, 0, True),
  ):
    case = case_fn()
    found = case.searcher.search(
      case.xq_QD, 3, nprobe=2, num_network=num_network
    )
    assert ("refine" in found.seconds) == want


def test_settings_of_refiners_that_make_no_sense_are_refused(case):
  with pytest.raises(ValueError, match="num_refined=5 needs a refiner, but"):
    case.searcher.search(case.xq_QD, 3, nprobe=1, num_refined=5)
  for case_fn in (_BitsCase, _FastscanCase):
    search = case_fn().searcher.search
    with pytest.raises(ValueError, match="num_network must be at most num_re"):
      search(case.xq_QD, 3, nprobe=1, num_refined=5, num_network=6)
    with pytest.raises(ValueError, match="num_pairwise must be 0 with it"):
      search(
        *(case.xq_QD, 3),
        nprobe=1,
        num_refined=5,
        num_pairwise=6,
        num_network=2,
      )
  with pytest.raises(ValueError, match="num_pairwise must be 0 with it"):
    search(case.xq_QD, 3, nprobe=1, num_pairwise=6, num_network=2)
