"""evaluate: its figures are what they are defined to be."""

import json
import pathlib

import numpy as np
import pytest

from configs import qinco2_s
from experiments import evaluate, train
from experiments.lib import cli, codecs
from vqjax.codecs import rq
from vqjax.data import formats
from vqjax.storage import codec_file

ROOT = pathlib.Path(__file__).parents[1]
SAMPLE = ROOT / "third_party" / "sample_sift"


def _config(module, **values):
  return cli.get_config(module.OPTIONS, **values)


def test_a_released_codec_by_error_and_with_queries_by_recall(caplog):
  caplog.set_level("INFO", "absl")
  golden = ROOT / "third_party" / "golden"
  values = {"codec": golden / "qinco2_tiny.pt"}
  values["data"] = f"{golden / 'qinco2_tiny.npz'}#x"
  (row,) = evaluate.run(_config(evaluate, **values))["rows"]
  assert (round(row["mse"], 3), row.get("1-recall@1")) == (176.963, None)
  assert "For recall add --queries=FILE." in caplog.text
  caplog.clear()
  values["queries"] = values["data"]
  (row,) = evaluate.run(_config(evaluate, **values))["rows"]
  assert row["1-recall@1"] == 0.97
  assert "For recall" not in caplog.text


def test_evaluate_agrees_with_its_definition(run_dir, tmp_path, caplog, capfd):
  caplog.set_level("INFO", "absl")
  output = str(tmp_path / "out" / "figures.json")
  result = evaluate.run(
    _config(evaluate, codec=run_dir, baselines="RQ", output=output)
  )
  assert json.loads(pathlib.Path(output).read_text()) == result
  row, baseline = result["rows"]
  # A row is said before the next one is begun, then all of them in a table.
  first, *_ = caplog.text.partition("encode us")
  assert f"{row['name']}: MSE x0.0001 {row['mse'] * 1e-4:.4f}" in first
  shown = capfd.readouterr()
  assert "train faiss RQ: 00:0" in shown.err
  assert "encode by RQ: 100%" in shown.err
  assert shown.out == ""
  codec = codecs.open_codec(run_dir)
  x_ND = formats.open_vectors(SAMPLE / "base.bvecs")[:500].astype(np.float32)
  xq_QD = formats.open_vectors(SAMPLE / "query.bvecs")[:50].astype(np.float32)
  codes_NM = codec.encode(x_ND)
  xhat_ND = np.asarray(codec.spec.decode(codec.tables, codes_NM))
  mse = ((x_ND - xhat_ND) ** 2).sum(axis=1).mean()
  assert row["mse"] == pytest.approx(mse, rel=1e-5)
  sq = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(axis=-1)
  true_Q = sq(xq_QD, x_ND).argmin(axis=1)
  order_QN = sq(xq_QD, xhat_ND).argsort(axis=1, kind="stable")
  for r in (1, 10, 100):
    hit = (order_QN[:, :r] == true_Q[:, None]).any(axis=1).mean()
    assert row[f"1-recall@{r}"] == pytest.approx(hit, abs=0.021)  # Ties.
  assert row["bytes"] == 3 * 4 / 8
  assert baseline["name"] == "faiss RQ"
  assert baseline["mse"] > 0


def test_evaluate_the_held_out_part(run_dir):
  result = evaluate.run(_config(evaluate, codec=run_dir, split="validation"))
  assert result["num_vectors"] == 200
  summary = json.loads((pathlib.Path(run_dir) / "summary.json").read_text())
  assert result["rows"][0]["mse"] == pytest.approx(
    summary["validation_mse"], rel=1e-4
  )
  assert "1-recall@1" not in result["rows"][0]


@pytest.mark.slow
def test_search_sizes_change_the_code(run_dir):
  mse = lambda **knobs: evaluate.run(
    _config(evaluate, codec=run_dir, num_vectors=300, **knobs)
  )["rows"][0]["mse"]
  greedy = mse(beam_size=1, num_candidates=1)
  assert mse(beam_size=8, num_candidates=8) < greedy
  assert mse(beam_size=8, num_joint_candidates=16) < greedy
  assert mse(num_steps=1) > mse()


