"""FastIVFPQ: golden values, what faiss finds in its file, edits, bad input."""

import pathlib

import faiss
import numpy as np
import pytest

from vqjax.fast_ivf import FastIVFPQ
from vqjax.search import calibration

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party/golden/fast_ivf"
KEYS = ["np4_r000_k10", "np8_r000_k100", "np8_r000_k50", "np8_r090_k50"]
KINDS = [("tables", 11), ("tables", 16), ("fastscan", 16)]


@pytest.fixture(name="golden", scope="module")
def _golden():
  with np.load(GOLDEN / "ivfpq.npz") as found:
    return dict(found)


@pytest.fixture(name="index", scope="module")
def _index(golden):
  index = FastIVFPQ(16, 16, pq_num_centroids=16, pq_num_subvectors=8)
  index.set_centroids(golden["centroids"])
  index.set_codebooks(golden["codebooks"])
  index.add(golden["x"])
  return index


@pytest.fixture(name="x_ND", scope="module")
def _x():
  """300 vectors; the last 20 are as the first."""
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(300, 8)).astype(np.float32)
  x_ND[280:] = x_ND[:20]
  return x_ND


def _small(x_ND, engine="tables", num_words=16, metric="ip", **settings):
  index = FastIVFPQ(
    *(8, 6, 3, 0, num_words, 4),
    engine=engine,
    metric=metric,
    verbose=False,
    **settings,
  )
  rng = np.random.default_rng(1)
  centroids_LD = rng.normal(size=(6, 8))
  index.set_centroids(centroids_LD / np.linalg.norm(centroids_LD[:1]))
  index.set_codebooks(rng.normal(size=(4, num_words, 2)))
  index.add(x_ND)
  return index


def _setup(index, key: str) -> int:
  nprobe, ratio, k = (
    int("".join(filter(str.isdigit, p))) for p in key.split("_")
  )
  index.nprobe, index.ratio_threshold = nprobe, ratio / 100
  return k


@pytest.mark.parametrize("key", KEYS)
def test_golden_distances_and_exact_scores(golden, index, key):
  k = _setup(index, key)
  index.rescore_num_samples = -1
  for name, rescore, worst in (
    ("approx", False, np.inf),
    ("exact", True, -np.inf),
  ):
    scores_QK, ids_QK = index.search(golden["queries"], k, rescore=rescore)
    want_QK = golden[f"{name}_scores_{key}"]
    np.testing.assert_array_equal(ids_QK, golden[f"{name}_ids_{key}"])
    want_QK = np.where(ids_QK < 0, worst, want_QK)
    np.testing.assert_allclose(scores_QK, want_QK, atol=1e-5)


@pytest.mark.parametrize("num_samples", [5, 20])
@pytest.mark.parametrize("key", KEYS)
def test_golden_calibrated_scores(golden, index, key, num_samples):
  k = _setup(index, key)
  index.rescore_num_samples = num_samples
  name = f"calib{num_samples}"
  for sort, part in ((True, ""), (False, "_unsorted")):
    found_QK, ids_QK = index.search(golden["queries"], k, True, sort)
    want_QK = golden[f"{name}{part}_scores_{key}"]
    np.testing.assert_allclose(found_QK, want_QK, atol=1e-3)
  np.testing.assert_array_equal(ids_QK, golden[f"approx_ids_{key}"])


def test_lines_are_those_of_polyfit():
  rng = np.random.default_rng(2)
  x_QR, y_QR = rng.normal(size=(2, 5, 9))
  is_there_QR = np.ones((5, 9), bool)
  is_there_QR[2, 4:] = False
  x_QR[~is_there_QR] = np.inf
  slope_Q, offset_Q = calibration.fit_lines(x_QR, y_QR, is_there_QR)
  for row in range(5):
    there = is_there_QR[row]
    want = np.polyfit(x_QR[row, there], y_QR[row, there], 1)
    np.testing.assert_allclose([slope_Q[row], offset_Q[row]], want, rtol=1e-9)
  is_there_QR[:, 1:] = False  # One point, and none.
  is_there_QR[4, 0] = False
  slope_Q, offset_Q = calibration.fit_lines(x_QR, y_QR, is_there_QR)
  np.testing.assert_array_equal(slope_Q, 0)
  np.testing.assert_allclose(offset_Q, [*y_QR[:4, 0], 0])


