import json
import pathlib
import shutil
import struct

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy

from vqjax.codecs import qinco_search, registry
from vqjax.data import temporary
from vqjax.interop import torch_qinco
from vqjax.storage import codec_file, tensors
from vqjax.storage.codec_file import load_codec, save_codec

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party" / "golden"
INFO = {
  "encode": {"num_candidates": 4, "beam_size": 8},
  "metric": "l2",
  "scale": 1e-4,
  "unit": "1e4",
  "training": {"epochs": 3, "mse": 1.77},
}


def _params(name="qinco2_tiny"):
  return torch_qinco.load_checkpoint(GOLDEN / f"{name}.pt")[1]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A folder with a codec; tests that change it work on a copy."""
  folder = tmp_path_factory.mktemp("saved")
  save_codec(folder, "qinco", _params(), info=INFO)
  return folder


@pytest.fixture
def folder(saved, tmp_path):
  return shutil.copytree(saved, tmp_path / "run")


def _equal(got, want):
  arrays = [codec_file._flatten(params) for params in (got, want)]
  assert type(got) is type(want)
  assert arrays[0][1] == arrays[1][1]
  assert set(arrays[0][0]) == set(arrays[1][0])
  for name, x in arrays[0][0].items():
    assert x.dtype == arrays[1][0][name].dtype
    np.testing.assert_array_equal(x, arrays[1][0][name])


def _edit(folder, change):
  """Writes the header, in both places, after `change(header)`."""
  path = folder / "codec.safetensors"
  raw = path.read_bytes()
  (size,) = struct.unpack("<Q", raw[:8])
  outer = json.loads(raw[8 : 8 + size])
  header = json.loads(outer["__metadata__"]["vqjax"])
  change(header)
  text = json.dumps(header)
  outer["__metadata__"]["vqjax"] = text
  head = json.dumps(outer).encode()
  path.write_bytes(struct.pack("<Q", len(head)) + head + raw[8 + size :])
  (folder / "codec.json").write_text(text)


@pytest.mark.parametrize(
  ("codec", "name"),
  [
    ("qinco", "qinco2_tiny"),
    ("qinco", "ivf_qinco2_tiny"),
    ("qinco", "qinco1_tiny_v2format"),
    ("qinco", "v1_qinco_lr"),
    ("pq_qinco", "v1_pq_qinco_opq"),
  ],
)
def test_what_is_saved_is_loaded(tmp_path, codec, name):
  params = _params(name)
  path = save_codec(tmp_path / "new" / "run", codec, params, info=INFO)
  assert path == tmp_path / "new" / "run" / "codec.safetensors"
  for place in (path, path.parent):
    got = load_codec(place)
    _equal(got.params, params)
    assert (got.name, got.info) == (codec, INFO)
    assert got.fingerprint == codec_file.fingerprint(params)


@pytest.mark.parametrize("codec", ["pq", "rq"])
def test_saves_classical_codecs(tmp_path, codec):
  books = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)))
  params = registry.get(codec).Params(books)
  save_codec(tmp_path, codec, params, info={})
  loaded = load_codec(tmp_path)
  assert loaded.name == codec
  _equal(loaded.params, params)


def test_header_says_what_is_needed(folder):
  header = json.loads((folder / "codec.json").read_text())
  assert header["codec"] == "qinco"
  assert header["dim"] == 16
  assert header["codebook_sizes"] == [16] * 4
  assert header["info"] == INFO
  assert header["version"] == 1
  assert len(header["fingerprint"]) == 16
  assert {"vqjax_version", "created"} <= set(header)


def test_names_of_arrays_are_field_paths(tmp_path):
  path = save_codec(tmp_path, "pq_qinco", _params("v1_pq_qinco_opq"), info={})
  names = set(safetensors_numpy.load_file(path))
  assert {"rotation_DD", "blocks.codebooks_TKD", "blocks.std"} <= names
  assert "blocks.in_TDE" not in names  # None.


def test_the_tensors_file_alone_is_a_codec(folder, tmp_path):
  alone = tmp_path / "mine.safetensors"
  shutil.copy(folder / "codec.safetensors", alone)
  got = load_codec(alone)
  _equal(got.params, _params())
  assert got.info == INFO
  # As is a folder with one such file, whatever its name.
  other = tmp_path / "other"
  other.mkdir()
  shutil.copy(alone, other)
  _equal(load_codec(other).params, _params())


def test_loads_released_checkpoints(tmp_path):
  shutil.copy(GOLDEN / "qinco2_tiny.pt", tmp_path)
  for place in (tmp_path, tmp_path / "qinco2_tiny.pt"):
    got = load_codec(place)
    assert got.name == "qinco"
    assert got.info["encode"] == {"num_candidates": 4, "beam_size": 8}
    assert got.fingerprint == codec_file.fingerprint(_params())


def test_info_may_hold_numpy_and_jax_scalars(tmp_path):
  info = {"mse": np.float32(0.5), "steps": jnp.int32(3), "sizes": (1, 2)}
  save_codec(tmp_path, "qinco", _params(), info=info)
  assert load_codec(tmp_path).info == {"mse": 0.5, "steps": 3, "sizes": [1, 2]}


def test_fingerprint_sees_every_change():
  params = _params()
  changed = [
    params.replace(std=params.std * (1 + 2e-7)),
    params.replace(mean_D=params.mean_D.reshape(4, 4)),
    params.replace(mean_D=params.mean_D.view(jnp.int32)),
    params.replace(add_word=False),
    params.replace(in_TDE=None),
    params.replace(word_TEU=params.bias_TE, bias_TE=params.word_TEU),
  ]
  prints = [codec_file.fingerprint(p) for p in (params, *changed)]
  assert len(set(prints)) == len(prints)
  assert prints[0] == codec_file.fingerprint(_params())


def test_fingerprint_is_the_same_everywhere():
  """Written into files: a change of it makes old files unreadable."""
  params = registry.get("rq").Params(jnp.arange(12.0).reshape(2, 3, 2))
  assert codec_file.fingerprint(params) == "a09719a30be2bbf1"


def test_everybody_may_read_who_may_read_new_files(folder, saved):
  (folder / "new").touch()
  modes = {path.stat().st_mode for path in (folder / "new", *saved.iterdir())}
  assert len(modes) == 1


def test_writes_whole_or_not_at_all(folder, monkeypatch):
  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  params = _params("qinco2_tiny_dim_equal")
  with pytest.raises(FileExistsError, match=r"codec\.json exists already"):
    save_codec(folder, "qinco", params, info={})

  def fail(arrays, path, metadata):
    pathlib.Path(path).write_bytes(b"half")
    raise OSError("disk on fire")

  with monkeypatch.context() as patch:
    patch.setattr(safetensors_numpy, "save_file", fail)
    with pytest.raises(OSError, match="disk on fire"):
      save_codec(folder, "qinco", params, info={}, overwrite=True)
    with pytest.raises(OSError, match="disk on fire"):
      save_codec(folder / "b", "qinco", params, info={})
  assert {p.name: p.read_bytes() for p in folder.glob("*.*")} == before
  assert not list((folder / "b").iterdir())
  save_codec(folder, "qinco", params, info={}, overwrite=True)
  _equal(load_codec(folder).params, params)


def test_refuses_what_it_cannot_save(tmp_path):
  params = _params()
  with pytest.raises(ValueError, match="codec must be one of .*got 'lsq'"):
    save_codec(tmp_path, "lsq", params, info={})
  with pytest.raises(TypeError, match="has parameters RQParams, got QincoPar"):
    save_codec(tmp_path, "rq", params, info={})
  with pytest.raises(TypeError, match="plain values, got PosixPath"):
    save_codec(tmp_path, "qinco", params, info={"path": tmp_path})
  with pytest.raises(ValueError, match="info must hold finite numbers"):
    save_codec(tmp_path, "qinco", params, info={"mse": float("nan")})
  assert not list(tmp_path.iterdir())


def test_refuses_missing_files(tmp_path):
  with pytest.raises(FileNotFoundError, match="expected a run folder, a codec"):
    load_codec(tmp_path / "nothing")
  with pytest.raises(FileNotFoundError, match="must hold .* found 0: none"):
    load_codec(tmp_path)
  for name in ("a.pt", "b.safetensors"):
    (tmp_path / name).write_bytes(b"")
  with pytest.raises(FileNotFoundError, match="found 2: a.pt, b.safetensors"):
    load_codec(tmp_path)


@pytest.mark.parametrize("kind", ["checkpoints", "config.json"])
def test_refuses_unfinished_runs(tmp_path, kind):
  place = tmp_path / kind
  place.write_text("{}") if "." in kind else place.mkdir()
  said = "no checkpoint yet.* Run its command again .*--workdir="
  with pytest.raises(FileNotFoundError, match=said):
    load_codec(tmp_path)


def test_refuses_files_of_others(tmp_path):
  path = tmp_path / "x.safetensors"
  for metadata in (None, {"format": "pt"}):
    safetensors_numpy.save_file({"w": np.zeros(3)}, path, metadata=metadata)
    with pytest.raises(ValueError, match="is no codec of vqjax: its metadata"):
      load_codec(path)
  for text, said in (
    ("{", "has a damaged header"),
    ("[]", "has a damaged header: .* expected an object, got list"),
    ("[" * 3000 + "]" * 3000, "has a damaged header: .* more than 64 brackets"),
    ('{"format": "other"}', "must have format 'vqjax codec'"),
  ):
    safetensors_numpy.save_file({}, path, metadata={"vqjax": text})
    with pytest.raises(ValueError, match=said):
      load_codec(path)
  path = tmp_path / "codes.npy"
  path.write_bytes(b"")
  with pytest.raises(ValueError, match="got suffix '.npy'"):
    load_codec(path)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.999])
def test_refuses_truncated_files(folder, share):
  path = folder / "codec.safetensors"
  raw = path.read_bytes()
  path.write_bytes(raw[: int(len(raw) * share)])
  with pytest.raises(ValueError, match="truncated or no safetensors file"):
    load_codec(folder)


def test_a_ranker_is_stored_with_a_fingerprint_of_its_own(folder, tmp_path):
  numbers = np.arange(4, dtype=np.float32).reshape(1, 2, 2)
  ranker = qinco_search.Ranker(*(numbers + i for i in range(5)))
  save_codec(tmp_path / "r", "qinco", _params(), info=INFO, ranker=ranker)
  loaded = load_codec(tmp_path / "r")
  assert loaded.fingerprint == load_codec(folder).fingerprint
  assert codec_file.fingerprint(loaded.ranker) == codec_file.fingerprint(ranker)
  path = tmp_path / "r" / "codec.safetensors"
  text, arrays = tensors.read(path)
  for changed in ({"ranker.plain_TKU": numbers}, {}):
    del arrays["ranker.plain_TKU"]
    arrays |= changed
    tensors.write(path, arrays, text)
    with pytest.raises(ValueError, match="ranker does not match its finger"):
      load_codec(tmp_path / "r")


def test_refuses_changed_arrays(folder):
  path = folder / "codec.safetensors"
  raw = bytearray(path.read_bytes())
  raw[-1] ^= 1
  path.write_bytes(raw)
  with pytest.raises(ValueError, match="was changed after it was written"):
    load_codec(folder)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"version": 2}, "has version 2, this vqjax .* reads version 1"),
    ({"codec": "vae"}, "holds codec 'vae', which this vqjax does not know; it"),
    ({"codec": "rq"}, "is no codec 'rq': it lacks the array codebooks_MKD"),
    ({"codec": ["a"]}, "holds codec .*which this vqjax does not know"),
    ({"fingerprint": "0" * 16}, "fingerprint [0-9a-f]{16}, expected 0{16}"),
    ({"fingerprint": None}, "damaged header: no valid 'fingerprint'"),
    ({"info": 3}, "damaged header: no valid 'info'"),
    ({"static": {}}, "was changed after it was written"),
    ({"dim": 3}, r"dim and codebook_sizes are \[16, .*expected \[3, "),
  ],
)
def test_refuses_changed_headers(folder, change, said):
  _edit(folder, lambda header: header.update(change))
  with pytest.raises(ValueError, match=said):
    load_codec(folder)


def test_refuses_changed_info(folder):
  def change(header):
    name = next(iter(header["info"]))
    header["info"] |= {name: "other", "metric": "ip"}

  _edit(folder, change)
  with pytest.raises(ValueError, match="in its header .info. do not match"):
    load_codec(folder)
  # A file of before, without a digest, is taken; its neighbour must agree.
  _edit(folder, lambda header: header.pop("info_digest"))
  assert load_codec(folder).info["metric"] == "ip"
  header = json.loads((folder / "codec.json").read_text())
  header["info"]["metric"] = "l2"
  (folder / "codec.json").write_text(json.dumps(header))
  with pytest.raises(
    ValueError, match="codec.json says metric=l2, but codec.s"
  ):
    load_codec(folder)


def test_a_kill_while_replacing_leaves_a_codec(folder):
  params = _params("qinco2_tiny_dim_equal")
  found = []
  for number in range(20):
    with pytest.MonkeyPatch.context() as patch:
      calls = []

      def kill(name, path, calls=calls, number=number):
        calls.append(name)
        if len(calls) > number:
          raise KeyboardInterrupt

      patch.setattr(temporary, "at_point", kill)
      try:
        save_codec(folder, "qinco", params, info={}, overwrite=True)
      except KeyboardInterrupt:
        found.append(load_codec(folder).fingerprint)
      else:
        break
  assert len(set(found)) == 2  # The old one, then the new one.


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2"])
def test_refuses_types_that_numpy_lacks(tmp_path, dtype):
  path = tmp_path / "x.safetensors"
  table = {"a": {"dtype": dtype, "shape": [4], "data_offsets": [0, 4]}}
  table["__metadata__"] = {"vqjax": "{}"}
  text = json.dumps(table).encode()
  path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
  with pytest.raises(ValueError, match="a type that numpy does not have .*flo"):
    load_codec(path)


def _resave(folder, arrays, static):
  """Writes arrays with a fingerprint that fits them."""
  header = json.loads((folder / "codec.json").read_text())
  header |= {
    "static": static,
    "fingerprint": codec_file._digest(arrays, static),
  }
  (folder / "codec.json").unlink()
  path = folder / "codec.safetensors"
  safetensors_numpy.save_file(arrays, path, {"vqjax": json.dumps(header)})


def test_refuses_arrays_that_do_not_fit_the_codec(folder):
  arrays, static = codec_file._flatten(_params())
  for new_arrays, new_static, said in (
    (arrays | {"x": np.zeros(2)}, static, "has no field for x"),
    (arrays, static | {"y": 1}, "has no field for y"),
    (arrays, {"is_ivf": False}, "its header lacks the value add_word"),
    (arrays | {"mean_D": np.zeros(3)}, static, "does not fit its arrays"),
  ):
    _resave(folder, new_arrays, new_static)
    with pytest.raises(ValueError, match=said):
      load_codec(folder)
    (folder / "codec.json").write_text(
      json.dumps(
        {"format": "vqjax codec", "version": 1, "codec": "qinco"}
        | {"static": {}, "info": {}, "fingerprint": "f" * 16}
      )
    )


def test_refuses_a_header_of_another_codec(folder, tmp_path):
  other = _params("qinco2_tiny_dim_equal")
  save_codec(tmp_path / "b", "qinco", other, info={})
  shutil.copy(tmp_path / "b" / "codec.json", folder)
  with pytest.raises(
    ValueError, match=r"describes codec .* remove codec\.json"
  ):
    load_codec(folder)
