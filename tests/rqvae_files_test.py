"""RQ-VAE checkpoints and RQ-KMeans archives of other programs."""

import pathlib

import numpy as np
import pytest

import vqjax
from tests.pickles import Build, Call, Name, storage, tensor, write

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party/golden/rqvae"


def test_what_the_resolver_needs_is_kept():
  codec = vqjax.load(GOLDEN / "rqvae_tiny.pth")
  assert codec.info["sk_epsilons"] == [0.0, 0.0, 0.003]
  assert (codec.info["sk_iters"], codec.info["epoch"]) == (50, 5)
  assert codec.info["trained_with"]["learner"] == "AdamW"
  assert codec.codebook_sizes == (9, 8, 7)
  assert codec.num_bytes == 10 / 8  # 4 + 3 + 3 bits.


def test_a_checkpoint_is_saved_as_our_own(tmp_path):
  codec = vqjax.load(GOLDEN / "rqvae_tiny_bn.pth")
  codec.save(tmp_path)
  again = vqjax.load(tmp_path)
  assert again.fingerprint == codec.fingerprint
  assert again.info == codec.info
  x_ND = np.load(GOLDEN / "rqvae_tiny_bn.npz")["x"]
  np.testing.assert_array_equal(again.encode(x_ND), codec.encode(x_ND))


def _checkpoint(path, state=(), **changes):
  """An archive of a tiny RQ-VAE, 3 -> 2 dimensions and 2 codewords."""
  records = {"data/0": np.arange(6, dtype="f4").tobytes()}
  made = {
    "encoder.mlp_layers.1.weight": tensor(shape=(2, 3)),
    "encoder.mlp_layers.1.bias": tensor(shape=(2,), strides=(1,)),
    "rq.vq_layers.0.embedding.weight": tensor(shape=(2, 2), strides=(2, 1)),
    "decoder.mlp_layers.1.weight": tensor(shape=(3, 2), strides=(2, 1)),
    "decoder.mlp_layers.1.bias": tensor(shape=(3,), strides=(1,)),
  } | dict(state)
  made = {name: x for name, x in made.items() if x is not None}
  space = Call(Name("argparse", "Namespace"), (), b"\x81")
  args = {"sk_epsilons": [0.003], "sk_iters": 7, "device": "cpu"}
  root = {"args": Build(space, args), "epoch": 3, "state_dict": made}
  return write(path, {**root, **changes}, records)


def test_a_tiny_checkpoint_is_read(tmp_path):
  # numpy 1 and 2 have scalars at different places.
  for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    dtype = Build(
      Call(Name("numpy", "dtype"), ("f8", False, True)),
      (3, "<", None, None, None, -1, -1, 0),
    )
    number = Call(Name("_codecs", "encode"), ("\0" * 8, "latin1"))
    scalar = Call(Name(module, "scalar"), (dtype, number))
    path = _checkpoint(tmp_path / "x.pth", best_codebook_utilization=scalar)
    codec = vqjax.load(path)
    assert codec.info["sk_epsilons"] == [0.003]
    assert codec.info["trained_with"]["sk_iters"] == 7
    # x W' + b of the numbers 0 to 5.
    z_NE = codec.spec.latent(codec.params, np.float32([[1, 1, 1]]))
    np.testing.assert_allclose(z_NE, [[3, 13]])


BAD = "rq.vq_layers.1.embedding.weight"


@pytest.mark.parametrize(
  ("state", "said"),
  [
    ({"decoder.mlp_layers.1.bias": None}, "no tensor 'decoder.mlp_layers.1.b"),
    ({BAD: tensor(shape=(2, 3))}, r"shape \(2, 3\), expected \(None, 2\)"),
    ({BAD: 3}, "no tensor 'rq.vq_layers.1.embedding.weight'"),
    ({"encoder.mlp_layers.1.weight": None}, "0 linear layers"),
    (
      {"decoder.mlp_layers.4.weight": tensor(shape=(3, 2), strides=(2, 1))}
      | {"decoder.mlp_layers.4.bias": tensor(shape=(3,), strides=(1,))},
      "layers in its decoder that do not fit each other",
    ),
    (
      {f"encoder.mlp_layers.2.running_{k}": tensor() for k in ("mean", "var")}
      | {"encoder.mlp_layers.2.weight": tensor(shape=(2,), strides=(1,))},
      r"expected \(2,\)|no tensor 'encoder.mlp_layers.2.bias'",
    ),
    (
      {f"rq.vq_layers.{at}.embedding.weight": tensor() for at in range(27)},
      "27 levels; at most 26",
    ),
    ({BAD: tensor(storage(size=2), shape=(2, 2))}, "does not lie within"),
  ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, state, said):
  path = _checkpoint(tmp_path / "x.pth", state)
  with pytest.raises(ValueError, match=said) as error:
    vqjax.load(path)
  assert str(path) in str(error.value)


def test_odd_options_are_left_out(tmp_path):
  args = {"sk_epsilons": "no", "sk_iters": [1], "layers": [[1]], "x" * 3: "y"}
  space = Call(Name("argparse", "Namespace"), (), b"\x81")
  path = _checkpoint(tmp_path / "x.pth", args=Build(space, args), epoch="2")
  info = vqjax.load(path).info
  assert (info["sk_epsilons"], info["sk_iters"]) == ([0.0], 50)
  assert info["epoch"] is None
  assert "layers" not in info["trained_with"]


def test_rq_kmeans_is_opened():
  golden = np.load(GOLDEN / "rqkmeans_constrained.npz")
  codec = vqjax.load(GOLDEN / "rqkmeans_constrained.npz")
  assert (codec.name, codec.codebook_sizes) == ("rq", (6, 6))
  np.testing.assert_allclose(
    codec.decode(golden["codes"]), golden["recon"], atol=1e-6
  )


def test_levels_of_several_sizes_are_opened(tmp_path):
  rng = np.random.default_rng(0)
  books = [rng.normal(size=(k, 3)) for k in (5, 4)]
  path = tmp_path / "x.npz"
  np.savez(path, codebook_0=books[0], codebook_1=books[1])
  codec = vqjax.load(path)
  assert (codec.name, codec.codebook_sizes) == ("rqvae", (5, 4))
  want = books[0][[1, 4]] + books[1][[3, 0]]
  np.testing.assert_allclose(codec.decode([[1, 3], [4, 0]]), want, rtol=1e-6)
  np.testing.assert_array_equal(codec.encode(books[0])[:, 0], range(5))


@pytest.mark.parametrize(
  ("arrays", "said"),
  [
    ({"codes": np.zeros(3)}, "codebook_0, codebook_1 and so on.*got 0"),
    ({"codebook_0": np.zeros(3)}, r"codebook_0 of shape \(3,\)"),
    ({"codebook_0": np.full((2, 2), np.nan)}, "NaN or Inf in codebook_0"),
    (
      {"codebook_0": np.zeros((2, 2)), "codebook_1": np.zeros((2, 3))},
      r"codebook_1 of shape \(2, 3\), float64; expected floats \[K, D\] with",
    ),
  ],
)
def test_an_archive_without_codebooks_is_refused(tmp_path, arrays, said):
  path = tmp_path / "x.npz"
  np.savez(path, **arrays)
  with pytest.raises(ValueError, match=said):
    vqjax.load(path)


def test_no_archive_is_refused(tmp_path):
  path = tmp_path / "x.npz"
  path.write_bytes(b"PK\x03\x04 and no more")
  with pytest.raises(ValueError, match="damaged or no archive of numpy"):
    vqjax.load(path)
