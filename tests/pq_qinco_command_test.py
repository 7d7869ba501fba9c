"""PQ-QINCo by commands: parts of vectors, and one codec of theirs."""

import importlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import encode, evaluate, pq_qinco, train
from experiments.lib import cli, pq_parts
from tests import qinco_cases
from vqjax.codecs import pq_qinco as codec_module
from vqjax.codecs import qinco
from vqjax.codecs.rule import SearchRule
from vqjax.data import datasets, formats
from vqjax.storage import codec_file

P, S, NUM, HELD = 2, 4, 600, 50
D = P * S
ENCODE = {"num_candidates": 3, "beam_size": 2}


@pytest.fixture(name="source", scope="module")
def _source(tmp_path_factory):
  """Vectors whose first dimensions have nearly all the variance."""
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(NUM, D)) * (4.0 ** -np.arange(D)) + 1
  path = tmp_path_factory.mktemp("data") / "x.fvecs"
  formats.write_vectors(path, x_ND.astype(np.float32))
  return str(path)


def _run(folder, **values):
  values = {"output": str(folder), **values}
  return pq_qinco.run(cli.get_config(pq_qinco.OPTIONS, **values))


def _prepare(folder, source, **values):
  values = {"num_blocks": P, **values}
  return _run(folder, prepare=True, data=source, **values)


def _save_part(folder, file, seed, *, validation_size=HELD, **sizes):
  """What training on `file` leaves behind, but for the quality."""
  params = qinco_cases.make_params(seed, **{"dim": S, **sizes})
  data = {"train": str(file), "num_train": None}
  data["validation_size"] = validation_size
  info = {"encode": ENCODE, "metric": "l2", "scale": 2.0, "data": data}
  info["training"] = {"seconds": 1.5}
  codec_file.save_codec(folder, "qinco", params, info=info)


def _prepare_with_codecs(folder, source, **values):
  _prepare(folder, source, **values)
  for block in range(P):
    file = pq_parts.part_path(folder, block)
    _save_part(pq_parts.codec_path(folder, block), file, block)
  return folder


@pytest.fixture(name="rotated", scope="module")
def _rotated(source, tmp_path_factory):
  return _prepare_with_codecs(tmp_path_factory.mktemp("opq"), source, opq=True)


@pytest.fixture(name="plain", scope="module")
def _plain(source, tmp_path_factory):
  return _prepare_with_codecs(tmp_path_factory.mktemp("plain"), source)


@pytest.fixture(name="folder")
def _folder(rotated, tmp_path):
  """A copy to change; its codecs were trained on the files of another."""
  return shutil.copytree(rotated, tmp_path / "parts")


def _parts(folder):
  files = [pq_parts.part_path(folder, block) for block in range(P)]
  return np.stack([np.load(file) for file in files])


def _rotation(folder):
  return np.load(folder / pq_parts.ROTATION_NAME)


@jax.jit
def _errors(params, x_ND):
  """Squared error of each vector, coded by one QINCo."""
  xhat_ND = qinco.decode(
    params, qinco.encode(params, x_ND, rule=SearchRule(**ENCODE))
  )
  return jnp.sum((x_ND - xhat_ND) ** 2, axis=1)


def test_parts_are_the_slices_of_the_vectors(source, tmp_path, monkeypatch):
  monkeypatch.setattr(pq_parts, "_BLOCK", 64)
  record = _prepare(tmp_path / "parts", source, num_blocks=4)
  x_ND = np.asarray(formats.open_vectors(source))
  for block in range(4):
    x_NS = np.load(pq_parts.part_path(tmp_path / "parts", block))
    assert x_NS.dtype == np.float32
    np.testing.assert_array_equal(x_NS, x_ND[:, 2 * block : 2 * block + 2])
  written = json.loads((tmp_path / "parts" / "prepared.json").read_text())
  assert written == record
  assert (record["source"], record["num_vectors"]) == (source, NUM)
  assert (record["dim"], record["num_blocks"], record["opq"]) == (D, 4, False)


