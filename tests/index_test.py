"""The index of a program: build, search, add, save, load, against loops."""

import json

import faiss
import jax
import numpy as np
import pytest

from tests import qinco_cases
from vqjax import index as index_lib
from vqjax.codec import Codec
from vqjax.codecs import pq, rq
from vqjax.data import row_ids
from vqjax.index import load_index
from vqjax.index_build import build_index

pytestmark = pytest.mark.usefixtures("one_thread")
_NUM, _DIM, _MORE = 400, 8, 60


def _vectors(num, seed):
  rng = np.random.default_rng(seed)
  centres_KD = np.random.default_rng(9).normal(size=(12, _DIM))
  x_ND = centres_KD[rng.integers(0, 12, num)] + 0.3 * rng.normal(
    size=(num, _DIM)
  )
  return x_ND.astype(np.float32)


def _make_codec(name: str, metric: str = "l2") -> Codec:
  x_ND = _vectors(900, 0)
  if metric == "cosine":
    x_ND /= np.linalg.norm(x_ND, axis=1, keepdims=True)
  info = {"metric": metric}
  if name == "qinco_ivf":
    sizes = dict(dim=_DIM, num_networks=3, num_codewords=8, num_lists=6)
    info["encode"] = {"beam_size": 3, "num_candidates": 4}
    return Codec("qinco", qinco_cases.make_params(**sizes), info)
  module, kwargs = {"pq": (pq, {}), "rq": (rq, {"beam_size": 3})}[name]
  params = module.fit(
    jax.random.key(0), x_ND, num_codes=4, codebook_size=16, num_iterations=4
  )
  return Codec(name, params, info | {"encode": kwargs})


@pytest.fixture(scope="module", name="codecs")
def _codecs():
  return {
    (name, metric): _make_codec(name, metric)
    for name, metric in (
      ("pq", "l2"),
      ("rq", "l2"),
      ("rq", "cosine"),
      ("qinco_ivf", "l2"),
    )
  }


def _want(codec, metric, x_ND, xq_QD):
  """What an exact search among the decoded vectors finds, `[Q, N]`."""
  xhat_ND = _decoded(codec, metric, x_ND)
  if metric != "l2":
    xq_QD = _unit(xq_QD) if metric == "cosine" else xq_QD
    return -np.sort(-(xq_QD @ xhat_ND.T), axis=1)
  return np.sort(((xq_QD[:, None] - xhat_ND) ** 2).sum(axis=-1), axis=1)


def _unit(x_ND):
  return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def _decoded(codec, metric, x_ND):
  """What codes stand for in a search: directions, for the cosine."""
  if metric != "cosine":
    return codec.decode(codec.encode(x_ND)).astype(float)
  return _unit(codec.decode(codec.encode(_unit(x_ND))).astype(float))


@pytest.mark.parametrize(
  ("name", "of", "metric", "num_lists"),
  [
    ("pq", "l2", "l2", 1),
    ("pq", "l2", "ip", 5),
    ("rq", "l2", "l2", 5),
    ("rq", "l2", "ip", 1),
    ("rq", "cosine", "cosine", 5),
    ("qinco_ivf", "l2", "l2", None),
  ],
)
def test_all_lists_and_a_long_shortlist_are_exact_search(
  codecs, name, of, metric, num_lists
):
  codec = codecs[name, of]
  x_ND, xq_QD = _vectors(_NUM, 1), _vectors(7, 2)
  index = build_index(codec, x_ND, num_lists, metric=metric, num_tables=0)
  assert (len(index), index.dim, index.metric) == (_NUM, _DIM, metric)
  distances_QR, ids_QR = index.search(xq_QD, k=9, nprobe=1000, num_network=_NUM)
  want_QN = _want(codec, metric, x_ND, xq_QD)
  np.testing.assert_allclose(distances_QR, want_QN[:, :9], rtol=1e-4, atol=2e-4)
  assert (ids_QR.dtype, distances_QR.dtype) == (np.int64, np.float32)
  one_R, id_R = index.search(xq_QD[3], k=9, nprobe=1000, num_network=_NUM)
  np.testing.assert_array_equal(id_R, ids_QR[3:4])
  np.testing.assert_allclose(one_R, distances_QR[3:4], rtol=1e-5, atol=1e-5)
  made_ND = _decoded(codec, metric, x_ND)
  off_nN = np.abs(index.sample(20)[:, None] - made_ND).max(axis=-1)
  assert off_nN.min(axis=1).max() < 1e-5


