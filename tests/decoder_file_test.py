import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from vqjax.codecs.additive import AdditiveParams
from vqjax.codecs.pairwise import PairwiseParams
from vqjax.storage import decoder_file, tensors

M, K, D, LISTS = 3, 4, 5, 7


def _decoders(list_codes=True, num_tables=2):
  rng = np.random.default_rng(0)
  additive = AdditiveParams(jnp.asarray(rng.normal(size=(M, K, D)), "float32"))
  pairwise = PairwiseParams(
    pairs_R2=jnp.array([[0, 2], [1, 3 if list_codes else 2]], jnp.int32),
    tables_RKKD=jnp.asarray(rng.normal(size=(num_tables, K, K, D)), "float16"),
    scale_R=jnp.ones(num_tables),
    list_codes_LV=jnp.arange(LISTS, dtype=jnp.int32)[:, None] % K
    if list_codes
    else None,
    num_codes=M,
  )
  return additive, pairwise


def _save(path, additive, pairwise=None, **options):
  options = {"codec_fingerprint": "c" * 16, "info": {"mse": 2.5}} | options
  decoder_file.save(path, additive, pairwise, **options)


@pytest.fixture
def path(tmp_path):
  _save(tmp_path / "decoders.safetensors", *_decoders())
  return tmp_path / "decoders.safetensors"


@pytest.mark.parametrize("list_codes", [True, False])
def test_what_is_saved_is_loaded(tmp_path, list_codes):
  path = tmp_path / "new" / "d.safetensors"
  wanted = _decoders(list_codes)
  _save(path, *wanted)
  got = decoder_file.load(path)
  assert (got.info, got.codec_fingerprint) == ({"mse": 2.5}, "c" * 16)
  for params, want in zip(got[:2], wanted, strict=True):
    mine, theirs = tensors.flatten(params), tensors.flatten(want)
    assert mine[1] == theirs[1]
    assert list(mine[0]) == list(theirs[0])
    for name, x in mine[0].items():
      assert x.dtype == theirs[0][name].dtype
      np.testing.assert_array_equal(x, theirs[0][name])


def test_the_additive_decoder_alone(tmp_path):
  additive, _ = _decoders()
  _save(tmp_path / "d.safetensors", additive)
  got = decoder_file.load(tmp_path / "d.safetensors")
  assert got.pairwise is None
  np.testing.assert_array_equal(
    got.additive.codebooks_MKD, additive.codebooks_MKD
  )


def test_decoders_belong_to_a_codec(path):
  decoders = decoder_file.load(path)
  decoder_file.check_codec(decoders, "c" * 16)
  with pytest.raises(
    ValueError, match="of codec c{16}, but this is codec d{3}"
  ):
    decoder_file.check_codec(decoders, "ddd")


def test_writes_whole_or_not_at_all(path, monkeypatch):
  before = path.read_bytes()
  with pytest.raises(FileExistsError, match="exists already"):
    _save(path, *_decoders())

  def fail(arrays, path, metadata):
    path.write_bytes(b"half")
    raise OSError("disk on fire")

  with monkeypatch.context() as patch:
    patch.setattr(safetensors_numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk on fire"):
      _save(path, *_decoders(), overwrite=True)
  assert path.read_bytes() == before
  assert list(path.parent.iterdir()) == [path]
  _save(path, _decoders()[0], overwrite=True)
  assert decoder_file.load(path).pairwise is None


def test_refuses_what_it_cannot_save(tmp_path):
  path = tmp_path / "d.safetensors"
  additive, _ = _decoders()
  with pytest.raises(ValueError, match=r"a file \*.safetensors, got .*d.npz"):
    _save(tmp_path / "d.npz", additive)
  with pytest.raises(ValueError, match="info must hold finite numbers"):
    _save(path, additive, info={"mse": float("inf")})
  assert not list(tmp_path.iterdir())


def test_refuses_files_of_others(tmp_path, path):
  with pytest.raises(FileNotFoundError, match="pairwise_decoder makes"):
    decoder_file.load(tmp_path / "nothing.safetensors")
  other = tmp_path / "other.safetensors"
  safetensors_numpy.save_file({"w": np.zeros(3)}, other)
  with pytest.raises(ValueError, match="is no file of decoders of vqjax"):
    decoder_file.load(other)
  raw = bytearray(path.read_bytes())
  path.write_bytes(raw[:-9])
  with pytest.raises(ValueError, match="truncated or no safetensors file"):
    decoder_file.load(path)
  raw[-1] ^= 1
  path.write_bytes(raw)
  with pytest.raises(ValueError, match="was changed after it was written"):
    decoder_file.load(path)


def _rewrite(path, change):
  """Changes header and arrays, under a fingerprint that fits them."""
  text, arrays = tensors.read(path)
  header = json.loads(text)
  change(header, arrays)
  digest = tensors.digest(arrays, header["static"])
  text = json.dumps(header | {"fingerprint": digest})
  tensors.write(path, arrays, text)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lambda h, a: h.update(format="vqjax codec"), "format 'vqjax decoders'"),
    (lambda h, a: h.update(version=2), "has version 2, this vqjax"),
    (lambda h, a: h.update(info=None), "damaged header: no valid 'info'"),
    (lambda h, a: h.update(codec_fingerprint=3), "'codec_fingerprint' is 3"),
    (lambda h, a: h["static"].clear(), "lacks the value pairwise.num_codes"),
    (lambda h, a: a.update(x=np.zeros(2)), "no valid file .*: x is of neither"),
    (
      lambda h, a: a.pop("pairwise.scale_R"),
      "lacks the array pairwise.scale_R",
    ),
  ],
)
def test_refuses_changed_files(path, change, said):
  _rewrite(path, change)
  with pytest.raises(ValueError, match=said):
    decoder_file.load(path)