def test_the_rotation_evens_out_the_parts(source, rotated):
  rotation_DD, x_PNS = _rotation(rotated), _parts(rotated)
  x_ND = np.asarray(formats.open_vectors(source))
  np.testing.assert_allclose(rotation_DD @ rotation_DD.T, np.eye(D), atol=1e-5)
  np.testing.assert_allclose(np.hstack(x_PNS) @ rotation_DD.T, x_ND, atol=1e-5)
  params = codec_module.recombine(
    [qinco_cases.make_params(block, dim=S) for block in range(P)], rotation_DD
  )
  np.testing.assert_allclose(codec_module.split(x_ND, params), x_PNS, atol=1e-5)
  of_parts = lambda x_PNS: np.sort(x_PNS.var(axis=1).sum(axis=1))
  before = of_parts(x_ND.reshape(NUM, P, S).swapaxes(0, 1))
  assert of_parts(x_PNS)[0] > 10 * before[0]


def test_the_same_command_makes_what_is_missing(source, folder):
  before_PNS = _parts(folder)
  pq_parts.part_path(folder, 1).unlink()
  times = [
    file.stat().st_mtime_ns
    for file in (folder / "prepared.json", pq_parts.part_path(folder, 0))
  ]
  _prepare(folder, source, opq=True)
  np.testing.assert_array_equal(_parts(folder), before_PNS)
  assert times == [
    file.stat().st_mtime_ns
    for file in (folder / "prepared.json", pq_parts.part_path(folder, 0))
  ]
  with pytest.raises(ValueError, match="parts with num_blocks=2, now it is 4"):
    _prepare(folder, source, opq=True, num_blocks=4)
  with pytest.raises(
    ValueError, match="parts with num_vectors=600, now .* 599"
  ):
    _prepare(folder, source, opq=True, num_vectors=599)
  np.save(pq_parts.part_path(folder, 1), before_PNS[1][:-1])
  with pytest.raises(ValueError, match=r"shape \(600, 4\), got \(599, 4\)"):
    _prepare(folder, source, opq=True)


def test_bad_requests_are_refused(source, tmp_path):
  refused = lambda text: pytest.raises((ValueError, OSError), match=text)
  with refused("either --prepare or --recombine"):
    _run(tmp_path)
  with refused("--opq belongs to --prepare, not to --recombine"):
    _run(tmp_path, recombine=True, opq=True)
  with refused("--parts belongs to --recombine"):
    _prepare(tmp_path, source, parts="a,b")
  with refused("must divide the 8 dimensions .* got 3"):
    _prepare(tmp_path, source, num_blocks=3)
  with refused("--num_blocks must lie between 2 and 8, got 1"):
    _prepare(tmp_path, source, num_blocks=1)
  with refused("has no prepared.json: run --prepare first"):
    _run(tmp_path, recombine=True)
  assert not list(tmp_path.iterdir())
  np.save(tmp_path / "part-0.npy", np.zeros((1, 1)))
  with refused("part-0.npy, but no prepared.json"):
    _prepare(tmp_path, source)


@pytest.mark.parametrize("name", ["plain", "rotated"])
def test_the_codec_is_that_of_the_parts(name, request, source, tmp_path):
  folder = shutil.copytree(request.getfixturevalue(name), tmp_path / "parts")
  rotation_DD = _rotation(folder) if name == "rotated" else None
  result = _run(folder, recombine=True)
  found = codec_file.load_codec(folder)
  blocks = [qinco_cases.make_params(block, dim=S) for block in range(P)]
  want = codec_module.recombine(blocks, rotation_DD)
  assert found.name == "pq_qinco"
  assert found.fingerprint == codec_file.fingerprint(want)
  assert found.info["encode"] == ENCODE
  assert (found.info["scale"], found.info["metric"]) == (2.0, "l2")
  assert found.info["data"]["train"] == source
  assert found.info["training"]["seconds"] == 3.0
  mse = found.info["training"]["validation_mse"]
  assert result["codec"] == str(folder / "codec.safetensors")
  # A rotation keeps distances, so the errors of the parts add up to it.
  error_PN = np.stack([*map(_errors, blocks, _parts(folder)[:, -HELD:])])
  assert mse == pytest.approx(error_PN.sum() / HELD, rel=1e-4)


def test_nothing_is_replaced_unasked(folder):
  before = _run(folder, recombine=True)
  with pytest.raises(FileExistsError, match="codec.safetensors exists already"):
    _run(folder, recombine=True)
  assert _run(folder, recombine=True, overwrite=True) == before


