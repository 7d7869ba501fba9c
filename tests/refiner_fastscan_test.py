"""The refiner command, kind fastscan, and searches with what it writes."""

import os
import pathlib

import numpy as np
import pytest

from experiments import build_index, refiner, search
from experiments.lib import cli
from tests import search_test
from vqjax.interop import faiss_fastscan, faiss_ivf, searchers
from vqjax.storage import codec_file

pytestmark = pytest.mark.usefixtures("one_thread", "single_calls")


@pytest.fixture(scope="module", params=[True, False], ids=["ivf", "rq"])
def files(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("fastscan")
  made = search_test._make(folder, request.param)
  made["data"] = str(folder / "x.npy")
  made["refiner"] = str(folder / "refiner.faiss")
  _make(made, made["refiner"])
  return made


def _make(files, output, **values):
  names = ("codec", "index", "data")
  values = {name: files[name] for name in names} | values
  values["kind"] = "fastscan"
  config = cli.get_config(refiner.OPTIONS, **values, output=str(output))
  return refiner.run(config)


def _search(files, **values):
  values = {k: v for k, v in files.items() if k != "data"} | values
  return search.run(cli.get_config(search.OPTIONS, **values))


def _loaded(files):
  index, info = faiss_ivf.load(files["index"])
  return faiss_ivf.contents(index), info


def test_weights_have_the_least_error(files):
  contents, info = _loaded(files)
  index, meta = faiss_fastscan.load(files["refiner"], info)
  x_ND = np.load(files["data"])[contents.ids_N]
  assert meta["num_vectors"] == index.ntotal == search_test.NUM
  known_ND = faiss_fastscan.reconstruct(index, x_ND)
  sums_ND = faiss_ivf.make_rows_fn(contents)(np.arange(search_test.NUM))
  mse = lambda y_ND: ((x_ND - y_ND) ** 2).sum(axis=1).mean()
  assert meta["mse_refiner"] == pytest.approx(mse(known_ND), rel=1e-4)
  assert meta["mse_codewords"] == pytest.approx(
    mse(sums_ND), rel=1e-3, abs=1e-8
  )
  # The network decodes exactly what these vectors are.
  assert meta["mse_network"] < 1e-6 * meta["mse_refiner"]
  assert meta["network_weight"] == pytest.approx(1, abs=1e-3)
  weight = meta["codewords_weight"]
  of = lambda a: mse(a * sums_ND + (1 - a) * known_ND)
  assert 0 < weight <= 1
  assert of(weight) <= of(weight - 0.02)
  if weight < 1:  # Words of the codec itself would have more.
    assert of(weight) <= of(weight + 0.02)


def test_a_search_scans_the_make(files, tmp_path):
  at = {"nprobe": "6", "num_network": "0", "dtype": "float32"}
  at |= {"output": str(tmp_path / "out.json")}
  result = _search(files, **at, num_refined="0,20")
  (scanned, ordered), header = result["points"], result["header"]
  assert scanned["setting"]["num_refined"] == 0
  assert list(ordered["stage_us"]) == ["coarse", "scan", "refine"]
  codes_bytes = faiss_fastscan.load(files["refiner"], _loaded(files)[1]).info
  assert list(header["bytes"].values()) == [3 + codes_bytes["code_bytes"]]
  name = "knn_recall@10"
  assert ordered["recall"][name] > scanned["recall"][name]
  searcher = searchers.open_searcher(
    files["codec"], files["index"], refiner=files["refiner"]
  )
  nprobe = ordered["setting"]["nprobe"]
  xq_QD, true_QG = np.load(files["queries"]), np.load(files["groundtruth"])
  found = searcher.search(
    xq_QD, 10, nprobe=nprobe, num_refined=20, num_network=0
  )
  hit = np.mean(found.ids_QR[:, 0] == true_QG[:, 0])
  assert ordered["recall"]["1-recall@1"] == pytest.approx(hit)
  # The network decodes exactly: with all vectors it finds what is true.
  found = searcher.search(xq_QD, 10, nprobe=nprobe, num_network=500)
  np.testing.assert_array_equal(found.ids_QR, true_QG[:, :10])
  x_ND = np.load(files["data"])
  sq_QR = ((xq_QD[:, None] - x_ND[found.ids_QR]) ** 2).sum(axis=-1)
  np.testing.assert_allclose(found.distances_QR, sq_QR, rtol=0.05, atol=0.05)


def test_which_settings_are_valid(files, tmp_path):
  at = {"nprobe": "6", "output": str(tmp_path / "out.json")}
  result = _search(files, **at, num_refined="0,5", num_network="0,7")
  settings = [point["setting"] for point in result["points"]]
  pairs = {(s["num_refined"], s["num_network"]) for s in settings}
  assert pairs <= {(0, 0), (5, 0), (0, 7)}
  assert (0, 0) in pairs
  none = at | {"output": str(tmp_path / "none.json")}
  with pytest.raises(
    ValueError, match=r"No setting is left.* num_refined=\[5\]"
  ):
    _search(files, **none, num_refined="5", num_network="7")
  with pytest.raises(ValueError, match="--num_pairwise must be 0 with a fast"):
    _search(files, **none, num_pairwise="9")
  with pytest.raises(ValueError, match="--num_refined needs a refiner"):
    _search(files, **none, refiner=None, num_refined="5")
  with pytest.raises(ValueError, match="measured with refiner .*, now it is"):
    _search(files, **at, refiner=None)


def test_what_does_not_fit_is_refused(files, tmp_path):
  output, other = tmp_path / "refiner.faiss", str(tmp_path / "other.npy")
  x_ND = np.load(files["data"])
  np.save(other, x_ND[::-1])
  with pytest.raises(ValueError, match="vectors that were encoded as --data"):
    _make(files, output, data=other)
  np.save(other, x_ND[:, :-1])
  with pytest.raises(ValueError, match=r"--data must have shape \(500, 8\)"):
    _make(files, output, data=other)
  with pytest.raises(ValueError, match="num_parts must divide the 8"):
    _make(files, output, num_parts=3)
  before = os.stat(files["refiner"]).st_mtime_ns
  made = _make(files, files["refiner"])  # It is made already.
  assert os.stat(files["refiner"]).st_mtime_ns == before
  with pytest.raises(
    FileExistsError, match=f"num_parts={made['num_parts']}, n"
  ):
    _make(files, files["refiner"], num_parts=1)
  loaded = codec_file.load_codec(files["codec"])
  params = loaded.params.replace(
    **{
      name: getattr(loaded.params, name) * 1.01
      for name in ("codebooks_MKD", "codebooks_TKD")
      if getattr(loaded.params, name, None) is not None
    }
  )
  folder = tmp_path / "codec"
  codec_file.save_codec(folder, loaded.name, params, info={})
  with pytest.raises(ValueError, match="holds codes of codec .*, but"):
    _make(files, output, codec=str(folder))
  assert not output.exists()


def test_a_refiner_of_another_index_is_refused(files, tmp_path):
  folder = pathlib.Path(files["index"]).parent
  part = {
    "codec": files["codec"],
    "decoders": files["decoders"],
    "codes": str(folder / "codes.npy"),
    "output": str(tmp_path / "other.faiss"),
    "coarse": "hnsw",
  }
  build_index.run(cli.get_config(build_index.OPTIONS, **part))
  with pytest.raises(ValueError, match="belongs to an index with checksum"):
    searchers.open_searcher(
      files["codec"], part["output"], refiner=files["refiner"]
    )


def test_the_same_command_makes_the_same_file(files, tmp_path):
  meta = _make(files, tmp_path / "small.faiss", num_parts=1)
  assert meta["num_parts"] == 1
  again = _make(files, tmp_path / "again.faiss", num_parts=1)
  assert again["sha256"] == meta["sha256"]