@pytest.mark.parametrize("refiner", [None, "rabitq", "fastscan"])
def test_added_vectors_are_as_those_that_were_there(codecs, refiner):
  codec, xq_QD = codecs["rq", "l2"], _vectors(20, 2)
  x_ND = _vectors(_NUM + _MORE, 1)
  ids_N = np.random.default_rng(0).permutation(5000)[: len(x_ND)]
  parts = build_index(codec, x_ND[:_NUM], 4, ids=ids_N[:_NUM], refiner=refiner)
  before = parts.search(xq_QD, nprobe=4)
  parts.add(x_ND[_NUM:], ids_N[_NUM:])
  np.testing.assert_array_equal(parts.ids, np.sort(ids_N))
  found = parts.search(x_ND[_NUM:], k=5, nprobe=4)[1]
  assert np.mean((found == ids_N[_NUM:, None]).any(axis=1)) > 0.5
  old = parts.search(xq_QD, nprobe=4)
  both = [
    len(set(a.tolist()) & set(b.tolist()))
    for a, b in zip(before[1], old[1], strict=True)
  ]
  assert np.mean(both) > 6  # Of 10: some make room for nearer ones.


def test_residual_bits_that_were_there_stay(codecs):
  codec, x_ND = codecs["rq", "l2"], _vectors(_NUM + _MORE, 1)
  index = build_index(codec, x_ND[:_NUM], 3, refiner="rabitq")
  at = lambda: dict(
    zip(
      index_lib.faiss_lists.contents(index.faiss).ids_N.tolist(),
      np.asarray(index._refiner.bits_NW)[:, 0].tolist(),
      strict=True,
    )
  )
  before = at()
  index.add(x_ND[_NUM:])
  after = at()
  assert len(after) == _NUM + _MORE
  assert {k: after[k] for k in before} == before


@pytest.mark.parametrize("refiner", [None, "rabitq", "fastscan"])
def test_a_saved_index_is_the_same(codecs, refiner, tmp_path):
  codec, x_ND = codecs["qinco_ivf", "l2"], _vectors(_NUM, 1)
  ids_N = np.arange(_NUM) * 10**12
  index = build_index(codec, x_ND, ids=ids_N, refiner=refiner, num_tables=3)
  folder = index.save(tmp_path / "deep" / "my_index")
  assert not list(folder.parent.glob(".*"))
  loaded = load_index(folder)
  xq_QD = _vectors(9, 2)
  knobs = [{}, {"num_network": 0}]
  if refiner is None:
    knobs.append({"num_pairwise": 30, "num_network": 5})
  for settings in knobs:
    for a, b in zip(
      index.search(xq_QD, nprobe=3, **settings),
      loaded.search(xq_QD, nprobe=3, **settings),
      strict=True,
    ):
      np.testing.assert_array_equal(a, b)
  more = _vectors(5, 3)
  for each in (index, loaded):
    each.add(more)
  np.testing.assert_array_equal(
    index.search(more, k=3)[1], loaded.search(more, k=3)[1]
  )
  assert index.ids[-5:].tolist() == [ids_N[-1] + i for i in range(1, 6)]
  # Any faiss reads it.
  stock = faiss.read_index(str(folder / "index.faiss"))
  assert stock.ntotal == _NUM
  assert set(stock.search(xq_QD, 3)[1].ravel()) <= {-1, *ids_N.tolist()}


def test_a_folder_is_written_whole_or_not_at_all(codecs, tmp_path, monkeypatch):
  codec, x_ND = codecs["rq", "l2"], _vectors(_NUM, 1)
  index = build_index(codec, x_ND)
  folder = index.save(tmp_path / "a")
  with pytest.raises(FileExistsError, match="a exists already"):
    index.save(folder)
  index.add(_vectors(3, 4))
  monkeypatch.setattr(
    index_lib.index_folder, "write_manifest", lambda *a, **k: 1 / 0
  )
  with pytest.raises(ZeroDivisionError):
    index.save(folder, overwrite=True)
  assert len(load_index(folder)) == _NUM
  assert [path.name for path in tmp_path.iterdir()] == ["a"]
  monkeypatch.undo()
  index.save(folder, overwrite=True)
  assert len(load_index(folder)) == _NUM + 3
  (tmp_path / "b").mkdir()
  with pytest.raises(FileExistsError, match="is no index folder"):
    index.save(tmp_path / "b", overwrite=True)


