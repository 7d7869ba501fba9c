"""Lists of an IVF training run: from a file or k-means, kept for resuming."""

import importlib

import numpy as np
import pytest

import vqjax
from experiments import build_index, train
from experiments.lib import cli
from tests import oracles
from tests.qinco_cases import CASES, make_params, vectors
from vqjax import ivf_lists
from vqjax.codec import Codec
from vqjax.codecs import additive, qinco
from vqjax.codecs.rule import SearchRule
from vqjax.data import batches
from vqjax.interop import (
  faiss_assign,
  faiss_files,
  faiss_graph,
  faiss_lists,
)
from vqjax.storage import codec_file


def _config(**ivf):
  config = importlib.import_module("configs.ivf_qinco2_xs").get_config("smoke")
  config.ivf.update(ivf)
  return config


@pytest.fixture(name="x_ND")
def _x_ND():
  return np.random.default_rng(0).normal(size=(400, 6)).astype(np.float32)


def test_kmeans_finds_the_centroids(x_ND, tmp_path):
  config = _config(num_lists=5)
  centroids_LD, vectors = ivf_lists.prepare(config, tmp_path, x_ND, 300)
  assert centroids_LD.shape == (5, 6)
  got_ND, lists_N = batches.split_lists(vectors)
  np.testing.assert_array_equal(got_ND, x_ND)
  np.testing.assert_array_equal(lists_N, oracles.nearest(x_ND, centroids_LD))
  # Better than five of the vectors themselves.
  error = lambda c_LD: np.sum((x_ND - c_LD[oracles.nearest(x_ND, c_LD)]) ** 2)
  assert error(centroids_LD) < 0.95 * error(x_ND[:5])


def test_a_resumed_run_keeps_its_lists(x_ND, tmp_path, monkeypatch):
  config = _config(num_lists=5)
  first = ivf_lists.prepare(config, tmp_path, x_ND, 300)
  monkeypatch.delattr(ivf_lists, "_assign")
  monkeypatch.delattr(ivf_lists, "_fit")
  again = ivf_lists.prepare(config, tmp_path, x_ND, 300)
  np.testing.assert_array_equal(again[0], first[0])
  np.testing.assert_array_equal(again[1].lists_N, first[1].lists_N)


@pytest.mark.parametrize("is_begun", [False, True])
@pytest.mark.parametrize("name", ["lists.npy", "lists.npy.json"])
def test_a_flipped_bit_is_seen(x_ND, tmp_path, name, is_begun):
  config = _config(num_lists=5, num_iterations=2)
  want_N = np.array(ivf_lists.prepare(config, tmp_path, x_ND, 300)[1].lists_N)
  data = bytearray((tmp_path / name).read_bytes())
  data[-8 if name.endswith("npy") else 0] ^= 1
  (tmp_path / name).write_bytes(data)
  if is_begun:
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(ValueError, match="lists.npy.*Or remove .*lists.npy"):
      ivf_lists.prepare(config, tmp_path, x_ND, 300)
    for file in tmp_path.glob("lists.npy*"):
      file.unlink()
  again = ivf_lists.prepare(config, tmp_path, x_ND, 300)
  np.testing.assert_array_equal(again[1].lists_N, want_N)


def test_lists_of_unknown_origin_are_refused(x_ND, tmp_path):
  config = _config(num_lists=5, num_iterations=2)
  want = ivf_lists.prepare(config, tmp_path, x_ND, 300)[1]
  want_N = np.array(want.lists_N)
  np.save(tmp_path / "lists.npy", np.full(400, 4, np.int32))
  (tmp_path / "lists.npy.json").unlink()
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(ValueError, match="lists.npy .* without a description"):
    ivf_lists.prepare(config, tmp_path, x_ND, 300)
  (tmp_path / "checkpoints").rmdir()
  again = ivf_lists.prepare(config, tmp_path, x_ND, 300)[1]
  np.testing.assert_array_equal(again.lists_N, want_N)


def _other_seed(config):
  config.seed = 1


def _other_assign(config):
  config.ivf.assign = "hnsw"


def _other_number(config):
  config.ivf.num_lists = 6


def _other_data(config):
  del config


@pytest.mark.parametrize(
  ("change", "named"),
  [
    (_other_seed, "seed=0, now it is 1"),
    (_other_assign, "assign=auto, now it is hnsw"),
    (_other_number, "num_lists=5, now it is 6"),
    (_other_data, "num_vectors=400, now it is 399"),
  ],
)
def test_lists_of_something_else_are_made_anew(x_ND, tmp_path, change, named):
  config = _config(num_lists=5, num_iterations=2)
  ivf_lists.prepare(config, tmp_path, x_ND, 300)
  np.save(tmp_path / "lists.npy", np.full(400, 4, np.int32))
  change(config)
  x_ND = x_ND[1:] if change is _other_data else x_ND
  (tmp_path / "checkpoints").mkdir()
  with pytest.raises(ValueError, match=f"with {named}, and the training has"):
    ivf_lists.prepare(config, tmp_path, x_ND, 300)
  (tmp_path / "checkpoints").rmdir()
  got = ivf_lists.prepare(config, tmp_path, x_ND, 300)
  want = ivf_lists.prepare(config, tmp_path / "new", x_ND, 300)
  np.testing.assert_array_equal(got[0], want[0])
  np.testing.assert_array_equal(got[1].lists_N, want[1].lists_N)


