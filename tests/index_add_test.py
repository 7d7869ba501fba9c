"""Vectors added to the folder of an index, and what is said of them."""

import json
import pathlib
import shutil

import numpy as np
import pytest

import vqjax
from experiments import index_add
from vqjax.data import temporary
from vqjax.index_build import build_index
from vqjax.interop import faiss_lists
from vqjax.search import drift
from vqjax.storage import index_folder

pytestmark = pytest.mark.usefixtures("one_thread")
_OLD, _NEW, _DIM = 300, 40, 8


def _vectors(num, seed, shift=0.0):
  rng = np.random.default_rng(seed)
  return (rng.normal(size=(num, _DIM)) + shift).astype(np.float32)


@pytest.fixture(scope="module", name="made")
def _made(tmp_path_factory):
  folder = tmp_path_factory.mktemp("add")
  np.save(folder / "old.npy", _vectors(_OLD, 0))
  np.save(folder / "new.npy", _vectors(_NEW, 1))
  codec = vqjax.fit(folder / "old.npy", "rq:smoke", num_codes=3)
  build_index(codec, folder / "old.npy", 4).save(folder / "index")
  return folder


@pytest.fixture(name="folder")
def _folder(made, tmp_path):
  shutil.copytree(made / "index", tmp_path / "index")
  return tmp_path / "index"


def _bytes_by_id(folder) -> dict[int, bytes]:
  """List and packed code of each vector, as the file of faiss has them."""
  index = vqjax.load_index(folder).faiss
  found, ids_N, at = {}, faiss_lists.ids_of(index), 0
  for parts, packed in faiss_lists.blocks(index):
    lists_n = np.repeat([p[0] for p in parts], [p[2] for p in parts])
    codes_nM = faiss_lists.unpack(index, packed)
    for number, code_M in zip(lists_n, codes_nM, strict=True):
      found[int(ids_N[at])] = bytes([number]) + code_M.tobytes()
      at += 1
  return found


def test_old_codes_stay_and_new_ones_count_on(made, folder):
  before = _bytes_by_id(folder)
  options = {"index": str(folder), "data": str(made / "new.npy")}
  found = index_add.run(options)
  assert found["num_vectors"] == _OLD + _NEW
  after = _bytes_by_id(folder)
  assert sorted(after) == list(range(_OLD + _NEW))
  assert {k: after[k] for k in before} == before
  index = vqjax.load_index(folder)
  _, ids = index.search(_vectors(_NEW, 1), k=1, nprobe=4)
  assert np.mean(ids[:, 0] >= _OLD) > 0.5
  assert index_add.run(options)["is_there"]  # Nothing is added twice.
  assert len(vqjax.load_index(folder)) == _OLD + _NEW


def test_a_report_adds_nothing(made, folder):
  names = sorted(path.name for path in folder.iterdir())
  index_add.run(index=folder, data=made / "new.npy", report=True)
  assert sorted(path.name for path in folder.iterdir()) == names


def test_a_kill_before_the_manifest_leaves_the_old_index(
  made, folder, monkeypatch
):
  options = {"index": str(folder), "data": str(made / "new.npy")}

  def stop(*_):
    raise KeyboardInterrupt

  with monkeypatch.context() as cut:
    cut.setattr(index_folder, "switch", stop)
    with pytest.raises(KeyboardInterrupt):
      index_add.run(options)
  assert len(vqjax.load_index(folder)) == _OLD
  index_add.run(options)  # Over what the other has left.
  assert len(vqjax.load_index(folder)) == _OLD + _NEW


@pytest.mark.slow
def test_a_kill_at_any_point_leaves_an_index(made, folder, monkeypatch):
  """Cuts the command at each of its changes on disk, one after the other."""
  points, options = [], {"index": str(folder), "data": str(made / "new.npy")}

  def count(*point):
    points.append(point)
    if len(points) == stop:
      raise KeyboardInterrupt

  monkeypatch.setattr(temporary, "at_point", count)
  sizes, stop = [], 0
  while True:
    stop += 1
    points.clear()
    try:
      index_add.run(options)
    except KeyboardInterrupt:
      sizes.append(len(vqjax.load_index(folder)))
      continue
    break
  assert len(sizes) > 5
  assert set(sizes) <= {_OLD, _OLD + _NEW}
  assert len(vqjax.load_index(folder)) == _OLD + _NEW


