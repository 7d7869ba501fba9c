"""CompressedFastIVF: lists by whole vectors, scanned by short ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.codecs import compressor
from vqjax.fast_ivf import CompressedFastIVF, FastIVF, compressed
from vqjax.training import compressor_learner

DIM, LISTS, SHORT = 12, 6, 5
RNG = np.random.default_rng(0)
X = RNG.normal(size=(300, DIM)).astype(np.float32)
QUERIES = RNG.normal(size=(20, DIM)).astype(np.float32)
CENTROIDS = RNG.normal(size=(LISTS, DIM)).astype(np.float32)
WEIGHT = RNG.normal(size=(DIM, SHORT)).astype(np.float32)
BIAS = RNG.normal(size=SHORT).astype(np.float32)


def _unit(x_ND):
  return x_ND / np.linalg.norm(x_ND, axis=-1, keepdims=True)


def _index(metric="ip", nprobe=3, **settings):
  """An index of given centroids and map."""
  index = CompressedFastIVF(
    *(DIM, LISTS, SHORT, nprobe), metric=metric, verbose=False, **settings
  )
  is_l2 = metric == "l2"
  index.set_centroids(CENTROIDS if is_l2 else _unit(CENTROIDS))
  index.set_compressor(WEIGHT, BIAS)
  index.add(X)
  return index


def _search_by_loops(metric, nprobe, k):
  """Ids of the best cosines of short vectors in the best lists."""
  x_ND, queries_QD, centroids_LD = X, QUERIES, CENTROIDS
  if metric == "cosine":
    x_ND, queries_QD = _unit(X), _unit(QUERIES)
  if metric != "l2":
    centroids_LD = _unit(CENTROIDS)

  def rank(x_D):
    if metric == "l2":
      return np.argsort([((x_D - c_D) ** 2).sum() for c_D in centroids_LD])
    return np.argsort([-(x_D @ c_D) for c_D in centroids_LD])

  list_N = [rank(x_D)[0] for x_D in x_ND]
  short_NE = _unit(x_ND @ WEIGHT + BIAS)
  results = []
  for query_D in queries_QD:
    lists = set(rank(query_D)[:nprobe].tolist())
    short_E = _unit(query_D @ WEIGHT + BIAS)
    found = [
      (-float(short_NE[i] @ short_E), i)
      for i in range(300)
      if list_N[i] in lists
    ]
    results.append([i for _, i in sorted(found)[:k]])
  return np.array(results)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_search_finds_what_loops_find(metric):
  index = _index(metric)
  scores_QK, ids_QK = index.search(QUERIES, 10)
  np.testing.assert_array_equal(ids_QK, _search_by_loops(metric, 3, 10))
  assert (np.diff(scores_QK) <= 0).all()
  one_K = index.search(QUERIES[0], 10)[1][0]
  np.testing.assert_array_equal(one_K, ids_QK[0])


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_stock_faiss_finds_the_same(metric):
  index = _index(metric)
  _, ids_QK = index.search(QUERIES, 10)
  np.testing.assert_array_equal(index.to_faiss().search(QUERIES, 10)[1], ids_QK)


@pytest.mark.parametrize("metric", ["cosine", "ip", "l2"])
def test_all_candidates_scored_anew_are_those_of_whole_vectors(metric):
  index = _index(metric)
  flat = FastIVF(DIM, LISTS, 3, metric=metric)
  flat.set_centroids(index.centroids)
  flat.add(X)
  found = index.search(QUERIES, 10, rescore=True, num_candidates=300)
  for ours, want in zip(found, flat.search(QUERIES, 10), strict=True):
    np.testing.assert_array_equal(ours, want)
  index.rescore_num_samples = 5
  _, ids_QK = index.search(QUERIES, 10, rescore=True, sort=False)
  np.testing.assert_array_equal(ids_QK, index.search(QUERIES, 10)[1])


def test_added_removed_and_saved(tmp_path):
  index = _index()
  index.search(QUERIES, 1)  # Short vectors are there; the next are new.
  index.add(X[:2] * 2, ids=[1000, 1001])  # Other short vectors, for the bias.
  index.search(QUERIES, 1)
  index.remove([0, 1])
  assert len(index) == 300
  found = index.search(X[:2] * 2, 1)
  np.testing.assert_array_equal(found[1][:, 0], [1000, 1001])
  np.testing.assert_allclose(found[0][:, 0], 1, rtol=1e-6)
  index.save(tmp_path / "index")
  again = CompressedFastIVF.load(tmp_path / "index")
  for ours, want in zip(
    again.search(QUERIES, 10), index.search(QUERIES, 10), strict=True
  ):
    np.testing.assert_array_equal(ours, want)
  assert again.bytes_per_vector["disk"] == index.bytes_per_vector["disk"]
  few = _index(nprobe=1).search(QUERIES[:1], 300)
  assert few[1][0, -1] == -1
  assert few[0][0, -1] == -np.inf


@pytest.mark.parametrize("kind", ["hakes", "network"])
def test_training_is_the_same_for_a_seed_and_learns(kind):
  settings = dict(
    compressor=kind,
    compressor_epochs=2,
    compressor_steps_per_epoch=150,
    compressor_batch_size=64,
    kmeans_max_steps=20,
    verbose=False,
  )
  low_NS = RNG.normal(size=(600, 4)).astype(np.float32)
  x_ND = low_NS @ RNG.normal(size=(4, DIM)).astype(np.float32)
  one, two = (CompressedFastIVF(DIM, 4, 4, 4, **settings) for _ in range(2))
  one.train(x_ND)
  two.train(x_ND)
  np.testing.assert_array_equal(one._map.weight_DE, two._map.weight_DE)
  flat = FastIVF(DIM, 4, 4, kmeans_max_steps=20, verbose=False).train(x_ND)
  want_QK = flat.search(x_ND[:50], 10)[1]
  found_QK = one.search(x_ND[:50], 10)[1]
  share = np.mean(
    [np.isin(a, b).mean() for a, b in zip(found_QK, want_QK, strict=True)]
  )
  assert share > {"hakes": 0.8, "network": 0.2}[kind]  # By chance 1 in 60.


def test_a_query_is_no_neighbour_of_itself():
  near_QG = np.array([[4, 0, 2], [1, 3, 5], [7, 8, 9]])
  found_QG = compressed._without(near_QG, np.array([0, 1, 2]))
  np.testing.assert_array_equal(found_QG, [[4, 2], [3, 5], [7, 8]])


def test_losses_are_those_of_loops():
  params = compressor.init(jax.random.key(0), DIM, SHORT, LISTS)
  queries_QD, near_QGD = X[:4], X[:24].reshape(4, 6, DIM)
  loss = compressor.neighbour_loss(
    params, jnp.asarray(queries_QD), jnp.asarray(near_QGD), 0.5
  )
  short = lambda x: np.asarray(compressor.compress(params, jnp.asarray(x)))
  total = 0.0
  for query_D, near_GD in zip(queries_QD, near_QGD, strict=True):
    whole = np.exp(near_GD @ query_D / 0.5)
    reduced = np.exp(short(near_GD) @ short(query_D[None])[0] / 0.5)
    whole, reduced = whole / whole.sum(), reduced / reduced.sum()
    total += np.sum(whole * np.log(whole / reduced))
  np.testing.assert_allclose(loss, total / 4, rtol=1e-4)


def test_the_network_learns_to_tell_lists():
  lists_N = (X[:, 0] > 0).astype(np.int32)
  params = compressor_learner.fit_network(
    *(X, lists_N, 2, SHORT),
    num_epochs=2,
    steps_per_epoch=100,
    batch_size=64,
    seed=0,
    is_shown=False,
  )
  assert params.head_EL is None
  # The class is in the short vectors: those of a class are alike.
  short_NE = np.asarray(compressor.compress(params, jnp.asarray(X)))
  means_2E = np.stack([short_NE[lists_N == i].mean(axis=0) for i in (0, 1)])
  told_N = np.argmax(short_NE @ means_2E.T, axis=1)
  assert np.mean(told_N == lists_N) > 0.9


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"compression_ndim": DIM + 1}, "compression_ndim must lie"),
    ({"compression_ndim": 4, "compressor": "pca"}, "network, hakes; got 'pca'"),
    ({"compression_ndim": 4, "compressor_steps_per_epoch": 0}, "steps_per_ep"),
  ],
)
def test_bad_settings(settings, words):
  with pytest.raises(ValueError, match=words):
    CompressedFastIVF(DIM, LISTS, **settings)


def test_a_map_of_another_shape():
  index = CompressedFastIVF(DIM, LISTS, SHORT)
  with pytest.raises(ValueError, match=r"shape \(12, 5\), got \(5, 12\)"):
    index.set_compressor(WEIGHT.T, BIAS)
  with pytest.raises(ValueError, match=r"bias must have shape \(5,\)"):
    index.set_compressor(WEIGHT, BIAS[:3])
  with pytest.raises(ValueError, match="bias"):
    index.set_compressor(WEIGHT, BIAS * np.nan)
  with pytest.raises(ValueError, match="no lists yet: call train"):
    index.search(QUERIES)
