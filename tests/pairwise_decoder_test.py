"""The command that fits decoders, as a user calls it."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import encode, pairwise_decoder
from experiments.lib import cli, codecs
from tests import commands, fits, qinco_cases
from vqjax.codecs import additive, pairwise, pq, pq_qinco
from vqjax.data import codes
from vqjax.storage import codec_file, decoder_file, tensors

NUM, LISTS, K = 300, 5, 7


def _save(folder, codec, params):
  knobs = {"num_candidates": 3, "beam_size": 2} if codec != "pq" else {}
  info = {"encode": knobs}
  codec_file.save_codec(folder, codec, params, info=info)
  return str(folder)


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  """A codec with lists, vectors, and their codes."""
  folder = tmp_path_factory.mktemp("given")
  params = qinco_cases.make_params(num_lists=LISTS)
  data = str(folder / "x.npy")
  np.save(data, qinco_cases.vectors(NUM))
  codec = _save(folder / "codec", "qinco", params)
  output = str(folder / "codes.npy")
  options = dict(codec=codec, data=data)
  encode.run(cli.get_config(encode.OPTIONS, output=output, **options))
  return options | {"codes": output}


def _run(given, tmp_path, **values):
  output = str(tmp_path / "decoders.safetensors")
  values = {**given, "output": output, "num_held_out": 100, **values}
  config = cli.get_config(pairwise_decoder.OPTIONS, **values)
  return pairwise_decoder.run(config), output


def _reference(given, num_tables):
  """Decoders and errors, from all rows at once."""
  codec = codecs.open_codec(given["codec"])
  x_ND, codes_NM = np.load(given["data"]), np.load(given["codes"])
  centroids_LD = codec.centroids
  lists_N, own_NM = codes_NM[:, 0], codes_NM[:, 1:]
  target_ND = x_ND - centroids_LD[lists_N]
  rows_N, num_train = pairwise_decoder._draw(NUM, 100)
  train, held = rows_N[:num_train], rows_N[num_train:]
  words = fits.additive(own_NM[train], target_ND[train], K)
  sizes_L = np.bincount(lists_N[train], minlength=LISTS)
  tables = pairwise.fit(
    words,
    own_NM[train],
    target_ND[train],
    lists_N=lists_N[train],
    list_codes_LV=pairwise.fit_list_codes(
      jax.random.key(0), centroids_LD, sizes_L, K
    ),
    num_tables=num_tables,
  )
  network_ND = np.asarray(jax.jit(codec.spec.decode)(codec.tables, codes_NM))
  left = {
    "centroid of the list": target_ND,
    "additive": target_ND - additive.decode(words, own_NM),
    "pairwise": target_ND - pairwise.decode(tables, own_NM, lists_N),
    "qinco": x_ND - network_ND,
  }
  mse = {k: (np.asarray(v)[held] ** 2).sum(1).mean() for k, v in left.items()}
  return words, tables, mse


def test_writes_the_decoders_and_their_errors(given, tmp_path):
  info, output = _run(given, tmp_path, num_tables=2)
  words, tables, mse = _reference(given, 2)
  assert (info["num_training_codes"], info["num_held_out"]) == (200, 100)
  assert info["held_out_mse"] == pytest.approx(mse, rel=1e-4)
  decoders = decoder_file.load(output)
  assert decoders.info == info
  decoder_file.check_codec(
    decoders, codec_file.load_codec(given["codec"]).fingerprint
  )
  np.testing.assert_allclose(
    decoders.additive.codebooks_MKD, words.codebooks_MKD, atol=1e-5
  )
  np.testing.assert_array_equal(decoders.pairwise.pairs_R2, tables.pairs_R2)
  assert _run(given, tmp_path, num_tables=2)[0] == info  # Made already.
  with pytest.raises(FileExistsError, match="with num_tables=2, now it is No"):
    _run(given, tmp_path)


def test_tables_that_do_not_pay_are_left_out(given, tmp_path, caplog):
  info, output = _run(given, tmp_path)
  decoders = decoder_file.load(output)
  mse = info["held_out_mse"]
  if decoders.pairwise is None:
    assert "pairwise" not in mse
  else:
    num = len(decoders.pairwise.pairs_R2)
    assert mse["pairwise"] <= mse["additive"] * (1 - 0.005 * num)


def test_few_vectors_get_no_tables(given, tmp_path, monkeypatch):
  monkeypatch.setattr(pairwise_decoder.decoders, "_ROWS_PER_VECTOR", 0.1)
  _, output = _run(given, tmp_path)  # 49 rows a table, 200 vectors.
  assert decoder_file.load(output).pairwise is None
  _, output = _run(given, tmp_path, num_tables=2, overwrite=True)
  assert len(decoder_file.load(output).pairwise.pairs_R2) == 2


def test_a_disk_without_room_for_the_tables_is_found_before(
  given, tmp_path, monkeypatch
):
  monkeypatch.setattr(
    pairwise_decoder.decoders, "table_bytes", lambda *_: 1 << 60
  )
  monkeypatch.setattr(pairwise_decoder, "_read", None)
  with pytest.raises(OSError, match="decoders.safetensors will take about"):
    _run(given, tmp_path, num_tables=2)


def test_encodes_what_has_no_codes(given, tmp_path):
  want, _ = _run(given, tmp_path, num_tables=2)
  got, _ = _run(given, tmp_path, num_tables=2, codes=None, overwrite=True)
  assert got["held_out_mse"] == pytest.approx(want["held_out_mse"], rel=1e-4)


def test_codes_may_be_shards_of_the_first_vectors(given, tmp_path):
  codes_NM, folder = np.load(given["codes"])[:250], tmp_path / "shards"
  codec = codecs.open_codec(given["codec"])
  manifest = codes.describe(
    np.load(given["data"])[:250],
    codec="qinco",
    fingerprint=codec.fingerprint,
    codebook_sizes=codec.codebook_sizes,
    encode={},
    command="",
    num_shards=2,
  )
  codes.claim(folder, manifest)
  for shard in range(2):
    block_NM = codes_NM[125 * shard : 125 * (shard + 1)]
    codes.write_shard(folder, manifest, shard, [block_NM])
  head = str(tmp_path / "head.npy")
  np.save(head, codes_NM)
  options = dict(num_vectors=250, num_tables=0, overwrite=True)
  got, output = _run({**given, "codes": str(folder)}, tmp_path, **options)
  want, _ = _run({**given, "codes": head}, tmp_path, **options)
  assert got == want
  names = ["centroid of the list", "additive", "qinco"]
  assert list(got["held_out_mse"]) == names
  assert decoder_file.load(output).pairwise is None


def test_codes_are_read_in_the_order_asked_for(given, monkeypatch):
  monkeypatch.setattr(pairwise_decoder, "_BLOCK", 7)
  rows_N = np.random.default_rng(0).permutation(NUM)[:50]
  codes_NM = np.load(given["codes"])
  found = codes.open_codes(given["codes"])
  np.testing.assert_array_equal(
    pairwise_decoder._read_codes(found, rows_N), codes_NM[rows_N]
  )


def test_held_out_vectors_are_fitted_to_by_none(monkeypatch):
  monkeypatch.setattr(pairwise_decoder, "_MOST", 10_000)
  rows_N, num_train = pairwise_decoder._draw(12_000, 100)
  assert num_train == 10_000
  assert len(np.unique(rows_N)) == len(rows_N) == 10_100
  assert abs(rows_N[:1000].mean() / 6_000 - 1) < 0.1  # From the whole file.
  rows_N, num_train = pairwise_decoder._draw(30, 10_000)
  assert (num_train, sorted(rows_N.tolist())) == (15, list(range(30)))


@pytest.mark.parametrize(
  "codec", ["pq", pytest.param("pq_qinco", marks=pytest.mark.slow)]
)
def test_other_codecs_without_lists(tmp_path, codec):
  x_ND = qinco_cases.vectors(120)
  if codec == "pq":
    params = pq.fit(jax.random.key(0), x_ND, num_codes=2, codebook_size=4)
  else:
    block = qinco_cases.make_params(dim=3, num_networks=1, num_codewords=4)
    params = pq_qinco.recombine([block, block], jnp.eye(6))
  np.save(tmp_path / "x.npy", x_ND)
  folder = _save(tmp_path / "codec", codec, params)
  paths = dict(codec=folder, data=str(tmp_path / "x.npy"))
  info, output = _run(paths, tmp_path, num_held_out=20, num_tables=1)
  mse = info["held_out_mse"]
  assert list(mse) == ["additive", "pairwise", codec]
  assert max(mse.values()) < (x_ND**2).sum(1).mean()
  assert decoder_file.load(output).pairwise.list_codes_LV is None


@pytest.mark.parametrize(
  ("values", "said"),
  [
    (dict(data=""), "--data is needed"),
    (dict(output="d.npz"), r"a file \*.safetensors, got d.npz"),
    (dict(num_tables=1), "num_tables must lie between 2 and 6, got 1: each"),
    (dict(num_held_out=0), "--num_held_out must lie between 1"),
    (dict(num_vectors=200), "has 300 rows, .* has 200: give the vectors"),
  ],
)
def test_refuses_before_any_work(given, tmp_path, values, said):
  with pytest.raises(ValueError, match=said):
    _run(given, tmp_path, **values)
  assert not list(tmp_path.iterdir())


def test_refuses_codes_of_others(given, tmp_path):
  other = str(tmp_path / "other.npy")
  np.save(other, qinco_cases.vectors(NUM, seed=5))
  with pytest.raises(ValueError, match="holds other codes: their data.check"):
    _run({**given, "data": other}, tmp_path)
  codec = _save(
    tmp_path / "codec", "qinco", qinco_cases.make_params(3, num_lists=LISTS)
  )
  with pytest.raises(ValueError, match="was made by codec .* but"):
    _run({**given, "codec": codec}, tmp_path)
  codes_NM = np.load(given["codes"])
  np.save(tmp_path / "few.npy", codes_NM[:, :3])
  with pytest.raises(ValueError, match="has 3 codes per vector, but .* has 4"):
    _run({**given, "codes": str(tmp_path / "few.npy")}, tmp_path)
  codes_NM[5, 0] = LISTS
  np.save(tmp_path / "bad.npy", codes_NM)
  with pytest.raises(ValueError, match="Code 5 in row .*, column 0 must lie"):
    _run({**given, "codes": str(tmp_path / "bad.npy")}, tmp_path)


def test_refuses_to_encode_codes(given, tmp_path):
  for name, value in (("beam_size", 4), ("assign", "blocks")):
    with pytest.raises(ValueError, match=f"--{name} says how to encode"):
      _run(given, tmp_path, **{name: value})


def test_refuses_codebooks_of_different_sizes(tmp_path):
  params = qinco_cases.make_params()
  params = params.replace(first_KD=jnp.concatenate([params.first_KD] * 2))
  codec = _save(tmp_path / "codec", "qinco", params)
  with pytest.raises(ValueError, match="one size .* qinco codec has 14, 7, 7"):
    _run(dict(codec=codec, data="x.npy"), tmp_path)


@pytest.mark.slow
def test_from_the_shell(given, tmp_path):
  output = tmp_path / "decoders.safetensors"
  options = {**given, "num_held_out": 100, "output": output}
  done = commands.run(
    "pairwise_decoder", *(f"--{name}={x}" for name, x in options.items())
  )
  said = "Fitted to 200 vectors. On 100 others, squared distances in data units"
  assert said in done.stderr
  assert f"--decoders={output} --output=index.faiss" in done.stderr
  failed = commands.run(
    "pairwise_decoder", f"--codec={given['codec']}", check=False
  )
  assert failed.returncode == 1
  assert "--data is needed" in failed.stderr
  header, _ = tensors.read(output)
  assert json.loads(header)["num_lists"] == LISTS
