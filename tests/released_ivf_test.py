"""Released checkpoints through the commands: codes, decoders, index, search.

An IVF model of QINCo2 and one of QINCo, a QINCo without lists, whose index has
one, and a PQ-QINCo with a rotation. Origin: third_party/golden/README.md.
"""

import importlib
import pathlib
import shutil
from typing import NamedTuple

import numpy as np
import pytest

from experiments import (
  build_index,
  decode,
  encode,
  pairwise_decoder,
  search,
  train,
)
from experiments.lib import cli, codecs
from tests import oracles
from vqjax.interop import foreign_index, searchers
from vqjax.storage import codec_file, decoder_file

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party" / "golden"
NUM_LISTS = {
  "ivf_qinco2_tiny": 32,
  "v1_ivf_qinco": 40,
  "v1_qinco": 1,
  "v1_pq_qinco_opq": 1,
}
_FILES = [  # The others on request.
  "ivf_qinco2_tiny",
  "v1_pq_qinco_opq",
  *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("v1_ivf_qinco", "v1_qinco")
  ),
]
NUM, NUM_QUERIES = 200, 20
CLOSE = {"rtol": 1e-4, "atol": 1e-3}  # float32 sums in another order.


class Files(NamedTuple):
  """What the commands made of a checkpoint, and what they made it of."""

  name: str
  codec: str
  base: str
  queries: str
  codes: str
  decoders: str
  index: str
  decoded_ND: np.ndarray


def _run(module, **values):
  return module.run(cli.get_config(module.OPTIONS, **values))


@pytest.fixture(name="files", scope="module", params=_FILES)
def _files(request, tmp_path_factory):
  folder = tmp_path_factory.mktemp(request.param)
  at = lambda name: str(folder / name)
  codec = str(GOLDEN / f"{request.param}.pt")
  x_ND = np.load(GOLDEN / f"{request.param}.npz")["x"]
  np.save(at("base.npy"), x_ND)
  noise_QD = np.random.default_rng(0).normal(size=(NUM_QUERIES, x_ND.shape[1]))
  queries_QD = x_ND[:NUM_QUERIES] + 0.3 * x_ND.std() * noise_QD
  np.save(at("queries.npy"), queries_QD.astype(np.float32))
  made = {"codes": at("codes.npy"), "decoders": at("decoders.safetensors")}
  _run(encode, codec=codec, data=at("base.npy"), output=made["codes"])
  _run(
    pairwise_decoder,
    codec=codec,
    data=at("base.npy"),
    codes=made["codes"],
    num_held_out=40,
    num_tables=np.load(made["codes"]).shape[1],
    output=made["decoders"],
  )
  is_ivf = NUM_LISTS[request.param] > 1
  _run(
    build_index,
    codec=codec,
    **made,
    coarse="hnsw" if is_ivf else "flat",
    output=at("index.faiss"),
  )
  _run(decode, codec=codec, codes=made["codes"], output=at("decoded.npy"))
  return Files(
    request.param,
    codec,
    at("base.npy"),
    at("queries.npy"),
    **made,
    index=at("index.faiss"),
    decoded_ND=np.load(at("decoded.npy")),
  )


def test_codes_are_those_of_the_released_program(files):
  golden = np.load(GOLDEN / f"{files.name}.npz")
  codes_NM = np.load(files.codes)
  is_other_N = (codes_NM != golden["codes"]).any(axis=1)
  assert is_other_N.sum() <= 0.01 * NUM
  np.testing.assert_allclose(
    files.decoded_ND[~is_other_N], golden["decoded"][~is_other_N], **CLOSE
  )


def _distances(files):
  """Squared distances of all queries to all decoded vectors."""
  queries_QD = np.load(files.queries).astype(np.float64)
  return ((queries_QD[:, None] - files.decoded_ND[None]) ** 2).sum(axis=2)


@pytest.mark.parametrize("has_pairwise", [False, True])
def test_a_search_of_everything_is_exact(files, has_pairwise):
  searcher = searchers.open_searcher(files.codec, files.index, files.decoders)
  found = searcher.search(
    np.load(files.queries),
    k=10,
    nprobe=NUM_LISTS[files.name],
    ef_search=64 if NUM_LISTS[files.name] > 1 else None,
    num_pairwise=NUM if has_pairwise else 0,
    num_network=NUM,
  )
  distances_QN = _distances(files)
  np.testing.assert_allclose(
    found.distances_QR, np.sort(distances_QN, axis=1)[:, :10], **CLOSE
  )
  # Vectors of equal codes tie, so the ids may differ from an argsort.
  np.testing.assert_allclose(
    np.take_along_axis(distances_QN, found.ids_QR, axis=1),
    found.distances_QR,
    **CLOSE,
  )
  assert all(len(set(ids_R)) == 10 for ids_R in found.ids_QR)
  assert found.num_decoded == NUM


