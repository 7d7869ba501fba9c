import json
import pathlib
import shlex

import faiss
import numpy as np
import pytest

import vqjax
from experiments import build_index, encode, search
from experiments.lib import cli, codecs
from tests import fits, qinco_cases
from vqjax.codecs import additive, pq, rq
from vqjax.data import codes, item_ids
from vqjax.data.files import description_path, write_json
from vqjax.interop import faiss_ivf
from vqjax.storage import codec_file, decoder_file

D, K, M, L, NUM = 6, 8, 4, 11, 130
NO_FILES = {"codec": None, "codes": None, "decoders": None}


pytestmark = pytest.mark.usefixtures("one_thread")


def _make(folder, num_lists, seed=0, metric="l2"):
  """Files of a codec, vectors, their codes and decoders."""
  rng, is_ivf = np.random.default_rng(seed), bool(num_lists)
  x_ND = rng.normal(size=(NUM, D)).astype(np.float32)
  np.save(folder / "x.npy", x_ND)
  if is_ivf:
    name, encode = "qinco", {"beam_size": 2, "num_candidates": 3}
    params = qinco_cases.make_params(
      seed, dim=D, num_networks=M, num_codewords=K, num_lists=num_lists
    )
  else:
    name, encode = "rq", {"beam_size": 1}
    params = rq.RQParams(rng.normal(size=(M, K, D)).astype(np.float32))
  info = {"encode": encode, "metric": metric}
  codec_file.save_codec(folder / "codec", name, params, info=info)
  codec = codecs.open_codec(str(folder / "codec"))
  sizes = codec.codebook_sizes
  codes_NM = rng.integers(0, sizes, (NUM, len(sizes))).astype(np.int32)
  np.save(folder / "codes.npy", codes_NM)
  meta = codes.describe(
    x_ND,
    codec=codec.name,
    fingerprint=codec.fingerprint,
    codebook_sizes=sizes,
    encode=encode,
    command="",
  )
  write_json(folder / "codes.npy.json", meta)
  lists_N = codes_NM[:, 0] if is_ivf else np.zeros(NUM, np.int32)
  target_ND = x_ND - codec.centroids[lists_N]
  words = fits.additive(codes_NM[:, is_ivf:], target_ND, K)
  decoder_file.save(
    folder / "decoders.safetensors",
    words,
    codec_fingerprint=codec.fingerprint,
    info={},
  )
  return {
    "codec": str(folder / "codec"),
    "codes": str(folder / "codes.npy"),
    "decoders": str(folder / "decoders.safetensors"),
  }


@pytest.fixture(scope="module")
def files_of_rq(tmp_path_factory):
  return _make(tmp_path_factory.mktemp("rq"), 0)


@pytest.fixture(scope="module")
def ivf_files(tmp_path_factory):
  return _make(tmp_path_factory.mktemp("ivf"), L)


@pytest.fixture(params=["files_of_rq", "ivf_files"])
def files(request):
  return request.getfixturevalue(request.param)


@pytest.fixture
def said(monkeypatch):
  """What the command tells its user."""
  lines = []
  info = lambda text, *args: lines.append(text % args)
  monkeypatch.setattr(build_index.logging, "info", info)
  return lines


def _run(output, files, **values):
  values = {"output": str(output), **files, **values}
  build_index.run(cli.get_config(build_index.OPTIONS, **values))
  return faiss_ivf.load(output)


def _words(files):
  """Those of the index: a codec that is additive brings its own."""
  codec = codecs.open_codec(files["codec"])
  if codec.name == "rq":
    return np.asarray(codec.tables.codebooks_MKD)
  return np.asarray(decoder_file.load(files["decoders"]).additive.codebooks_MKD)