def test_generations_before_the_last_two_are_removed(made, folder, tmp_path):
  for seed in range(3):
    np.save(tmp_path / "more.npy", _vectors(5, 10 + seed))
    index_add.run(index=folder, data=tmp_path / "more.npy")
  names = sorted(p.name for p in folder.glob("generation*"))
  assert names == ["generation-00003", "generation-00004"]
  assert len(vqjax.load_index(folder)) == _OLD + 15
  assert len(vqjax.load_index(folder / names[0])) == _OLD + 10
  info = index_folder.read_manifest(folder)[1]
  assert len(info["added"]) == info["generation"] - 1 == 3
  assert index_folder.next_generation(folder) == pathlib.Path(
    folder / "generation-00005"
  )


def test_ids_that_are_there_are_refused_before_any_work(made, folder, tmp_path):
  np.save(tmp_path / "ids.npy", np.arange(_OLD - 1, _OLD - 1 + _NEW))
  with pytest.raises(ValueError, match=f"got {_OLD - 1} in row 0"):
    index_add.run(index=folder, data=made / "new.npy", ids=tmp_path / "ids.npy")
  with pytest.raises(FileNotFoundError, match="no folder of an index"):
    index_add.run(index=tmp_path / "none", data=made / "new.npy")
  assert not (tmp_path / "none").exists()


def test_what_cannot_be_added_is_refused_before_any_work(
  made, folder, tmp_path, monkeypatch
):
  def encode(*_, **__):
    raise AssertionError("It encodes.")

  monkeypatch.setattr(vqjax.Codec, "encode", encode)
  given = {"index": folder, "data": made / "new.npy"}
  np.save(tmp_path / "wide.npy", np.zeros((30, _DIM + 1), np.float32))
  np.save(tmp_path / "codes.npy", np.full((_NEW, 3), 300))
  (tmp_path / "ids.txt").write_text("\n".join(f"i{i}" for i in range(_NEW)))
  with pytest.raises(ValueError, match=f"wide.npy .*{_DIM}.* got .*{_DIM + 1}"):
    index_add.run(**given, reference=tmp_path / "wide.npy")
  with pytest.raises(ValueError, match="Code 300 in row 0, column 0 must lie"):
    index_add.run(**given, codes=tmp_path / "codes.npy")
  with pytest.raises(TypeError, match="must be integers, got text"):
    index_add.run(**given, ids=tmp_path / "ids.txt")


@pytest.mark.parametrize(
  ("name", "value", "text"),
  [
    ("generation", "x", "'generation' must be an integer, got 'x'"),
    ("added", 3, "'added' must be a list, got 3"),
    ("encode", [1], "'encode' must be an object"),
  ],
)
def test_a_damaged_manifest_is_named(made, folder, name, value, text):
  path = folder / "manifest.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
  with pytest.raises(ValueError, match=f"manifest.json is damaged: {text}"):
    index_add.run(index=folder, data=made / "new.npy")


@pytest.mark.parametrize(
  ("shift", "pays", "text"),
  [(0.0, False, "would gain little"), (4.0, True, "new vectors too pays")],
)
def test_drift_says_when_training_pays(made, shift, pays, text):
  index = vqjax.load_index(made / "index")
  x_ND = _vectors(200, 5, shift)
  found = index.drift(x_ND)
  assert found["pays"] is pays
  assert text in found["said"][-1]
  codes_NM = index.codec.encode(x_ND)
  errors_N = ((index.codec.decode(codes_NM) - x_ND) ** 2).sum(axis=1)
  assert found["mse"] == pytest.approx(errors_N.mean(), rel=1e-4)
  known = index.codec.info["training"]["validation_mse"]
  assert found["error_ratio"] == pytest.approx(found["mse"] / known)
  lists = found["positions"][0]
  assert lists["name"] == "lists"
  assert (lists["distance"] > lists["chance"] + 0.1) is pays
  assert index.drift(x_ND[:5])["pays"] is None  # Too few to tell.


