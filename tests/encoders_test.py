"""When a ranker is taken, and what the commands make of one."""

import functools
import json
import shlex

import jax
import numpy as np
import pytest

import vqjax
from experiments import bench as bench_command
from experiments import encode
from experiments import evaluate as evaluate_command
from experiments.lib import bench_subjects, cli, codecs
from tests import qinco_cases
from vqjax.codec import Codec
from vqjax.codecs import qinco, qinco_ranker, rq
from vqjax.codecs.rule import SearchRule
from vqjax.data import formats
from vqjax.storage import codec_file

KNOBS = dict(beam_size=6, num_joint_candidates=24)


def _params(is_plain=False, **sizes):
  """A codec of 16 words; of a plain one a ranker can know all."""
  if not is_plain:
    return qinco_cases.make_params(num_codewords=16, **sizes)
  params = qinco_cases.make_params(num_codewords=16, hidden_dim=48, **sizes)
  return params.replace(
    out_TED=0 * params.out_TED, preselect_TKD=0.9 * params.codebooks_TKD
  )


def _codec(params, **info):
  return Codec("qinco", params, info)


def _write(folder, params, num):
  """A codec and a file of vectors, as options of a command."""
  codec_file.save_codec(
    folder / "codec", "qinco", params, info={"encode": KNOBS}
  )
  x_ND = qinco_cases.vectors(num)
  formats.write_vectors(folder / "x.fvecs", x_ND, dtype=np.float32)
  paths = dict(codec=str(folder / "codec"), data=str(folder / "x.fvecs"))
  return x_ND, paths


def _encode(folder, paths, name="codes.npy", **asked):
  config = cli.get_config(
    encode.OPTIONS, **paths, output=str(folder / name), **asked
  )
  encode.run(config)
  return np.load(folder / name), json.loads(
    (folder / f"{name}.json").read_text()
  )


def _rank(folder, x_ND):
  """Fits a ranker to some vectors and stores it with the codec."""
  codec = vqjax.load(folder / "codec").with_ranker(x_ND[:32], num_ranked=9)
  codec.with_rule(num_ranked=0).save(folder / "codec", overwrite=True)


def test_a_stored_ranker_is_the_one_that_encodes(tmp_path):
  params = _params(is_plain=True, num_blocks=4)
  x_ND, paths = _write(tmp_path, params, 200)
  message = "num_ranked=9 needs a ranker, which .* vqjax tradeoff .*--write"
  with pytest.raises(ValueError, match=message):
    _encode(tmp_path, paths, num_ranked=9)
  _rank(tmp_path, x_ND)
  plain_NM, about = _encode(tmp_path, paths)
  assert "ranker" not in about["encode"]
  codes_NM, about = _encode(tmp_path, paths, "r.npy", num_ranked=9)
  tables = qinco_ranker.fit(qinco.prepare(params), x_ND[:32], **KNOBS)
  assert about["encode"]["ranker"] == codec_file.fingerprint(
    tables.steps.ranker
  )
  rule = SearchRule(**KNOBS, num_ranked=9)
  want_NM = jax.jit(functools.partial(qinco.encode, rule=rule))(tables, x_ND)
  assert (codes_NM == want_NM).mean() > 0.99  # Ties, to rounding.
  mse = lambda codes_NM: float(
    np.mean((x_ND - np.asarray(qinco.decode(params, codes_NM))) ** 2)
  )
  assert mse(codes_NM) == pytest.approx(mse(plain_NM), rel=0.01)
  # The command that is written down makes the same codes.
  words = shlex.split(about["command"])
  asked = dict(word[2:].split("=") for word in words if word[:2] == "--")
  assert {"num_ranked", "num_joint_candidates", "beam_size"} <= set(asked)


