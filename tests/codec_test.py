"""The door for programs: a codec of any kind over arrays, maps and paths."""

import subprocess
import sys

import jax
import numpy as np
import pytest

import vqjax
from tests import qinco_cases
from vqjax.codecs import pq, qinco, rq
from vqjax.codecs.rule import SearchRule

KEY = jax.random.key(0)
NUM, D = 90, 6


def _vectors(num=NUM, seed=0):
  return np.random.default_rng(seed).normal(size=(num, D)).astype(np.float32)


def _make(name):
  """A codec, and its codes of vectors by the functions of its module."""
  x_ND = _vectors()
  if name == "pq":
    params = pq.fit(KEY, x_ND, num_codes=3, codebook_size=16)
    return vqjax.Codec("pq", params), np.asarray(pq.encode(params, x_ND))
  if name == "rq":
    params = rq.fit(KEY, x_ND, num_codes=3, codebook_size=16)
    codec = vqjax.Codec("rq", params, {"encode": {"beam_size": 4}})
    return codec, np.asarray(rq.encode(params, x_ND, beam_size=4))
  lists = {"num_lists": 300} if name == "ivf" else {}
  params = qinco_cases.make_params(num_codewords=16, **lists)
  knobs = dict(num_candidates=4, beam_size=5)
  codec = vqjax.Codec("qinco", params, {"encode": knobs})
  return codec, np.asarray(qinco.encode(params, x_ND, rule=SearchRule(**knobs)))


NAMES = ("pq", "rq", "qinco", "ivf")


@pytest.fixture(name="case", params=NAMES, scope="module")
def _case(request):
  return _make(request.param)


def test_a_codec_shows_what_it_is_in_a_line():
  codec, _ = _make("rq")
  want = "Codec(rq, 6 dimensions, 3 codes, 1.5 bytes, fingerprint "
  assert repr(codec) == f"{want}{codec.fingerprint})"
  codec, _ = _make("ivf")
  codec.info["data"] = {"train": "x.npy"}
  assert "qinco2, 6 dimensions, 300 lists, 3 codes, 1.5 bytes" in repr(codec)
  assert repr(codec).endswith(", trained on x.npy)")


def test_a_saved_rule_is_that_of_encode(tmp_path):
  codec, _ = _make("qinco")
  new = codec.with_rule(beam_size=3, num_joint_candidates=6)
  new.save(tmp_path)
  loaded = vqjax.load(tmp_path)
  assert loaded.rule == codec.rule.replace(beam_size=3, num_joint_candidates=6)
  assert loaded.fingerprint == codec.fingerprint
  want_NM = codec.encode(_vectors(), beam_size=3, num_joint_candidates=6)
  np.testing.assert_array_equal(loaded.encode(_vectors()), want_NM)
  assert codec.rule.beam_size == 5  # As it was.


@pytest.mark.parametrize(
  ("name", "settings", "message"),
  [
    ("rq", dict(num_candidates=4), "num_candidates means nothing to a rq"),
    ("qinco", dict(beam_size=17), "beam_size must lie between 1 and 16"),
    (
      "qinco",
      dict(num_joint_candidates=8, num_ranked=6),
      "needs a ranker, which this codec has not",
    ),
  ],
)
def test_rules_that_do_not_fit_are_refused(name, settings, message):
  codec, _ = _make(name)
  with pytest.raises(ValueError, match=message):
    codec.with_rule(**settings)


def test_codes_are_those_of_the_module_and_of_the_smallest_type(case):
  codec, want_NM = case
  codes_NM = codec.encode(_vectors())
  assert codes_NM.dtype == (np.uint16 if codec.is_ivf else np.uint8)
  np.testing.assert_array_equal(codes_NM, want_NM)
  xhat_ND = codec.decode(codes_NM)
  assert (xhat_ND.dtype, xhat_ND.shape) == (np.float32, (NUM, D))
  np.testing.assert_allclose(
    xhat_ND,
    codec.spec.decode(codec.params, want_NM),
    rtol=1e-5,
    atol=1e-5,
  )


def test_arrays_maps_paths_and_lists_have_the_same_codes(case, tmp_path):
  codec, want_NM = case
  x_ND = _vectors()
  np.save(tmp_path / "x.npy", x_ND)
  mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
  for x in (
    mapped,
    tmp_path / "x.npy",
    str(tmp_path / "x.npy"),
    x_ND.tolist(),
    jax.numpy.asarray(x_ND),
    x_ND.astype(np.float64),
  ):
    np.testing.assert_array_equal(codec.encode(x), want_NM)
  np.save(tmp_path / "codes.npy", want_NM)
  np.testing.assert_array_equal(
    codec.decode(tmp_path / "codes.npy"), codec.decode(want_NM)
  )


@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_blocks_change_nothing(case, block_size):
  codec, want_NM = case
  codes_NM = codec.encode(_vectors(), block_size=block_size)
  assert (codes_NM == want_NM).mean() > 0.99  # Near ties.
  np.testing.assert_allclose(
    codec.decode(want_NM, block_size=block_size),
    codec.decode(want_NM),
    rtol=1e-5,
    atol=1e-5,
  )


