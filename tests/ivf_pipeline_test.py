"""All steps of an IVF-QINCo2 in one go, and what a second run leaves out."""

import importlib
import json

import numpy as np
import pytest

from experiments import ivf_pipeline
from vqjax.data import datasets
from vqjax.interop import searchers

FEW = dict(nprobe="1,8", num_aq="0,20", num_short="0,10")


def _config(name="ivf_qinco2_xs"):
  config = importlib.import_module(f"configs.{name}").get_config("smoke")
  config.train.num_epochs = 1
  return config


@pytest.fixture(name="workdir", scope="module")
def _workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("pipeline")
  ivf_pipeline.run(_config(), str(workdir), k=10, **FEW)
  return workdir


def _times(workdir):
  files = [path for path in workdir.rglob("*") if path.is_file()]
  return {path: path.stat().st_mtime_ns for path in files}


def test_every_step_leaves_its_file(workdir):
  names = {path.name for path in workdir.iterdir()}
  assert names >= {
    "centroids.npy",
    "codec",
    "codes",
    "train_codes",
    "decoders.safetensors",
    "index.faiss",
    "index.faiss.json",
    "search.json",
    "search.png",
  }
  sidecar = json.loads((workdir / "index.faiss.json").read_text())
  assert sidecar["num_vectors"] == 500
  assert sidecar["num_lists"] == 8


def test_a_program_searches_what_it_made(workdir):
  at = lambda name: str(workdir / name)
  searcher = searchers.open_searcher(
    at("codec"), at("index.faiss"), at("decoders.safetensors")
  )
  dataset = datasets.resolve(name="sample_sift", num_base=500)
  xb_ND = np.asarray(datasets.open_split(dataset, "base"), np.float32)
  # A vector of the base is among the nearest to itself.
  result = searcher.search(xb_ND[:40], 10, nprobe=8, num_short=100)
  assert (result.ids_QR == np.arange(40)[:, None]).any(axis=1).mean() > 0.6
  with pytest.raises(ValueError, match="must have shape \\(None, 128\\)"):
    searcher.search(xb_ND[:2, :5], 10)


def test_a_second_run_makes_what_is_missing(workdir):
  index = (workdir / "index.faiss").read_bytes()
  before = _times(workdir)
  (workdir / "index.faiss").unlink()
  (workdir / "index.faiss.json").unlink()
  (workdir / "search.json").unlink()
  (workdir / "search.png").unlink()
  ivf_pipeline.run(_config(), str(workdir), k=10, **FEW)
  assert (workdir / "index.faiss").read_bytes() == index
  made = ("index.faiss", "index.faiss.json", "search.json", "search.png")
  for path, when in _times(workdir).items():
    assert (when != before[path]) == (path.name in made), path


def test_another_configuration_is_refused(workdir):
  config = _config()
  config.train.num_epochs = 3
  with pytest.raises(ValueError, match="started with train.num_epochs=1"):
    ivf_pipeline.run(config, str(workdir), k=10, **FEW)


def test_what_cannot_be_searched_is_refused_first(tmp_path):
  config = _config()
  config.ivf.num_lists = 0
  with pytest.raises(ValueError, match="codec without lists"):
    ivf_pipeline.run(config, str(tmp_path / "x"))
  config = _config()
  np.save(tmp_path / "x.npy", np.zeros((20, 4), np.float32))
  config.data.update(
    name=None,
    train=str(tmp_path / "x.npy"),
    base=str(tmp_path / "x.npy"),
    num_train=None,
    num_base=None,
    num_queries=None,
  )
  with pytest.raises(ValueError, match="no queries to search"):
    ivf_pipeline.run(config, str(tmp_path / "x"))
  assert not (tmp_path / "x").exists()
