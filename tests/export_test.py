import json
import pathlib

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import encode, export
from experiments.lib import cli, codecs
from tests import fits, oracles
from vqjax.codecs import additive, pq, rq
from vqjax.data import codes, files
from vqjax.interop import faiss_io
from vqjax.storage import codec_file, decoder_file

ROOT = pathlib.Path(__file__).parents[1]
KEY = jax.random.key(0)
KINDS = {
  "pq": "IndexPQ",
  "opq": "IndexPreTransform",
  "rq": "IndexResidualQuantizer",
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Codecs of 4 codes of 3 bits for the 200 vectors in x.npy."""
  folder = tmp_path_factory.mktemp("codecs")
  rng = np.random.default_rng(0)
  mix = rng.normal(size=(8, 8))
  x_ND = (rng.normal(size=(200, 8)) @ mix + 3).astype(np.float32)
  np.save(folder / "x.npy", x_ND)
  sizes = dict(num_codes=4, codebook_size=8, num_iterations=4)
  turn = np.linalg.qr(mix)[0]
  params = {
    "pq": pq.fit(KEY, jnp.asarray(x_ND), **sizes),
    "opq": pq.fit(KEY, jnp.asarray(x_ND), rotation=turn, **sizes),
    "rq": rq.fit(KEY, jnp.asarray(x_ND), **sizes),
  }
  for name, values in params.items():
    info = {"metric": "l2", "encode": {"beam_size": 3} if name == "rq" else {}}
    codec_file.save_codec(
      folder / name, name.removeprefix("o"), values, info=info
    )
  return folder


def _run(folder, tmp_path, name, **values):
  for key in ("codes", "data", "decoders"):
    if key in values:
      values[key] = str(values[key])
  given = dict(codec=str(folder / name), output=str(tmp_path / "out.faiss"))
  record = export.run(cli.get_config(export.OPTIONS, **{**given, **values}))
  return record, tmp_path / "out.faiss"


def _random_codes(path, shape=(90, 4)):
  codes_NM = np.random.default_rng(1).integers(8, size=shape)
  np.save(path, codes_NM.astype(np.uint8))
  return codes_NM.astype(np.int32)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("name", KINDS)
def test_faiss_ranks_as_exact_search_over_decoded(
  name, metric, folder, tmp_path
):
  codes_NM = _random_codes(tmp_path / "codes.npy")
  record, path = _run(
    folder, tmp_path, name, codes=tmp_path / "codes.npy", metric=metric
  )
  assert json.loads((tmp_path / "out.faiss.json").read_text()) == record
  assert (record["index"], record["num_vectors"]) == (KINDS[name], 90)
  assert record["compared"]["num_vectors"] == 90
  index = faiss.read_index(str(path))
  assert index.ntotal == 90
  codec = codecs.open_codec(str(folder / name))
  xhat_ND = np.asarray(codec.spec.decode(codec.tables, codes_NM), float)
  np.testing.assert_allclose(index.reconstruct_n(0, 90), xhat_ND, atol=1e-4)
  queries_QD = np.random.default_rng(2).normal(size=(7, 8)).astype(np.float32)
  found_QR, ids_QR = index.search(queries_QD, 20)
  is_ip = metric == "ip"
  if is_ip:
    want_QN = -(queries_QD.astype(float) @ xhat_ND.T)
  else:
    want_QN = oracles.sq_distances(queries_QD, xhat_ND)
  # Equal codes tie: compare the distances, and the distances of the ids.
  sorted_QR = np.sort(want_QN, axis=1)[:, :20]
  np.testing.assert_allclose(
    -found_QR if is_ip else found_QR, sorted_QR, rtol=1e-4, atol=1e-3
  )
  np.testing.assert_allclose(
    np.take_along_axis(want_QN, ids_QR, 1), sorted_QR, rtol=1e-4, atol=1e-3
  )


@pytest.mark.parametrize("name", KINDS)
def test_vectors_get_the_codes_of_encode(name, folder, tmp_path):
  output = str(tmp_path / "codes.npy")
  encode.run(
    cli.get_config(
      encode.OPTIONS,
      codec=str(folder / name),
      data=str(folder / "x.npy"),
      output=output,
    )
  )
  _, path = _run(folder, tmp_path, name, codes=output)
  by_codes = path.read_bytes()
  _run(folder, tmp_path, name, data=folder / "x.npy", overwrite=True)
  assert path.read_bytes() == by_codes


def test_many_blocks_and_no_vectors(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(export, "_BLOCK", 7)
  monkeypatch.setattr(export, "_CHECKED", 20)
  codes_NM = _random_codes(tmp_path / "codes.npy")
  record, path = _run(folder, tmp_path, "rq", codes=tmp_path / "codes.npy")
  assert record["compared"]["num_vectors"] == 20
  codec = codecs.open_codec(str(folder / "rq"))
  np.testing.assert_allclose(
    faiss.read_index(str(path)).reconstruct_n(0, 90),
    codec.spec.decode(codec.tables, codes_NM),
    atol=1e-4,
  )
  record, path = _run(folder, tmp_path, "rq", overwrite=True)
  assert record["compared"]["num_vectors"] == 1000  # Random codes.
  index = faiss.read_index(str(path))
  assert (index.ntotal, index.is_trained) == (0, True)
  index.add(np.load(folder / "x.npy"))  # A codec for any faiss program.
  assert index.ntotal == 200


@pytest.fixture
def decoders(folder, tmp_path):
  """Additive words for codes of the RQ codec."""
  codes_NM = _random_codes(tmp_path / "codes.npy", (200, 4))
  params = fits.additive(codes_NM, np.load(folder / "x.npy"), 8)
  path = tmp_path / "decoders.safetensors"
  codec = codecs.open_codec(str(folder / "rq"))
  decoder_file.save(path, params, codec_fingerprint=codec.fingerprint, info={})
  return path


def test_an_additive_decoder_is_exported(folder, tmp_path, decoders):
  record, path = _run(
    folder, tmp_path, "rq", decoders=decoders, codes=tmp_path / "codes.npy"
  )
  assert (record["kind"], record["num_vectors"]) == ("additive", 200)
  codes_NM = np.load(tmp_path / "codes.npy")
  books_MKD = np.asarray(decoder_file.load(decoders).additive.codebooks_MKD)
  want_ND = sum(books_MKD[m][codes_NM[:, m]] for m in range(4))
  index = faiss.read_index(str(path))
  np.testing.assert_allclose(index.reconstruct_n(0, 200), want_ND, atol=1e-4)
  with pytest.raises(ValueError, match="vqjax encode and give --codes"):
    _run(
      folder,
      tmp_path,
      "rq",
      decoders=decoders,
      data=folder / "x.npy",
      overwrite=True,
    )
  with pytest.raises(ValueError, match="make its own by"):
    _run(folder, tmp_path, "pq", decoders=decoders, overwrite=True)


def test_lists_and_networks_are_refused(tmp_path):
  golden = ROOT / "third_party" / "golden"
  with pytest.raises(ValueError, match="qinco codec.*vqjax build_index"):
    _run(golden, tmp_path, "qinco2_tiny.pt")
  codec = codecs.open_codec(str(golden / "ivf_qinco2_tiny.pt"))
  m, d = len(codec.codebook_sizes) - 1, 8
  params = additive.AdditiveParams(jnp.zeros((m, 8, d)))
  path = tmp_path / "decoders.safetensors"
  decoder_file.save(path, params, codec_fingerprint=codec.fingerprint, info={})
  with pytest.raises(ValueError, match="has lists.*vqjax build_index"):
    _run(golden, tmp_path, "ivf_qinco2_tiny.pt", decoders=path)


def test_foreign_codes_are_refused(folder, tmp_path):
  path = tmp_path / "codes.npy"
  run = lambda: _run(folder, tmp_path, "rq", codes=path)
  np.save(path, np.full((5, 4), 8))
  with pytest.raises(ValueError, match="Code 8 in row 0, column 0"):
    run()
  np.save(path, np.zeros((5, 3), int))
  with pytest.raises(ValueError, match="3 codes per vector, but .* 4"):
    run()
  np.save(path, np.zeros((5, 4), int))
  x_ND = np.load(folder / "x.npy")[:5]
  meta = codes.describe(
    x_ND,
    codec="rq",
    fingerprint="0123",
    codebook_sizes=[8] * 4,
    encode={},
    command="",
  )
  files.write_json(files.description_path(path), meta)
  with pytest.raises(ValueError, match="made by codec 0123, but"):
    run()
  assert not (tmp_path / "out.faiss").exists()


@pytest.mark.parametrize(
  ("values", "error", "message"),
  [
    (
      dict(metric="cosine"),
      ValueError,
      "cosine needs a codec of vectors of length 1, but this one",
    ),
    (dict(codes="a", data="b"), ValueError, "--codes or --data, not both"),
    (dict(output=None), ValueError, "--output is needed"),
  ],
)
def test_senseless_options_are_refused(
  values, error, message, folder, tmp_path
):
  with pytest.raises(error, match=message):
    _run(folder, tmp_path, "rq", **values)


def test_a_file_that_decodes_otherwise_never_appears(
  folder, tmp_path, monkeypatch
):
  codes_file = tmp_path / "codes.npy"
  _random_codes(codes_file)
  to_faiss = faiss_io.rq_to_faiss

  def wrong(params, **knobs):
    books_MKD = params.codebooks_MKD.at[2, 3, 1].add(0.01)
    return to_faiss(params.replace(codebooks_MKD=books_MKD), **knobs)

  monkeypatch.setattr(faiss_io, "rq_to_faiss", wrong)
  for given in ({}, {"codes": codes_file}):
    with pytest.raises(ValueError, match="differences up to 0.01 of"):
      _run(folder, tmp_path, "rq", **given)
  assert {p.name for p in tmp_path.iterdir()} == {"codes.npy"}
  monkeypatch.undo()
  made = _run(folder, tmp_path, "rq")
  assert _run(folder, tmp_path, "rq") == made  # It is made already.
  with pytest.raises(FileExistsError, match="made with num_vectors=0, now it"):
    _run(folder, tmp_path, "rq", codes=codes_file)
