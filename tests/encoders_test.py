"""When a scout is taken, and what the commands make of one."""

import functools
import json
import shlex

import jax
import numpy as np
import pytest

from experiments import bench as bench_command
from experiments import encode
from experiments import evaluate as evaluate_command
from experiments.lib import bench_subjects, cli, codecs, encoders
from tests import qinco_cases
from vqjax.codecs import qinco, qinco_scout, rq
from vqjax.data import formats
from vqjax.storage import codec_file

KNOBS = dict(beam_size=6, num_joint_candidates=24)


def _params(is_plain=False, **sizes):
  """A codec of 16 words; of a plain one a scout can know all."""
  if not is_plain:
    return qinco_cases.make_params(num_words=16, **sizes)
  params = qinco_cases.make_params(num_words=16, hidden_dim=48, **sizes)
  return params.replace(
    out_TED=0 * params.out_TED, preselect_TKD=0.9 * params.codebooks_TKD
  )


def _codec(params, **info):
  tables = jax.jit(qinco.prepare)(params)
  return codecs.Codec("qinco", qinco, tables, info, "")


@pytest.mark.parametrize(
  ("num_blocks", "knobs", "sizes"),
  [
    (4, KNOBS, [(48, 6), (48, 7)]),
    (5, KNOBS, [(48, 6), (48, 7)]),
    (4, dict(KNOBS, num_joint_candidates=90), [(96, 6), (96, 7)]),
    (4, dict(KNOBS, num_joint_candidates=7), [(14, 6)]),
    (4, dict(KNOBS, num_joint_candidates=6), []),  # Nothing would be dropped.
    (3, KNOBS, []),
    (4, dict(KNOBS, num_joint_candidates=0, num_candidates=4), []),
  ],
)
def test_deep_networks_are_worth_a_scout(num_blocks, knobs, sizes):
  codec = _codec(_params(num_blocks=num_blocks))
  names = "num_joint_candidates", "num_finalists"
  got = encoders.scout_rules(codec, knobs)
  assert [tuple(rule[name] for name in names) for rule in got] == sizes
  assert all(rule["beam_size"] == knobs["beam_size"] for rule in got)


def test_other_codecs_have_no_scout():
  x_ND = qinco_cases.vectors(50)
  params = rq.fit(jax.random.key(0), x_ND, num_codes=2, codebook_size=8)
  codec = codecs.Codec("rq", rq, rq.prepare(params), {}, "")
  assert encoders.scout_rules(codec, KNOBS) == []


def test_a_scout_is_taken_where_it_is_as_good():
  codec = _codec(_params(is_plain=True, num_blocks=4))
  x_ND = qinco_cases.vectors(128 * 32)
  got, knobs = encoders.try_scout(codec, KNOBS, x_ND, num_vectors=32)
  sizes = dict(beam_size=6, num_joint_candidates=48)
  assert knobs == {**sizes, "num_finalists": 6}
  rows, others = encoders.sample_rows(len(x_ND), 32)
  assert rows[0] == 0
  assert others[-1] == len(x_ND) - 1  # All of the file has a say.
  assert len(rows) == len(others) == 32
  assert (others - rows > 0).all()
  assert (others - rows < 128).all()
  want = qinco_scout.fit(codec.tables, x_ND[rows], **sizes).scout
  np.testing.assert_array_equal(got.tables.scout.words_TKU, want.words_TKU)


def test_a_scout_is_refused_where_it_is_worse():
  codec, x_ND = _codec(_params(num_blocks=4)), qinco_cases.vectors(128 * 32)
  exhaustive = dict(KNOBS, num_joint_candidates=96)
  got, knobs = encoders.try_scout(codec, exhaustive, x_ND, num_vectors=32)
  assert got is codec
  assert knobs == exhaustive


@pytest.mark.parametrize("num_rows", [1, 40, 63, 64])
def test_small_files_are_fitted_to_as_a_whole(num_rows):
  rows, others = encoders.sample_rows(num_rows, 32)
  assert len(rows) == len(set(rows)) == min(num_rows, 32)
  assert rows.max() < num_rows
  assert len(others) == (32 if num_rows == 64 else 0)


@pytest.mark.parametrize(("num_steps", "is_taken"), [(1, False), (2, True)])
def test_no_scout_where_no_network_is_left(num_steps, is_taken):
  codec = _codec(_params(is_plain=True, num_blocks=4))
  x_ND = qinco_cases.vectors(128 * 32)
  _, knobs = encoders.try_scout(
    codec, KNOBS, x_ND, num_steps=num_steps, num_vectors=32
  )
  assert ("num_finalists" in knobs) == is_taken


def test_few_vectors_are_not_worth_a_trial():
  codec = _codec(_params(is_plain=True, num_blocks=4))
  x_ND = qinco_cases.vectors(4095)
  got, knobs = encoders.try_scout(codec, KNOBS, x_ND, num_vectors=32)
  assert got is codec
  assert knobs == KNOBS


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


