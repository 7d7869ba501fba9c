"""Learning an RQ-VAE: the released program's steps, and what is reported."""

import pathlib

import jax
import numpy as np
import pytest

from vqjax import devices
from vqjax.codecs.rqvae import Mlp, RQVAEParams
from vqjax.training import loop, optimisers, rqvae_learner

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party" / "golden" / "rqvae"


def _params(golden, start):
  """Parameters under the released program's names."""

  def mlp(name):
    head = f"{start}|{name}.mlp_layers."
    places = sorted(
      int(key.removeprefix(head).split(".")[0])
      for key in golden
      if key.startswith(head) and key.endswith("weight")
    )
    weights = tuple(golden[f"{head}{at}.weight"].T for at in places)
    return Mlp(weights, tuple(golden[f"{head}{at}.bias"] for at in places))

  words = tuple(
    golden[f"{start}|rq.vq_layers.{level}.embedding.weight"]
    for level in range(3)
  )
  return RQVAEParams(mlp("encoder"), mlp("decoder"), words)


@pytest.mark.parametrize(
  ("name", "decay"),
  [
    pytest.param("constant", 0, marks=pytest.mark.slow),
    ("linear", 1e-4),
  ],
)
def test_steps_are_those_of_the_released_program(name, decay):
  golden = dict(np.load(GOLDEN / f"train_{name}.npz"))
  x_ND = np.load(GOLDEN / "rqvae_tiny.npz")["x"]
  schedule = optimisers.make_schedule(
    name, peak_lr=0.01, ramp_steps=6, total_steps=15
  )
  tx = optimisers.make_optimiser(schedule, weight_decay=decay, clip_norm=1.0)
  learner = rqvae_learner.make_learner(x_ND, range(len(x_ND)))
  state = rqvae_learner.make_state(
    jax.tree.map(jax.numpy.asarray, _params(golden, "init")), tx
  )
  step_fn = loop.make_train_step(learner, tx, schedule, seed=0)
  wish_N = np.zeros(jax.device_count(), np.int32)
  for step, rows in enumerate(golden["batches"]):
    batch = devices.shard((wish_N, x_ND[rows[rows >= 0]]))
    state, metrics, _ = step_fn(state, *batch)
    for ours, theirs in (
      ("loss", "loss"),
      ("reconstruction", "recon"),
      ("grad_norm", "grad_norm_before_clip"),
      ("lr", "lr"),
    ):
      np.testing.assert_allclose(
        metrics[ours], golden[theirs][step], rtol=1e-3, err_msg=f"{step}"
      )
  want = _params(golden, "final")
  jax.tree.map(
    lambda got, want: np.testing.assert_allclose(
      got, want, atol=1e-3 * np.abs(want).max()
    ),
    state.params,
    want,
  )


def test_figures_of_codes():
  codes_NM = np.array([[0, 1], [0, 1], [2, 1], [0, 3], [0, 1]])
  got = rqvae_learner.code_figures(codes_NM, (4, 5))
  entropy = lambda *p: -sum(q * np.log(q) for q in p)
  assert got["collision_rate"] == 2 / 5
  assert got["utilisation_M"] == [2 / 4, 2 / 5]
  assert got["utilisation"] == pytest.approx(0.45)
  np.testing.assert_allclose(
    got["perplexity_M"], [np.exp(entropy(0.8, 0.2))] * 2
  )
