"""Our RQ-VAE against what the program of LC-Rec's family computed.

Origin and meaning of the files: third_party/golden/README.md.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqjax
from vqjax.codecs import rqvae, rqvae_loss

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party/golden/rqvae"
KEY = jax.random.key(0)
SINKHORN = {"sk": (0.0, 0.0, 0.003), "nosk": ()}


@functools.cache
def _load(name):
  codec = vqjax.load(GOLDEN / f"{name}.pth")
  return codec, dict(np.load(GOLDEN / f"{name}.npz"))


def _close(got, want):
  """To 1e-4 of the largest number: small ones are sums that cancel."""
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


def _check_grads(grads, golden, start, step=3):
  """Compares what the file has of the gradients, by torch's names."""
  last = step * (len(grads.decoder.weights) - 1) + 1
  pairs = {
    "encoder.mlp_layers.1.weight": grads.encoder.weights[0].T,
    f"decoder.mlp_layers.{last}.weight": grads.decoder.weights[-1].T,
  }
  for level, grad_KE in enumerate(grads.codebooks):
    pairs[f"rq.vq_layers.{level}.embedding.weight"] = grad_KE
  names = [name for name in pairs if f"{start}{name}" in golden]
  assert names
  for name in names:
    _close(pairs[name], golden[f"{start}{name}"])
  total = f"{start.replace('|', '_')}total_norm"
  if total in golden:
    norm = jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(grads)))
    _close(norm, golden[total])


@pytest.mark.parametrize("name", ["rqvae_tiny", "rqvae_tiny_bn"])
def test_codes_and_vectors(name):
  codec, golden = _load(name)
  x_ND = golden["x"]
  z_NE = jax.jit(codec.spec.latent)(codec.params, x_ND)
  _close(z_NE, golden["z"])
  codes_NM = codec.encode(x_ND)
  np.testing.assert_array_equal(codes_NM, golden["codes_nosk"])
  _close(codec.decode(codes_NM), golden["recon_nosk"])


@pytest.mark.parametrize("sinkhorn", ["sk", "nosk"])
@pytest.mark.parametrize("loss_type", ["mse", "l1"])
def test_losses_and_gradients(loss_type, sinkhorn):
  codec, golden = _load("rqvae_tiny")
  start = f"{loss_type}_{sinkhorn}_"
  loss_fn = functools.partial(
    rqvae_loss.loss, loss_type=loss_type, sk_epsilons=SINKHORN[sinkhorn]
  )
  grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  (loss, aux), grads = grad_fn(codec.params, KEY, golden["x"])
  _close(loss, golden[f"{start}total"])
  _close(aux["metrics"]["reconstruction"], golden[f"{start}recon_loss"])
  _close(aux["metrics"]["quantisation"], golden[f"rq_loss_{sinkhorn}"])
  _check_grads(grads, golden, f"{start}grad|")
  codes_NM = golden[f"codes_{sinkhorn}"]
  for used_K, ids_N in zip(aux["stats"].used, codes_NM.T, strict=True):
    np.testing.assert_array_equal(
      used_K, np.bincount(ids_N, minlength=len(used_K))
    )


def test_weight_and_beta():
  codec, golden = _load("rqvae_tiny")
  loss_fn = functools.partial(rqvae_loss.loss, quant_weight=0.7, beta=0.4)
  grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  (loss, aux), grads = grad_fn(codec.params, KEY, golden["x"])
  _close(loss, golden["w07b04_total"])
  _close(aux["metrics"]["quantisation"], golden["w07b04_rq_loss"])
  _check_grads(grads, golden, "w07b04_grad|")


def test_batch_norm_by_its_running_statistics():
  codec, golden = _load("rqvae_tiny_bn")
  loss_fn = lambda params: rqvae_loss.loss(
    rqvae.prepare(params), KEY, golden["x"]
  )
  (loss, _), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
    codec.params
  )
  _close(loss, golden["mse_nosk_total"])
  is_frozen = rqvae_loss.frozen(codec.params)  # The folded ones have some.
  grads = jax.tree.map(lambda x, skip: 0 * x if skip else x, grads, is_frozen)
  _check_grads(grads, golden, "mse_nosk_grad|", step=4)


def test_batch_norm_by_the_batch():
  codec, golden = _load("rqvae_tiny_bn")
  x_ND = golden["x"]
  loss_fn = jax.jit(rqvae_loss.loss)
  _, aux = loss_fn(codec.params, KEY, x_ND)
  _close(aux["metrics"]["quantisation"], golden["train_mode_rq_loss"])
  error = np.mean((golden["train_mode_recon"] - x_ND) ** 2)
  _close(aux["metrics"]["reconstruction"], error)
  params = rqvae_loss.update_norms(codec.params, aux["stats"])
  for name, mlp in (("encoder", params.encoder), ("decoder", params.decoder)):
    for j, norm in enumerate(mlp.norms):
      start = f"after_one_train_forward|{name}.mlp_layers.{4 * j + 2}.running_"
      _close(norm.mean_H, golden[f"{start}mean"])
      _close(norm.var_H, golden[f"{start}var"])
  is_frozen = rqvae_loss.frozen(params)
  assert sum(map(bool, jax.tree.leaves(is_frozen))) == 8
  assert is_frozen.decoder.norms[1].var_H is True


def test_rq_kmeans_plus():
  codec, golden = _load("rqkmeans_plus_tiny")
  z_NE = jax.jit(codec.spec.latent)(codec.params, golden["x"])
  _close(z_NE, golden["z"])
  np.testing.assert_array_equal(codec.encode(golden["x"]), golden["codes"])
  _close(codec.decode(golden["codes"]), golden["recon"])
