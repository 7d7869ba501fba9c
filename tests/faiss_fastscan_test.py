"""Filters: what they hold, what a scan finds, and their files."""

import faiss
import numpy as np
import pytest

from tests import fits
from vqjax.data import files
from vqjax.interop import faiss_fastscan, faiss_ivf

pytestmark = pytest.mark.usefixtures("one_thread")
D, L, NUM = 8, 5, 400


def _data(n=NUM, d=D, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)).astype(np.float32)


CENTROIDS_LD = _data(L, seed=9)


def _like(coarse="flat", d=D, metric="l2"):
  return fits.make_index(
    _data(L, d, seed=9),
    _data(2 * 16, d, seed=8).reshape(2, 16, d),
    norm_range=(0.0, 9.0),
    coarse=coarse,
    metric=metric,
  )


def _filled(coarse="flat", **options):
  x_ND = _data()
  index = faiss_fastscan.fit(_like(coarse), x_ND, **options)
  assert index.ntotal == 0
  ids_N = np.arange(NUM) * 3 + 7
  for rows in (slice(150), slice(150, None)):
    faiss_fastscan.add(index, x_ND[rows], ids_N[rows])
  return index, x_ND, ids_N


def _sq(x_ND, y_MD):
  return ((x_ND[:, None] - y_MD[None]) ** 2).sum(axis=-1)


@pytest.mark.parametrize("coarse", ["flat", "hnsw"])
@pytest.mark.parametrize("num_parts", [None, 4])
def test_distances_are_those_to_what_it_knows(coarse, num_parts):
  index, x_ND, ids_N = _filled(coarse, num_parts=num_parts)
  known_ND = faiss_fastscan.reconstruct(index, x_ND)
  error_N = ((x_ND - known_ND) ** 2).sum(axis=1)
  lists_N = _sq(x_ND, CENTROIDS_LD).argmin(axis=1)
  left_N = ((x_ND - CENTROIDS_LD[lists_N]) ** 2).sum(axis=1)
  # A part of 4 dimensions and 4 bits halves the error at least.
  assert error_N.mean() < (0.2 if num_parts else 0.5) * left_N.mean()
  xq_QD = _data(6, seed=3)
  probes_QP = np.argsort(_sq(xq_QD, CENTROIDS_LD), axis=1)[:, :2]
  ids_QK, distances_QK = faiss_fastscan.scan(index, xq_QD, probes_QP, NUM)
  for q, x_D in enumerate(xq_QD):
    found = ids_QK[q] >= 0
    rows = (ids_QK[q][found] - 7) // 3
    inside = np.flatnonzero(np.isin(lists_N, probes_QP[q]))
    assert sorted(rows) == inside.tolist()
    np.testing.assert_array_equal(ids_N[rows], ids_QK[q][found])
    assert np.isinf(distances_QK[q][~found]).all()
    exact_N = ((x_D - known_ND[rows]) ** 2).sum(axis=1)
    # Norms are bytes, and so are sums of tables.
    np.testing.assert_allclose(distances_QK[q][found], exact_N, atol=1.0)
    assert np.abs(distances_QK[q][found] - exact_N).mean() < 0.3
    assert (np.diff(distances_QK[q][found]) >= 0).all()


def test_some_queries_look_into_fewer_lists():
  index, _, _ = _filled()
  xq_QD = _data(9, seed=3)
  probes_QP = np.argsort(_sq(xq_QD, CENTROIDS_LD), axis=1)[:, :3]
  some_QP = probes_QP.copy()
  some_QP[2:5, 1:] = some_QP[7:, 2:] = some_QP[6] = -1
  ids_QK, distances_QK = faiss_fastscan.scan(index, xq_QD, some_QP, 5)
  for q in range(9):
    num = np.count_nonzero(some_QP[q] >= 0)
    if not num:
      assert (ids_QK[q] == -1).all()
      assert np.isinf(distances_QK[q]).all()
      continue
    alone = faiss_fastscan.scan(
      index, xq_QD[q : q + 1], probes_QP[q : q + 1, :num], 5
    )
    np.testing.assert_array_equal(ids_QK[q], alone[0][0])
    np.testing.assert_allclose(distances_QK[q], alone[1][0], rtol=1e-5)


def test_plain_faiss_searches_the_file(tmp_path):
  index, _, _ = _filled()
  path = tmp_path / "refiner.faiss"
  meta = faiss_fastscan.save(index, path, of_index="abc", info={"seed": 1})
  assert meta == faiss_fastscan.load(path, {"sha256": "abc"}).info
  assert (meta["num_parts"], meta["code_bytes"], meta["seed"]) == (2, 2, 1)
  plain, xq_QD = faiss.read_index(str(path)), _data(20, seed=3)
  faiss.extract_index_ivf(plain).nprobe = 3
  distances_QK, ids_QK = plain.search(xq_QD, 4)
  probes_QP = np.argsort(_sq(xq_QD, CENTROIDS_LD), axis=1)[:, :3]
  loaded = faiss_fastscan.load(path, {"sha256": "abc"}).index
  found = faiss_fastscan.scan(loaded, xq_QD, probes_QP, 4)
  np.testing.assert_array_equal(found[0], ids_QK)
  # faiss leaves the part of a query out.
  missing_QK = found[1] - distances_QK
  np.testing.assert_allclose(missing_QK - missing_QK[:, :1], 0, atol=1e-4)
  assert not faiss.downcast_index(plain.index).rescale_norm


