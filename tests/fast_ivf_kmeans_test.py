"""K-means with the API of FastIVF: its examples, statistics and bad input."""

import itertools
import pathlib

import numpy as np
import pytest

from vqjax.fast_ivf import MiniBatchKMeans, SubvectorsMiniBatchKMeans

GOLDEN = (
  pathlib.Path(__file__).parents[1] / "third_party" / "golden" / "fast_ivf"
)


@pytest.fixture(name="x_ND", scope="module")
def _x():
  """600 vectors around 9 points."""
  rng = np.random.default_rng(0)
  points = 3 * rng.normal(size=(9, 8))[rng.integers(9, size=600)]
  return (points + rng.normal(size=(600, 8)) / 3).astype(np.float32)


def _plain(**values):
  given = dict(max_steps=40, metric="l2", verbose=False)
  return MiniBatchKMeans(9, 32, **{**given, **values})


def _sub(**values):
  given = dict(max_steps=40, metric="l2", verbose=False)
  return SubvectorsMiniBatchKMeans(9, 4, 32, **{**given, **values})


def test_the_examples_of_the_package_run(capfd):
  from vqjax.fast_ivf.kmeans import MiniBatchKMeans, SubvectorsMiniBatchKMeans

  kmeans = MiniBatchKMeans(num_centroids=16, batch_size=32, metric="l2")
  data = np.random.default_rng(0).random((5000, 64))
  history = kmeans.train(data)
  kmeans.add(data)
  labels = kmeans.predict(data)
  assert (labels.shape, labels.dtype) == ((5000,), np.int64)
  np.testing.assert_array_equal(labels, kmeans._labels)
  assert kmeans.num_steps == len(history) - 1 + kmeans.history_size
  assert "k-means" in capfd.readouterr().err

  kmeans = SubvectorsMiniBatchKMeans(
    num_centroids=16, num_subvectors=8, batch_size=32, metric="l2",
    max_steps=99, verbose=False,
  )  # fmt: skip
  kmeans.train(data)
  kmeans.add(data)
  labels = kmeans.predict(data)
  assert (labels.shape, labels.dtype) == ((5000, 8), np.int64)
  np.testing.assert_array_equal(labels, kmeans._labels)
  assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_seeds_spread_as_those_of_the_package(metric):
  golden = np.load(GOLDEN / "kmeans.npz")
  x_ND = golden["x"]
  if metric == "cosine":
    x_ND = x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)
  inertia, steps = [], []
  for seed in range(10):
    kmeans = MiniBatchKMeans(
      12, 64, metric=metric, seed=seed, closing_passes=0, verbose=False
    )
    kmeans.train(x_ND)
    steps.append(kmeans.num_steps)
    scores_NK = kmeans.predict_scores(x_ND)
    best_N = scores_NK.min(axis=1)
    if metric == "cosine":
      norms_K = np.linalg.norm(kmeans.centroids, axis=1)
      best_N = 1 - (scores_NK / norms_K[None]).max(axis=1)
    inertia.append(best_N.sum(dtype=float))
  want = golden[f"{metric}_inertia"]
  planted = float(golden[f"{metric}_inertia_planted"])
  assert min(inertia) > 0.99 * planted
  error = 3 * want.std() / np.sqrt(10)  # Of the mean of ten.
  assert np.mean(inertia) < want.mean() + error
  assert max(inertia) < want.max() + want.std()
  assert min(steps) >= 200
  assert np.mean(steps) < 1.5 * golden[f"{metric}_iterations"].mean()


