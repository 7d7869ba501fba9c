"""Which encoding rule is taken, and what each costs."""

import functools
import json
import shlex

import jax
import numpy as np
import pytest

import vqjax
from experiments import encode, tradeoff
from experiments.lib import cli, codecs
from tests import qinco_cases
from vqjax.codec import Codec
from vqjax.codecs import qinco
from vqjax.codecs.rule import SearchRule
from vqjax.data import datasets, formats
from vqjax.interop import faiss_lists
from vqjax.storage import codec_file

PUBLISHED = dict(num_candidates=10, beam_size=8)
KNOBS = qinco.CODEC.knobs


def _codec(preselect_fn):
  """A codec of 16 words without a network, so that its error is plain."""
  params = qinco_cases.make_params(num_codewords=16, dim=6)
  params = params.replace(out_TED=0 * params.out_TED)
  params = params.replace(preselect_TKD=preselect_fn(params.codebooks_TKD))
  return params, Codec("qinco", params)


def _vectors(num=320):
  return np.random.default_rng(0).normal(size=(num, 6)).astype(np.float32)


@pytest.mark.parametrize(
  ("assign", "num_graphs"),
  [("hnsw", 1), pytest.param("blocks", 0, marks=pytest.mark.slow)],
)
def test_an_encoder_makes_one_graph_of_the_centroids(
  assign, num_graphs, monkeypatch
):
  made, make_coarse = [], faiss_lists.make_coarse
  monkeypatch.setattr(
    faiss_lists,
    "make_coarse",
    lambda *args, **knobs: made.append(args) or make_coarse(*args, **knobs),
  )
  params = qinco_cases.make_params(num_codewords=16, dim=6, num_lists=20)
  codec = Codec("qinco", params, {"encode": PUBLISHED})
  x_ND = _vectors(50)
  blocks_fn, rule = codecs.make_encoder(codec, {"assign": assign}, x_ND)
  assert len(made) == num_graphs
  codes_NM = np.concatenate(list(blocks_fn()))
  want_NM = qinco.encode(params, x_ND, None, rule)
  assert (codes_NM == want_NM).mean() > 0.9  # A graph may miss the nearest.


def _config(**values):
  return cli.get_config(tradeoff.OPTIONS, **{"repeats": 1, **values})


def test_tradeoff_measures_both_rules(tmp_path):
  params, codec = _codec(lambda words_TKD: words_TKD)
  folder = tmp_path / "codec"
  codec_file.save_codec(folder, "qinco", params, info={})
  data = tmp_path / "x.fvecs"
  formats.write_vectors(data, _vectors(), dtype=np.float32)
  picture = tmp_path / "tradeoff.png"
  config = _config(
    codec=str(folder), data=str(data), num_candidates="2", beam_sizes="2,4",
    joint_factors="2", output=str(picture),
  )  # fmt: skip
  rows = tradeoff.run(config)["rows"]
  assert json.loads(picture.with_suffix(".json").read_text())["rows"] == rows
  assert picture.stat().st_size > 10_000
  assert [(r["rule"], r["B"], r["A"], r["C"]) for r in rows if r["B"] == 4] == [
    ("joint", 4, None, 8),
    ("published", 4, 2, None),
  ]
  assert [row["evaluations"] for row in rows if row["B"] == 4] == [8, 8]
  encode_fn = functools.partial(qinco.encode, rule=SearchRule(2, 4))
  codes_NM = jax.jit(encode_fn)(codec.tables, _vectors())
  error_ND = _vectors() - np.asarray(qinco.decode(codec.tables, codes_NM))
  (row,) = (r for r in rows if r["rule"] == "published" and r["B"] == 4)
  assert row["mse"] == pytest.approx((error_ND**2).sum(1).mean(), rel=1e-5)
  with pytest.raises(FileExistsError, match="tradeoff.png"):
    tradeoff.run(config)


