"""Every configuration: runs, saves, and knows its arguments."""

import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from experiments import train
from vqjax import recipe_qinco
from vqjax.codecs import qinco_loss
from vqjax.data import batches, datasets

ROOT = pathlib.Path(__file__).parents[1]
NAMES = sorted(
  p.stem
  for p in (ROOT / "configs").glob("*.py")
  # That of HAKES is no codec; tests/hakes_command_test.py runs it.
  if p.stem not in ("__init__", "base", "hakes")
)


def _config(name, arg=""):
  return importlib.import_module(f"configs.{name}").get_config(arg)


def test_all_are_there():
  known = {
    "pq",
    "opq",
    "rq",
    "rqvae",
    "qinco1",
    "qinco2_s",
    "qinco2_m",
    "qinco2_l",
  }
  assert known <= set(NAMES)


# M and L differ from S in numbers alone; other tests train XS and S, and OPQ.
_SLOW = [
  pytest.param(name, marks=pytest.mark.slow)
  if name in ("qinco2_m", "qinco2_l", "ivf_qinco2_s", "ivf_qinco2_m")
  or name in ("qinco2_s", "qinco2_xs", "opq")
  else name
  for name in NAMES
]


@pytest.mark.parametrize("name", _SLOW)
def test_smoke_trains_a_codec(name, tmp_path):
  summary = train.run(_config(name, "smoke"), tmp_path)
  for file in ("config.json", "codec.safetensors", "codec.json"):
    assert (tmp_path / file).exists()
  assert summary["validation_mse"] > 0
  # Nothing to do the second time, and no mixing of two runs.
  again = train.run(_config(name, "smoke"), tmp_path, resume=True)
  assert again == summary
  assert train.run(_config(name, "smoke"), tmp_path) == summary
  other = _config(name, "smoke")
  other.seed = 1
  with pytest.raises(ValueError, match="--config.seed was 0, but is 1 in"):
    train.run(other, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("arg", ["", "smoke", *datasets.NAMES])
def test_arguments_give_plain_values(name, arg):
  config = _config(name, arg)
  again = json.loads(config.to_json_best_effort())
  assert again == json.loads(json.dumps(config.to_dict()))
  sample = "sample_text" if name == "rqvae" else "sample_sift"
  assert config.data.name == (arg if arg in datasets.NAMES else sample)


LEARNED = [name for name in NAMES if "qinco" in name]


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("arg", ["", "sample_text", "bigann1M", "contriever1M"])
def test_sizes_fit_the_model(name, arg):
  config = _config(name, arg)
  sizes = {
    k: v for k, v in config.model.items() if k not in recipe_qinco.SEARCH
  }
  dim = {"sample_text": 384, "contriever1M": 768}.get(arg, 128)
  params = jax.eval_shape(
    lambda x_ND: qinco_loss.init(jax.random.key(0), x_ND, **sizes),
    jax.ShapeDtypeStruct((1000, dim), jnp.float32),
  )
  recipe_qinco.check_search(config, params)


@pytest.mark.parametrize("name", NAMES)
def test_unknown_arguments_are_refused(name):
  with pytest.raises(ValueError, match="Unknown argument 'sift'.*bigann1M"):
    _config(name, "sift")


def test_opq_is_pq_with_a_rotation():
  config = _config("opq", "smoke")
  assert config.model.opq
  config.model.opq = False
  assert config.to_dict() == _config("pq", "smoke").to_dict()


def test_the_published_setting():
  config = _config("qinco2_s", "bigann1M")
  assert (config.model.num_candidates, config.model.beam_size) == (16, 32)
  assert config.model.num_joint_candidates == 64  # Ours; 0 is as published.
  assert (config.encode.beam_size, config.encode.num_joint_candidates) == (
    48,
    128,
  )
  assert config.train.num_epochs == 60
  assert config.train.batch_size == 1024
  assert config.data.validation_size is None
  assert batches.split(10**8, None)[0] == 10**8 - 10_000  # As published.
  assert _config("qinco1", "bigann1M").model.num_blocks == 16


def test_the_settings_of_the_published_rqvae_programs():
  config = _config("rqvae", "reference")
  assert config.model.codebook_sizes == (256, 256, 256)
  assert config.model.layers == (2048, 1024, 512, 256, 128, 64)
  train, init = config.train, config.init
  assert (train.optimiser, train.peak_lr, train.clip_norm) == ("adamw", 1e-3, 1)
  assert (train.schedule, train.ramp_epochs) == ("constant", 50)
  assert (train.best, train.save_limit) == ("collision_rate", 5)
  assert (train.redraw, init.kmeans, init.num_iterations) == (
    *("none", "large"),
    100,
  )