@pytest.mark.parametrize(
  ("asked", "finalists"),
  [
    ({}, 6),
    (dict(num_finalists=0), None),
    (dict(num_joint_candidates=20), None),
    (dict(num_joint_candidates=20, num_finalists=9), 9),
  ],
)
def test_encode_tries_a_scout_where_that_was_left_open(
  tmp_path, asked, finalists, monkeypatch
):
  monkeypatch.setattr(encoders, "SAMPLE", 32)
  params = _params(is_plain=True, num_blocks=4)
  x_ND, paths = _write(tmp_path, params, 128 * 32)
  codes_NM, about = _encode(tmp_path, paths, **asked)
  assert about["encode"].get("num_finalists") == finalists
  if not finalists:
    return
  chosen = asked or {"num_joint_candidates": 48}
  knobs = {**KNOBS, **chosen, "num_finalists": finalists}
  rule = {name: knobs[name] for name in KNOBS}
  tables = qinco.prepare(params)
  rows, _ = encoders.sample_rows(len(x_ND), 32)
  tables = qinco_scout.fit(tables, x_ND[rows], **rule)
  encode_fn = functools.partial(qinco.encode, **knobs)
  want_NM = jax.jit(encode_fn)(tables, x_ND[:200])
  assert (codes_NM[:200] == want_NM).mean() > 0.99  # Ties, to rounding.
  # The command that is written down makes the same codes.
  words = shlex.split(about["command"])
  asked = dict(word[2:].split("=") for word in words if word[:2] == "--")
  assert {"num_finalists", "num_joint_candidates", "beam_size"} <= set(asked)
  sizes = {name: int(asked[name]) for name in (*KNOBS, "num_finalists")}
  again_NM, _ = _encode(tmp_path, paths, "again.npy", **sizes)
  np.testing.assert_array_equal(again_NM, codes_NM)


def test_codes_of_a_scout_are_codes_of_the_codec(tmp_path):
  params = _params(is_plain=True)
  x_ND, paths = _write(tmp_path, params, 300)
  mse = lambda codes_NM: float(
    np.mean((x_ND - np.asarray(qinco.decode(params, codes_NM))) ** 2)
  )
  plain_NM, _ = _encode(tmp_path, paths)
  codes_NM, _ = _encode(tmp_path, paths, "s.npy", num_finalists=7)
  assert mse(codes_NM) == pytest.approx(mse(plain_NM), rel=0.01)


def test_lists_found_by_a_graph_and_fewer_steps():
  params = _params(is_plain=True, num_lists=20)
  codec = _codec(params, encode=dict(KNOBS))
  x_ND = qinco_cases.vectors(300)
  asked = dict(num_finalists=8, num_steps=2, assign="hnsw")
  encoder = encoders.make_encoder(codec, asked, x_ND)
  codes_NM = next(encoder.blocks(range(50)))
  assert encoder.codebook_sizes == (20, 16, 16)
  encode_fn = functools.partial(qinco.encode, **KNOBS, num_steps=2)
  want_NM = jax.jit(encode_fn)(params, x_ND[:50])
  assert (codes_NM == want_NM).mean() > 0.9  # A graph may miss the nearest.


@pytest.mark.parametrize("asked", [{}, dict(num_finalists=0)])
def test_folders_begun_without_a_scout_are_gone_on_with(tmp_path, asked):
  _, paths = _write(tmp_path, _params(), 100)
  folder = dict(output=str(tmp_path / "codes"))
  run = lambda **more: encode.run(
    cli.get_config(encode.OPTIONS, **paths, **folder, **more)
  )
  run(shard="0/2")
  run(shard="1/2", **asked)
  with pytest.raises(ValueError, match="their encode.num_finalists is None"):
    run(shards=2, num_finalists=7)


def test_evaluate_measures_a_scout_that_is_asked_for(tmp_path):
  _, paths = _write(tmp_path, _params(is_plain=True), 600)
  config = cli.get_config(evaluate_command.OPTIONS, **paths, num_finalists=8)
  (row,) = evaluate_command.run(config)["rows"]
  assert row["num_finalists"] == 8
  config = cli.get_config(evaluate_command.OPTIONS, **paths)
  (plain,) = evaluate_command.run(config)["rows"]
  assert row["mse"] == pytest.approx(plain["mse"], rel=1e-3)
  assert "num_finalists" not in plain


@pytest.mark.parametrize(
  ("asked", "message"),
  [
    (dict(num_finalists=5), "num_finalists must lie between 6 and 24, got 5"),
    (dict(num_finalists=25), "must lie between 6 and 24, got 25"),
    (dict(num_candidates=3, num_finalists=8), "set num_joint_candidates too"),
  ],
)
def test_encode_refuses(tmp_path, asked, message):
  _, paths = _write(tmp_path, _params(), 100)
  with pytest.raises(ValueError, match=message):
    _encode(tmp_path, paths, **asked)
  assert not (tmp_path / "codes.npy").exists()


def test_a_scout_means_nothing_to_rq(tmp_path):
  x_ND = qinco_cases.vectors(50)
  params = rq.fit(jax.random.key(0), x_ND, num_codes=2, codebook_size=8)
  codec = codecs.Codec("rq", rq, rq.prepare(params), {}, "")
  with pytest.raises(ValueError, match="--num_finalists means nothing to a rq"):
    codecs.search_knobs(codec, dict(num_finalists=8))


def test_bench_measures_a_scout_beside_the_others():
  subject = bench_subjects.Subject(
    "x", _codec(_params(), encode=dict(KNOBS)), None, qinco_cases.vectors(9)
  )
  config = cli.get_config(
    bench_command.OPTIONS, num_joint_candidates=48, num_finalists=6
  )
  published, own, scouted = bench_subjects.searches(subject, config)
  assert published["num_joint_candidates"] == 0
  assert own == {**KNOBS, "dtype": "float32"}
  assert scouted == own | dict(num_joint_candidates=48, num_finalists=6)
  sizes = bench_subjects.sizes(subject.codec, scouted)
  assert (sizes["B"], sizes["C"], sizes["F"]) == (6, 48, 6)
