import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import qinco1, qinco2_l, qinco2_m, qinco2_s, qinco2_xs
from tests import oracles
from tests.qinco_cases import CASES, make_params, prefixes, vectors
from vqjax.codecs import qinco
from vqjax.codecs.rule import SearchRule

KNOBS = [
  dict(num_candidates=0, beam_size=1),
  dict(num_candidates=0, beam_size=4),
  dict(num_candidates=2, beam_size=1),
  dict(num_candidates=3, beam_size=5),
  dict(num_candidates=7, beam_size=7),
  dict(num_candidates=3, beam_size=3, num_joint_candidates=3),
  dict(num_candidates=3, beam_size=4, num_joint_candidates=9),
  dict(num_candidates=0, beam_size=5, num_joint_candidates=35),
  dict(num_candidates=3, beam_size=7, num_joint_candidates=20),
]


# One network, which is also the last step.
SHORT = {
  "short": dict(num_networks=1),
  "short_ivf": dict(num_networks=1, num_lists=11),
}


@pytest.mark.parametrize("case", CASES)
def test_decode_matches_the_plain_network(case):
  params = make_params(**CASES[case])
  for prefix_NM in prefixes(params):
    np.testing.assert_allclose(
      qinco.decode(params, prefix_NM),
      oracles.qinco_decode(params, prefix_NM),
      rtol=2e-5,
      atol=2e-5,  # float32 sums in another order.
    )


def _searches():
  """Cases with the searches they can do; a few of each, the rest slow."""
  for case in CASES:
    has_preselection = make_params(**CASES[case]).preselect_TKD is not None
    for at, knobs in enumerate(KNOBS):
      needs = knobs["num_candidates"] or knobs.get("num_joint_candidates")
      if needs and not has_preselection:
        continue
      is_quick = case in ("qinco2", "ivf") or at in (1, 3, 8)
      marks = () if is_quick else pytest.mark.slow
      yield pytest.param(case, knobs, id=f"{case}-{knobs}", marks=marks)


@pytest.mark.parametrize("case", SHORT)
@pytest.mark.parametrize("knobs", [KNOBS[3], KNOBS[6]])
def test_one_network_matches_the_plain_search(case, knobs):
  params, x_ND = make_params(**SHORT[case]), vectors()
  np.testing.assert_array_equal(
    _jit_encode_fn(params, x_ND, rule=SearchRule(**knobs)),
    oracles.qinco_encode(params, x_ND, **knobs),
  )


@pytest.mark.parametrize(("case", "knobs"), list(_searches()))
def test_encode_matches_the_plain_search(case, knobs):
  params = make_params(**CASES[case])
  x_ND = vectors()
  codes_NM = qinco.encode(params, jnp.asarray(x_ND), rule=SearchRule(**knobs))
  assert codes_NM.dtype == jnp.int32
  np.testing.assert_array_equal(
    codes_NM, oracles.qinco_encode(params, x_ND, **knobs)
  )


# A search is compiled sooner than it is run operation by operation.
_jit_encode_fn = jax.jit(
  qinco.encode,
  static_argnames="rule",
)


@pytest.mark.parametrize("case", ["qinco2", "ivf"])
def test_num_steps_gives_the_code_of_the_shorter_codec(case):
  params = make_params(**CASES[case])
  tables = qinco.prepare(params)
  x_ND = jnp.asarray(vectors())
  num_codes = 2 + params.is_ivf
  short = jax.tree.map(lambda leaf: leaf[: num_codes - 1], {
    name: getattr(params, name)
    for name in (
      "codebooks_TKD", "preselect_TKD", "in_TDE", "word_TEU", "state_TDU",
      "bias_TE", "up_TJEH", "down_TJHE", "out_TED",
    )
  })  # fmt: skip
  want_NM = oracles.qinco_encode(params.replace(**short), x_ND, 3, 4)
  got_NM = qinco.encode(tables, x_ND, None, SearchRule(3, 4, num_steps=2))
  assert got_NM.shape[1] == num_codes
  np.testing.assert_array_equal(got_NM, want_NM)


def test_bfloat16_products_stay_close():
  params = make_params(dim=16, network_dim=12, hidden_dim=16, num_codewords=16)
  x_ND = jnp.asarray(vectors(200, 16))
  rule = SearchRule(4, 4)
  codes_NM = qinco.encode(params, x_ND, None, rule)[:, :2]
  exact_ND = np.asarray(qinco.decode(params, codes_NM))
  rough_ND = np.asarray(qinco.decode(params, codes_NM, dtype="bfloat16"))
  gap = np.abs(rough_ND - exact_ND).mean() / np.abs(exact_ND).mean()
  assert 1e-4 < gap < 0.02  # 8 bits of mantissa, two products in a row.
  error = lambda codes_NM: float(
    jnp.mean((x_ND - qinco.decode(params, codes_NM[:, :2])) ** 2)
  )
  rule = rule.replace(num_steps=2)
  rough_NM = qinco.encode(params, x_ND, None, rule.replace(dtype="bfloat16"))
  exact_NM = qinco.encode(params, x_ND, None, rule)
  assert error(rough_NM) == pytest.approx(error(exact_NM), rel=0.01)