def _saved(tmp_path, num=320):
  """A codec by the published rule and vectors, as options of a command."""
  params, _ = _codec(lambda codewords_TKD: codewords_TKD)
  info = {"encode": PUBLISHED, "metric": "l2"}
  codec_file.save_codec(tmp_path / "codec", "qinco", params, info=info)
  formats.write_vectors(tmp_path / "x.fvecs", _vectors(num), dtype=np.float32)
  return dict(codec=str(tmp_path / "codec"), data=str(tmp_path / "x.fvecs"))


def test_write_stores_the_recommended_rule(tmp_path, caplog):
  caplog.set_level("INFO", "absl")
  paths, before = _saved(tmp_path), codec_file.load_codec(tmp_path / "codec")
  asked = dict(
    num_candidates="2", beam_sizes="2", joint_factors="1",
    output=str(tmp_path / "t.png"), loss=1000.0, overwrite=True,
  )  # fmt: skip
  found = tradeoff.run(_config(**paths, **asked))["recommended"]
  assert (found["B"], found["C"]) == (2, 2)
  assert codec_file.load_codec(tmp_path / "codec").info == before.info
  tradeoff.run(_config(**paths, **asked, write=True))
  assert "B=2 C=2 from now on; it was A=10 B=8. To restore" in caplog.text
  codec = vqjax.load(tmp_path / "codec")
  assert codec.fingerprint == before.fingerprint
  assert codec.info["metric"] == "l2"
  out = str(tmp_path / "codes.npy")
  encode.run(cli.get_config(encode.OPTIONS, **paths, output=out))
  want_NM = codec.encode(_vectors(), beam_size=2, num_joint_candidates=2)
  np.testing.assert_array_equal(np.load(out), want_NM)
  tradeoff._store(tmp_path / "codec", codec, found, None)
  assert "has this rule already" in caplog.text
  # What the message says restores the rule.
  command = caplog.text.partition("python -c ")[2].partition("\n")[0]
  exec(shlex.split(command)[0], {})
  assert vqjax.load(tmp_path / "codec").rule.describe(KNOBS) == "A=10 B=8"


def test_write_needs_a_codec_of_its_own(tmp_path):
  paths = _saved(tmp_path) | {"codec": str(tmp_path / "x.pt")}
  config = _config(**paths, output=str(tmp_path / "t.png"), write=True)
  with pytest.raises(ValueError, match=r"x\.pt is not\. .*save\(FOLDER\)"):
    tradeoff.run(config)


def test_write_leaves_a_codec_that_was_trained_again(tmp_path):
  paths, (_, other) = _saved(tmp_path), _codec(lambda words_TKD: words_TKD / 2)
  before = other.params.replace(std=2 * other.params.std)
  row = {"A": 2, "B": 4, "C": None, "F": None}
  with pytest.raises(ValueError, match="another codec.*run the command again"):
    tradeoff._store(tmp_path / "codec", Codec("qinco", before), row, None)
  assert vqjax.load(paths["codec"]).rule.beam_size == 8


@pytest.mark.parametrize(("loss", "best"), [(0, 3), (0.2, 2), (5, 5)])
def test_recommended_are_the_fewest_evaluations_within_the_loss(loss, best):
  values = [(8, 1.2, 0), (16, 1.04, 0), (32, 1.001, 0), (64, 1.0, 0)]
  rows = [
    dict(evaluations=n, mse=mse, F=f, B=4)
    for n, mse, f in (*values, (16, 1.045, 0), (12, 1.04, 12))
  ]
  assert tradeoff.recommend(rows, loss) is rows[best]


def test_vectors_are_spread_over_the_file(tmp_path, monkeypatch):
  monkeypatch.setattr(tradeoff, "_FITTED", 30)
  paths = _saved(tmp_path)
  dataset = datasets.resolve(base=paths["data"])
  x_ND, others_ND = tradeoff._read(_config(num_vectors=70), dataset)
  assert (len(x_ND), len(others_ND)) == (70, 30)
  rows = {row.tobytes(): i for i, row in enumerate(_vectors())}
  at = [rows[row.tobytes()] for row in (*x_ND, *others_ND)]
  assert len(set(at)) == 100
  for part in at[:70], at[70:]:
    assert min(part) < 10
    assert max(part) > 310