def test_a_saved_codec_is_the_same(case, tmp_path):
  codec, want_NM = case
  codec.save(tmp_path / "codec")
  again = vqjax.load(tmp_path / "codec")
  assert again.fingerprint == codec.fingerprint
  assert again.rule == codec.rule
  assert (again.name, again.num_bytes) == (codec.name, codec.num_bytes)
  np.testing.assert_array_equal(again.encode(_vectors()), want_NM)
  with pytest.raises(FileExistsError):
    codec.save(tmp_path / "codec")


def test_no_rows_have_no_codes(case):
  codec, want_NM = case
  codes_NM = codec.encode(np.zeros((0, D), np.float32))
  assert codes_NM.shape == (0, want_NM.shape[1])
  assert codec.decode(codes_NM).shape == (0, D)


def test_evaluate_measures_error_and_recall(case):
  codec, want_NM = case
  x_ND, queries_QD = _vectors(), _vectors(20, 1)
  found = codec.evaluate(x_ND, queries=queries_QD)
  error_ND = x_ND - codec.decode(want_NM)
  assert found["mse"] == pytest.approx((error_ND**2).sum(1).mean(), rel=1e-5)
  distances_QN = ((queries_QD[:, None] - x_ND) ** 2).sum(-1)
  decoded_QN = ((queries_QD[:, None] - codec.decode(want_NM)) ** 2).sum(-1)
  order_QN = decoded_QN.argsort(1)
  for r in (1, 10, 100):
    want = (order_QN[:, :r] == distances_QN.argmin(1)[:, None]).any(1).mean()
    assert found[f"1-recall@{r}"] == pytest.approx(want, abs=0.051)  # A tie.
  assert found["encode_us"] > 0
  assert found["decode_us"] > 0
  assert set(codec.evaluate(x_ND)) == {"mse", "encode_us", "decode_us"}


def test_evaluate_counts_equally_near_vectors_alike(case):
  codec, _ = case
  x_ND, queries_QD = np.tile(_vectors(), (2, 1)), _vectors(20, 1)
  distances_QN = ((queries_QD[:, None] - _vectors()) ** 2).sum(-1)
  near_Q1 = distances_QN.argmin(1)[:, None]
  found = [
    codec.evaluate(x_ND, queries=queries_QD, true_ids=true_ids)
    for true_ids in (None, near_Q1, near_Q1 + len(_vectors()))
  ]
  assert found[0]["1-recall@10"] > 0
  for name in ("1-recall@1", "1-recall@10", "1-recall@100"):
    assert found[0][name] == found[1][name] == found[2][name]


def test_settings_take_the_place_of_those_stored():
  codec, _ = _make("qinco")
  codes_NM = codec.encode(_vectors(), beam_size=2, num_steps=2)
  want_NM = qinco.encode(
    codec.params, _vectors(), rule=SearchRule(4, 2, num_steps=2)
  )
  np.testing.assert_array_equal(codes_NM, want_NM)
  with pytest.raises(ValueError, match="beam_width means nothing to a qinco"):
    codec.encode(_vectors(), beam_width=2)
  with pytest.raises(ValueError, match="beam_size must lie between 1 and 16"):
    codec.encode(_vectors(), beam_size=17)


def test_the_size_of_a_code():
  assert _make("pq")[0].num_bytes == 1.5  # Three codes of 4 bits.
  codec, _ = _make("ivf")
  assert codec.num_codes == 3
  assert codec.num_bytes == 1.5  # Without the number of the list.


def test_senseless_vectors_are_refused():
  codec, _ = _make("pq")
  x_ND = _vectors()
  x_ND[17, 2] = np.nan
  with pytest.raises(ValueError, match="17"):
    codec.encode(x_ND)
  with pytest.raises(ValueError, match=r"\(None, 6\), got \(90, 5\)"):
    codec.encode(_vectors()[:, :5])
  with pytest.raises(TypeError, match="must hold real numbers"):
    codec.encode(_vectors().astype(complex))


def test_senseless_codes_are_refused():
  codec, want_NM = _make("pq")
  codes_NM = np.array(want_NM)
  codes_NM[31, 1] = 16
  with pytest.raises(ValueError, match="31"):
    codec.decode(codes_NM)
  with pytest.raises(TypeError, match="codes must be integers, got float64"):
    codec.decode(want_NM / 2)
  with pytest.raises(ValueError, match=r"\(N, 1 to 3\), got \(90, 4\)"):
    codec.decode(np.zeros((NUM, 4), int))


def test_importing_the_package_is_cheap():
  program = (
    "import sys, vqjax; assert 'jax' not in sys.modules; "
    "assert vqjax.load.__name__ == 'load'; assert 'jax' in sys.modules"
  )
  subprocess.run([sys.executable, "-c", program], check=True)
  with pytest.raises(AttributeError, match="no attribute 'lod'"):
    vqjax.lod  # noqa: B018