@pytest.mark.slow
def test_sub_vectors_spread_as_those_of_the_package():
  golden = np.load(GOLDEN / "subkmeans.npz")
  x_ND, errors = golden["x"], []
  for seed in range(3):
    kmeans = SubvectorsMiniBatchKMeans(
      16, 4, 64, metric="l2", seed=seed, closing_passes=0, verbose=False
    )
    kmeans.train(x_ND)
    best_MN = kmeans.predict_scores(x_ND).min(axis=2)
    errors.append(best_MN.sum(axis=0).mean())
  want = golden["l2_recon_sqerr"]
  assert abs(np.mean(errors) - want.mean()) < 4 * want.std()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_scores_and_labels_match_loops(x_ND, metric):
  kmeans = _plain(metric=metric)
  kmeans.train(x_ND)
  x_nD, words_KD = x_ND[:37], kmeans.centroids
  if metric == "l2":
    want = ((x_nD[:, None] - words_KD[None]) ** 2).sum(axis=2)
    labels = want.argmin(axis=1)
  else:
    want = x_nD @ words_KD.T
    labels = want.argmax(axis=1)
  np.testing.assert_allclose(kmeans.predict_scores(x_nD), want, atol=1e-4)
  np.testing.assert_array_equal(kmeans.predict(x_nD), labels)
  np.testing.assert_array_equal(kmeans._centroids, words_KD.T)
  assert kmeans.predict(x_nD[:0]).shape == (0,)
  assert kmeans.predict_scores(x_nD[:0]).shape == (0, 9)


