"""Commands with metric=cosine against cosines in float64."""

import json

import faiss
import numpy as np
import pytest

import vqjax
from configs import rq as rq_config
from experiments import (
  build_index,
  encode,
  evaluate,
  export,
  ivf_centroids,
  search,
  train,
)
from experiments.lib import cli, codecs
from vqjax.interop import searchers

D, NUM, Q = 8, 400, 40
pytestmark = pytest.mark.usefixtures("one_thread")


def _vectors(num, seed):
  """Around few directions, of lengths that differ by thousands."""
  rng = np.random.default_rng(seed)
  of_ND = np.random.default_rng(99).normal(size=(12, D))[
    rng.integers(12, size=num)
  ]
  x_ND = of_ND + 0.4 * rng.normal(size=(num, D))
  return (x_ND * np.exp(rng.normal(scale=3, size=(num, 1)))).astype(np.float32)


def _cosines(a_QD, b_ND):
  unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)
  return unit(np.asarray(a_QD, float)) @ unit(np.asarray(b_ND, float)).T


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
  """Files, a codec that was trained on them, and their true neighbours."""
  folder = tmp_path_factory.mktemp("cosine")
  xt_ND, x_ND, xq_QD = _vectors(500, 1), _vectors(NUM, 2), _vectors(Q, 3)
  for name, values in (("t", xt_ND), ("x", x_ND), ("q", xq_QD)):
    np.save(folder / f"{name}.npy", values)
  true_QN = (-_cosines(xq_QD, x_ND)).argsort(axis=1, kind="stable")
  np.save(folder / "gt.npy", true_QN[:, :20])
  config = rq_config.get_config("smoke")
  config.data.update(
    train=str(folder / "t.npy"), metric="cosine", num_train=500
  )
  config.model.num_codes = 4
  train.run(config, str(folder / "codec"))
  return folder, x_ND, xq_QD, true_QN


def _run(command, **values):
  return command.run(cli.get_config(command.OPTIONS, **values))


def _flags(folder, *names):
  paths = {
    "codec": "codec",
    "data": "x.npy",
    "queries": "q.npy",
    "groundtruth": "gt.npy",
  }
  return {name: str(folder / paths[name]) for name in names}


@pytest.mark.parametrize("has_truth", [False, True])
def test_evaluate_finds_what_cosines_find(made, has_truth):
  folder, x_ND, xq_QD, true_QN = made
  names = ["codec", "data", "queries"] + ["groundtruth"] * has_truth
  (row,) = _run(evaluate, **_flags(folder, *names))["rows"]
  codec = codecs.open_codec(str(folder / "codec"))
  assert codec.info["metric"] == "cosine"
  unit_ND = x_ND / np.linalg.norm(x_ND.astype(float), axis=1, keepdims=True)
  unit_ND = unit_ND.astype(np.float32)
  codes_NM = codec.encode(x_ND, beam_size=5)
  xhat_ND = np.asarray(codec.spec.decode(codec.tables, codes_NM), float)
  assert row["mse"] == pytest.approx(
    np.square(unit_ND - xhat_ND).sum(axis=1).mean(), rel=1e-4
  )
  # A query of another length ranks just as well.
  xhat_ND /= np.linalg.norm(xhat_ND, axis=1, keepdims=True)
  score_QN = xq_QD.astype(float) @ xhat_ND.T
  best_Q = np.take_along_axis(score_QN, true_QN[:, :1], axis=1)
  rank_Q = (score_QN > best_Q + 1e-6 * np.abs(best_Q)).sum(axis=1)
  for r in (1, 10, 100):
    assert row[f"1-recall@{r}"] == pytest.approx(np.mean(rank_Q < r), abs=0.03)
  assert row["1-recall@10"] > 0.5


def test_a_ground_truth_of_another_metric_is_refused(made, tmp_path):
  folder, x_ND, xq_QD, _ = made
  ids_QN = (-(xq_QD.astype(float) @ x_ND.T)).argsort(axis=1)[:, :10]
  np.save(tmp_path / "ip.npy", ids_QN)
  flags = _flags(folder, "codec", "data", "queries")
  with pytest.raises(
    ValueError, match=r"\(cosine\) .* right for the metric ip"
  ):
    _run(evaluate, **flags, groundtruth=str(tmp_path / "ip.npy"))


