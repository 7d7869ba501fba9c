"""Noise with the covariance of the data, in the training steps of a QINCo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import train
from experiments.lib import cli
from tests.qinco_cases import CASES, make_params, vectors
from vqjax import recipe_qinco
from vqjax.codecs import qinco, qinco_loss
from vqjax.codecs.rule import SearchRule
from vqjax.data.batches import WithLists
from vqjax.training import learners

RULE = SearchRule(3, 3)


def _learner(share):
  return learners.make_learner(
    vectors(), RULE, dtype="float32", redraw="none", noise_share=share
  )


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_noise_keeps_the_mean_and_the_covariance(share):
  n, d = 60_000, 4
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 7
  x_ND = jnp.asarray(x_ND, jnp.float32)
  mixed_ND = learners.mix_with_noise(jax.random.key(0), x_ND, share)
  x_ND, mixed_ND = np.asarray(x_ND), np.asarray(mixed_ND)
  np.testing.assert_allclose(mixed_ND.mean(0), x_ND.mean(0), atol=0.03)
  cov_DD, size = np.cov(x_ND.T), np.trace(np.cov(x_ND.T)) / d
  np.testing.assert_allclose(np.cov(mixed_ND.T), cov_DD, atol=0.05 * size)
  # What comes from the noise alone is its share of that covariance.
  kept_ND = x_ND.mean(0) + (1 - share) ** 0.5 * (x_ND - x_ND.mean(0))
  noise_DD = np.cov((mixed_ND - kept_ND).T)
  np.testing.assert_allclose(noise_DD, share * cov_DD, atol=0.05 * share * size)


@pytest.mark.parametrize("case", ["qinco2", "ivf"])
def test_a_step_sees_mixed_vectors_or_the_vectors(monkeypatch, case):
  monkeypatch.setattr(
    qinco_loss, "loss", lambda params, key, x_ND, lists_N, rule: x_ND
  )
  params, key = make_params(**CASES[case]), jax.random.key(3)
  x_ND, centres_ND = jnp.asarray(vectors()), jnp.zeros((20, 6))
  rows = x_ND
  if params.is_ivf:  # The noise has the covariance within the lists.
    lists_N = jnp.arange(len(x_ND), dtype=jnp.int32) % 11
    centres_ND = qinco.centroids(params)[lists_N]
    rows = WithLists(x_ND, lists_N)
  mixed_ND = learners.mix_with_noise(key, x_ND - centres_ND, 0.3)
  assert _learner(0.0).loss_fn(params, key, rows) is x_ND
  np.testing.assert_array_equal(
    _learner(0.3).loss_fn(params, key, rows), centres_ND + mixed_ND
  )


def test_a_share_is_below_one(tmp_path):
  config = cli.config_of("qinco2_xs:smoke")
  config.train.noise_share = 1.0
  with pytest.raises(ValueError, match=r"train.noise_share must lie between"):
    train.run(config, tmp_path)


@pytest.mark.parametrize(
  ("name", "shape", "share"),
  [
    ("qinco2_s", (57_000, 128), 0.030),
    ("qinco2_xs", (57_000, 128), 0),  # Ten numbers for each weight.
    ("qinco2_xs", (3000, 384), 0.334),
    ("qinco2_xs", (1000, 384), 0.5),
    ("qinco2_s:bigann1M", (57_000, 128), 0),  # As published.
    ("qinco2_s:smoke", (57_000, 128), 0),
  ],
)
def test_the_default_share_follows_weights_numbers_and_passes(
  name, shape, share
):
  config = cli.config_of(name)
  plan = recipe_qinco.make_plan(config, shape[0], 1.0)
  found = recipe_qinco.noise_share(config, plan, shape)
  assert found == pytest.approx(share, rel=0.01)
  config.train.noise_share = 0.2
  assert recipe_qinco.noise_share(config, plan, shape) == 0.2


def test_few_passes_need_no_noise():
  config = cli.config_of("qinco2_s")
  config.train.num_epochs = 2
  plan = recipe_qinco.make_plan(config, 57_000, 1.0)
  found = recipe_qinco.noise_share(config, plan, (57_000, 128))
  assert found == pytest.approx(0.030 / 20, rel=0.01)
