"""The ranker of QINCo's encoder: what it learns, and what it lets through."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles
from tests.qinco_cases import make_params, vectors
from vqjax.codecs import qinco, qinco_ranker
from vqjax.codecs.rule import SearchRule

RANKED = {
  "qinco2": dict(),
  "same_dim": dict(network_dim=6),
  "three_blocks": dict(num_blocks=3),
  "low_rank": dict(low_rank=2),
  "ivf": dict(num_lists=11),
}
SIZES = dict(beam_size=4, num_joint_candidates=14)


def _encode(tables, x_ND, **knobs):
  encode_fn = functools.partial(
    qinco.encode, rule=SearchRule(num_candidates=0, **knobs)
  )
  return jax.jit(encode_fn)(tables, x_ND)


def _mse(tables, x_ND, **knobs):
  codes_NM = _encode(tables, x_ND, **knobs)
  return float(
    np.mean((x_ND - np.asarray(qinco.decode(tables, codes_NM))) ** 2)
  )


@pytest.mark.parametrize(
  ("case", "ranked"),
  [
    ("qinco2", 9),
    ("low_rank", 9),
    ("ivf", 4),
    *[
      pytest.param(*sizes, marks=pytest.mark.slow)
      for sizes in (
        *[(case, 9) for case in ("same_dim", "three_blocks", "ivf")],
        *[("qinco2", num) for num in (4, 14)],
        ("ivf", 14),
      )
    ],
  ],
)
def test_encode_matches_the_plain_search(case, ranked):
  params = make_params(**RANKED[case], num_codewords=12)
  tables = qinco_ranker.fit(qinco.prepare(params), vectors(40), **SIZES, rank=3)
  knobs = dict(**SIZES, num_ranked=ranked)
  np.testing.assert_array_equal(
    _encode(tables, vectors(), **knobs),
    oracles.qinco_encode(
      params,
      vectors(),
      num_candidates=0,
      **knobs,
      ranker=tables.steps.ranker,
    ),
  )


@pytest.mark.parametrize("case", [dict(), dict(num_lists=11)])
def test_one_block_is_told_exactly(case):
  """A single block is linear in its hidden layer: nothing is lost."""
  params = make_params(**case, num_blocks=1, num_codewords=12, hidden_dim=9)
  tables = qinco_ranker.fit(
    qinco.prepare(params), vectors(2000), **SIZES, rank=6
  )
  xhat = np.random.default_rng(5).normal(size=6)
  for k in range(12):
    np.testing.assert_allclose(
      oracles.ranker_word(params, tables.steps.ranker, 1, k, xhat),
      oracles.qinco_word(params, 1, k, xhat),
      atol=0.02,  # The ridge, on 28,000 words.
    )
  ranked = _mse(tables, vectors(300), **SIZES, num_ranked=4)
  assert ranked == pytest.approx(_mse(tables, vectors(300), **SIZES), rel=2e-3)


def test_no_plane_is_nearer_than_the_basis():
  """The word told best in U directions: better than along any others."""
  params = make_params(num_codewords=12)
  tables, x_ND = qinco.prepare(params), vectors(200)
  whole = qinco_ranker.fit(tables, x_ND, **SIZES, rank=6).steps.ranker
  part = qinco_ranker.fit(tables, x_ND, **SIZES, rank=2).steps.ranker
  identity_TUU = np.einsum("tdu,tdv->tuv", part.basis_TDU, part.basis_TDU)
  np.testing.assert_allclose(identity_TUU, [np.eye(2)] * 3, atol=1e-5)
  np.testing.assert_allclose(
    np.abs(part.basis_TDU), np.abs(whole.basis_TDU[..., :2]), atol=1e-4
  )
  xhats = np.random.default_rng(6).normal(size=(50, 6))

  def error(ranker):
    told = [oracles.ranker_word(params, ranker, 0, 3, xhat) for xhat in xhats]
    true = [oracles.qinco_word(params, 0, 3, xhat) for xhat in xhats]
    return np.mean((np.array(told) - true) ** 2)

  least = part.replace(
    **{
      name: getattr(whole, name)[..., 4:]
      for name in ("basis_TDU", "plain_TKU", "words_TKU", "state_TDU")
    },
    hidden_THU=whole.hidden_THU[..., 4:],
  )
  assert error(whole) < error(part) < error(least)


@pytest.mark.slow
def test_a_ranker_beats_as_many_words_without_one():
  params = make_params(num_codewords=32, dim=8, hidden_dim=32, network_dim=8)
  x_ND = vectors(600, dim=8)
  sizes = dict(beam_size=6, num_joint_candidates=48)
  tables = qinco_ranker.fit(qinco.prepare(params), x_ND[:300], **sizes)
  rest_ND = x_ND[300:]
  few = _mse(tables, rest_ND, beam_size=6, num_joint_candidates=8)
  ranked = _mse(tables, rest_ND, **sizes, num_ranked=8)
  many = _mse(tables, rest_ND, **sizes)
  assert many <= ranked < (few + 2 * many) / 3


def test_blocks_and_lists_make_no_difference():
  params = make_params(num_lists=11)
  # Among the vectors of seed 1 is one with two candidates equal to rounding.
  tables, x_ND = qinco.prepare(params), vectors(30, seed=2)
  z_ND = np.asarray(qinco.normalise(params, x_ND))
  lists_N = oracles.nearest(z_ND, params.first_KD)
  sizes = dict(beam_size=4, num_joint_candidates=14)
  calls = []
  whole = qinco_ranker.fit(
    tables, x_ND, **sizes, block_size=64, progress=lambda *n: calls.append(n)
  )
  assert calls == [(30, 30)]
  parts = qinco_ranker.fit(tables, x_ND, lists_N, **sizes, block_size=8)
  told = lambda tables: [
    oracles.ranker_word(params, tables.steps.ranker, 2, k, np.ones(6))
    for k in range(7)
  ]
  np.testing.assert_allclose(told(whole), told(parts), atol=1e-3)


def test_a_ranker_of_a_prefix():
  params = make_params(num_codewords=12)
  tables = qinco_ranker.fit(qinco.prepare(params), vectors(40), **SIZES)
  knobs = dict(**SIZES, num_ranked=5)
  codes_NM = _encode(tables, vectors(), **knobs, num_steps=2)
  assert codes_NM.shape == (20, 2)
  shorter = params.replace(
    **{
      name: getattr(params, name)[:1]
      for name in (
        "codebooks_TKD", "preselect_TKD", "in_TDE", "word_TEU", "state_TDU",
        "bias_TE", "up_TJEH", "down_TJHE", "out_TED",
      )
    }
  )  # fmt: skip
  ranker = jax.tree.map(lambda leaf: leaf[:1], tables.steps.ranker)
  np.testing.assert_array_equal(
    codes_NM,
    oracles.qinco_encode(
      shorter, vectors(), num_candidates=0, **knobs, ranker=ranker
    ),
  )


@pytest.mark.parametrize(
  ("knobs", "message"),
  [
    (dict(SIZES, num_ranked=5), "needs a ranker that chooses them"),
    (dict(SIZES, num_ranked=3), "must lie between 4 and 14, got 3"),
    (dict(SIZES, num_ranked=15), "must lie between 4 and 14, got 15"),
    (dict(beam_size=4, num_ranked=5), "set num_joint_candidates too"),
  ],
)
def test_encode_refuses(knobs, message):
  params = make_params(num_codewords=12)
  with pytest.raises(ValueError, match=message):
    _encode(params, vectors(), **knobs)


@pytest.mark.parametrize(
  ("params", "sizes", "message"),
  [
    (dict(is_qinco1=True), {}, "no pre-selection codebooks"),
    (dict(num_codewords=1500), {}, "codebook_size must lie between 2 and 1024"),
    ({}, dict(rank=7), "rank must lie between 1 and 6, got 7"),
    ({}, dict(num_joint_candidates=3), "must lie between 4 and 48"),
    ({}, dict(block_size=0), "block_size must lie between 1"),
    ({}, dict(num=0), "number of vectors must lie between 1"),
    (dict(num_networks=0), {}, "networks must lie between 1"),
    ({}, dict(dim=5), r"x must have shape \(None, 6\)"),
  ],
)
def test_fit_refuses(params, sizes, message):
  params = make_params(**({"num_codewords": 12} | params))
  sizes = dict(SIZES) | sizes
  x_ND = vectors(sizes.pop("num", 20), dim=sizes.pop("dim", 6))
  with pytest.raises(ValueError, match=message):
    qinco_ranker.fit(qinco.prepare(params), jnp.asarray(x_ND), **sizes)