def test_tradeoff_refuses_a_codec_without_preselection(tmp_path):
  params = qinco_cases.make_params(**qinco_cases.CASES["qinco1"])
  codec_file.save_codec(tmp_path / "codec", "qinco", params, info={})
  config = _config(codec=str(tmp_path / "codec"), output="x.png")
  with pytest.raises(ValueError, match="Only a QINCo2 has codewords pre-"):
    tradeoff.run(config)


@pytest.mark.parametrize(
  ("asked", "candidates"),
  [
    ({}, 0),
    (dict(rule="published"), 0),
    (dict(rule="joint"), 32),
    (dict(rule="joint", num_candidates=10), 0),
    (dict(rule="joint", num_joint_candidates=20), 20),
    (dict(num_joint_candidates=9), 9),
  ],
)
def test_a_codec_is_encoded_by_its_own_rule_unless_asked(
  tmp_path, asked, candidates, caplog
):
  caplog.set_level("INFO", "absl")
  params, _ = _codec(lambda words_TKD: words_TKD)
  info = {"encode": PUBLISHED}
  codec_file.save_codec(tmp_path / "codec", "qinco", params, info=info)
  formats.write_vectors(tmp_path / "x.fvecs", _vectors(100), dtype=np.float32)
  config = cli.get_config(encode.OPTIONS)
  config.update(
    codec=str(tmp_path / "codec"), data=str(tmp_path / "x.fvecs"),
    output=str(tmp_path / "codes.npy"), **asked,
  )  # fmt: skip
  encode.run(config)
  about = json.loads((tmp_path / "codes.npy.json").read_text())
  assert about["encode"]["num_joint_candidates"] == candidates
  is_told = "--rule=joint (B=12 C=32) sends 2.5 times fewer" in caplog.text
  assert is_told == (not asked)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(output="x.txt"), "must end in .png, .svg or .pdf; got x.txt"),
    (dict(repeats=0), "--repeats must lie between 1"),
    (dict(beam_sizes="4,"), "--beam_sizes must be numbers from 1 on"),
    (dict(joint_factors="0"), "--joint_factors must be numbers from 1 on"),
    (
      dict(beam_sizes="64"),
      "the codec has 16 codewords, and no beam may be wider",
    ),
  ],
)
def test_tradeoff_refuses_before_any_work(tmp_path, values, message):
  params, _ = _codec(lambda words_TKD: words_TKD)
  codec_file.save_codec(tmp_path / "codec", "qinco", params, info={})
  formats.write_vectors(tmp_path / "x.fvecs", _vectors(), dtype=np.float32)
  config = _config(
    codec=str(tmp_path / "codec"), data=str(tmp_path / "x.fvecs"),
    output=str(tmp_path / "x.png"),
  )  # fmt: skip
  config.update(values)
  with pytest.raises(ValueError, match=message):
    tradeoff.run(config)
  assert not (tmp_path / "x.png").exists()


@pytest.mark.slow
def test_tradeoff_measures_the_ranker_of_a_deep_network(tmp_path):
  params = qinco_cases.make_params(num_codewords=16, dim=6, num_blocks=4)
  codec_file.save_codec(tmp_path / "codec", "qinco", params, info={})
  formats.write_vectors(tmp_path / "x.fvecs", _vectors(), dtype=np.float32)
  config = _config(
    codec=str(tmp_path / "codec"), data=str(tmp_path / "x.fvecs"),
    num_vectors=200, num_candidates="2", beam_sizes="6", joint_factors="2",
    output=str(tmp_path / "tradeoff.png"), write=True, loss=50.0,
  )  # fmt: skip
  ranker, *others = tradeoff.run(config)["rows"][::-1]
  assert {row["rule"] for row in others} == {"published", "joint"}
  sizes = [ranker[name] for name in ("rule", "B", "C", "F", "evaluations")]
  assert sizes == ["ranker", 6, 32, 6, 6]
  codec = vqjax.load(tmp_path / "codec")
  assert codec.rule.describe(KNOBS) == "B=6 C=32 F=6"
  assert codec.encode(_vectors()[:20]).shape == (20, codec.num_codes)