def test_sub_vectors_are_each_a_k_means(x_ND):
  kmeans = _sub()
  kmeans.train(x_ND)
  x_MNS, (scores_MNK, labels_MN) = kmeans.predict_all(x_ND[:21])
  for m in range(4):
    x_NS = x_ND[:21, 2 * m : 2 * m + 2]
    np.testing.assert_array_equal(x_MNS[m], x_NS)
    sq_NK = ((x_NS[:, None] - kmeans.centroids[m][None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(scores_MNK[m], sq_NK, atol=1e-4)
    np.testing.assert_array_equal(labels_MN[m], sq_NK.argmin(axis=1))
  np.testing.assert_array_equal(kmeans.predict(x_ND[:21]), labels_MN.T)
  np.testing.assert_array_equal(kmeans.predict_labels(x_ND[:21]), labels_MN)
  assert kmeans._centroids.shape == (4, 2, 9)


def test_added_vectors_are_kept_in_order(x_ND):
  kmeans = _plain()
  kmeans.train(x_ND)
  assert kmeans.num_vectors == 0
  kmeans.add(x_ND[:400])
  kept = x_ND[:400]
  assert np.shares_memory(kmeans._vectors, kept)
  assert sum(map(len, kmeans.centroids_indices)) == 400
  kmeans.add(iter([x_ND[400:500], x_ND[500:]]))
  np.testing.assert_array_equal(kmeans.vectors, x_ND)
  labels_N = kmeans.predict(x_ND)
  np.testing.assert_array_equal(kmeans._labels, labels_N)
  assigned = kmeans.get_centroids_assignments()
  for k, ids in enumerate(kmeans.centroids_indices):
    np.testing.assert_array_equal(ids, np.flatnonzero(labels_N == k))
    assert assigned[k] == ids.tolist()
  np.testing.assert_array_equal(kmeans.get_vectors([5, 2]), x_ND[[5, 2]])
  parts = list(kmeans.get_dataset_iterator(batch_size=250))
  assert [len(x) for x, _ in parts] == [250, 250, 100]
  np.testing.assert_array_equal(np.concatenate([y for _, y in parts]), labels_N)


def test_sub_vectors_are_added_twice(x_ND):
  kmeans = _sub()
  kmeans.train(x_ND)
  kmeans.add(x_ND[:300])
  kmeans.add(x_ND[300:])
  assert kmeans.num_vectors == 600
  np.testing.assert_array_equal(kmeans._labels, kmeans.predict(x_ND))


def test_the_seed_alone_decides(x_ND):
  found = []
  for seed in (3, 3, 4):
    kmeans = _plain(seed=seed)
    kmeans.train(x_ND)
    found.append(kmeans.centroids)
  np.testing.assert_array_equal(found[0], found[1])
  assert not np.array_equal(found[0], found[2])


def test_closing_passes_lower_the_error(x_ND):
  errors = []
  for closing_passes in (0, 1, 3):
    kmeans = _plain(max_steps=3, closing_passes=closing_passes)
    kmeans.train(x_ND)
    errors.append(kmeans.predict_scores(x_ND).min(axis=1).mean())
  assert errors[0] > errors[1] > errors[2]


def test_every_kind_of_numbers_and_source(x_ND, tmp_path):
  whole = np.round(40 * x_ND)
  np.save(tmp_path / "x.npy", whole)
  found = []
  for data in (
    whole,
    whole.astype(np.float64),
    whole.astype(np.float16),
    whole.astype(np.int16),
    np.asfortranarray(whole),
    np.load(tmp_path / "x.npy", mmap_mode="r"),
    str(tmp_path / "x.npy"),
    whole.tolist(),
  ):
    kmeans = _plain()
    kmeans.train(data)
    kmeans.add(data)
    found.append((kmeans.centroids, kmeans.predict(data)))
  for words_KD, labels_N in found[1:]:
    np.testing.assert_array_equal(words_KD, found[0][0])
    np.testing.assert_array_equal(labels_N, found[0][1])


def test_an_iterator_is_trained_on_as_it_comes(x_ND):
  batches = [x_ND[i : i + 40] for i in range(0, 600, 40)]
  kmeans = _plain(max_steps=50)
  kmeans.train(itertools.cycle(batches))
  assert kmeans.num_steps == 50
  with pytest.warns(UserWarning, match="ended after 14 steps, before"):
    kmeans.train(iter(batches))  # One of 15 is the start.
  assert kmeans.num_steps == 14
  assert np.isfinite(kmeans.centroids).all()
  with pytest.raises(ValueError, match="=9 needs at least as many .* got 4"):
    kmeans.train(iter([x_ND[:4]]))
  with pytest.raises(ValueError, match="The iterator has no vectors"):
    kmeans.train(iter([]))
  with pytest.raises(TypeError, match=r"give iter\(batches\)"):
    kmeans.train(batches)
  with pytest.raises(TypeError, match=r"give iter\(batches\)"):
    kmeans.train([x_ND[:3], x_ND[:4]])


def test_fewer_centroids_on_request(x_ND):
  with pytest.raises(ValueError, match="num_centroids=9 .* got 5; ask for"):
    _plain().train(x_ND[:5])
  kmeans = _plain(allow_fewer=True)
  kmeans.train(x_ND[:5])
  assert kmeans.num_centroids == 5
  assert sorted(kmeans.predict(x_ND[:5])) == [0, 1, 2, 3, 4]
  kmeans = _plain(allow_fewer=True)
  with pytest.warns(UserWarning, match="ended after 0 steps"):
    kmeans.train(iter([x_ND[:5]]))
  np.testing.assert_array_equal(kmeans.centroids, x_ND[:5])


@pytest.mark.parametrize("make", [_plain, _sub])
def test_bad_vectors_are_named(make, x_ND):
  bad = x_ND.copy()
  bad[123, 4] = np.nan
  kmeans = make()
  for data in (bad, iter([bad])):
    with pytest.raises(ValueError, match="NaN .* in row 123"):
      kmeans.train(data)
  bad[123] = 0
  kmeans.train(bad)  # Zeros are no fault under l2.
  kmeans = make(metric="cosine")
  for data in (bad, iter([bad])):
    with pytest.raises(ValueError, match="row 123 is a vector of zeros"):
      kmeans.train(data)
  with pytest.raises(ValueError, match="call train first"):
    kmeans.add(x_ND)
  kmeans.train(x_ND)
  for fn in (kmeans.add, kmeans.predict):
    with pytest.raises(ValueError, match="row 123 is a vector of zeros"):
      fn(bad)
    with pytest.raises(ValueError, match=r"\(None, 8\), got \(600, 7\)"):
      fn(x_ND[:, :7])
  with pytest.raises(ValueError, match=r"\(None, 8\), got \(8,\)"):
    kmeans.predict(x_ND[0])
  with pytest.raises(TypeError, match="must hold real numbers"):
    kmeans.predict(x_ND > 0)


def test_senseless_settings_are_refused(x_ND):
  with pytest.raises(ValueError, match="metric must be one of .* got 'dot'"):
    _plain(metric="dot")
  with pytest.raises(ValueError, match="num_centroids must .* got 0"):
    MiniBatchKMeans(0, 32)
  with pytest.raises(ValueError, match="batch_size must .* got 0"):
    MiniBatchKMeans(4, 0)
  with pytest.raises(ValueError, match="seed must lie between 0"):
    _plain(seed=-1)
  kmeans = SubvectorsMiniBatchKMeans(4, 3, 32, verbose=False)
  for data in (x_ND, iter([x_ND])):
    with pytest.raises(ValueError, match="8 dimensions cannot be cut into 3"):
      kmeans.train(data)