def test_usage_expects_what_a_sample_would_use():
  old = np.repeat(np.arange(4), [600, 200, 150, 50])[:, None]
  rng = np.random.default_rng(0)
  draws = rng.choice(old[:, 0], (4000, 10))
  used = [len(set(draw)) for draw in draws.tolist()]
  shares = np.stack([(draws == k).mean(axis=1) for k in range(4)], 1)
  distance = np.abs(shares - [0.6, 0.2, 0.15, 0.05]).sum(axis=1) / 2
  (found,) = drift.usage(old, np.array([[0]] * 9 + [[1]]), [6])
  assert found["used"] == 2
  assert found["expected"] == pytest.approx(np.mean(used), abs=0.05)
  assert np.std(used) < found["spread"] < 2 * np.std(used)
  assert found["distance"] == pytest.approx(0.3)
  assert found["chance"] == pytest.approx(distance.mean(), rel=0.03)


def test_refresh_goes_on_with_the_codec_of_before(made, folder, tmp_path):
  """A stop in the middle leaves the old generation, and is gone on with."""
  x_ND = np.concatenate([_vectors(_OLD, 0), _vectors(200, 5, 3.0)])
  np.save(tmp_path / "all.npy", x_ND)
  options = {"index": folder, "data": tmp_path / "all.npy", "refresh": True}
  before = (folder / "manifest.json").read_bytes()

  def stop(*_):
    raise KeyboardInterrupt

  with pytest.MonkeyPatch.context() as cut:
    cut.setattr(index_folder, "switch", stop)
    with pytest.raises(KeyboardInterrupt):
      index_add.run(options)
  assert (folder / "manifest.json").read_bytes() == before
  assert len(vqjax.load_index(folder)) == _OLD
  shards = {p.name for p in folder.glob("refresh-*/codes/*.npy")}
  found = index_add.run(options)
  assert shards
  assert found["mse"] < 0.9 * found["mse_before"]
  index = vqjax.load_index(folder)
  assert (len(index), index.num_lists) == (len(x_ND), 4)
  old = vqjax.load_index(made / "index").codec
  assert index.codec.fingerprint != old.fingerprint
  assert index.codec.num_codes == old.num_codes
  assert not list(folder.glob("refresh*"))
  assert index_add.run(options)["is_there"]


@pytest.mark.slow
def test_refresh_trains_a_network_on(tmp_path):
  x_ND = _vectors(1000, 0)
  codec = vqjax.fit(x_ND, "ivf_qinco2_xs:smoke", num_epochs=4, num_lists=4)
  build_index(codec, x_ND).save(tmp_path / "index")
  y_ND = np.concatenate([x_ND, _vectors(600, 5, 2.0)])
  np.save(tmp_path / "all.npy", y_ND)
  found = index_add.run(
    index=tmp_path / "index", data=tmp_path / "all.npy", refresh=True
  )
  assert found["mse"] < found["mse_before"]
  new = vqjax.load_index(tmp_path / "index").codec
  np.testing.assert_allclose(new.centroids, codec.centroids, atol=1e-5)
  assert new.info["config"]["model"] == codec.info["config"]["model"]


@pytest.mark.slow
def test_vectors_that_a_refresh_has_left_out_can_be_added_again(made, folder):
  added = {"index": folder, "data": made / "new.npy"}
  index_add.run(added)
  index_add.run(index=folder, data=made / "old.npy", refresh=True)
  assert len(vqjax.load_index(folder)) == _OLD
  assert index_add.run(added)["num_vectors"] == _OLD + _NEW
  assert index_add.run(added)["is_there"]


def test_options_of_one_way_are_refused_for_the_other(made, folder):
  given = {"index": folder, "data": made / "new.npy"}
  with pytest.raises(ValueError, match="--epochs is only for --refresh"):
    index_add.run(**given, epochs=3)
  with pytest.raises(ValueError, match="rq codec is fitted without epochs"):
    index_add.run(**given, refresh=True, epochs=3)
  with pytest.raises(ValueError, match="--report is not for --refresh"):
    index_add.run(**given, refresh=True, report=True)