def test_a_shortlist_is_what_the_tables_say(files):
  """Two stages: the additive decoder chooses, the network puts in order."""
  searcher = searchers.open_searcher(files.codec, files.index)
  at = {"nprobe": NUM_LISTS[files.name]}
  at["ef_search"] = 64 if NUM_LISTS[files.name] > 1 else None
  queries_QD = np.load(files.queries)
  short = searcher.search(queries_QD, k=30, num_network=0, **at)
  found = searcher.search(queries_QD, k=5, num_network=30, **at)
  distances_QN = _distances(files)
  of_short_QC = np.take_along_axis(distances_QN, short.ids_QR, axis=1)
  np.testing.assert_allclose(
    found.distances_QR, np.sort(of_short_QC, axis=1)[:, :5], **CLOSE
  )
  # Distances of the scan are to the additive decoder, but for the norms, of
  # which a byte is kept.
  approx_ND = _additive(files)
  norm_N = (approx_ND**2).sum(axis=1)
  difference_QND = queries_QD[:, None] - approx_ND[None]
  np.testing.assert_allclose(
    short.distances_QR,
    np.take_along_axis((difference_QND**2).sum(axis=2), short.ids_QR, axis=1),
    atol=np.ptp(norm_N) / 255,
  )
  assert (short.ids_QR[:, :5] != found.ids_QR).any()


def _additive(files):
  """What the additive decoder makes of the codes."""
  codec, codes_NM = codecs.open_codec(files.codec), np.load(files.codes)
  lists_N = np.zeros(NUM, np.int32)
  if NUM_LISTS[files.name] > 1:
    lists_N, codes_NM = codes_NM[:, 0], codes_NM[:, 1:]
  books_MKD = decoder_file.load(files.decoders).additive.codebooks_MKD
  words = [
    np.asarray(book)[at] for book, at in zip(books_MKD, codes_NM.T, strict=True)
  ]
  return codec.centroids[lists_N] + sum(words)


def test_the_recall_of_a_search_of_everything(files, tmp_path):
  is_ivf = NUM_LISTS[files.name] > 1
  common_values = {
    "dtype": "float32",
    "codec": files.codec,
    "data": files.base,
    "queries": files.queries,
  }
  found = _run(
    search,
    **common_values,
    index=files.index,
    decoders=files.decoders,
    nprobe=str(NUM_LISTS[files.name]),
    ef_search="64" if is_ivf else None,
    num_pairwise="0",
    num_network=f"10,{NUM}",
    rounds=1,
    output=str(tmp_path / "search.json"),
  )
  everything = _run(
    search,
    **common_values,
    decode_all=True,
    codes=files.codes,
    output=str(tmp_path / "all.json"),
  )
  recalls = {p["setting"]["num_network"]: p["recall"] for p in found["points"]}
  assert recalls[NUM] == everything["recall"]
  true_Q = oracles.nearest(np.load(files.queries), np.load(files.base))
  nearest_Q = _distances(files).argmin(axis=1)
  same_Q = (files.decoded_ND[true_Q] == files.decoded_ND[nearest_Q]).all(axis=1)
  # Vectors of equal codes tie: either may come first.
  assert everything["recall"]["1-recall@1"] <= same_Q.mean() + 1e-9
  assert 0 < everything["recall"]["1-recall@10"] <= 1


@pytest.mark.slow
def test_released_centroids_start_a_training(tmp_path):
  """A .npy of centroids in data units, as the released programs write it."""
  released = codecs.open_codec(str(GOLDEN / "v1_ivf_qinco.pt"))
  centroids_LD = released.centroids
  np.save(tmp_path / "centroids.npy", centroids_LD)
  x_ND = np.load(GOLDEN / "v1_ivf_qinco.npz")["x"]
  np.save(tmp_path / "x.npy", x_ND)
  config = importlib.import_module("configs.ivf_qinco2_xs").get_config("smoke")
  config.ivf.num_lists = 0
  config.ivf.centroids = str(tmp_path / "centroids.npy")
  config.data.train, config.data.num_train = str(tmp_path / "x.npy"), None
  config.data.validation_size = 40
  config.train.update(num_epochs=1, batch_size=32)
  train.run(config, str(tmp_path / "run"))
  codec = codecs.open_codec(str(tmp_path / "run"))
  np.testing.assert_allclose(codec.centroids, centroids_LD, atol=1e-4)
  values = {"codec": str(tmp_path / "run"), "data": str(tmp_path / "x.npy")}
  _run(encode, **values, output=str(tmp_path / "codes.npy"))
  np.testing.assert_array_equal(
    np.load(tmp_path / "codes.npy")[:, 0], oracles.nearest(x_ND, centroids_LD)
  )


