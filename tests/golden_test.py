"""Our QINCo against what the released programs computed.

Origin and meaning of the files: third_party/golden/README.md.
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.codecs import qinco_loss, registry
from vqjax.codecs.rule import SearchRule
from vqjax.interop.torch_qinco import load_checkpoint

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party" / "golden"
SIZES = {  # Words at each code position.
  "ivf_qinco2_tiny": (32, 16, 16, 16, 16),
  "qinco1_tiny_v2format": (16,) * 4,
  "qinco2_tiny": (16,) * 4,
  "qinco2_tiny_dim_equal": (16,) * 4,
  "v1_ivf_qinco": (40, 16, 16, 16),
  "v1_pq_qinco_opq": (16,) * 6,
  "v1_qinco": (16,) * 3,
  "v1_qinco_lr": (16,) * 3,
}
# float32 sums in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@functools.cache
def _load(name):
  codec_name, params, info = load_checkpoint(GOLDEN / f"{name}.pt")
  codec = registry.get(codec_name)
  return codec, params, info, dict(np.load(GOLDEN / f"{name}.npz"))


def _errors(x, y):
  return np.sum((np.asarray(x, np.float64) - y) ** 2, axis=1)


def test_every_golden_checkpoint_is_tested():
  assert {path.stem for path in GOLDEN.glob("*.pt")} == set(SIZES)


@pytest.mark.parametrize("name", SIZES)
def test_sizes(name):
  codec, params, _, _ = _load(name)
  assert codec.codebook_sizes(params) == SIZES[name]
  assert codec.dim(params) == 16


@pytest.mark.parametrize("name", SIZES)
def test_decodes_as_the_released_program(name):
  codec, params, _, want = _load(name)
  tables = jax.jit(codec.prepare)(params)
  for codes, decoded in (
    ("codes", "decoded"),
    ("random_codes", "random_decoded"),
  ):
    got = jax.jit(codec.decode)(tables, jnp.asarray(want[codes]))
    np.testing.assert_allclose(got, want[decoded], **CLOSE)
    if decoded == "decoded":
      mse = _errors(got, want["x"]).mean()
      np.testing.assert_allclose(mse, want["mse"], rtol=1e-4)


@pytest.mark.parametrize("name", SIZES)
def test_encodes_as_the_released_program(name):
  codec, params, info, want = _load(name)
  tables, x_ND = jax.jit(codec.prepare)(params), want["x"]
  encode_fn = jax.jit(
    lambda tables, x_ND: codec.encode(
      tables, x_ND, None, codec.rule.replace(**info["encode"])
    )
  )
  codes = np.asarray(encode_fn(tables, jnp.asarray(x_ND)))
  differ = np.any(codes != want["codes"], axis=1)
  # Two candidates may tie to rounding.
  assert differ.mean() <= 0.01
  ours = jax.jit(codec.decode)(tables, jnp.asarray(codes))
  np.testing.assert_allclose(
    _errors(ours, x_ND)[differ],
    _errors(want["decoded"], x_ND)[differ],
    rtol=1e-4,
  )


@pytest.mark.parametrize(
  "name", [name for name in SIZES if not name.startswith("v1")]
)
def test_losses_are_those_of_the_released_program(name):
  _, params, info, want = _load(name)
  loss_fn = functools.partial(
    qinco_loss.loss, rule=SearchRule(**info["encode"])
  )
  _, aux = jax.jit(loss_fn)(params, jax.random.key(0), jnp.asarray(want["x"]))
  pairs = {"mse_loss": "loss_mse_loss", "preselect_loss": "loss_loss_substep"}
  for ours, theirs in pairs.items():
    # QINCo1 has no pre-selection, so its file has no loss of it.
    np.testing.assert_allclose(
      aux["metrics"][ours], want.get(theirs, 0.0), rtol=1e-4
    )


def test_encode_defaults_are_those_of_the_checkpoint():
  _, _, info, _ = _load("ivf_qinco2_tiny")
  assert info["encode"] == {"num_candidates": 4, "beam_size": 8}
  assert info["epoch"] == 4
  assert info["source"] == "v2"
  _, _, info, _ = _load("v1_qinco_lr")
  assert info["encode"] == {"num_candidates": 0, "beam_size": 1}
  assert info["source"] == "v1 QINCoLR"


def test_scales():
  assert float(_load("v1_qinco")[1].std) == 2.5
  assert float(_load("v1_qinco_lr")[1].std) == 1.5  # A numpy scalar.
  blocks = _load("v1_pq_qinco_opq")[1].blocks
  np.testing.assert_array_equal(blocks.std, [1.0, 2.0])
