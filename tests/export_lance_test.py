"""Lance data sets of ours, searched by pylance, against loops."""

import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest

import vqjax
from experiments import export
from vqjax.codec import Codec
from vqjax.codecs import pq
from vqjax.data import batches, formats, item_ids, unit
from vqjax.interop import hakes_files, lance_files

pytestmark = pytest.mark.usefixtures("one_thread")
GOLDEN = pathlib.Path(__file__).parents[1] / "third_party" / "golden"
_NUM, _DIM = 300, 8


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory):
  """A PQ and an OPQ codec of 4 codes of 4 bits, vectors and ids."""
  folder = tmp_path_factory.mktemp("lance")
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(_DIM, _DIM))
  x_ND = (rng.normal(size=(_NUM, _DIM)) @ mix + 1).astype(np.float32)
  np.save(folder / "x.npy", x_ND)
  np.save(folder / "q.npy", x_ND[:9] + 0.3)
  (folder / "ids.txt").write_text("".join(f"item {i}\n" for i in range(_NUM)))
  sizes = dict(num_codes=4, codebook_size=16, num_iterations=4)
  turn = np.linalg.qr(mix)[0]
  for name, rotation, metric in (
    ("opq", turn, "l2"),
    ("unit", None, "cosine"),
  ):
    y_ND = unit.normalise(x_ND) if metric == "cosine" else x_ND
    params = pq.fit(jax.random.key(0), y_ND, rotation=rotation, **sizes)
    Codec("pq", params, {"metric": metric}).save(folder / name)
  return folder


def _export(folder, output, **values):
  options = {"to": "lance", "data": folder / "x.npy", "output": output}
  return export.run({**options, **values})


def _lists(model, x_NE):
  """The list of each vector: the nearest centroid, or the best product."""
  if model.metric == "dot":
    return np.array([np.argmax(model.centroids_LE @ x) for x in x_NE])
  return np.array(
    [np.argmin(((model.centroids_LE - x) ** 2).sum(axis=1)) for x in x_NE]
  )


def _decoded(model, x_NE, lists_N):
  """Codes in loops; residuals for L2."""
  found = []
  for x, number in zip(x_NE, lists_N, strict=True):
    centre = model.centroids_LE[number] * (model.metric == "L2")
    parts = np.split(x - centre, len(model.codebooks_MKS))
    words = [
      book[np.argmin(((book - part) ** 2).sum(axis=1))]
      for book, part in zip(model.codebooks_MKS, parts, strict=True)
    ]
    found.append(np.concatenate(words) + centre)
  return np.array(found)


def _check_search(index, xhat_NE, lists_N, queries_QD, names):
  """Compares with a search in loops, in one list and in all."""
  model = index.model
  for nprobe in (1, len(model.centroids_LE)):
    got_QR, ids_QR = index.search(queries_QD, 5, nprobe=nprobe)
    for q, got_R, ids in zip(
      model.apply(queries_QD), got_QR, ids_QR, strict=True
    ):
      is_dot = model.metric == "dot"
      distance_L = -model.centroids_LE @ q
      if not is_dot:
        distance_L = ((model.centroids_LE - q) ** 2).sum(axis=1)
      distance_N = 1 - xhat_NE @ q
      if not is_dot:
        distance_N = ((xhat_NE - q) ** 2).sum(axis=1)
      probed = np.argsort(distance_L)[:nprobe]
      want_N = np.where(np.isin(lists_N, probed), distance_N, np.inf)
      num = min(5, int(np.isfinite(want_N).sum()))
      close = dict(rtol=1e-4, atol=1e-4)
      np.testing.assert_allclose(got_R[:num], np.sort(want_N)[:num], **close)
      at = [names.index(item) for item in ids[:num]]
      np.testing.assert_allclose(got_R[:num], want_N[at], **close)


@pytest.mark.parametrize(
  ("name", "metric", "column"),
  [
    ("opq", "l2", "rotated"),
    ("opq", "ip", "rotated"),
    ("unit", "cosine", "vector"),
  ],
)
def test_lance_finds_what_our_codes_say(name, metric, column, folder, tmp_path):
  pytest.importorskip("lance")
  output = tmp_path / "made"
  values = dict(codec=folder / name, metric=metric, num_lists=6)
  record = _export(folder, output, **values, ids=folder / "ids.txt")
  assert (record["column"], record["num_lists"]) == (column, 6)
  assert record["compared"]["same"] > 0.9  # Of 16^4 codes some are equal.
  shutil.move(output, tmp_path / "moved")
  index = lance_files.open_index(tmp_path / "moved")
  x_ND = np.load(folder / "x.npy")
  x_NE = index.model.apply(x_ND)
  lists_N = _lists(index.model, x_NE)
  xhat_NE = _decoded(index.model, x_NE, lists_N)
  names = [f"item {i}" for i in range(_NUM)]
  queries_QD = np.load(folder / "q.npy")
  _check_search(index, xhat_NE, lists_N, queries_QD, names)
  if metric == "ip":  # Whole vectors: the codewords are those of the codec.
    books_MKS = np.asarray(vqjax.load(folder / name).params.codebooks_MKS)
    np.testing.assert_array_equal(index.model.codebooks_MKS, books_MKS)
  true = names[int(np.argmin(((x_ND - queries_QD[0]) ** 2).sum(axis=1)))]
  if metric == "l2":  # Re-ordered by the vectors that are kept.
    _, ids = index.search(queries_QD[:1], 1, nprobe=6, num_refined=_NUM)
    assert ids == [[true]]