@pytest.fixture(name="bare")
def _bare(files, tmp_path):
  """The index as a released program leaves it, without a description."""
  path = tmp_path / "index.faissindex"
  shutil.copy(files.index, path)
  return str(path)


def test_an_index_without_a_description_is_compared(
  files, bare, tmp_path, caplog
):
  caplog.set_level("INFO", "absl")
  is_ivf = NUM_LISTS[files.name] > 1
  at = {"nprobe": NUM_LISTS[files.name], "num_network": 20}
  at["ef_search"] = 64 if is_ivf else None
  found, want = (
    searchers.open_searcher(files.codec, index).search(
      np.load(files.queries), k=5, **at
    )
    for index in (bare, files.index)
  )
  np.testing.assert_array_equal(found.ids_QR, want.ids_QR)
  if files.name != "ivf_qinco2_tiny":
    return  # The command takes seconds.
  result = _run(
    search,
    codec=files.codec,
    index=bare,
    data=files.base,
    queries=files.queries,
    nprobe=str(at["nprobe"]),
    ef_search="64",
    num_network="10",
    rounds=1,
    output=str(tmp_path / "search.json"),
  )
  assert result["header"]["num_vectors"] == NUM
  assert "has no description, so it was compared" in caplog.text
  assert "Sizes and centroids are equal; of 200 sampled codes" in caplog.text


def test_an_index_of_another_codec_is_refused(files, bare):
  codec = codecs.open_codec(files.codec)
  decode_fn = searchers.make_decode_fn(codec, "float32")
  open_fn = foreign_index.open_index
  other = lambda codes_NM, lists_N: decode_fn(codes_NM[::-1], lists_N)
  with pytest.raises(ValueError, match="100 %|1[0-9]{2} %|9[0-9] %"):
    open_fn(bare, codec, other)
  wide = codecs.open_codec(str(GOLDEN / "qinco1_tiny_v2format.pt"))
  with pytest.raises(ValueError, match="is of another codec: its "):
    open_fn(bare, wide, decode_fn)
  if codec.is_ivf:
    moved = codec.params.replace(first_KD=codec.params.first_KD[::-1])
    loaded = codec_file.LoadedCodec(codec.name, moved, {}, "other")
    with pytest.raises(ValueError, match="centroids differ from those"):
      open_fn(bare, loaded, decode_fn)


def _cut(files, folder):
  """The codes in parts, as the released program writes them."""
  codes_NM = np.load(files.codes).astype(np.int64)
  k = np.int64(codecs.open_codec(files.codec).codebook_sizes[-1])
  m = np.int64(codes_NM.shape[1] - (NUM_LISTS[files.name] > 1))
  np.savez(folder / "codes.npz", n_parts=3, K=k, M=m, D=np.int64(8))
  for i, part_NM in enumerate(np.array_split(codes_NM, 3)):
    np.savez_compressed(folder / f"codes.part_{i}.npz", codes=part_NM)
  return str(folder / "codes.npz")


def test_codes_in_parts_are_decoded_and_indexed(files, tmp_path):
  codes = _cut(files, tmp_path)
  _run(decode, codec=files.codec, codes=codes, output=str(tmp_path / "x.npy"))
  np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), files.decoded_ND)
  index = str(tmp_path / "index.faiss")
  values = {"codec": files.codec, "decoders": files.decoders}
  values["coarse"] = "hnsw" if NUM_LISTS[files.name] > 1 else "flat"
  _run(build_index, codes=codes, output=index, **values)
  same = (
    pathlib.Path(index).read_bytes() == pathlib.Path(files.index).read_bytes()
  )
  assert same
  # Other parts of the same names are not taken for these.
  np.savez(
    tmp_path / "codes.part_2.npz",
    codes=np.zeros_like(np.load(tmp_path / "codes.part_2.npz")["codes"]),
  )
  with pytest.raises(FileExistsError, match="codes_sha256"):
    _run(build_index, codes=codes, output=index, **values)