def _assert_same(ours, theirs):
  for a, b in zip(
    *map(faiss_ivf.contents, (ours.index, theirs.index)), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("coarse", [None, "flat", "hnsw"])
def test_the_index_holds_the_codes(coarse, files, tmp_path):
  index, info = _run(tmp_path / "index.faiss", files, coarse=coarse)
  found, codes_NM = faiss_ivf.contents(index), np.load(files["codes"])
  num_lists = len(found.centroids_LD)
  lists_N = np.repeat(np.arange(num_lists), np.diff(found.starts))
  got_NM = found.codes_NM
  if num_lists > 1:
    got_NM = np.column_stack([lists_N, found.codes_NM])
  np.testing.assert_array_equal(np.sort(found.ids_N), np.arange(NUM))
  np.testing.assert_array_equal(got_NM, codes_NM[found.ids_N])
  codec = codecs.open_codec(files["codec"])
  np.testing.assert_array_equal(found.codebooks_MKD, _words(files))
  np.testing.assert_array_equal(found.centroids_LD, codec.centroids)
  assert info["codec_fingerprint"] == codec.fingerprint
  assert info["rows"] == [[0, NUM]]
  assert info["coarse"] == (coarse or "flat")


def test_the_metric_is_that_of_the_search(tmp_path):
  files = _make(tmp_path, L, metric="ip")
  assert _run(tmp_path / "a.faiss", files).info["metric"] == "l2"
  ip = _run(tmp_path / "b.faiss", files, metric="ip")
  assert ip.info["metric"] == "ip"


def test_many_lists_are_found_by_a_graph(ivf_files, tmp_path, monkeypatch):
  kinds = []
  for most in (L, L + 1):
    monkeypatch.setattr(faiss_ivf, "MANY_LISTS", most)
    kinds.append(_run(tmp_path / str(most), ivf_files).info["coarse"])
  assert kinds == ["hnsw", "flat"]


def test_plain_faiss_ranks_by_the_additive_decoder(files, tmp_path):
  path = tmp_path / "index.faiss"
  _run(path, files, coarse="flat")
  index = faiss.read_index(str(path))
  index.nprobe = index.nlist
  codec, codes_NM = codecs.open_codec(files["codec"]), np.load(files["codes"])
  words = _words(files)
  lists_N = codes_NM[:, 0] if codes_NM.shape[1] > M else np.zeros(NUM, int)
  x_ND = codec.centroids[lists_N]
  r_ND = sum(words[m][code_N] for m, code_N in enumerate(codes_NM[:, -M:].T))
  norm_N = np.sum(np.square(r_ND, dtype=float), axis=1)
  distances_QR, ids_QR = index.search(np.load(_data(files))[:9], NUM)
  for q, ids_R in enumerate(ids_QR):
    error_N = np.square(np.load(_data(files))[q] - (x_ND + r_ND)).sum(axis=1)
    # As exact as a byte for the norm.
    step = (norm_N.max() - norm_N.min()) / 256
    np.testing.assert_allclose(distances_QR[q], error_N[ids_R], atol=step)
    assert sorted(ids_R) == list(range(NUM))


@pytest.mark.parametrize("name", ["pq", "opq", "rq"])
def test_an_additive_codec_brings_its_own_codewords(name, tmp_path, said):
  rng = np.random.default_rng(0)
  if name == "rq":
    params = rq.RQParams(rng.normal(size=(M, K, D)).astype(np.float32))
  else:
    turn_DD = np.linalg.qr(rng.normal(size=(D, D)))[0].astype(np.float32)
    params = pq.PQParams(
      rng.normal(size=(3, K, D // 3)).astype(np.float32),
      turn_DD if name == "opq" else None,
    )
  codec_file.save_codec(tmp_path / "c", name[-2:], params, info={})
  codec = codecs.open_codec(str(tmp_path / "c"))
  num_codes = len(codec.codebook_sizes)
  codes_NM = rng.integers(0, K, (NUM, num_codes)).astype(np.int32)
  np.save(tmp_path / "codes.npy", codes_NM)
  given = {"codec": str(tmp_path / "c"), "codes": str(tmp_path / "codes.npy")}
  path = tmp_path / "index.faiss"
  info = _run(path, given).info
  words = additive.AdditiveParams(_read_words(path))
  assert info["decoders_fingerprint"] == codec_file.fingerprint(words)
  x_ND = np.asarray(codec.spec.decode(codec.tables, codes_NM))
  index = faiss.read_index(str(path))
  index.make_direct_map()
  np.testing.assert_allclose(index.reconstruct_n(0, NUM), x_ND, atol=1e-5)
  assert f"--codec={given['codec']} --index={path} --queries=" in said[-1]


def _read_words(path):
  return faiss_ivf.contents(faiss_ivf.load(path).index).codebooks_MKD


def test_decoders_of_an_additive_codec_are_not_needed(
  files_of_rq, tmp_path, said
):
  with_them = _run(tmp_path / "a", files_of_rq)
  assert "gets these instead of those in" in said[0]
  _assert_same(
    with_them, _run(tmp_path / "b", files_of_rq | {"decoders": None})
  )


def _data(files):
  return str(pathlib.Path(files["codes"]).with_name("x.npy"))


@pytest.mark.parametrize(
  "files",
  ["files_of_rq", pytest.param("ivf_files", marks=pytest.mark.slow)],
  indirect=True,
)
def test_vectors_are_encoded_on_the_way(files, tmp_path):
  got = _run(tmp_path / "a", files | {"codes": None}, data=_data(files))
  codec = codecs.open_codec(files["codec"])
  codes_NM = codec.encode(_data(files))
  np.save(tmp_path / "codes.npy", codes_NM)
  given = files | {"codes": str(tmp_path / "codes.npy")}
  _assert_same(got, _run(tmp_path / "b", given))
  described = _run(tmp_path / "c", files).info
  assert got.info["data"] == described["data"]


def test_blocks_change_nothing(files, tmp_path, monkeypatch):
  want = _run(tmp_path / "a.faiss", files)
  monkeypatch.setattr(build_index, "_BLOCK", 7)
  _assert_same(_run(tmp_path / "b.faiss", files), want)


def test_norms_are_learnt_from_all_rows_of_a_small_file(files, tmp_path):
  index, _ = _run(tmp_path / "a.faiss", files)
  words = _words(files)
  codes_NM = np.load(files["codes"])[:, -M:]
  r_ND = sum(words[m][code_N] for m, code_N in enumerate(codes_NM.T))
  norm_N = np.square(r_ND, dtype=float).sum(axis=1)
  bounds = norm_N.min(), norm_N.max()
  np.testing.assert_allclose((index.rq.norm_min, index.rq.norm_max), bounds)


def test_parts_merge_to_the_whole(files, tmp_path, said):
  whole = _run(tmp_path / "index.faiss", files)
  parts = {"c": f"{NUM - 3}:", "a": ":40", "b": f"40:{NUM - 3}"}
  paths = [str(tmp_path / name) for name in parts]
  for path, rows in zip(paths, parts.values(), strict=True):
    part = _run(path, files, rows=rows)
  assert part.info["rows"] == [[40, NUM - 3]]
  assert part.index.ntotal == NUM - 43
  merged = _run(tmp_path / "m", {}, merge=",".join(sorted(paths)))
  _assert_same(merged, whole)
  assert merged.info["rows"] == [[0, NUM]]
  assert merged.info["sha256"] != part.info["sha256"]
  two = _run(tmp_path / "two", {}, merge=",".join(paths[:2]))
  assert two.info["rows"] == [[0, 40], [NUM - 3, NUM]]
  assert f"lacks 40:{NUM - 3}. Build" in said[-1]


@pytest.mark.parametrize("coarse", ["flat", "hnsw"])
def test_shards_give_the_index_of_one_process(coarse, files, tmp_path, said):
  whole = _run(tmp_path / "whole", files, coarse=coarse)
  given = {**files, "coarse": coarse, "output": str(tmp_path / "a")}
  for shard in (2, 0):
    found = build_index.run(**given, shard=f"{shard}/3")
    assert found["output"].endswith(f"a.parts/part-0000{shard}-of-00003.faiss")
  assert "with --shards=3 instead of --shard" in said[-1]
  merged = _run(tmp_path / "a", files, coarse=coarse, shards=3)
  assert "2 of the 3 shards are made already." in said
  _assert_same(merged, whole)
  assert merged.info == whole.info
  assert not (tmp_path / "a.parts").exists()
  build_index.run(**given, shard="1/3")
  assert f"{tmp_path / 'a'} is made already." in said


@pytest.mark.parametrize(
  ("values", "match"),
  [
    ({"shards": 3, "rows": ":5"}, "leave --rows out"),
    ({"shard": "0/3", "plan": True}, "leave --plan out"),
    ({"shards": 3, "num_lists": 4}, "leave --num_lists out"),
    ({"shards": NUM + 1}, "number of shards must lie between 1 and 130"),
    ({"address": "auto"}, "--address is for --engine=ray"),
  ],
)
def test_shards_that_cannot_be(values, match, ivf_files, tmp_path):
  with pytest.raises(ValueError, match=match):
    build_index.run(**ivf_files, output=str(tmp_path / "a"), **values)
  assert not list(tmp_path.iterdir())


def test_the_summary_names_the_next_command(files, tmp_path, said):
  output = tmp_path / "my index"
  info = _run(output, files).info
  lists = {1: "1 list"}.get(info["num_lists"], f"{info['num_lists']} lists")
  each = faiss.read_index(str(output)).code_size
  assert f"{NUM} vectors in {lists}: " in said[-2]
  assert f"{each} bytes per vector in memory for code and norm" in said[-2]
  assert f"{output}.json" in said[-2]
  assert (
    f"vqjax search --codec={files['codec']} "
    f"--index={shlex.quote(str(output))} --decoders={files['decoders']} "
    "--queries=QUERIES --data=BASE --output=search.json"
  ) in said[-1]


@pytest.mark.parametrize(
  ("values", "match"),
  [
    ({"output": None}, "--output is needed"),
    ({"codec": None}, "--codec is needed"),
    ({"codes": None}, "either --codes or --data"),
    ({"data": "x.npy"}, "either --codes or --data"),
    ({"decoders": None}, r"vqjax pairwise_decoder --codec="),
    ({"rows": "5"}, "must be first:stop, rows from 0 to 130 .* got '5'"),
    ({"rows": "0:131"}, "rows from 0 to 130 .* got '0:131'"),
    ({"rows": "9:9"}, "got '9:9'"),
    ({"metric": "hamming"}, "metric must be one of .* got 'hamming'"),
    ({"metric": "cosine"}, "cosine needs a codec .* this one was trained for"),
    ({"coarse": "tree"}, "coarse must be one of .* got 'tree'"),
    ({"merge": "a,b"}, "leave --codes out"),
    ({"merge": "a", "beam_size": 4} | NO_FILES, "leave --beam_size out"),
    ({"beam_size": 4}, "--beam_size says how to encode .* --codes are encoded"),
    ({"num_candidates": 0}, "--num_candidates says how"),
    ({"dtype": "float32"}, "--dtype says how to encode"),
    ({"assign": "hnsw"}, "--assign says how to encode"),
  ],
)
def test_options_that_make_no_sense_are_refused(
  values, match, ivf_files, tmp_path
):
  config = {"output": tmp_path / "index.faiss", **ivf_files} | values
  if config["output"]:
    config["output"] = str(config["output"])
  with pytest.raises(ValueError, match=match):
    build_index.run(cli.get_config(build_index.OPTIONS, **config))
  assert not list(tmp_path.iterdir())


def test_codes_that_are_not_there_are_said_to_be_so(ivf_files, tmp_path):
  match = "no file or folder nowhere; codes are a folder of shards or a .n"
  with pytest.raises(FileNotFoundError, match=match):
    _run(tmp_path / "index.faiss", ivf_files, codes="nowhere")


def test_a_search_that_does_not_fit_is_refused(ivf_files, tmp_path):
  given = ivf_files | {"codes": None, "data": _data(ivf_files)}
  with pytest.raises(ValueError, match="beam_size must lie between 1"):
    _run(tmp_path / "index.faiss", given, beam_size=0)


@pytest.mark.parametrize("name", ["index.faiss", "index.faiss.json"])
def test_nothing_is_overwritten_unasked(name, ivf_files, tmp_path):
  (tmp_path / name).write_text("mine")
  with pytest.raises(FileExistsError, match="exists already"):
    _run(tmp_path / "index.faiss", ivf_files)
  assert (tmp_path / name).read_text() == "mine"
  _run(tmp_path / "index.faiss", ivf_files, overwrite=True)


def test_another_codec_is_refused(ivf_files, tmp_path):
  other = _make(tmp_path, L, seed=5)
  for name, match in (
    ("codec", "was made by codec .* but .* is codec"),
    ("codes", "was made by codec .* but .* is codec"),
    ("decoders", "decodes codes of codec .* but this is codec"),
  ):
    given = ivf_files | {name: other[name]}
    if name == "codec":
      given["decoders"] = other["decoders"]
    with pytest.raises(ValueError, match=match):
      _run(tmp_path / "index.faiss", given)


def test_decoders_and_codes_of_fewer_steps_are_refused(ivf_files, tmp_path):
  codec = codecs.open_codec(ivf_files["codec"])
  words = decoder_file.load(ivf_files["decoders"]).additive
  path = tmp_path / "decoders.safetensors"
  short = words.replace(codebooks_MKD=words.codebooks_MKD[1:])
  decoder_file.save(path, short, codec_fingerprint=codec.fingerprint, info={})
  with pytest.raises(ValueError, match="has 3 codebooks of 8 codewords in 6"):
    _run(tmp_path / "a", ivf_files, decoders=str(path))
  np.save(tmp_path / "codes.npy", np.load(ivf_files["codes"])[:, :-1])
  with pytest.raises(ValueError, match="has 4 codes per vector, but .* has 5"):
    _run(tmp_path / "a", ivf_files, codes=str(tmp_path / "codes.npy"))


def test_codes_out_of_range_leave_no_file(ivf_files, tmp_path):
  codes_NM = np.load(ivf_files["codes"])
  codes_NM[77, 2] = K
  np.save(tmp_path / "codes.npy", codes_NM)
  with pytest.raises(ValueError, match="Code 8 in row 77, column 2"):
    _run(tmp_path / "a", ivf_files, codes=str(tmp_path / "codes.npy"))
  assert [path.name for path in tmp_path.iterdir()] == ["codes.npy"]


def test_parts_that_do_not_fit_are_refused(ivf_files, tmp_path, monkeypatch):
  a, b, c, d = (str(tmp_path / name) for name in "abcd")
  _run(a, ivf_files, rows=":70")
  part = _run(b, ivf_files, rows="60:")
  with monkeypatch.context() as patch:
    patch.setattr(faiss_ivf, "merge", None)  # It is seen before.
    with pytest.raises(ValueError, match="Rows 60:70 are in two of the parts"):
      _run(d, {}, merge=f"{a},{b}")
  faiss_ivf.save(part.index, c, {})
  with pytest.raises(ValueError, match=r"c\.json does not say which rows"):
    _run(d, {}, merge=f"{c},{a}")
  (tmp_path / "other").mkdir()
  other = _make(tmp_path / "other", L, seed=5)
  _run(c, other, rows="70:", overwrite=True)
  with pytest.raises(ValueError, match="their codec_fingerprint is"):
    _run(d, {}, merge=f"{a},{c}")
  beside = description_path(b)
  info = json.loads(beside.read_text()) | {"rows": [[70, NUM]]}
  beside.write_text(json.dumps(info | {"sha256": "0"}))
  with pytest.raises(ValueError, match="does not match the checksum"):
    _run(d, {}, merge=f"{a},{b}")
  beside.unlink()
  with pytest.raises(FileNotFoundError, match="has no description"):
    _run(d, {}, merge=f"{a},{b}")
  assert not pathlib.Path(d).exists()


def test_the_next_search_needs_no_data_that_the_codec_knows(tmp_path):
  known = {"data": {"name": "sample_sift"}}
  codec = codecs.Codec("pq", None, known, fingerprint="0" * 16)
  config = cli.get_config(build_index.OPTIONS, data="my base.npy")
  assert build_index._data_flags(config, codec) == ""
  flags = " --queries=QUERIES --data='my base.npy'"
  assert build_index._data_flags(config) == flags


@pytest.fixture(name="rq_run")
def _rq_run(tmp_path):
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(300, 6)).astype(np.float32)
  np.save(tmp_path / "x.npy", x_ND)
  vqjax.fit(x_ND, "rq", num_codes=2, codebook_size=16).save(tmp_path / "rq")
  at = {"codec": str(tmp_path / "rq"), "data": str(tmp_path / "x.npy")}
  return at | {"output": str(tmp_path / "my index"), "num_lists": 5}


def test_a_codec_without_lists_gets_them(rq_run, said):
  assert build_index.run(**rq_run)["num_lists"] == 5
  index = vqjax.load_index(rq_run["output"])
  assert (len(index), index.num_lists) == (300, 5)
  assert f"search --index='{rq_run['output']}' --queries=QUERIES" in said[-1]
  assert build_index.run(**rq_run)["num_lists"] == 5
  assert any("is made already" in text for text in said)
  with pytest.raises(FileExistsError, match="num_lists=5, now it is 3"):
    build_index.run(**rq_run | {"num_lists": 3})
  build_index.run(**rq_run | {"num_lists": 3}, overwrite=True)
  assert vqjax.load_index(rq_run["output"]).num_lists == 3


@pytest.mark.parametrize(
  ("values", "match"),
  [
    ({"data": None}, "--data is needed"),
    ({"codes": "codes.npy"}, "leave --codes out"),
    ({"dtype": "float32"}, "leave --dtype out"),
    ({"num_lists": 301}, "num_lists must lie between 1 and 300"),
  ],
)
def test_lists_of_codes_that_are_made_already_are_refused(
  rq_run, values, match
):
  with pytest.raises(ValueError, match=match):
    build_index.run(**rq_run | values)
  assert not pathlib.Path(rq_run["output"]).exists()


def test_item_ids_go_from_codes_to_results(files_of_rq, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  codec, data = files_of_rq["codec"], files_of_rq["codes"].replace("codes", "x")
  item_ids.save("ids.txt", np.array([f"i{n}" for n in range(NUM)], object))
  given = {"codec": codec, "data": data, "ids": "ids.txt"}
  encode.run(**given, output="codes", shards=2)
  encode.run(**given, output="codes", shards=2)
  for rows, output in ((":50", "a.faiss"), ("50:", "b.faiss")):
    build_index.run(codec=codec, codes="codes", rows=rows, output=output)
  build_index.run(merge="a.faiss,b.faiss", output="all.faiss")
  search.run(
    **{"codec": codec, "index": "all.faiss", "queries": data, "data": data},
    **{"k": 3, "rounds": 1, "output": "s.json", "results": "r.npy"},
  )
  index = vqjax.build_index(codec, data, 1)
  rows_QR = index.search(data, 3)[1]
  found = np.load("r.npy")
  assert np.mean(found == np.char.add("i", rows_QR.astype(str))) > 0.95  # Ties.
  with pytest.raises(ValueError, match="holds other codes: their ids_checksum"):
    encode.run(codec=codec, data=data, output="codes", shards=2)