def test_results_that_there_are_not(codecs):
  codec, x_ND = codecs["rq", "l2"], _vectors(3, 1)
  index = build_index(codec, x_ND)
  distances_QR, ids_QR = index.search(x_ND, k=5)
  assert (np.sort(ids_QR[:, :3], axis=1) == [0, 1, 2]).all()
  assert (ids_QR[:, 3:] == -1).all()
  assert np.isposinf(distances_QR[:, 3:]).all()
  by_ip = build_index(codec, x_ND, metric="ip")
  assert np.isneginf(by_ip.search(x_ND, k=5)[0][:, 3:]).all()


@pytest.mark.parametrize(
  ("values", "error", "message"),
  [
    ({"metric": "L2"}, ValueError, "metric must be one of l2, ip, cosine"),
    ({"metric": "cosine"}, ValueError, "trained for l2: for the cosine"),
    ({"refiner": "bits"}, ValueError, "refiner must be one of rabitq, fast"),
    ({"refiner": "fastscan", "metric": "ip"}, ValueError, "for l2 and cosine"),
    (
      {"num_lists": 50},
      ValueError,
      "between 1 and 40, got 50: there are no",
    ),
    ({"ids": np.arange(39)}, ValueError, r"ids must have shape \(40,\)"),
    ({"ids": np.arange(40) - 1}, ValueError, "got -1 in row 0"),
    ({"ids": np.arange(40) // 2}, ValueError, "ids must be distinct, got"),
    ({"ids": np.arange(40.0)}, TypeError, "ids must be integers, got float"),
    ({"beam_sise": 3}, ValueError, "means nothing to a rq .*'beam_size'"),
    ({"lists": 3}, ValueError, "lists means nothing to .*'num_lists'"),
  ],
)
def test_what_does_not_fit_is_refused(codecs, values, error, message):
  with pytest.raises(error, match=message):
    build_index(codecs["rq", "l2"], _vectors(40, 1), **values)


def test_bad_queries_and_additions_are_refused(codecs):
  x_ND = _vectors(40, 1)
  index = build_index(codecs["rq", "l2"], x_ND)
  with pytest.raises(ValueError, match="queries must have shape"):
    index.search(x_ND[:, :5])
  bad_ND = x_ND.copy()
  bad_ND[2, 1] = np.nan
  with pytest.raises(ValueError, match="row 2"):
    index.search(bad_ND)
  with pytest.raises(ValueError, match="row 2"):
    index.add(bad_ND)
  with pytest.raises(ValueError, match="in the index yet, got 7 in row 1"):
    index.add(x_ND[:2], [99, 7])
  assert len(index) == 40
  lists = build_index(codecs["qinco_ivf", "l2"], x_ND, num_tables=0)
  assert lists.num_lists == 6
  with pytest.raises(ValueError, match="num_lists must be None or 6"):
    build_index(codecs["qinco_ivf", "l2"], x_ND, 7)


def test_a_damaged_folder_says_what_is_wrong(codecs, tmp_path):
  index = build_index(codecs["rq", "l2"], _vectors(40, 1))
  folder = index.save(tmp_path / "a")
  with pytest.raises(FileNotFoundError, match=r"no folder of an index: it has"):
    load_index(tmp_path)
  manifest = json.loads((folder / "manifest.json").read_text())
  for name, message in (
    ("../a/index.faiss", "names must be files of the folder"),
    ("none.faiss", "lacks none.faiss, its index"),
  ):
    manifest["files"]["index"] = name
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      load_index(folder)
  (folder / "manifest.json").write_text("{")
  with pytest.raises(ValueError, match="manifest.json is damaged"):
    load_index(folder)


def test_evaluate_measures_its_search(codecs):
  x_ND, xq_QD = _vectors(_NUM, 1), _vectors(20, 2)
  ids_N = np.random.default_rng(0).permutation(_NUM) + 1000
  index = build_index(codecs["rq", "l2"], x_ND, 4, ids=ids_N)
  error_QN = np.square(xq_QD[:, None] - x_ND).sum(axis=2)
  true_QG = ids_N[error_QN.argsort(axis=1)[:, :10]]
  found = index.evaluate(xq_QD, true_QG, nprobe=4)
  _, ids_QR = index.search(xq_QD, nprobe=4)
  for r in (1, 10):
    want = (ids_QR[:, :r] == true_QG[:, :1]).any(axis=1).mean()
    assert found[f"1-recall@{r}"] == pytest.approx(want)
  assert found["knn_recall@10"] > 0.3
  assert found["queries_per_second"] > 0
  assert "1-recall@10" not in index.evaluate(xq_QD, true_QG, k=3)
  with pytest.raises(ValueError, match="true_ids must have a row for each"):
    index.evaluate(xq_QD, true_QG[:3])


def test_results_have_the_ids_of_items(codecs, tmp_path):
  x_ND, items = _vectors(_NUM, 1), [f"item {i}" for i in range(_NUM)]
  index = build_index(codecs["rq", "l2"], x_ND[:-2], 4, ids=items[:-2])
  plain = build_index(codecs["rq", "l2"], x_ND[:-2], 4)
  _, rows_QR = plain.search(x_ND[:9], 3)
  want = [[items[row] for row in rows_R] for rows_R in rows_QR]
  assert index.search(x_ND[:9], 3)[1].tolist() == want
  found = index.evaluate(x_ND[:9], rows_QR)
  assert found["1-recall@1"] == plain.evaluate(x_ND[:9], rows_QR)["1-recall@1"]
  with pytest.raises(ValueError, match="1 of the new items have ids already"):
    index.add(x_ND[-2:], ["item 0", "new"])
  index.add(x_ND[-2:], items[-2:])
  index.save(tmp_path / "index")
  again = load_index(tmp_path / "index")
  assert again.ids.tolist() == items
  assert items[-1] in again.search(x_ND[-1:], 20, nprobe=4)[1][0]
  assert again.search(x_ND[:1], _NUM + 1, nprobe=4)[1][0, -1] is None
  (tmp_path / "ids.txt").write_text("\n".join(map(str, range(5, _NUM + 5))))
  index = build_index(codecs["rq", "l2"], x_ND, 4, ids=tmp_path / "ids.txt")
  assert (np.sort(index.ids) == np.arange(5, _NUM + 5)).all()
  with pytest.raises(ValueError, match="an id for each of the 9 vectors"):
    build_index(codecs["rq", "l2"], x_ND[:9], ids=tmp_path / "ids.txt")


@pytest.mark.parametrize("name", ["rq", "qinco_ivf"])
def test_a_search_keeps_codes_once_and_ids_on_disk(codecs, name, tmp_path):
  x_ND, xq_QD = _vectors(_NUM, 1), _vectors(5, 2)
  ids_N = np.random.default_rng(0).permutation(5000)[:_NUM]
  index = build_index(codecs[name, "l2"], x_ND, ids=ids_N, num_tables=0)
  index.save(tmp_path / "before")
  found = index.search(xq_QD)
  opened = load_index(tmp_path / "before")
  for one in (index, opened):
    np.testing.assert_array_equal(one.search(xq_QD)[1], found[1])
    assert row_ids.num_bytes(one._searcher.parts.ids_N)["ram"] == 0
    assert one._index.ntotal == 0  # Its lists are empty.
    np.testing.assert_array_equal(one.ids, np.sort(ids_N))
    assert len(one) == _NUM
  opened.save(tmp_path / "after")
  read = lambda folder: (tmp_path / folder / "index.faiss").read_bytes()
  assert read("before") == read("after")
  opened.add(x_ND[:3], np.array([6000, 6001, 6002]))
  opened.search(xq_QD)
  assert row_ids.num_bytes(opened._searcher.parts.ids_N)["disk"] == 0


@pytest.mark.parametrize("refiner", [None, "rabitq", "fastscan"])
def test_bytes_in_memory_and_on_disk(codecs, refiner, tmp_path):
  x_ND = _vectors(_NUM, 1)
  index = build_index(codecs["rq", "l2"], x_ND, 4, refiner=refiner)
  unsaved = index.footprint()
  assert (unsaved.of("ids") >= 4, unsaved.disk) == (True, {})
  folder = index.save(tmp_path / "my_index")
  found = load_index(folder).footprint()
  # A code is packed into words of 32 bits; both arrays end in a spare tile.
  assert found.of("codes", "norms") == (4 + 1) * (_NUM + 32) / _NUM
  assert found.of("ids") == {"fastscan": 8}.get(refiner, 0)
  each = {None: 0, "rabitq": 6, "fastscan": 2}[refiner]
  assert found.of("refiner") == pytest.approx(each, abs=0.05)
  names = ("index.faiss", "index.faiss.order.npy", "codec.safetensors")
  sizes = [(folder / name).stat().st_size for name in names]
  named = (found.disk["index"], found.disk["ids"], found.disk["codec"])
  assert list(named) == sizes
  whole = sum(path.stat().st_size for path in folder.glob("refiner*[!n]"))
  assert found.disk["refiner"] == whole
