"""The table of the first network's words, and when the commands make one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import decode, encode, evaluate
from experiments.lib import cli, codecs
from tests import oracles
from tests.qinco_cases import CASES, make_params, prefixes, vectors
from vqjax.codecs import qinco, qinco_scout, rq
from vqjax.data import formats
from vqjax.storage import codec_file

RULES = {
  "published": dict(num_candidates=3, beam_size=5),
  "joint": dict(num_candidates=3, beam_size=4, num_joint_candidates=9),
  "wide": dict(num_candidates=3, beam_size=5, num_joint_candidates=35),
  "all": dict(num_candidates=0, beam_size=5),
}
# One network; it is the last step, too.
SHORT = {
  "short": dict(num_networks=1),
  "short_ivf": dict(num_networks=1, num_lists=11),
}
MESSAGE = "table of the first network's 49 words"


def _tables(params, **options):
  return qinco.with_pairs(jax.jit(qinco.prepare)(params), **options)


def _encode(tables, x_ND, lists_N=None, **knobs):
  encode_fn = functools.partial(qinco.encode, **knobs)
  return jax.jit(encode_fn)(tables, x_ND, lists_N)


def _searches():
  """Cases with the searches they can do."""
  for case, sizes in (CASES | SHORT).items():
    for rule in RULES:
      is_quick = (case, rule) in (
        ("qinco2", "joint"),
        ("ivf", "published"),
        ("short", "wide"),
      )
      marks = () if is_quick else pytest.mark.slow
      if rule == "all" or make_params(**sizes).preselect_TKD is not None:
        yield pytest.param(sizes, rule, marks=marks, id=f"{case}-{rule}")


@pytest.mark.parametrize(("case", "rule"), list(_searches()))
def test_encode_matches_the_plain_search(case, rule):
  params, x_ND, knobs = make_params(**case), vectors(), RULES[rule]
  codes_NM = _encode(_tables(params), x_ND, **knobs)
  assert codes_NM.dtype == jnp.int32
  np.testing.assert_array_equal(
    codes_NM, oracles.qinco_encode(params, x_ND, **knobs)
  )


def _quick(quick, cases):
  """The cases, those slow that are not among the quick ones."""
  for case in cases:
    yield pytest.param(
      case, marks=() if case in quick else pytest.mark.slow, id=str(case)
    )


@pytest.mark.parametrize("case", list(_quick(["ivf", "short"], CASES | SHORT)))
def test_decode_matches_the_plain_network(case):
  params = make_params(**(CASES | SHORT)[case])
  tables = _tables(params)
  for prefix_NM in prefixes(params):
    np.testing.assert_allclose(
      qinco.decode(tables, prefix_NM),
      oracles.qinco_decode(params, prefix_NM),
      rtol=2e-5,
      atol=2e-5,  # float32 sums in another order.
    )


@pytest.mark.parametrize("case", ["qinco2", "ivf"])
def test_the_table_has_the_words_of_the_first_network(case):
  params = make_params(**CASES[case])
  table_LKD = _tables(params).pairs_LKD
  assert table_LKD.shape == (*qinco.codebook_sizes(params)[:2], 6)
  for first, word in ((0, 0), (3, 6), (6, 2)):
    xhat = np.asarray(params.first_KD, np.float64)[first]
    want_D = oracles.qinco_word(params, 0, word, xhat)
    np.testing.assert_allclose(table_LKD[first, word], want_D, atol=1e-5)
  rough_LKD = _tables(params, dtype="bfloat16").pairs_LKD
  difference = np.abs(rough_LKD - table_LKD).max()
  assert 0 < difference < 0.05 * np.abs(table_LKD).max()


@pytest.mark.parametrize("case", ["qinco2", "ivf"])
def test_the_table_is_what_is_read(case):
  """Words taken away from it are missed by both directions."""
  params = make_params(**CASES[case])
  tables = _tables(params)
  codes_NM = np.asarray(_encode(tables, vectors(), **RULES["joint"]))
  first, word = codes_NM[0, :2]
  moved = tables.replace(pairs_LKD=tables.pairs_LKD.at[first, word].add(100.0))
  others_NM = np.asarray(_encode(moved, vectors(), **RULES["joint"]))
  assert tuple(others_NM[0, :2]) != (first, word)
  far_ND = qinco.decode(moved, codes_NM) - qinco.decode(tables, codes_NM)
  assert np.abs(far_ND[0]).max() > 10


@pytest.mark.parametrize(
  ("case", "num_steps"),
  [
    ("qinco2", 1),
    ("ivf", 2),
    *[
      pytest.param(case, num_steps, marks=pytest.mark.slow)
      for case, num_steps in (("qinco2", 2), ("qinco2", 3), ("ivf", 1))
    ],
  ],
)
def test_prefixes(case, num_steps):
  params = make_params(**CASES[case])
  knobs = dict(RULES["joint"], num_steps=num_steps)
  np.testing.assert_array_equal(
    _encode(_tables(params), vectors(), **knobs),
    _encode(qinco.prepare(params), vectors(), **knobs),
  )


def test_lists_that_are_given_and_additive_words():
  params = make_params(num_lists=11)
  words_MKD = np.random.default_rng(2).normal(size=(3, 7, 6))
  lists_N = np.arange(20) % 11
  knobs = dict(RULES["joint"], additive_weight=0.7)
  encode_fn = lambda tables: _encode(
    qinco.with_additive(tables, words_MKD), vectors(), lists_N, **knobs
  )
  codes_NM = encode_fn(_tables(params))
  np.testing.assert_array_equal(codes_NM[:, 0], lists_N)
  np.testing.assert_array_equal(codes_NM, encode_fn(qinco.prepare(params)))


@pytest.mark.parametrize(
  "case", [dict(), pytest.param(dict(num_lists=11), marks=pytest.mark.slow)]
)
def test_known_words_need_no_scout(case):
  params = make_params(**case, num_words=12)
  knobs = dict(beam_size=4, num_joint_candidates=14)
  tables = qinco_scout.fit(_tables(params), vectors(40), **knobs, rank=3)
  knobs = dict(num_candidates=0, **knobs, num_finalists=4)
  np.testing.assert_array_equal(
    _encode(tables, vectors(), **knobs),
    oracles.qinco_encode(
      params, vectors(), **knobs, scout=tables.scout, knows_first=True
    ),
  )


def test_no_network_has_no_words():
  tables = qinco.prepare(make_params(num_networks=0))
  with pytest.raises(ValueError, match="networks must lie between 1"):
    qinco.with_pairs(tables)


# -- In the commands --


def _codec(params):
  return codecs.Codec("qinco", qinco, qinco.prepare(params), {}, "")


def _has_table(codec) -> bool:
  return codec.tables.pairs_LKD is not None


@pytest.mark.parametrize(
  ("num_vectors", "beam_size", "is_worth_it"),
  [(48, 4, False), (49, 4, True), (195, 1, False), (196, 1, True)],
)
def test_a_table_is_made_where_it_pays(num_vectors, beam_size, is_worth_it):
  codec = _codec(make_params())
  knobs = dict(beam_size=beam_size)
  got = codecs.with_pairs(codec, knobs, num_vectors)
  assert _has_table(got) == is_worth_it


def test_no_table_is_made_that_is_large(monkeypatch):
  codec, many = _codec(make_params()), 1 << 40
  monkeypatch.setattr(codecs, "_PAIRS_BYTES", 4 * 49 * 6)
  assert _has_table(codecs.with_pairs(codec, {}, many))
  monkeypatch.setattr(codecs, "_PAIRS_BYTES", 4 * 49 * 6 - 1)
  assert codecs.with_pairs(codec, {}, many) is codec


def test_other_codecs_have_no_table():
  params = rq.fit(jax.random.key(0), vectors(50), num_codes=2, codebook_size=8)
  for codec in (
    codecs.Codec("rq", rq, rq.prepare(params), {}, ""),
    _codec(make_params(num_networks=0)),
  ):
    assert codecs.with_pairs(codec, {}, 1 << 40) is codec


def test_products_of_the_table_are_of_the_type_asked_for():
  codec = _codec(make_params())
  knobs = dict(beam_size=4, dtype="bfloat16")
  got = codecs.with_pairs(codec, knobs, 1000).tables.pairs_LKD
  want = jax.jit(functools.partial(qinco.with_pairs, dtype="bfloat16"))
  np.testing.assert_array_equal(got, want(codec.tables).pairs_LKD)


@pytest.fixture
def files(tmp_path):
  """A codec and vectors enough for a table."""
  folder, data = str(tmp_path / "codec"), str(tmp_path / "x.npy")
  info = {"encode": RULES["joint"]}
  codec_file.save_codec(folder, "qinco", make_params(), info=info)
  formats.write_vectors(data, [vectors(250)], dtype=np.float32)
  return dict(codec=folder, data=data)


def _run(command, **options):
  return command.run(cli.get_config(command.OPTIONS, **options))


def test_commands_make_a_table_for_many_vectors(files, tmp_path, caplog):
  caplog.set_level("INFO", "absl")
  path, back = str(tmp_path / "codes.npy"), str(tmp_path / "back.npy")
  _run(encode, **files, output=path)
  assert caplog.text.count(MESSAGE) == 1
  codes_NM = np.load(path)
  params = make_params()
  np.testing.assert_array_equal(
    codes_NM, _encode(qinco.prepare(params), vectors(250), **RULES["joint"])
  )
  _run(decode, codec=files["codec"], codes=path, output=back)
  assert caplog.text.count(MESSAGE) == 2
  want_ND = qinco.decode(params, codes_NM)
  np.testing.assert_allclose(np.load(back), want_ND, rtol=1e-4, atol=1e-4)
  _run(evaluate, **files)
  assert caplog.text.count(MESSAGE) == 3


def test_few_vectors_are_encoded_without(files, tmp_path, caplog):
  caplog.set_level("INFO", "absl")
  _run(encode, **files, num_vectors=40, output=str(tmp_path / "codes.npy"))
  assert MESSAGE not in caplog.text