def test_what_does_not_fit_is_refused():
  with pytest.raises(ValueError, match="num_parts must divide the 8 .* 1, 2,"):
    faiss_fastscan.fit(_like(), _data(), num_parts=3)
  with pytest.raises(ValueError, match="num_parts must lie between 1 and 8"):
    faiss_fastscan.fit(_like(), _data(), num_parts=9)
  with pytest.raises(ValueError, match="num_parts must divide the 9 .* 1, 3,"):
    faiss_fastscan.fit(_like(d=9), _data(d=9))
  with pytest.raises(ValueError, match="needs an index of metric l2"):
    faiss_fastscan.fit(_like(metric="ip"), _data())
  with pytest.raises(ValueError, match="training vectors must .* 256 .* 255"):
    faiss_fastscan.fit(_like(), _data(255))
  with pytest.raises(ValueError, match="vectors must have shape"):
    faiss_fastscan.fit(_like(), _data(d=7))
  index, x_ND, ids_N = _filled()
  with pytest.raises(ValueError, match="ids must have shape"):
    faiss_fastscan.add(index, x_ND, ids_N[:-1])
  x_ND[3, 1] = np.nan
  with pytest.raises(ValueError, match="vectors must be finite, .* row 3"):
    faiss_fastscan.add(index, x_ND, ids_N)
  assert index.ntotal == NUM


def test_files_that_are_not_its_own_are_refused(tmp_path):
  index, _, _ = _filled()
  path, of = tmp_path / "refiner.faiss", {"sha256": "abc"}
  with pytest.raises(FileNotFoundError, match="There is no file"):
    faiss_fastscan.load(path, of)
  faiss_fastscan.save(index, path, of_index="abc", info={})
  with pytest.raises(FileExistsError):
    faiss_fastscan.save(index, path, of_index="abc", info={})
  with pytest.raises(ValueError, match="checksum abc, but this index has xyz"):
    faiss_fastscan.load(path, {"sha256": "xyz"})
  other = tmp_path / "index.faiss"
  faiss_ivf.save(_like(), other, {})
  with pytest.raises(ValueError, match="must have format 'vqjax fastscan"):
    faiss_fastscan.load(other, of)
  faiss.write_index(_like(), str(path))
  with pytest.raises(ValueError, match="truncated or of another run"):
    faiss_fastscan.load(path, of)
  beside = files.description_path(path)
  beside.unlink()
  with pytest.raises(FileNotFoundError, match="has no description"):
    faiss_fastscan.load(path, of)


@pytest.mark.parametrize(("num_lists", "num_codewords"), [(1, 16), (5, 256)])
def test_rows_are_what_centroid_and_words_add_up_to(num_lists, num_codewords):
  rng = np.random.default_rng(0)
  centroids_LD = _data(num_lists, seed=9)
  words_MKD = _data(3 * num_codewords, seed=8).reshape(3, num_codewords, D)
  index = fits.make_index(
    centroids_LD, words_MKD, norm_range=(0.0, 99.0), coarse="flat"
  )
  lists_N = rng.integers(0, num_lists, 60)
  codes_NM = rng.integers(0, num_codewords, (60, 3))
  faiss_ivf.add_codes(index, lists_N, codes_NM, np.arange(60))
  contents = faiss_ivf.contents(index)
  rows_n = rng.integers(0, 60, 25)
  x_nD = faiss_ivf.make_rows_fn(contents)(rows_n)
  for row, x_D in zip(rows_n, x_nD, strict=True):
    at = contents.ids_N[row]
    words = sum(words_MKD[m, codes_NM[at, m]] for m in range(3))
    np.testing.assert_allclose(
      x_D, centroids_LD[lists_N[at]] + words, atol=1e-5
    )


def test_parts_are_those_of_a_learned_rotation_far_from_zero():
  """Vectors whose dimensions are unlike, and whose norms are large."""
  rng = np.random.default_rng(0)
  turn_DD = np.linalg.qr(rng.normal(size=(D, D)))[0]
  spread_D = np.array([4, 4, 4, 4, 0.1, 0.1, 0.1, 0.1])
  x_ND = (_data() * spread_D @ turn_DD + 300).astype(np.float32)
  index = faiss_fastscan.fit(
    fits.make_index(
      x_ND[:L],
      _data(2 * 16, seed=8).reshape(2, 16, D),
      norm_range=(0.0, 9.0),
      coarse="flat",
    ),
    x_ND,
  )
  faiss_fastscan.add(index, x_ND, np.arange(NUM))
  known_ND = faiss_fastscan.reconstruct(index, x_ND)
  # Without a rotation 16 words have all of the spread in one part, or in two.
  lists_N = _sq(x_ND, x_ND[:L]).argmin(axis=1)
  left_ND = x_ND - x_ND[lists_N]
  plain = faiss.ProductQuantizer(D, 2, 4)
  plain.cp.min_points_per_centroid = 1
  plain.train(left_ND)
  plain_ND = plain.decode(plain.compute_codes(left_ND))
  error = ((x_ND - known_ND) ** 2).sum(axis=1).mean()
  assert error < 0.75 * ((left_ND - plain_ND) ** 2).sum(axis=1).mean()
  ids_QK, distances_QK = faiss_fastscan.scan(
    index, x_ND[:9], np.tile(np.arange(L), (9, 1)), NUM
  )
  exact_QK = ((x_ND[:9, None] - known_ND[ids_QK]) ** 2).sum(axis=-1)
  assert np.abs(distances_QK - exact_QK).mean() < 0.05 * exact_QK.mean()
