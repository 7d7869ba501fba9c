"""Training from a program: the same codec as by the command."""

import numpy as np
import pytest

import vqjax
from configs import qinco2_xs
from experiments import train
from vqjax import fitting
from vqjax.codecs import pq, rq

SMALL = dict(codebook_size=16, num_iterations=3)


def _vectors(num=700, dim=8):
  return np.random.default_rng(0).normal(size=(num, dim)).astype(np.float32)


@pytest.mark.parametrize(
  "name", ["pq", pytest.param("opq", marks=pytest.mark.slow), "rq"]
)
def test_closed_forms_of_arrays_maps_and_paths_are_the_same(name, tmp_path):
  x_ND, path = _vectors(), tmp_path / "x.npy"
  np.save(path, x_ND)
  knobs = dict(num_codes=4, **SMALL)
  codec = vqjax.fit(x_ND, name, **knobs)
  assert len(codec.codebook_sizes) == 4
  assert codec.encode(x_ND).shape == (700, 4)
  for x in (np.load(path, mmap_mode="r"), path):
    assert vqjax.fit(x, name, **knobs).fingerprint == codec.fingerprint
  assert vqjax.fit(x_ND, name, **knobs, seed=1).fingerprint != codec.fingerprint
  assert codec.info["training"]["num_held_out"] == 70
  error_ND = x_ND[630:] - codec.decode(codec.encode(x_ND[630:]))
  mse = (error_ND**2).sum(axis=1).mean()
  assert codec.info["training"]["validation_mse"] == pytest.approx(
    mse, rel=1e-4
  )


@pytest.mark.slow
@pytest.mark.parametrize("num_lists", [0, 8])
def test_a_network_is_that_of_the_command(num_lists, tmp_path):
  x_ND, path = _vectors(), tmp_path / "x.npy"
  np.save(path, x_ND)
  name = "ivf_qinco2_xs:smoke" if num_lists else "qinco2_xs:smoke"
  codec = vqjax.fit(x_ND, name, num_codes=2, num_epochs=1)
  config = qinco2_xs.get_config("smoke", has_lists=bool(num_lists))
  config.data.train = str(path)
  config.data.num_train = None
  config.model.num_steps, config.train.num_epochs = 2, 1
  train.run(config, str(tmp_path / "run"))
  again = vqjax.load(tmp_path / "run")
  assert again.fingerprint == codec.fingerprint
  assert again.rule == codec.rule
  assert codec.num_codes == 2
  np.testing.assert_array_equal(again.encode(path), codec.encode(x_ND))


def test_settings_go_to_the_groups_that_have_them():
  config = fitting.make_config(
    "qinco2_xs", num_codes=5, beam_size=7, train={"num_epochs": 3}
  )
  assert (config.model.num_steps, config.train.num_epochs) == (5, 3)
  assert config.model.beam_size == config.encode.beam_size == 7
  config = fitting.make_config("ivf_qinco2_xs", num_iterations=4, seed=3)
  assert (config.init.num_iterations, config.ivf.num_iterations) == (4, 25)
  assert config.seed == 3
  assert fitting.make_config("opq").model.opq


@pytest.mark.parametrize(
  ("args", "knobs", "error", "message"),
  [
    ((_vectors(), "vq"), {}, ValueError, "no configuration 'vq'"),
    (
      (_vectors(), "pq"),
      dict(num_cods=3),
      ValueError,
      "did you mean 'num_codes'",
    ),
    (("pq", _vectors()), {}, TypeError, "takes the vectors first"),
    ((_vectors(50), "pq"), {}, ValueError, "^codebook_size .* 45 vectors"),
    ((_vectors()[0], "pq"), {}, ValueError, "x must have shape"),
    ((_vectors(), "pq"), dict(num_codes=3, **SMALL), ValueError, "must divide"),
  ],
)
def test_what_makes_no_sense_is_refused(args, knobs, error, message):
  with pytest.raises(error, match=message):
    vqjax.fit(*args, **knobs)


def test_vectors_that_are_not_finite_are_refused():
  x_ND = _vectors()
  x_ND[11, 3] = np.inf
  with pytest.raises(ValueError, match="11"):
    vqjax.fit(x_ND, "pq", num_codes=4, **SMALL)


@pytest.mark.parametrize("module", [pq, rq])
def test_a_forgotten_key_is_one_sentence(module):
  x_ND = _vectors(60)
  for args in ((x_ND,), (x_ND, x_ND)):
    with pytest.raises(
      TypeError, match=r"a random key first.*jax\.random\.key"
    ):
      module.fit(*args, num_codes=2, codebook_size=8)


def test_a_transposed_array_is_doubted():
  with pytest.warns(UserWarning, match="300 dimensions: is .* transposed"):
    vqjax.fit(_vectors(200, 300), "pq", num_codes=4, **SMALL)