def test_hakes_is_searched_by_what_it_has_learned(tmp_path):
  pytest.importorskip("lance")
  for name in ("findex.bin", "uindex.bin"):
    shutil.copy(GOLDEN / f"hakes_ip_{name}", tmp_path / name)
  base, query = (
    hakes_files.load(tmp_path / name).side
    for name in ("findex.bin", "uindex.bin")
  )
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(80, base.reduction_ED.shape[1])).astype(np.float32)
  np.save(tmp_path / "x.npy", x_ND)
  _export(tmp_path, tmp_path / "made", hakes=tmp_path)
  index = lance_files.open_index(tmp_path / "made")
  by_base = lance_files.Model("dot", base.centroids_LE, base.codebooks_MKS)
  x_NE = x_ND @ base.reduction_ED.T + base.bias_E
  lists_N = _lists(by_base, x_NE)
  # The codewords of the query side, at the codes of the base side.
  parts = [
    [np.argmin(((book - part) ** 2).sum(axis=1)) for part in parts]
    for book, parts in zip(
      base.codebooks_MKS,
      np.split(x_NE, len(base.codebooks_MKS), axis=1),
      strict=True,
    )
  ]
  words = [b[c] for b, c in zip(query.codebooks_MKS, parts, strict=True)]
  queries_QD = rng.normal(size=(6, x_ND.shape[1]))
  names = list(range(80))
  _check_search(index, np.hstack(words), lists_N, queries_QD, names)


def test_a_data_set_is_read_back_as_vectors_and_ids(folder, tmp_path):
  pytest.importorskip("lance")
  output = tmp_path / "made"
  values = dict(codec=folder / "opq", num_lists=2, ids=folder / "ids.txt")
  _export(folder, output, **values)
  assert _export(folder, output, **values)["num_lists"] == 2  # Made already.
  with pytest.raises(FileExistsError, match="num_lists=2, now it is 3"):
    _export(folder, output, **{**values, "num_lists": 3})
  path = f"{output}/vectors.lance"
  x_ND = np.load(folder / "x.npy")
  found = formats.open_vectors(f"{path}#vector")
  np.testing.assert_array_equal(found[:], x_ND)
  rows = np.array([7, 299, 7, 0])
  np.testing.assert_array_equal(batches.read_rows(found, rows), x_ND[rows])
  ids_N = item_ids.read("id", _NUM, data=f"{path}#vector")
  assert ids_N[3] == "item 3"
  assert item_ids.read(f"{path}#id", _NUM).tolist() == ids_N.tolist()
  with pytest.raises(ValueError, match="several columns; choose one"):
    formats.open_vectors(path)
  with pytest.raises(ValueError, match="no column 'none' of vectors"):
    formats.open_vectors(f"{path}#none")


def test_what_lance_cannot_hold_is_refused(folder, tmp_path):
  pytest.importorskip("lance")
  params = pq.PQParams(np.zeros((2, 8, 4), np.float32))
  Codec("pq", params).save(tmp_path / "eight")
  with pytest.raises(ValueError, match="16 or 256 codewords.*have 8"):
    _export(folder, tmp_path / "out", codec=tmp_path / "eight", num_lists=2)
  with pytest.raises(ValueError, match="--codec of PQ or OPQ, or --hakes"):
    _export(folder, tmp_path / "out")
  given = {"codec": tmp_path / "eight"}
  with pytest.raises(
    ValueError, match="--num_lists must lie between 1.* got 0"
  ):
    _export(folder, tmp_path / "out", **given, num_lists=0)
  with pytest.raises(ValueError, match="--metric must be one of l2.*'hamming'"):
    _export(folder, tmp_path / "out", **given, metric="hamming")
  assert not (tmp_path / "out").exists()


def test_without_pylance_the_extra_is_named(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, "lance", None)
  with pytest.raises(ImportError, match=r"pip install 'vqjax\[lance\]'"):
    _export(tmp_path, tmp_path / "out", codec=tmp_path / "pq")
  (tmp_path / "items.lance").mkdir()
  with pytest.raises(ImportError, match=r"pip install 'vqjax\[lance\]'"):
    formats.open_vectors(tmp_path / "items.lance")
