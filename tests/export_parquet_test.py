"""Tables of codes and codewords, read by pyarrow as the pages say."""

import pathlib
import shutil

import numpy as np
import pyarrow.parquet
import pytest

import vqjax
from experiments import decode, export
from tests import oracles
from vqjax.codecs import hakes
from vqjax.data import codes, item_ids
from vqjax.index_build import build_index
from vqjax.interop import hakes_files

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = pathlib.Path(__file__).parents[1] / "third_party" / "golden"
_NUM, _DIM = 120, 8


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("parquet")
  x_ND = np.random.default_rng(0).normal(size=(_NUM, _DIM)).astype("f4")
  np.save(folder / "x.npy", x_ND)
  (folder / "ids.txt").write_text("".join(f"item {i}\n" for i in range(_NUM)))
  for name in ("opq", "rq"):
    codec = vqjax.fit(x_ND, f"{name}:smoke", num_codes=4, codebook_size=16)
    codec.save(folder / name)
  return folder


def _read(path):
  """Columns as arrays, lists as `[N, X]`."""
  table = pyarrow.parquet.read_table(path)
  return {k: np.array(v) for k, v in table.to_pydict().items()}


def _export(output, **values):
  return export.run({"to": "parquet", "output": output, **values})


@pytest.mark.parametrize("name", ["opq", "rq"])
def test_codes_are_decoded_from_the_tables_alone(name, folder, tmp_path):
  out = tmp_path / "out"
  values = dict(codec=folder / name, data=folder / "x.npy")
  _export(out, **values, ids=folder / "ids.txt")
  rows, books = _read(out / "codes.parquet"), _read(out / "codebooks.parquet")
  assert rows["id"][7] == "item 7"
  found = []
  for code in rows["codes"]:
    at = [
      np.flatnonzero((books["position"] == m) & (books["codeword"] == c))[0]
      for m, c in enumerate(code)
    ]
    words = books["vector"][at]
    found.append(words.sum(axis=0) if name == "rq" else words.ravel())
  if name == "opq":
    matrix = _read(out / "transform.parquet")["vector"]
    found = np.array(found) @ matrix
  codec = vqjax.load(folder / name)
  x_ND = codec.decode(codec.encode(np.load(folder / "x.npy")))
  np.testing.assert_allclose(found, x_ND, atol=1e-5)


def test_codes_go_back_in(folder, tmp_path):
  out = tmp_path / "out"
  values = dict(codec=folder / "rq", data=folder / "x.npy")
  _export(out, **values, ids=folder / "ids.txt")
  assert _export(out, **values, ids=folder / "ids.txt")["num_vectors"] == _NUM
  path = out / "codes.parquet"
  codec = vqjax.load(folder / "rq")
  want_NM = codec.encode(np.load(folder / "x.npy"))
  found = codes.open_codes(path)
  np.testing.assert_array_equal(found[0:_NUM], want_NM)
  assert item_ids.load_beside(path, found.meta, _NUM)[3] == "item 3"
  with pytest.raises(ValueError, match="was made by codec"):
    decode.run(codec=folder / "opq", codes=path, output=tmp_path / "no.npy")
  decode.run(codec=folder / "rq", codes=path, output=tmp_path / "x.npy")
  np.testing.assert_allclose(
    np.load(tmp_path / "x.npy"), codec.decode(want_NM), atol=1e-6
  )
  _export(tmp_path / "again", codec=folder / "rq", codes=path)
  again = _read(tmp_path / "again" / "codes.parquet")
  np.testing.assert_array_equal(again["codes"], want_NM)
  assert again["id"][3] == "item 3"


def test_an_index_is_written_with_its_lists(folder, tmp_path):
  codec, x_ND = vqjax.load(folder / "rq"), np.load(folder / "x.npy")
  index = build_index(codec, x_ND, 3, ids=np.arange(_NUM) * 10)
  index.save(tmp_path / "index")
  _export(tmp_path / "out", index=tmp_path / "index")
  rows = _read(tmp_path / "out" / "codes.parquet")
  assert sorted(rows["id"].tolist()) == list(range(0, 10 * _NUM, 10))
  at = rows["id"] // 10
  np.testing.assert_array_equal(rows["codes"], codec.encode(x_ND)[at])
  centroids = _read(tmp_path / "out" / "centroids.parquet")["vector"]
  sq = oracles.sq_distances(x_ND[at], centroids)
  np.testing.assert_array_equal(rows["list"], sq.argmin(axis=1))


@pytest.mark.parametrize("metric", hakes.METRICS)
def test_hakes_is_written_with_both_sides(metric, tmp_path):
  for name in ("findex.bin", "uindex.bin"):
    shutil.copy(GOLDEN / f"hakes_{metric}_{name}", tmp_path / name)
  base = hakes_files.load(tmp_path / "findex.bin").side
  query = hakes_files.load(tmp_path / "uindex.bin").side
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(40, base.reduction_ED.shape[1])).astype("f4")
  np.save(tmp_path / "x.npy", x_ND)
  _export(tmp_path / "out", hakes=tmp_path, data=tmp_path / "x.npy")
  rows = _read(tmp_path / "out" / "codes.parquet")
  reduced = x_ND @ base.reduction_ED.T + base.bias_E
  np.testing.assert_allclose(rows["reduced"], reduced, atol=1e-5)
  np.testing.assert_array_equal(rows["codes"], hakes.encode(base, x_ND))
  lists_N = hakes.assign(base, x_ND, metric)
  np.testing.assert_array_equal(rows["list"], lists_N)
  for before, side in (("", base), ("query_", query)):
    found = _read(tmp_path / "out" / f"{before}codebooks.parquet")
    np.testing.assert_array_equal(
      found["vector"].reshape(side.codebooks_MKS.shape), side.codebooks_MKS
    )
    found = _read(tmp_path / "out" / f"{before}transform.parquet")
    np.testing.assert_array_equal(found["vector"], side.reduction_ED)


def test_one_source_is_needed(folder, tmp_path):
  with pytest.raises(ValueError, match="one of --codec, --hakes and --index"):
    _export(tmp_path / "out", codec=folder / "rq", index=folder)
  with pytest.raises(ValueError, match="--to must be one of faiss, lance"):
    export.run(to="csv", output=tmp_path / "out")
