"""Lists of an IVF training run: from a file or k-means, kept for resuming."""

import importlib

import numpy as np
import pytest

from experiments import codecs, ivf_lists, train
from tests import oracles
from tests.qinco_cases import CASES, make_params, vectors
from vqjax.codecs import qinco
from vqjax.data import batches
from vqjax.interop import safetensors_io


def _config(**ivf):
  config = importlib.import_module("configs.ivf_qinco2_xs").get_config("smoke")
  config.ivf.update(ivf)
  return config


@pytest.fixture(name="x_ND")
def _x_ND():
  return np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)


def test_kmeans_finds_the_centroids(x_ND, tmp_path):
  config = _config(num_lists=5)
  centroids_LD, joined = ivf_lists.prepare(config, tmp_path, x_ND, 300)
  assert centroids_LD.shape == (5, 6)
  rows, lists_N = ivf_lists.split(joined[:])
  np.testing.assert_array_equal(rows, x_ND)
  np.testing.assert_array_equal(lists_N, oracles.nearest(x_ND, centroids_LD))
  # Better than five of the vectors themselves.
  error = lambda c_LD: np.sum((x_ND - c_LD[oracles.nearest(x_ND, c_LD)]) ** 2)
  assert error(centroids_LD) < 0.95 * error(x_ND[:5])


def test_a_resumed_run_keeps_its_lists(x_ND, tmp_path):
  config = _config(num_lists=5)
  first = ivf_lists.prepare(config, tmp_path, x_ND, 300)
  strange_N = np.arange(400, dtype=np.int32) % 5
  np.save(tmp_path / "lists.npy", strange_N)
  again = ivf_lists.prepare(config, tmp_path, x_ND, 300)
  np.testing.assert_array_equal(again[0], first[0])
  np.testing.assert_array_equal(ivf_lists.split(again[1][:])[1], strange_N)
  with pytest.raises(ValueError, match="is of 400 vectors.* has 399"):
    ivf_lists.prepare(config, tmp_path, x_ND[1:], 300)


def test_centroids_of_a_file(x_ND, tmp_path):
  np.save(tmp_path / "c.npy", x_ND[:7].astype(np.float64))
  config = _config(num_lists=0, centroids=str(tmp_path / "c.npy"))
  centroids_LD, _ = ivf_lists.prepare(config, tmp_path, x_ND, 300)
  np.testing.assert_array_equal(centroids_LD, x_ND[:7])
  other = _config(num_lists=6, centroids=str(tmp_path / "c.npy"))
  with pytest.raises(ValueError, match="has 7 centroids.*num_lists is 6"):
    ivf_lists.prepare(other, tmp_path / "new", x_ND, 300)


def test_without_lists_nothing_happens(x_ND, tmp_path):
  centroids_LD, same = ivf_lists.prepare(
    _config(num_lists=0), tmp_path, x_ND, 300
  )
  assert centroids_LD is None
  assert same is x_ND
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("how", ["blocks", "hnsw", "auto"])
def test_ways_to_find_the_list(x_ND, how):
  assign_fn, block_size = codecs.make_assign_fn(x_ND[:40], how)
  blocks = batches.map_blocks(assign_fn, x_ND, block_size=min(block_size, 99))
  lists_N = np.concatenate([lists_N for _, lists_N in blocks])
  assert lists_N.dtype == np.int32
  share = (lists_N == oracles.nearest(x_ND, x_ND[:40])).mean()
  assert share > 0.95 if how == "hnsw" else share == 1
  with pytest.raises(ValueError, match="auto, blocks, hnsw; got 'tree'"):
    codecs.make_assign_fn(x_ND, "tree")


def test_the_codec_has_the_centroids(tmp_path):
  config = _config(num_lists=4, assign="hnsw")
  config.train.num_epochs = 1
  train.run(config, str(tmp_path))
  params = safetensors_io.load_codec(tmp_path).params
  centroids_LD = params.first_KD * params.std + params.mean_D[None]
  np.testing.assert_allclose(
    centroids_LD, np.load(tmp_path / "centroids.npy"), atol=1e-2
  )


@pytest.mark.parametrize("assign", ["blocks", "hnsw"])
def test_encoding_finds_the_lists_either_way(assign):
  params = make_params(**CASES["ivf"])
  codec = codecs.Codec("qinco", qinco, qinco.prepare(params), {}, "")
  assert codecs.takes_graph(codec, assign) == (assign == "hnsw")
  knobs = dict(beam_size=2, num_candidates=2)
  x_ND = vectors(50)
  encode_fn, _ = codecs.make_encode_fn(codec, knobs, assign=assign)
  np.testing.assert_array_equal(
    encode_fn(x_ND), qinco.encode(params, x_ND, **knobs)
  )
  np.testing.assert_allclose(
    codecs.centroids_of(codec),
    params.first_KD * params.std + params.mean_D[None],
    rtol=1e-6,
  )