@pytest.mark.parametrize(
  ("k", "num", "want"),
  [
    (50, 20, range(0, 50, 2)),
    (10, 6, range(10)),
    (10, 10, range(10)),
    (4, -1, range(4)),
    (7, 1, [0]),
  ],
)
def test_samples_are_equally_far_apart(k, num, want):
  assert calibration.sample_ranks(k, num).tolist() == list(want)


def test_padding_comes_last_and_stays_out_of_the_line(x_ND):
  index = _small(x_ND, metric="l2")
  index.nprobe, index.rescore_num_samples = 1, 10
  scores_QK, ids_QK = index.search(x_ND[:30], 200, rescore=True)
  num_Q = (ids_QK >= 0).sum(axis=1)
  assert (num_Q < 200).all()
  assert (np.isinf(scores_QK) == (ids_QK < 0)).all()
  assert (np.diff(ids_QK < 0, axis=1) >= 0).all()
  plain_QK, order_QK = index.search(x_ND[:30], 200)
  ranks = np.arange(0, num_Q[0], 20)
  exact = np.square(x_ND[order_QK[0, ranks]] - x_ND[0]).sum(axis=1)
  line = np.polyfit(plain_QK[0, ranks], exact, 1)
  found = index.search(x_ND[0], 200, True, False)[0]
  want = np.maximum(np.polyval(line, plain_QK[0, : num_Q[0]]), 0)
  np.testing.assert_allclose(found[0, : num_Q[0]], want, atol=1e-4)


@pytest.mark.parametrize(("engine", "num_words"), KINDS)
@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_faiss_finds_the_same_in_the_file(
  x_ND, metric, engine, num_words, tmp_path
):
  x_ND = x_ND[:280]  # Without copies, whose order may differ.
  index = _small(x_ND, engine, num_words, metric)
  index.save(tmp_path / "a")
  stock = faiss.read_index(str(tmp_path / "a" / "index.faiss"))
  queries_QD = x_ND[:30] + 0.1
  # Of equal codes at the end faiss may have other ones.
  distances_QK = index.search(queries_QD, 21)[0]
  is_clear_Q = distances_QK[:, 19] < distances_QK[:, 20]
  assert is_clear_Q.mean() > 0.4
  queries_QD = queries_QD[is_clear_Q]
  found, ids_QK = index.search(queries_QD, 20, rescore=True)
  want, want_ids_QK = stock.search(queries_QD, 20)
  np.testing.assert_array_equal(ids_QK, want_ids_QK)
  np.testing.assert_allclose(found, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("engine", "num_words"), KINDS)
def test_a_folder_brings_back_the_index(x_ND, engine, num_words, tmp_path):
  index = _small(x_ND, engine, num_words)
  index.ratio_threshold, index.rescore_num_samples = 0.2, 7
  index.remove(np.arange(0, 300, 7))
  index.add(x_ND[:9], ids=np.arange(9) + 2**40)
  index.save(tmp_path / "a")
  again = FastIVFPQ.load(tmp_path / "a")
  assert again._settings() == index._settings()
  np.testing.assert_array_equal(again.codebooks, index.codebooks)
  for rescore in (False, True):
    for have, want in zip(
      again.search(x_ND, 11, rescore),
      index.search(x_ND, 11, rescore),
      strict=True,
    ):
      np.testing.assert_array_equal(have, want)
  again.add(x_ND[:3])
  assert len(again) == len(index) + 3


@pytest.mark.parametrize(("engine", "num_words"), KINDS)
def test_removed_vectors_are_as_if_never_there(x_ND, engine, num_words):
  index = _small(x_ND, engine, num_words, "l2")
  index.remove(np.arange(1, 300, 2))
  wanted = _small(x_ND[::2], engine, num_words, "l2")
  distances_QK, ids_QK = index.search(x_ND[:40], 25)
  want, want_ids_QK = wanted.search(x_ND[:40], 25)
  np.testing.assert_array_equal(distances_QK, want)
  np.testing.assert_array_equal(
    ids_QK, np.where(want_ids_QK < 0, -1, 2 * want_ids_QK)
  )


