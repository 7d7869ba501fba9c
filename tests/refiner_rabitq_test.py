"""The refiner command, kind rabitq, and searches with what it writes."""

import json
import pathlib

import numpy as np
import pytest

from experiments import build_index, refiner, search
from experiments.lib import cli
from tests import search_test
from vqjax.interop import faiss_ivf, searchers
from vqjax.storage import refiner_file

pytestmark = pytest.mark.usefixtures("one_thread", "single_calls")


@pytest.fixture(
  scope="module",
  params=[True, pytest.param(False, marks=pytest.mark.slow)],
  ids=["ivf", "rq"],
)
def files(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("rabitq")
  made = search_test._make(folder, request.param)
  # The codes are of the decoded vectors, the signs of vectors beside them.
  made["data"] = str(folder / "x.npy")
  return made


def _make(files, output, **values):
  values = {
    "kind": "rabitq",
    "index": files["index"],
    "data": files["data"],
    **values,
  }
  config = cli.get_config(refiner.OPTIONS, **values, output=str(output))
  return refiner.run(config)


def _search(files, **values):
  values = {k: v for k, v in files.items() if k != "data"} | values
  return search.run(cli.get_config(search.OPTIONS, **values))


def test_bits_are_of_the_rows_of_the_index(files, tmp_path, caplog):
  path = tmp_path / "refiner.safetensors"
  with caplog.at_level("INFO", "absl"):
    result = _make(files, path)
  size = refiner_file.num_bytes(search_test.D)
  assert f"takes {size}.03 bytes per vector in memory" in caplog.text
  on_disk = path.stat().st_size / search_test.NUM
  assert f"{on_disk:.4g} bytes per vector on disk" in caplog.text
  assert result == {
    "output": str(path),
    "num_vectors": search_test.NUM,
    "code_bytes": refiner_file.num_bytes(search_test.D),
  }
  index, info = faiss_ivf.load(files["index"])
  contents, made = faiss_ivf.contents(index), refiner_file.load(path, info)
  x_ND, decode_fn = np.load(files["data"]), faiss_ivf.faiss_lists.make_decode_fn
  words_ND = decode_fn(contents.codebooks_MKD)(contents.codes_NM)
  list_N = np.repeat(
    np.arange(len(contents.centroids_LD)), np.diff(contents.starts)
  )
  left_ND = x_ND[contents.ids_N] - contents.centroids_LD[list_N] - words_ND
  left_NE = left_ND @ np.asarray(made.rotation_DE)
  place_B = np.arange(32, dtype=np.uint32)
  bits_NE = (np.asarray(made.bits_NW)[..., None] >> place_B & 1).reshape(
    len(x_ND), -1
  )
  sure_NE = np.abs(left_NE) > 1e-4
  np.testing.assert_array_equal((left_NE > 0)[sure_NE], bits_NE[sure_NE] == 1)
  if info["num_lists"] > 1:  # Else the codewords of the codec are exact here.
    assert sure_NE.mean() > 0.9
  # Of a vector to itself the distance is zero, but for bytes and the rest.
  searcher = searchers.open_searcher(files["codec"], files["index"], None, path)
  found = searcher.search(
    *(x_ND, 500), nprobe=info["num_lists"], num_refined=500, num_network=0
  )
  is_self_NR = found.ids_QR == np.arange(500)[:, None]
  assert is_self_NR.any(axis=1).all()
  far = np.mean(np.sum(left_ND**2, axis=1))
  own = np.abs(found.distances_QR[is_self_NR])
  assert np.median(own) < 0.05 * far + 1e-3 * np.mean(np.sum(x_ND**2, axis=1))
  # With another rotation the bits are others.
  if info["num_lists"] > 1:
    other = tmp_path / "other.safetensors"
    _make(files, other, seed=1)
    assert not np.array_equal(
      refiner_file.load(other, info).bits_NW, made.bits_NW
    )


def test_a_search_gains_by_residual_bits(files, tmp_path):
  path, output = tmp_path / "refiner.safetensors", str(tmp_path / "out.json")
  _make(files, path)
  at = {
    "refiner": str(path),
    "num_pairwise": "0",
    "num_network": "0",
    "nprobe": "6",
  }
  at |= {"output": output, "dtype": "float32"}
  (plain,) = _search(files, **at, num_refined="0")["points"]
  at["overwrite"] = True
  result = _search(files, **at, num_refined="30")
  (refined,), header = result["points"], result["header"]
  assert refined["setting"]["num_refined"] == 30
  if header["num_lists"] > 1:  # Else the words are those of the codec.
    name = "knn_recall@10"
    assert refined["recall"][name] > plain["recall"][name] + 0.02
  num_bytes = 3 + refiner_file.num_bytes(search_test.D)
  assert list(header["bytes"].values()) == [num_bytes]
  searcher = searchers.open_searcher(files["codec"], files["index"], None, path)
  nprobe = refined["setting"]["nprobe"]
  found = searcher.search(
    np.load(files["queries"]), 10, nprobe=nprobe, num_refined=30, num_network=0
  )
  hit = np.mean(found.ids_QR[:, 0] == np.load(files["groundtruth"])[:, 0])
  assert refined["recall"]["1-recall@1"] == pytest.approx(hit)


def test_which_settings_are_valid(files, tmp_path):
  path = tmp_path / "refiner.safetensors"
  _make(files, path)
  at = {"refiner": str(path), "num_pairwise": "0", "nprobe": "6"}
  at |= {"output": str(tmp_path / "out.json")}
  result = _search(files, **at, num_refined="0,12", num_network="0,12,30")
  settings = [point["setting"] for point in result["points"]]
  pairs = {(s["num_refined"], s["num_network"]) for s in settings}
  assert pairs <= {(0, 0), (0, 12), (0, 30), (12, 0), (12, 12)}
  assert (0, 0) in pairs
  # Before anything is measured: a stage that another undoes.
  none = at | {"output": str(tmp_path / "none.json")}
  with pytest.raises(ValueError, match=r"No setting .* num_refined=\[12\]"):
    _search(files, **none, num_refined="12", num_network="30")
  # Points of other signs, or of none, do not go into the same record.
  other = tmp_path / "other.safetensors"
  _make(files, other, seed=1)
  at |= {"num_network": "0"}
  with pytest.raises(ValueError, match="measured with refiner .*, now it is"):
    _search(files, **at | {"refiner": str(other)}, num_refined="0,12")
  at["refiner"] = None
  with pytest.raises(ValueError, match="measured with refiner .*, now it is"):
    _search(files, **at, num_refined="0")
  with pytest.raises(ValueError, match="--num_refined needs a refiner"):
    _search(files, **at, num_refined="0,12")


def test_what_does_not_fit_is_refused(files, tmp_path, monkeypatch):
  path = tmp_path / "refiner.safetensors"
  other = str(tmp_path / "other.npy")
  x_ND = np.load(files["data"])
  np.save(other, x_ND[::-1])
  with pytest.raises(ValueError, match="vectors that were encoded as --data"):
    _make(files, path, data=other)
  np.save(other, x_ND[:-1])
  with pytest.raises(ValueError, match=r"--data must have shape \(500, 8\)"):
    _make(files, path, data=other)
  np.save(other, x_ND[:, :-1])
  with pytest.raises(ValueError, match=r"--data must have shape \(500, 8\)"):
    _make(files, path, data=other)
  with pytest.raises(ValueError, match=r"file \*.safetensors"):
    _make(files, tmp_path / "signs.npy")
  bad_ND = x_ND.copy()
  bad_ND[7, 2] = np.nan  # A row of which the checksum takes no notice.
  np.save(other, bad_ND)
  monkeypatch.setattr(refiner.inputs, "check_data", lambda *_: None)
  with pytest.raises(ValueError, match="must be finite, .* row 7"):
    _make(files, path, data=other)
  assert not path.exists()
  path.write_bytes(b"there")
  with pytest.raises(FileExistsError, match="exists already"):
    _make(files, path)
  assert path.read_bytes() == b"there"
  assert _make(files, path, overwrite=True)["num_vectors"] == 500


def _build(files, output, **values):
  """Another index of the same codes; returns its name."""
  folder = pathlib.Path(files["index"]).parent
  values |= {name: files[name] for name in ("codec", "decoders")}
  values |= {"codes": str(folder / "codes.npy"), "output": str(output)}
  build_index.run(cli.get_config(build_index.OPTIONS, **values))
  return str(output)


def test_a_part_of_an_index_has_residual_bits_too(files, tmp_path):
  part = _build(files, tmp_path / "part.faiss", rows="100:350")
  path = tmp_path / "part.safetensors"
  assert _make({**files, "index": part}, path)["num_vectors"] == 250
  info = json.loads((tmp_path / "part.faiss.json").read_text())
  assert refiner_file.load(path, info).bits_NW.shape == (250, 1)
  whole = json.loads(pathlib.Path(files["index"] + ".json").read_text())
  with pytest.raises(ValueError, match="make its own by vqjax refiner"):
    refiner_file.load(path, whole)


def test_an_index_for_inner_products_has_residual_bits_too(files, tmp_path):
  index = _build(files, tmp_path / "ip.faiss", metric="ip")
  path = tmp_path / "refiner.safetensors"
  _make({**files, "index": index}, path)
  made = refiner_file.load(path, faiss_ivf.load(index).info)
  np.testing.assert_array_equal(made.offset_N, made.offset_N[0])  # No norms.