def test_a_changed_file_of_centroids_is_read_again(x_ND, tmp_path):
  config = _config(num_lists=0, centroids=str(tmp_path / "c.npy"))
  for first in (0, 50):
    np.save(tmp_path / "c.npy", x_ND[first : first + 7])
    centroids_LD, vectors = ivf_lists.prepare(config, tmp_path, x_ND, 300)
    np.testing.assert_array_equal(centroids_LD, x_ND[first : first + 7])
    np.testing.assert_array_equal(
      vectors.lists_N, oracles.nearest(x_ND, centroids_LD)
    )


def test_so_many_lists_that_memory_would_not_do_are_refused(tmp_path):
  x_ND = np.broadcast_to(np.float32(0), (70_000, 2))
  with pytest.raises(
    ValueError,
    match=r"vqjax ivf_centroids .*--num_vectors=69000 "
    r"--num_centroids=65537 .*--config.ivf.centroids=centroids.npy",
  ):
    ivf_lists.prepare(_config(num_lists=65537), tmp_path, x_ND, 69_000)


def test_a_search_that_does_not_fit_is_refused_before_kmeans(tmp_path):
  config = _config(num_lists=4)
  config.model.beam_size = 10_000
  with pytest.raises(ValueError, match="In config.model: beam_size must lie"):
    train.run(config, str(tmp_path))
  assert not (tmp_path / "centroids.npy").exists()


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
  assign_fn, block_size = faiss_assign.make_assign_fn(x_ND[:40], how)
  blocks = batches.map_blocks(assign_fn, x_ND, block_size=min(block_size, 99))
  lists_N = np.concatenate([lists_N for _, lists_N in blocks])
  assert lists_N.dtype == np.int32
  share = (lists_N == oracles.nearest(x_ND, x_ND[:40])).mean()
  assert share > 0.95 if how == "hnsw" else share == 1
  with pytest.raises(ValueError, match="auto, blocks, hnsw; got 'tree'"):
    faiss_assign.make_assign_fn(x_ND, "tree")


@pytest.mark.slow
def test_the_codec_has_the_centroids_of_one_graph(tmp_path, monkeypatch):
  made, make_fn = [], faiss_lists.make_coarse
  counted = lambda *args, **knobs: made.append(args) or make_fn(*args, **knobs)
  monkeypatch.setattr(faiss_lists, "make_coarse", counted)
  monkeypatch.setattr(faiss_assign, "_MANY_LISTS", 1)  # Then auto is the graph.
  config = _config(num_lists=4)
  config.train.num_epochs = 1
  train.run(config, str(tmp_path))
  assert len(made) == 1  # None to find the lists of the held-out again.
  codec = vqjax.load(tmp_path)
  codec.encode(vectors(9, codec.dim), assign="hnsw")
  assert len(made) == 1  # The run folder has it.
  params = codec_file.load_codec(tmp_path).params
  centroids_LD = params.first_KD * params.std + params.mean_D[None]
  np.testing.assert_allclose(
    centroids_LD, np.load(tmp_path / "centroids.npy"), atol=1e-2
  )


@pytest.mark.parametrize("assign", ["blocks", "hnsw"])
def test_encoding_finds_the_lists_either_way(assign):
  params = make_params(**CASES["ivf"])
  codec = Codec("qinco", params)
  assert codec.takes_graph(assign) == (assign == "hnsw")
  knobs = dict(beam_size=2, num_candidates=2)
  x_ND = vectors(50)
  encode_fn, _ = codec.encoder(codec.rule.replace(**knobs), assign)
  np.testing.assert_array_equal(
    encode_fn(x_ND), qinco.encode(params, x_ND, rule=SearchRule(**knobs))
  )
  np.testing.assert_allclose(
    codec.centroids,
    params.first_KD * params.std + params.mean_D[None],
    rtol=1e-6,
  )


def test_the_graph_is_made_once_and_kept(tmp_path, monkeypatch):
  made, make_fn = [], faiss_lists.make_coarse
  counted = lambda *args, **knobs: made.append(args) or make_fn(*args, **knobs)
  monkeypatch.setattr(faiss_lists, "make_coarse", counted)
  codec = Codec("qinco", make_params(**CASES["ivf"]))
  codec.with_rule(beam_size=2, num_candidates=2).save(tmp_path / "run")
  x_ND = vectors(300)
  codec = vqjax.load(tmp_path / "run")
  want_NM = codec.encode(x_ND, assign="hnsw")
  codec.encode(x_ND, assign="hnsw")
  assert len(made) == 1  # Compiled once, but kept nowhere: no run folder.
  np.save(tmp_path / "run" / "centroids.npy", codec.centroids + 1e-7)
  for _ in range(2):
    codec = vqjax.load(tmp_path / "run")
    found_NM = codec.encode(x_ND, assign="hnsw")
    np.testing.assert_array_equal(found_NM, want_NM)
  assert len(made) == 2
  config = cli.get_config(build_index.OPTIONS, coarse="hnsw")
  words = additive.AdditiveParams(np.ones((2, 4, codec.dim), np.float32))
  build_fn = lambda: build_index._empty_index(
    config, vqjax.load(tmp_path / "run"), words
  )
  one = faiss_lists.centroids_of(build_fn())
  assert len(made) == 2
  graph = tmp_path / "run" / faiss_graph.NAME
  other = make_fn(codec.centroids + 1)  # Not those of the codec.
  faiss_files.save(other, graph, {}, kind=faiss_graph._KIND, overwrite=True)
  two = faiss_lists.centroids_of(build_fn())
  assert len(made) == 3
  np.testing.assert_allclose(one, codec.centroids + 2, rtol=1e-5)
  np.testing.assert_array_equal(one, two)
  graph.write_bytes(graph.read_bytes()[:-1])
  with pytest.raises(ValueError, match="centroids.graph.faiss"):
    vqjax.load(tmp_path / "run").encode(x_ND, assign="hnsw")