@pytest.mark.slow
def test_own_files_are_evaluated_from_any_folder(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(900, 8)).astype(np.float16)
  np.save(tmp_path / "x.npy", x_ND)
  monkeypatch.chdir(tmp_path)
  config = qinco2_s.get_config("smoke")
  config.data.train = "x.npy"
  config.data.num_train = None
  train.run(config, "run")
  codec = str(tmp_path / "run")
  monkeypatch.chdir("/")
  with pytest.raises(ValueError, match="without a base: give --data=FILE"):
    evaluate.run(_config(evaluate, codec=codec))
  with pytest.raises(ValueError, match="--queries and --groundtruth need"):
    evaluate.run(_config(evaluate, codec=codec, queries="q.npy"))
  with pytest.raises(ValueError, match="may name PQ, OPQ, RQ, LSQ; got XX"):
    evaluate.run(_config(evaluate, codec=codec, baselines="PQ,xx"))
  data = str(tmp_path / "x.npy")
  result = evaluate.run(
    _config(evaluate, codec=codec, data=data, baselines="RQ")
  )
  assert [row["name"] for row in result["rows"]] == ["qinco2", "faiss RQ"]
  held_out = evaluate.run(_config(evaluate, codec=codec, split="validation"))
  assert held_out["num_vectors"] == 200


def test_inner_product_data_are_searched_by_it(tmp_path):
  rng = np.random.default_rng(0)
  files = {}
  for name, num in (("train", 900), ("base", 400), ("queries", 30)):
    scale = rng.uniform(0.2, 3, size=(num, 1))  # Norms matter.
    files[name] = str(tmp_path / f"{name}.npy")
    np.save(files[name], (scale * rng.normal(size=(num, 8))).astype("f4"))
  config = qinco2_s.get_config("smoke")
  config.data.update(files, num_train=None, num_base=None, num_queries=None)
  config.data.metric = "ip"
  train.run(config, tmp_path / "run")
  result = evaluate.run(_config(evaluate, codec=str(tmp_path / "run")))
  codec = codecs.open_codec(str(tmp_path / "run"))
  xb_ND, xq_QD = np.load(files["base"]), np.load(files["queries"])
  codes_NM = codec.encode(xb_ND)
  xhat_ND = np.asarray(codec.spec.decode(codec.tables, codes_NM))
  hit = (xq_QD @ xhat_ND.T).argmax(axis=1) == (xq_QD @ xb_ND.T).argmax(axis=1)
  assert result["rows"][0]["1-recall@1"] == pytest.approx(hit.mean(), abs=0.04)


@pytest.fixture
def given(tmp_path):
  """A codec of 4 codes for vectors of 6 dimensions, and such vectors."""
  rng = np.random.default_rng(0)
  params = rq.RQParams(rng.normal(size=(4, 8, 6)).astype(np.float32))
  codec_file.save_codec(tmp_path / "codec", "rq", params, info={})
  np.save(tmp_path / "x.npy", rng.normal(size=(50, 6)).astype(np.float32))
  return {"codec": str(tmp_path / "codec"), "data": str(tmp_path / "x.npy")}


@pytest.mark.parametrize("name", ["PQ", "OPQ"])
def test_parts_that_are_not_equal_are_refused_at_once(name, given, monkeypatch):
  run = lambda **values: evaluate.run(
    cli.get_config(evaluate.OPTIONS, **given, **values)
  )
  monkeypatch.delattr(evaluate, "_measure")
  message = f"^{name} cuts .* 6 dimensions cannot be cut into 4; leave {name}"
  with pytest.raises(ValueError, match=message):
    run(baselines=f"RQ,{name}")
  for baselines, num_steps in ((name, 3), ("RQ,LSQ", None)):
    with pytest.raises(ValueError, match="trained on what the codec was"):
      run(baselines=baselines, num_steps=num_steps)