@pytest.mark.parametrize("joint", [0, 8])
def test_only_the_first_step_has_exact_products(joint):
  tables = qinco.prepare(make_params())
  knobs = dict(num_candidates=3, beam_size=4, num_joint_candidates=joint)
  for dtype in ("float32", "bfloat16"):
    encode = lambda t, x, dtype=dtype: qinco.encode(
      t, x, rule=SearchRule(**knobs, dtype=dtype)
    )
    text = str(jax.make_jaxpr(encode)(tables, jnp.asarray(vectors())))
    exact = text.count("precision=(Precision.HIGHEST")
    assert exact == (1 if dtype == "bfloat16" else text.count("dot_general["))


@pytest.mark.parametrize(
  ("knobs", "message"),
  [
    (dict(beam_size=8), "beam_size must lie between 1 and 7, got 8: the first"),
    (dict(beam_size=0), "beam_size must lie between 1 and 7, got 0"),
    (dict(num_candidates=9, beam_size=2), "num_candidates.* 0 and 7, got 9"),
    (dict(num_candidates=-1, beam_size=2), "num_candidates.*got -1"),
    (dict(num_steps=5), "num_steps must lie between 1 and 4, got 5"),
    (
      dict(beam_size=4, num_joint_candidates=3),
      "num_joint_candidates must lie between 4 and 28, got 3",
    ),
  ],
)
def test_senseless_sizes_are_refused_with_the_rule(knobs, message):
  params = make_params()
  knobs = {"num_candidates": 3, "beam_size": 4, **knobs}
  with pytest.raises(ValueError, match=message):
    qinco.encode(params, jnp.asarray(vectors()), rule=SearchRule(**knobs))


def test_preselection_is_refused_without_its_codebooks():
  params = make_params(is_qinco1=True)
  with pytest.raises(ValueError, match="num_candidates=0"):
    qinco.encode(params, jnp.asarray(vectors()), rule=SearchRule(2, 1))


def test_wrong_shapes_are_refused():
  params = make_params()
  with pytest.raises(ValueError, match=r"x must have shape \(None, 6\)"):
    qinco.encode(params, jnp.zeros((3, 5)))
  with pytest.raises(ValueError, match=r"\(N, 1 to 4\), got \(2, 5\)"):
    qinco.decode(params, jnp.zeros((2, 5), jnp.int32))
  with pytest.raises(TypeError, match="codes must be integers, got float32"):
    qinco.decode(params, jnp.zeros((2, 4)))


@pytest.mark.parametrize("size", ["s", "m", "l"])
def test_presets_have_the_published_sizes(size):
  width = dict(
    s=dict(network_dim=128, hidden_dim=256, num_blocks=2),
    m=dict(network_dim=384, hidden_dim=384, num_blocks=4),
    l=dict(network_dim=384, hidden_dim=384, num_blocks=16),
  )[size]
  count = dict(s=1.64e6, m=10.8e6, l=35.6e6)[size]  # spec of the papers.
  from vqjax.codecs import qinco_loss

  xt_ND = jax.ShapeDtypeStruct((1000, 128), jnp.float32)
  params = jax.eval_shape(
    lambda x_ND: qinco_loss.init(jax.random.key(0), x_ND, **width), xt_ND
  )
  sizes = [leaf.size for leaf in jax.tree.leaves(params)]
  assert abs(sum(sizes) / count - 1) < 0.02
  codes_NM = jax.eval_shape(
    lambda p, x_ND: qinco.encode(p, x_ND[:8]), params, xt_ND
  )
  assert codes_NM.shape == (8, 8)
  decoded_ND = jax.eval_shape(qinco.decode, params, codes_NM)
  assert decoded_ND.shape == (8, 128)


@pytest.mark.parametrize(
  "config", [qinco1, qinco2_xs, qinco2_s, qinco2_m, qinco2_l]
)
def test_tables_equal_the_plain_network_at_the_sizes_of_a_preset(config):
  model = config.get_config("bigann1M").model
  params = make_params(
    dim=128, num_networks=1, num_codewords=4,
    network_dim=model.network_dim or 128, hidden_dim=model.hidden_dim,
    num_blocks=model.num_blocks, is_qinco1=model.is_qinco1,
  )  # fmt: skip
  tame = lambda w: None if w is None else w / w.shape[-2] ** 0.5
  names = ("in_TDE", "word_TEU", "state_TDU", "up_TJEH", "down_TJHE", "out_TED")
  params = params.replace(**{n: tame(getattr(params, n)) for n in names})
  codes_NM = np.array([[0, 1], [3, 2]], np.int32)
  want_ND = oracles.qinco_decode(params, codes_NM)
  got_ND = qinco.decode(qinco.prepare(params), codes_NM)
  np.testing.assert_allclose(got_ND, want_ND, rtol=1e-4, atol=1e-4)