def test_the_index_is_searched_by_queries_of_length_1(made, tmp_path):
  folder, x_ND, xq_QD, true_QN = made
  path = str(tmp_path / "index.faiss")
  flags = _flags(folder, "codec", "data")
  _run(build_index, **flags, output=path, metric="cosine")
  info = json.loads((tmp_path / "index.faiss.json").read_text())
  assert (info["metric"], info["is_cosine"]) == ("l2", True)
  searcher = searchers.open_searcher(flags["codec"], path)
  found = searcher.search(xq_QD, 10, num_network=50)
  again = searcher.search(xq_QD * 1000, 10, num_network=50)
  np.testing.assert_array_equal(found.ids_QR, again.ids_QR)
  np.testing.assert_allclose(found.distances_QR, again.distances_QR, atol=1e-5)
  hit = (found.ids_QR == true_QN[:, :1]).any(axis=1).mean()
  result = _run(
    search,
    **_flags(folder, "codec", "data", "queries", "groundtruth"),
    index=path,
    output=str(tmp_path / "search.json"),
    num_network="50",
    rounds=1,
  )
  (point,) = result["points"]
  assert point["recall"]["1-recall@10"] == pytest.approx(hit)
  assert hit > 0.5
  with pytest.raises(ValueError, match="queries: row 1 is a vector of zeros"):
    searcher.search(np.stack([xq_QD[0], 0 * xq_QD[0]]))


@pytest.mark.parametrize("metric", [None, "cosine", "l2"])
def test_an_exported_index_makes_queries_of_length_1(made, tmp_path, metric):
  folder, _, xq_QD, true_QN = made
  path = str(tmp_path / "rq.faiss")
  flags = _flags(folder, "codec", "data")
  record = _run(export, **flags, output=path, metric=metric)
  assert record["metric"] == (metric or "cosine")
  index = faiss.read_index(path)
  values_QR, ids_QR = index.search(xq_QD, 10)
  scaled_QR, _ = index.search(xq_QD * 1000, 10)
  np.testing.assert_allclose(values_QR, scaled_QR, atol=1e-5)
  assert (ids_QR == true_QN[:, :1]).any(axis=1).mean() > 0.5


def test_zeros_are_refused_by_their_row_in_every_command(made, tmp_path):
  folder, x_ND, *_ = made
  x_ND = x_ND.copy()
  x_ND[33] = 0
  np.save(tmp_path / "zero.npy", x_ND)
  data, codec = str(tmp_path / "zero.npy"), str(folder / "codec")
  match = r"zero\.npy.*: row 33 is a vector of zeros"
  for command, more in (
    (evaluate, {}),
    (encode, {"output": str(tmp_path / "codes.npy")}),
    (build_index, {"output": str(tmp_path / "i.faiss")}),
    (export, {"output": str(tmp_path / "e.faiss")}),
  ):
    with pytest.raises(ValueError, match=match):
      _run(command, codec=codec, data=data, **more)
  with pytest.raises(ValueError, match=match):
    _run(
      ivf_centroids,
      data=data,
      num_centroids=4,
      metric="cosine",
      output=str(tmp_path / "c.npy"),
    )
  config = rq_config.get_config("smoke")
  config.data.update(train=data, metric="cosine", num_train=NUM)
  with pytest.raises(ValueError, match=match):
    train.run(config, str(tmp_path / "run"))


def test_codes_are_verified_as_they_were_made(made, tmp_path):
  folder, *_ = made
  flags = _flags(folder, "codec", "data") | {"output": str(tmp_path / "codes")}
  _run(encode, **flags, shards=2)
  assert _run(encode, **flags, verify=True)["shape"] == (NUM, 4)


def test_centroids_are_of_vectors_of_length_1(made, tmp_path):
  folder, x_ND, *_ = made
  path = tmp_path / "c.npy"
  values = dict(data=str(folder / "x.npy"), num_centroids=6)
  _run(ivf_centroids, **values, metric="cosine", output=str(path))
  centroids_LD = np.load(path)
  assert np.linalg.norm(centroids_LD, axis=1).max() <= 1 + 1e-6
  assert np.linalg.norm(centroids_LD, axis=1).min() > 0.5
  with pytest.raises(ValueError, match="--metric must be one of"):
    _run(ivf_centroids, **values, metric="hamming", output=str(path) + ".npy")


def test_the_library_makes_vectors_of_length_1(made):
  folder, x_ND, xq_QD, true_QN = made
  codec = vqjax.load(folder / "codec")
  codes_NM = codec.encode(x_ND)
  np.testing.assert_array_equal(codes_NM, codec.encode(folder / "x.npy"))
  long_ND = x_ND * np.linspace(0.1, 9, NUM, dtype=np.float32)[:, None]
  assert (codes_NM != codec.encode(long_ND)).any(axis=1).mean() < 0.02  # Ties.
  flags = _flags(folder, "codec", "data", "queries")
  (row,) = _run(evaluate, **flags)["rows"]
  for true_ids in (None, true_QN[:, :5]):
    found = codec.evaluate(x_ND, queries=xq_QD, true_ids=true_ids)
    for name in ("mse", "1-recall@1", "1-recall@10"):
      assert found[name] == pytest.approx(row[name], rel=1e-4)
  with pytest.raises(ValueError, match="true_ids must .*counted from 1"):
    codec.evaluate(x_ND, queries=xq_QD, true_ids=true_QN[:, :5] + 1)
  with pytest.raises(ValueError, match="row 2 is a vector of zeros"):
    codec.encode(x_ND * (np.arange(NUM) != 2)[:, None])