def test_of_equal_codes_the_lower_ids_are_found(x_ND):
  copies_ND = np.repeat(x_ND[:10], 50, axis=0)
  index = _small(copies_ND)
  index.remove(index.ids)
  index.add(copies_ND, ids=np.arange(500)[::-1])  # The lower ids come last.
  index.nprobe = 6
  for rescore in (False, True):
    ids_QK = index.search(x_ND[:10], 7, rescore)[1]
    # Different vectors may have equal codes.
    np.testing.assert_array_equal(ids_QK, np.sort(ids_QK, axis=1))
    assert (ids_QK % 50 < 7).all()


def test_more_candidates_give_better_results(x_ND):
  index = _small(x_ND[:280], "fastscan")
  index.nprobe = 6
  few = index.search(x_ND[:50], 3, rescore=True)[0]
  scores_QK, ids_QK = index.search(x_ND[:50], 3, True, num_candidates=280)
  want_QK = np.sort(x_ND[:50] @ x_ND[:280].T)[:, :-4:-1]
  np.testing.assert_allclose(scores_QK, want_QK, rtol=1e-5)
  assert (scores_QK >= few - 1e-6).all()
  assert ids_QK.shape == (50, 3)


@pytest.mark.parametrize("training", ["faiss", "minibatch"])
def test_training(x_ND, training):
  index = FastIVFPQ(
    *(8, 6, 6, 0, 16, 4),
    kmeans_batch_size=32,
    kmeans_max_steps=16,
    kmeans_pq_max_steps=16,
    pq_training=training,
    verbose=False,
    metric="l2",
  )
  index.train(x_ND)
  index.train(x_ND)  # Anew.
  assert (len(index), index.codebooks.shape) == (300, (4, 16, 2))
  distances_QK, ids_QK = index.search(x_ND[:40], 10)
  assert (ids_QK == np.arange(40)[:, None]).any(axis=1).mean() > 0.9
  exact_QK, ids_QK = index.search(x_ND[:40], 40, rescore=True)
  found = np.square(x_ND[:40, None] - x_ND[ids_QK]).sum(axis=2)
  np.testing.assert_allclose(exact_QK, found, atol=1e-5)
  # Distances to codes are near the true ones.
  assert distances_QK[:, 0].mean() < 0.2 * found.mean()


def test_bytes_of_a_vector_are_those_of_the_file(x_ND, tmp_path):
  index = _small(np.repeat(x_ND, 10, axis=0), num_words=256)
  index.save(tmp_path / "a")
  size = (tmp_path / "a" / "index.faiss").stat().st_size
  num_bytes = index.bytes_per_vector
  assert num_bytes["disk"] == pytest.approx(size / len(index), rel=0.02)
  # Code and its id, vector and its id, codewords.
  want = 4 + 8 + 32 + 4 + 4 * 256 * 2 * 4 / 3000
  assert num_bytes["ram"] == pytest.approx(want, rel=0.02)


def test_bad_input_is_refused_in_words(x_ND):
  for settings, match in (
    (dict(pq_num_subvectors=3), "must divide the 8 dimensions, got 3"),
    (dict(pq_num_subvectors=9), "pq_num_subvectors must lie between 1 and 8"),
    (dict(engine="fast"), "engine must be one of tables, fastscan"),
    (dict(engine="fastscan"), "needs pq_num_centroids=16, got 128"),
    (dict(pq_training="jax"), "pq_training must be one of"),
    (dict(metric="l1"), "metric must be one of"),
  ):
    with pytest.raises(ValueError, match=match):
      FastIVFPQ(8, 6, **{"pq_num_subvectors": 4, **settings})
  index = FastIVFPQ(8, 6, pq_num_centroids=400, pq_num_subvectors=4)
  with pytest.raises(ValueError, match="pq_num_centroids .* 300 vectors to le"):
    index.train(x_ND)
  with pytest.raises(ValueError, match="no lists yet"):
    index.search(x_ND)
  index = _small(x_ND)
  with pytest.raises(ValueError, match="of an empty index only"):
    index.set_codebooks(index.codebooks)
  with pytest.raises(ValueError, match="queries must have shape"):
    index.search(x_ND[:, :4], rescore=True)


def test_an_empty_index_finds_nothing(x_ND):
  index = _small(x_ND)
  index.remove(index.ids)
  for rescore, worst in ((False, np.inf), (True, -np.inf)):
    scores_QK, ids_QK = index.search(x_ND[:2], 3, rescore)
    np.testing.assert_array_equal(ids_QK, np.full((2, 3), -1))
    np.testing.assert_array_equal(scores_QK, np.full((2, 3), worst))
