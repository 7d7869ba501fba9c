"""Codecs on the hub, there and back, by a stand-in of it on loopback."""

import re
import threading
import time

import numpy as np
import pytest

import vqjax
from experiments import encode, publish
from tests.hub_server import HubServer, commit_id
from vqjax.data import hub

hf = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
RNG = np.random.default_rng(0)
X_ND = RNG.normal(size=(300, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  root = tmp_path_factory.mktemp("codec")
  np.save(root / "x.npy", X_ND)
  codec = vqjax.fit(str(root / "x.npy"), "pq", num_codes=2, codebook_size=16)
  codec.save(root / "codec")
  return root


@pytest.fixture
def server(tmp_path, monkeypatch):
  found = HubServer()
  threading.Thread(
    target=found.serve_forever, args=(0.01,), daemon=True
  ).start()
  monkeypatch.setenv("HF_TOKEN", "hf_test")
  template = found.url + "/{repo_id}/resolve/{revision}/{filename}"
  for name, value in {
    "ENDPOINT": found.url,
    "HUGGINGFACE_CO_URL_TEMPLATE": template,
    "HF_HUB_CACHE": str(tmp_path / "cache"),
    "HF_HUB_OFFLINE": False,
  }.items():
    monkeypatch.setattr(constants, name, value)
  yield found
  found.shutdown()
  found.server_close()


def _publish(folder, **values):
  given = {"codec": folder / "codec", "to": "me/mine", **values}
  return publish.run({k: v for k, v in given.items() if v is not None})


def test_published_codecs_come_back(folder, server, tmp_path):
  data = str(folder / "x.npy")
  made = _publish(folder, data=data, queries=data, license="mit", private=True)
  assert made["address"] == "hf://me/mine"
  assert server.private == {"me/mine": True}
  found = vqjax.load("hf://me/mine")
  own = vqjax.load(folder / "codec")
  assert found.fingerprint == own.fingerprint
  np.testing.assert_array_equal(found.encode(X_ND), own.encode(X_ND))
  assert found.info["data"]["train"] == "x.npy"  # Without its folder.
  card = server.repos["me/mine"][-1]["README.md"].decode()
  assert str(folder) not in card
  for line in ("license: mit", "| dimensions | 8 |", "| metric | l2 |"):
    assert line in card
  for line in ("| bytes of a code | 1 |", "| seed | 0 |", "rows 300, dim 8"):
    assert line in card
  mse = float(np.sum((own.decode(own.encode(X_ND)) - X_ND) ** 2, 1).mean())
  written = float(re.search(r"\| MSE \| (\S+) \|", card)[1])
  assert written == pytest.approx(mse, rel=1e-4)
  recall = float(re.search(r"\| 1-recall@1 \| (\S+) \|", card)[1])
  assert recall == pytest.approx(made["figures"]["1-recall@1"], rel=1e-4)
  output = tmp_path / "codes.npy"
  encode.run(codec="hf://me/mine@main", data=data, output=output)
  np.testing.assert_array_equal(np.load(output), own.encode(X_ND))


def test_revisions_and_the_cache(folder, server, monkeypatch):
  _publish(folder)
  with pytest.raises(FileExistsError, match="hf://me/mine has codec.safete"):
    _publish(folder)
  _publish(folder, overwrite=True, license="mit")
  first = vqjax.load(f"hf://me/mine@{commit_id(1)}")
  assert b"unknown" in server.repos["me/mine"][1]["README.md"]
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  server.asked.clear()
  again = vqjax.load(f"hf://me/mine@{commit_id(1)}")
  assert again.fingerprint == first.fingerprint
  assert server.asked == []
  with pytest.raises(ConnectionError, match="HF_HUB_OFFLINE lets no server"):
    vqjax.load("hf://me/other")
  with pytest.raises(ConnectionError, match="Nothing can be published as hf"):
    _publish(folder)


@pytest.mark.parametrize(
  ("address", "error", "words"),
  [
    ("hf://me/none", FileNotFoundError, "There is no .*me/none, or it is pri"),
    ("hf://me/mine@v9", FileNotFoundError, "no branch, tag or commit 'v9'"),
    ("hf://me/empty", FileNotFoundError, "hf://me/empty has no codec.safe"),
    ("hf://mine", ValueError, "hf://mine is no address .*OWNER/NAME@REV"),
    ("hf://me/mine@", ValueError, "is no address"),
  ],
)
def test_what_is_not_there(address, error, words, server):
  server.repos |= {"me/mine": [{}], "me/empty": [{}]}
  with pytest.raises(error, match=words):
    vqjax.load(address)


def test_a_hub_that_does_not_answer(server, monkeypatch):
  nobody = "http://127.0.0.1:9"
  template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(server.url, nobody)
  monkeypatch.setattr(constants, "ENDPOINT", nobody)
  monkeypatch.setattr(time, "sleep", lambda seconds: None)  # It tries again.
  monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
  with pytest.raises(ConnectionError, match="27.0.0.1:9 does not answer"):
    vqjax.load("hf://me/mine")


def test_the_folder_alone_needs_no_hub(folder, tmp_path):
  output = tmp_path / "card"
  made = _publish(folder, to=None, output=output)
  assert made == {"folder": str(output), "address": None, "figures": None}
  names = sorted(path.name for path in output.iterdir())
  assert names == ["README.md", "codec.json", "codec.safetensors"]
  card = (output / "README.md").read_text()
  assert "Not measured" in card
  assert 'vqjax.load("card")' in card  # No address of the hub.
  with pytest.raises(FileExistsError, match="exists already"):
    _publish(folder, to=None, output=output)


@pytest.mark.parametrize(
  ("values", "words"),
  [
    (dict(to=None), "Give --to=OWNER/NAME, or --output"),
    (dict(to="mine"), "--to must be OWNER/NAME"),
    (dict(queries="q.npy"), "--queries and --groundtruth need --data"),
    (dict(license="My own"), "--license must be a name of the hub"),
  ],
)
def test_flags_that_cannot_work(values, words, folder):
  with pytest.raises(ValueError, match=words):
    _publish(folder, **values)


def test_no_token_is_one_sentence(folder, server, monkeypatch):
  monkeypatch.delenv("HF_TOKEN")
  monkeypatch.setattr(constants, "HF_TOKEN_PATH", "/none")
  with pytest.raises(PermissionError, match="hf auth login, or set HF_TOKEN"):
    _publish(folder)


def test_addresses():
  assert hub.parse("hf://a/b@v1") == hub.Address("a/b", "v1")
  assert hub.is_address("hf:/a/b")  # Of a pathlib.Path.
  assert not hub.is_address("runs/hf")