@pytest.mark.slow
def test_lists_found_by_a_graph_and_fewer_steps():
  params = _params(is_plain=True, num_lists=20)
  codec = _codec(params, encode=dict(KNOBS))
  x_ND = qinco_cases.vectors(300)
  codec = codec.with_ranker(x_ND, num_ranked=8)
  asked = dict(num_steps=2, assign="hnsw")
  blocks_fn, rule = codecs.make_encoder(codec, asked, x_ND)
  codes_NM = next(blocks_fn(rows=range(50)))
  assert codec.code_sizes(rule) == (20, 16, 16)
  encode_fn = functools.partial(
    qinco.encode, rule=SearchRule(**KNOBS, num_steps=2)
  )
  want_NM = jax.jit(encode_fn)(params, x_ND[:50])
  assert (codes_NM == want_NM).mean() > 0.9  # A graph may miss the nearest.


@pytest.mark.parametrize("asked", [{}, dict(num_ranked=0)])
def test_folders_begun_without_a_ranker_are_gone_on_with(tmp_path, asked):
  x_ND, paths = _write(tmp_path, _params(), 100)
  _rank(tmp_path, x_ND)
  folder = dict(output=str(tmp_path / "codes"))
  run = lambda **more: encode.run(
    cli.get_config(encode.OPTIONS, **paths, **folder, **more)
  )
  run(shard="0/2")
  run(shard="1/2", **asked)
  with pytest.raises(ValueError, match="their encode.num_ranked is None"):
    run(shards=2, num_ranked=7)


def test_evaluate_measures_a_ranker_that_is_asked_for(tmp_path):
  x_ND, paths = _write(tmp_path, _params(is_plain=True), 600)
  _rank(tmp_path, x_ND)
  config = cli.get_config(evaluate_command.OPTIONS, **paths, num_ranked=8)
  (row,) = evaluate_command.run(config)["rows"]
  assert row["num_ranked"] == 8
  config = cli.get_config(evaluate_command.OPTIONS, **paths)
  (plain,) = evaluate_command.run(config)["rows"]
  assert row["mse"] == pytest.approx(plain["mse"], rel=1e-3)
  assert "num_ranked" not in plain


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    (dict(num_ranked=5), "num_ranked must lie between 6 and 24, got 5"),
    (dict(num_ranked=25), "must lie between 6 and 24, got 25"),
    (dict(num_candidates=3, num_ranked=8), "set num_joint_candidates too"),
  ],
)
def test_encode_refuses(tmp_path, asked, message):
  _, paths = _write(tmp_path, _params(), 100)
  with pytest.raises(ValueError, match=message):
    _encode(tmp_path, paths, **asked)
  assert not (tmp_path / "codes.npy").exists()


def test_a_ranker_means_nothing_to_rq(tmp_path):
  x_ND = qinco_cases.vectors(50)
  params = rq.fit(jax.random.key(0), x_ND, num_codes=2, codebook_size=8)
  codec = Codec("rq", params)
  with pytest.raises(ValueError, match="--num_ranked means nothing to a rq"):
    codecs.search_rule(codec, dict(num_ranked=8))
  with pytest.raises(ValueError, match="--rule means nothing to a rq"):
    codecs.search_rule(codec, dict(rule="joint"))
  with pytest.raises(ValueError, match="joint or published; got 'best'"):
    codecs.search_rule(_codec(_params()), dict(rule="best"))


def test_bench_measures_a_ranker_beside_the_others():
  subject = bench_subjects.Subject(
    "x", _codec(_params(), encode=dict(KNOBS)), qinco_cases.vectors(9)
  )
  config = cli.get_config(
    bench_command.OPTIONS, num_joint_candidates=48, num_ranked=6
  )
  published, own, ranked = bench_subjects.searches(subject, config)
  assert published.num_joint_candidates == 0
  assert own == SearchRule(**KNOBS)
  assert ranked == own.replace(num_joint_candidates=48, num_ranked=6)
  sizes = bench_subjects.sizes(subject.codec, ranked)
  assert (sizes["B"], sizes["C"], sizes["F"]) == (6, 48, 6)
