"""All steps of an IVF-QINCo2 in one go, and what a second run leaves out."""

import importlib
import json
import shutil
import types

import numpy as np
import pytest

from experiments import encode, ivf_centroids, ivf_pipeline
from vqjax.codecs import kmeans
from vqjax.data import datasets
from vqjax.interop import searchers
from vqjax.storage import decoder_file, index_folder

FEW = dict(nprobe="1,8", num_pairwise="0,20", num_network="0,10")


def _config(name="ivf_qinco2_xs"):
  config = importlib.import_module(f"configs.{name}").get_config("smoke")
  config.train.num_epochs = 1
  return config


@pytest.fixture(name="workdir", scope="module")
def _workdir(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("pipeline")
  ivf_pipeline.run(_config(), str(workdir), k=10, **FEW)
  return workdir


def test_a_program_names_configuration_and_options(tmp_path):
  with pytest.raises(
    ValueError, match="no option 'nprob': did you mean 'nprobe"
  ):
    ivf_pipeline.run("ivf_qinco2_xs:smoke", tmp_path, nprob="8")
  with pytest.raises(ValueError, match="no configuration 'ivf_qinco2_x'"):
    ivf_pipeline.run("ivf_qinco2_x", tmp_path)


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
  result = searcher.search(xb_ND[:40], 10, nprobe=8, num_network=100)
  assert (result.ids_QR == np.arange(40)[:, None]).any(axis=1).mean() > 0.6
  with pytest.raises(ValueError, match="128.* got .*5"):
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
  made = {"index.faiss", "index.faiss.json", "search.json", "search.png"}
  made.add("manifest.json")  # The last step, of every run.
  for path, when in _times(workdir).items():
    name = str(path.relative_to(workdir))
    assert (when != before[path]) == (name in made), path


def test_files_without_their_descriptions_are_made_again(workdir):
  """As a kill of an earlier version leaves them."""
  names = ("index.faiss", "centroids.npy")
  before = [(workdir / name).read_bytes() for name in names]
  for name in ("index.faiss.json", "centroids.npy.json"):
    (workdir / name).unlink()
  for path in workdir.glob("search.*"):
    path.unlink()
  config = _config()
  ivf_pipeline.run(config, str(workdir), k=10, **FEW)
  assert config.ivf.centroids == _config().ivf.centroids  # As it was given.
  assert [(workdir / name).read_bytes() for name in names] == before
  assert (workdir / "index.faiss.json").exists()
  assert (workdir / "search.json").exists()


@pytest.mark.parametrize("text", ["", "[]", "[" * 3000, '{"bytes": 1}'])
def test_a_damaged_description_is_one_sentence(workdir, text):
  path = workdir / "centroids.npy.json"
  before = path.read_text()
  path.write_text(text)
  try:
    with pytest.raises(
      ValueError,
      match="centroids.npy.json exists already and is damaged.*: remove it",
    ):
      ivf_pipeline.run(_config(), str(workdir), k=10, **FEW)
  finally:
    path.write_text(before)


@pytest.mark.parametrize(
  ("name", "values", "text"),
  [
    ("centroids.npy.json", {"seed": 5}, "seed=5, now it is 0"),
    ("index.faiss.json", {"decoders_fingerprint": "f"}, "fingerprint=f, now"),
    ("index.faiss.json", {"data": None}, "data=None, now it is .'dim'"),
    ("index.faiss.json", {"rows": [[0, 9]]}, r"9\]\], now it is .*500"),
  ],
)
def test_what_was_made_of_something_else_is_refused(
  workdir, name, values, text
):
  before = (workdir / name).read_text()
  (workdir / name).write_text(json.dumps(json.loads(before) | values))
  try:
    with pytest.raises(ValueError, match=f"made with .*{text}.*: remove it"):
      ivf_pipeline.run(_config(), str(workdir), k=10, **FEW)
  finally:
    (workdir / name).write_text(before)


def test_decoders_of_another_codec_are_refused(workdir, monkeypatch):
  other = decoder_file.describe(workdir / "decoders.safetensors")
  other["codec_fingerprint"] = "another"
  monkeypatch.setattr(decoder_file, "describe", lambda path: other)
  with pytest.raises(ValueError, match="decoders.* with .*another, .*remove"):
    ivf_pipeline.run(_config(), str(workdir), k=10, **FEW)


def test_stopped_centroids_are_resumed_and_commands_can_be_copied(
  tmp_path, monkeypatch
):
  said, pass_over = [], kmeans.pass_over
  info = lambda text, *args: said.append(text % args)
  monkeypatch.setattr(ivf_pipeline.logging, "info", info)

  def stop(*args, **kwargs):
    raise KeyboardInterrupt

  workdir, config = tmp_path / "my run", _config()
  monkeypatch.setattr(kmeans, "pass_over", stop)
  with pytest.raises(KeyboardInterrupt):
    ivf_pipeline.run(config, str(workdir))
  path = workdir / "centroids.npy"
  assert ivf_centroids.checkpoint_path(path).exists()
  monkeypatch.setattr(kmeans, "pass_over", pass_over)
  dataset = ivf_pipeline._resolve(config)
  ivf_pipeline._find_centroids(config, workdir, dataset)
  assert np.load(path).shape == (8, 128)
  command = [line for line in said if line.startswith("vqjax ")][-1]
  assert command.endswith(f"'--output={path}'")
  assert "None" not in command


def test_codes_are_made_in_shards(workdir, tmp_path, monkeypatch):
  monkeypatch.setattr(ivf_pipeline, "_SHARD_ROWS", 200)
  shutil.copytree(workdir / "codec", tmp_path / "codec")
  shards, run = [], encode.run
  monkeypatch.setattr(
    encode, "run", lambda config: shards.append(config["shards"]) or run(config)
  )
  config = _config()
  ivf_pipeline._encode(config, tmp_path, ivf_pipeline._resolve(config), None)
  assert shards == [3, 6]  # Of 500 and 1,200 rows.


def test_the_search_of_a_changed_folder_says_that_it_is_of_the_first(
  tmp_path, monkeypatch
):
  given, said = [], []
  run = lambda command, **values: given.append(values)
  warn = lambda text, *args: said.append(text % args)
  monkeypatch.setattr(ivf_pipeline, "_run", run)
  monkeypatch.setattr(ivf_pipeline.logging, "warning", warn)
  paths = {"codec": "codec", "index": "index.faiss"}
  for number, later in ((1, False), (3, True)):
    info = {"generation": number}
    index_folder.write_manifest(tmp_path, paths, info, overwrite=True)
    ivf_pipeline._search(tmp_path, {})
    assert given[-1]["index"] == str(tmp_path / "index.faiss")
    assert bool(said) is later
  assert "the search of the first generation" in said[0]
  assert "generation 3, of index_add" in said[0]
  assert f"--index={tmp_path} " in said[0]


def test_another_configuration_is_refused(workdir):
  config = _config()
  config.train.num_epochs = 3
  with pytest.raises(ValueError, match="started with train.num_epochs=1"):
    ivf_pipeline.run(config, str(workdir), k=10, **FEW)


def test_an_index_has_the_metric_of_the_data(workdir, monkeypatch):
  made = []
  monkeypatch.setattr(
    ivf_pipeline, "_run", lambda *command, **values: made.append(values)
  )
  for metric, wanted in (("ip", "ip"), ("cosine", "l2"), ("l2", "l2")):
    dataset = types.SimpleNamespace(metric=metric)
    ivf_pipeline._build_index(workdir, dataset)
    assert made[-1]["metric"] == wanted
  config = _config()
  config.data.metric = "ip"
  with pytest.raises(ValueError, match="take --refiner=rabitq for ip"):
    ivf_pipeline.run(config, workdir, refiner="fastscan")


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
  with pytest.raises(ValueError, match="128 dimensions cannot be cut into 3"):
    ivf_pipeline.run(_config(), str(tmp_path / "x"), baselines="IVF-PQ")
  assert not (tmp_path / "x").exists()


@pytest.mark.slow
def test_a_refiner_of_either_kind(tmp_path_factory):
  folder = tmp_path_factory.mktemp("refined")
  few = FEW | {"refiner": "rabitq", "num_refined": "0,10"}
  result = ivf_pipeline.run(_config(), str(folder), k=10, **few)
  found = {point["setting"]["num_refined"] for point in result["points"]}
  assert found == {0, 10}
  path = folder / "refiner.safetensors"
  before = _times(folder)[path]
  again = ivf_pipeline.run(_config(), str(folder), k=10, **few)
  assert again["points"] == result["points"]
  assert _times(folder)[path] == before
  # Without it it is another search.
  with pytest.raises(ValueError, match="measured with refiner"):
    ivf_pipeline.run(_config(), str(folder), k=10, **FEW)
  for name in ("search.json", "search.png"):
    (folder / name).unlink()
  few = {"nprobe": "8", "num_network": "0", "refiner": "fastscan"}
  scanned = ivf_pipeline.run(_config(), str(folder), k=10, **few)
  found = [point["setting"]["num_refined"] for point in scanned["points"]]
  assert found[0] == 0
  assert set(found) <= {0, 3, 5, 10}
  before = _times(folder)[folder / "refiner.faiss"]
  again = ivf_pipeline.run(_config(), str(folder), k=10, **few)
  assert again["points"] == scanned["points"]
  assert _times(folder)[folder / "refiner.faiss"] == before
  with pytest.raises(ValueError, match="--refiner must be one of rabitq, fast"):
    ivf_pipeline.run(_config(), str(folder), k=10, refiner="bits")