def test_a_codec_of_another_part_is_refused(folder, source):
  first, second = (pq_parts.codec_path(folder, block) for block in range(P))
  with pytest.raises(ValueError, match="codec-1 must be trained on .*part-0"):
    _run(folder, recombine=True, parts=f"{second},{first}")
  with pytest.raises(ValueError, match="has 2 parts, .* names 1 codecs"):
    _run(folder, recombine=True, parts=str(first))
  # A file of the same name, but of other vectors.
  other = folder.parent / "other"
  _prepare(other, source, num_blocks=4)
  with pytest.raises(FileNotFoundError, match="codec-0"):
    _run(other, recombine=True)
  shutil.rmtree(second)
  _save_part(second, pq_parts.part_path(other, 1), 1)
  with pytest.raises(ValueError, match="but was on .*other/part-1"):
    _run(folder, recombine=True)
  shutil.rmtree(other)  # Then the name is all there is.
  _run(folder, recombine=True)


def test_parts_must_be_alike(folder):
  second, file = pq_parts.codec_path(folder, 1), pq_parts.part_path(folder, 1)
  shutil.rmtree(second)
  _save_part(second, file, 1, num_codewords=5)
  with pytest.raises(ValueError, match="must have the same shapes"):
    _run(folder, recombine=True)
  shutil.rmtree(second)
  _save_part(second, file, 1, validation_size=HELD + 1)
  with pytest.raises(ValueError, match="same --config.data.validation_size"):
    _run(folder, recombine=True)
  assert not (folder / "codec.safetensors").exists()


def test_what_was_changed_since_is_refused(folder, source, tmp_path):
  x_ND = np.asarray(formats.open_vectors(source))
  formats.write_vectors(tmp_path / "x.fvecs", x_ND[::-1])
  with pytest.raises(ValueError, match="not what the parts were cut from"):
    _run(folder, recombine=True, data=str(tmp_path / "x.fvecs"))
  formats.write_vectors(tmp_path / "x.fvecs", x_ND, overwrite=True)
  _run(folder, recombine=True, data=str(tmp_path / "x.fvecs"))
  rotation_DD = _rotation(folder)
  np.save(folder / pq_parts.ROTATION_NAME, rotation_DD[:, ::-1])
  with pytest.raises(ValueError, match="rotation.npy is damaged, or was chang"):
    _run(folder, recombine=True, overwrite=True)


def test_codecs_of_parts_may_lie_elsewhere(folder, tmp_path):
  want = _run(folder, recombine=True)
  paths = [tmp_path / str(block) for block in range(P)]
  for block, path in enumerate(paths):
    pq_parts.codec_path(folder, block).rename(path)
  found = _run(
    *(folder,), recombine=True, overwrite=True, parts=",".join(map(str, paths))
  )
  for name in ("data", "training", "encode"):
    assert found[name] == want[name]


@pytest.mark.slow
def test_trained_parts_make_a_codec(tmp_path):
  config = importlib.import_module("configs.qinco2_xs").get_config("smoke")
  source = datasets.resolve(name="sample_sift").train
  record = _prepare(tmp_path, source, num_vectors=3000)
  for block in range(record["num_blocks"]):
    config.data.train = str(pq_parts.part_path(tmp_path, block))
    config.data.num_train = None
    train.run(config, str(pq_parts.codec_path(tmp_path, block)))
  result = _run(tmp_path, recombine=True)
  assert result["data"]["validation_size"] == config.data.validation_size
  parts = [
    codec_file.load_codec(pq_parts.codec_path(tmp_path, block)).info
    for block in range(record["num_blocks"])
  ]
  of_parts = sum(info["training"]["validation_mse"] for info in parts)
  mse = result["training"]["validation_mse"]
  assert mse == pytest.approx(of_parts, rel=1e-4)
  config = cli.get_config(
    evaluate.OPTIONS, codec=str(tmp_path), split="validation"
  )
  measured = evaluate.run(config)
  assert measured["num_vectors"] == 200
  assert measured["rows"][0]["mse"] == pytest.approx(mse, rel=1e-4)
  values = {"codec": str(tmp_path), "data": source, "num_vectors": 300}
  values["output"] = str(tmp_path / "codes.npy")
  encode.run(cli.get_config(encode.OPTIONS, **values))
  assert np.load(values["output"]).shape == (300, P * 3)
