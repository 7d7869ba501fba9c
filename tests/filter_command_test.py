"""The filter command on a small index, and searches with what it writes."""

import pathlib

import numpy as np
import pytest

from experiments import build_index, search
from experiments import filter as filter_command
from experiments.lib import cli
from tests import search_test
from vqjax.interop import faiss_filter, faiss_ivf, searchers
from vqjax.storage import codec_file

pytestmark = pytest.mark.usefixtures("one_thread", "single_calls")


@pytest.fixture(scope="module", params=[True, False], ids=["ivf", "rq"])
def files(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp("filter")
  made = search_test._make(folder, request.param)
  made["data"] = str(folder / "x.npy")
  made["filter"] = str(folder / "filter.faiss")
  _filter(made, made["filter"])
  return made


def _filter(files, output, **values):
  names = ("codec", "index", "data")
  values = {name: files[name] for name in names} | values
  config = cli.get_config(filter_command.OPTIONS, **values, output=str(output))
  return filter_command.run(config)


def _search(files, **values):
  values = {k: v for k, v in files.items() if k != "data"} | values
  return search.run(cli.get_config(search.OPTIONS, **values))


def _loaded(files):
  index, info = faiss_ivf.load(files["index"])
  return faiss_ivf.contents(index), info


def test_shares_are_the_best_of_sums(files):
  contents, info = _loaded(files)
  index, meta = faiss_filter.load(files["filter"], info)
  x_ND = np.load(files["data"])[contents.ids_N]
  assert meta["num_vectors"] == index.ntotal == search_test.NUM
  known_ND = faiss_filter.reconstruct(index, x_ND)
  words_ND = faiss_ivf.make_rows_fn(contents)(np.arange(search_test.NUM))
  mse = lambda y_ND: ((x_ND - y_ND) ** 2).sum(axis=1).mean()
  assert meta["mse_filter"] == pytest.approx(mse(known_ND), rel=1e-4)
  assert meta["mse_words"] == pytest.approx(mse(words_ND), rel=1e-3, abs=1e-8)
  # The network decodes exactly what these vectors are.
  assert meta["mse_network"] < 1e-6 * meta["mse_filter"]
  assert meta["network_share"] == pytest.approx(1, abs=1e-3)
  share = meta["words_share"]
  of = lambda a: mse(a * words_ND + (1 - a) * known_ND)
  assert 0 < share <= 1
  assert of(share) <= of(share - 0.02)
  if share < 1:  # Words of the codec itself would have more.
    assert of(share) <= of(share + 0.02)


def test_a_search_scans_the_filter(files, tmp_path):
  at = {"nprobe": "6", "num_short": "0", "dtype": "float32"}
  at |= {"output": str(tmp_path / "out.json")}
  result = _search(files, **at, num_words="0,20")
  (scanned, ordered), header = result["points"], result["header"]
  assert scanned["setting"]["num_words"] == 0
  assert list(ordered["stage_us"]) == ["coarse", "scan", "words"]
  codes_bytes = faiss_filter.load(files["filter"], _loaded(files)[1]).info
  assert list(header["bytes"].values()) == [3 + codes_bytes["code_bytes"]]
  name = "knn_recall@10"
  assert ordered["recall"][name] > scanned["recall"][name]
  searcher = searchers.open_searcher(
    files["codec"], files["index"], filter=files["filter"]
  )
  nprobe = ordered["setting"]["nprobe"]
  xq_QD, true_QG = np.load(files["queries"]), np.load(files["groundtruth"])
  found = searcher.search(xq_QD, 10, nprobe=nprobe, num_words=20, num_short=0)
  hit = np.mean(found.ids_QR[:, 0] == true_QG[:, 0])
  assert ordered["recall"]["1-recall@1"] == pytest.approx(hit)
  # The network decodes exactly: with all vectors it finds what is true.
  found = searcher.search(xq_QD, 10, nprobe=nprobe, num_short=500)
  np.testing.assert_array_equal(found.ids_QR, true_QG[:, :10])
  x_ND = np.load(files["data"])
  sq_QR = ((xq_QD[:, None] - x_ND[found.ids_QR]) ** 2).sum(axis=-1)
  np.testing.assert_allclose(found.distances_QR, sq_QR, rtol=0.05, atol=0.05)


def test_which_settings_of_filters_are_some(files, tmp_path):
  at = {"nprobe": "6", "output": str(tmp_path / "out.json")}
  result = _search(files, **at, num_words="0,5", num_short="0,7")
  settings = [point["setting"] for point in result["points"]]
  pairs = {(s["num_words"], s["num_short"]) for s in settings}
  assert pairs <= {(0, 0), (5, 0), (0, 7)}
  assert (0, 0) in pairs
  none = at | {"output": str(tmp_path / "none.json")}
  with pytest.raises(ValueError, match="No setting is left: .* --filter one"):
    _search(files, **none, num_words="5", num_short="7")
  with pytest.raises(ValueError, match="With --filter --num_aq must be 0"):
    _search(files, **none, num_aq="9")
  with pytest.raises(ValueError, match="a --filter replaces; give one"):
    _search(files, **none, signs="signs.safetensors")
  with pytest.raises(ValueError, match="--num_words asks for a filter"):
    _search(files, **none, filter=None, num_words="5")
  with pytest.raises(ValueError, match="measured with filter .*, now it is"):
    _search(files, **at, filter=None, resume=True)


def test_what_does_not_fit_is_refused(files, tmp_path):
  output, other = tmp_path / "filter.faiss", str(tmp_path / "other.npy")
  x_ND = np.load(files["data"])
  np.save(other, x_ND[::-1])
  with pytest.raises(ValueError, match="vectors that were encoded as --data"):
    _filter(files, output, data=other)
  np.save(other, x_ND[:, :-1])
  with pytest.raises(ValueError, match=r"--data must have shape \(500, 8\)"):
    _filter(files, output, data=other)
  with pytest.raises(ValueError, match="num_parts must divide the 8"):
    _filter(files, output, num_parts=3)
  with pytest.raises(FileExistsError):
    _filter(files, files["filter"])
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
    _filter(files, output, codec=str(folder))
  assert not output.exists()


def test_a_filter_of_another_index_is_refused(files, tmp_path):
  folder = pathlib.Path(files["index"]).parent
  part = {
    "codec": files["codec"],
    "decoders": files["decoders"],
    "codes": str(folder / "codes.npy"),
    "output": str(tmp_path / "other.faiss"),
    "coarse": "hnsw",
  }
  build_index.run(cli.get_config(build_index.OPTIONS, **part))
  with pytest.raises(ValueError, match="is a filter of an index with checksum"):
    searchers.open_searcher(
      files["codec"], part["output"], filter=files["filter"]
    )


def test_the_same_command_makes_the_same_file(files, tmp_path):
  meta = _filter(files, tmp_path / "small.faiss", num_parts=1)
  assert meta["num_parts"] == 1
  again = _filter(files, tmp_path / "again.faiss", num_parts=1)
  assert again["sha256"] == meta["sha256"]
