"""The search command on a small index whose network decodes exactly."""

import json
import pathlib
import re
import shutil
import types

import numpy as np
import pytest

import vqjax
from experiments import build_index, search
from experiments.lib import cli, codecs, search_measure
from tests import commands, fits, qinco_cases
from vqjax.codecs import pairwise, rq
from vqjax.data import codes, formats
from vqjax.data.files import write_json
from vqjax.interop import searchers
from vqjax.storage import codec_file, decoder_file, index_folder

D, K, M, L, NUM = 8, 16, 4, 6, 500
pytestmark = pytest.mark.usefixtures("one_thread", "single_calls")


def _make(folder, is_ivf):
  """Files of a codec, of vectors that it decodes exactly, index, queries."""
  rng = np.random.default_rng(0)
  if is_ivf:
    name = "qinco"
    params = qinco_cases.make_params(
      dim=D, num_networks=M, num_codewords=K, num_lists=L
    )
  else:
    name = "rq"
    params = rq.RQParams(rng.normal(size=(M, K, D)).astype(np.float32))
  codec_file.save_codec(folder / "codec", name, params, info={})
  codec = codecs.open_codec(str(folder / "codec"))
  sizes = codec.codebook_sizes
  codes_NM = rng.integers(0, sizes, (2 * NUM, len(sizes))).astype(np.int32)
  codes_NM = rng.permutation(np.unique(codes_NM, axis=0))[:NUM]  # No ties.
  x_ND = np.asarray(codec.spec.decode(codec.tables, codes_NM))
  xq_QD = x_ND[:40] + 0.2 * rng.normal(size=(40, D)).astype(np.float32)
  np.save(folder / "x.npy", x_ND)
  np.save(folder / "xq.npy", xq_QD)
  sq_QN = ((xq_QD[:, None] - x_ND[None]) ** 2).sum(axis=-1)
  np.save(folder / "gt.npy", sq_QN.argsort(axis=1)[:, :12].astype(np.int32))
  np.save(folder / "codes.npy", codes_NM)
  meta = codes.describe(
    x_ND,
    codec=name,
    fingerprint=codec.fingerprint,
    codebook_sizes=sizes,
    encode={},
    command="",
  )
  write_json(folder / "codes.npy.json", meta)
  lists_N = codes_NM[:, 0] if is_ivf else np.zeros(NUM, np.int32)
  target_ND = x_ND - codec.centroids[lists_N]
  words = fits.additive(codes_NM[:, is_ivf:], target_ND, K)
  tables = pairwise.fit(words, codes_NM[:, 1:], target_ND) if is_ivf else None
  decoder_file.save(
    folder / "decoders.safetensors",
    words,
    tables,
    codec_fingerprint=codec.fingerprint,
    info={},
  )
  files = {
    "codec": str(folder / "codec"),
    "decoders": str(folder / "decoders.safetensors"),
  }
  built = files | {
    "codes": str(folder / "codes.npy"),
    "output": str(folder / "index.faiss"),
    "coarse": "flat",
  }
  build_index.run(cli.get_config(build_index.OPTIONS, **built))
  return files | {
    "index": str(folder / "index.faiss"),
    "queries": str(folder / "xq.npy"),
    "groundtruth": str(folder / "gt.npy"),
    "rounds": 1,
    "threads": 1,
  }


@pytest.fixture(scope="module")
def ivf(tmp_path_factory):
  return _make(tmp_path_factory.mktemp("ivf"), True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  return _make(tmp_path_factory.mktemp("rq"), False)


@pytest.fixture
def small(ivf, tmp_path):
  grid = {"nprobe": "1,6", "num_pairwise": "0,30", "num_network": "0,15"}
  return ivf | grid | {"output": str(tmp_path / "out.json")}


def _run(values):
  return search.run(cli.get_config(search.OPTIONS, **values))


def _latency(values):
  return json.loads(pathlib.Path(values["output"]).read_text())["latency"]


def _load(file, name):
  return np.load(pathlib.Path(file["queries"]).parent / name)


def test_points_are_what_searching_gives(small):
  result = _run(small)
  written = json.loads(pathlib.Path(small["output"]).read_text())
  assert written["points"] == result["points"]
  assert written["header"] == result["header"]
  assert pathlib.Path(small["output"]).with_suffix(".png").stat().st_size
  dtype = result["header"]["dtype"]
  searcher = searchers.open_searcher(
    small["codec"], small["index"], small["decoders"], dtype=dtype
  )
  xq_QD, true_QG = _load(small, "xq.npy"), _load(small, "gt.npy")
  for point in result["points"]:
    found = searcher.search(xq_QD, 10, **point["setting"])
    rows = list(zip(found.ids_QR.tolist(), true_QG.tolist(), strict=True))
    one = np.mean([ids[0] == true[0] for ids, true in rows])
    ten = np.mean([true[0] in ids for ids, true in rows])
    knn = np.mean([len(set(ids) & set(true[:10])) / 10 for ids, true in rows])
    assert point["recall"] == pytest.approx(
      {"1-recall@1": one, "1-recall@10": ten, "knn_recall@10": knn}
    )
    assert point["qps"] > 0
    assert point["decoded_per_query"] == found.num_decoded / 40
    has_pairwise = point["setting"]["num_pairwise"] > 0
    assert ("pairwise" in point["stage_us"]) == has_pairwise
  assert result["header"]["bytes"] == {"qinco": 3}  # 4 x 4 bits and a norm.
  memory = result["header"]["memory"]["qinco"]
  assert "ids" not in memory["ram"]  # They stay on disk.
  assert memory["disk"]["index"] > memory["disk"]["ids"] > 4 * 400
  assert result["header"]["threads"]["faiss"] == 1
  (single,) = written["latency"]
  assert single["num_queries"] == 40
  assert 0 < single["p50_ms"] <= single["p95_ms"]


def test_points_are_printed_as_they_are_measured(small, capsys, monkeypatch):
  measure, num_printed = search_measure.measure_all, []

  def look(*args):
    num_printed.append(capsys.readouterr().out.count("\n"))
    return measure(*args)

  monkeypatch.setattr(search_measure, "measure_all", look)
  monkeypatch.setattr(cli, "has_own_stdout", lambda: True)
  points = _run(small)["points"]
  assert num_printed == [0] + [1] * (len(points) - 1)
  (last,) = capsys.readouterr().out.splitlines()
  assert json.loads(last) == points[-1]
  assert _run(small)["points"] == points
  assert capsys.readouterr().out == ""


def test_the_network_over_all_is_exact_search(small):
  small |= {
    "num_pairwise": "0",
    "num_network": f"0,{NUM + 99}",
    "dtype": "float32",
  }
  result = _run(small)
  best = [
    p for p in result["points"] if p["setting"]["num_network"] and
    p["setting"]["nprobe"] == L
  ]  # fmt: skip
  # A value beyond the index becomes its size.
  assert best[0]["setting"]["num_network"] == NUM
  assert best[0]["recall"]["knn_recall@10"] == 1
  assert best[0]["recall"]["1-recall@1"] == 1


def test_no_more_than_the_settings_worth_trying(small, caplog):
  small |= {"num_pairwise": "0,10,30", "num_network": "0,20,500"}
  settings = [p["setting"] for p in _run(small)["points"]]
  # All lists and 500 of 500 decoded are perfect; aq above 500 there is none.
  assert all(
    s["num_pairwise"] in (0, 30) or not s["num_network"] for s in settings
  )
  assert not any(
    s["num_pairwise"] and s["num_network"] == 500 for s in settings
  )
  assert len(settings) == len({json.dumps(s) for s in settings}) <= 12


def test_resume_measures_what_is_missing(small, monkeypatch):
  calls, measure = [], search_measure.measure_all

  def stop_later(*args):
    if calls:
      raise KeyboardInterrupt
    calls.append(args)
    return measure(*args)

  monkeypatch.setattr(search_measure, "measure_all", stop_later)
  with pytest.raises(KeyboardInterrupt):
    _run(small)
  path = pathlib.Path(small["output"])
  before = json.loads(path.read_text())["points"]
  assert len(before) == 1
  monkeypatch.setattr(search_measure, "measure_all", measure)
  changes = {"k": 5, "decoders": None, "threads": 2, "rounds": 2}
  for name, value in changes.items():
    other = {"num_pairwise": "0"} if name == "decoders" else {}
    with pytest.raises(ValueError, match=f"measured with {name} .*, now it is"):
      _run(small | other | {name: value})
  after = _run(small)["points"]
  assert after[:1] == before
  settings = [json.dumps(p["setting"]) for p in after]
  assert len(settings) == len(set(settings)) > 1
  again = _run(small)["points"]
  assert again == after
  whole = path.read_text()
  for text, said in (
    ('{"no": "points"}', "its 'header' is None"),
    (whole.replace('"qps": ', '"qps": "many", "x": '), "its 'qps' is 'many'"),
    (whole[:-20], "damaged, or no JSON"),
    ("[" * 3000 + "]" * 3000, "more than 64 brackets"),
  ):
    path.write_text(text)
    with pytest.raises(ValueError, match=f"no record of a search: .*{said}"):
      _run(small)
  assert _run(small | {"overwrite": True})["points"]


def test_baselines_on_the_same_lists(small, ivf):
  folder = pathlib.Path(ivf["queries"]).parent
  base = str(folder / "x.npy")
  small |= {"baselines": "ivf-pq,IVF-RaBitQ", "data": base, "train": base}
  small |= {"num_pairwise": "0", "num_network": "0"}
  result = _run(small)
  by_series = {}
  for point in result["points"]:
    by_series.setdefault(point["series"], []).append(point["setting"])
  assert len(by_series["IVF-PQ"]) == 2
  assert [s["nprobe"] for s in by_series["IVF-RaBitQ"]] in (
    [1, 1, 6, 6], [6, 6, 1, 1],
  )  # fmt: skip
  assert {s["query_bits"] for s in by_series["IVF-RaBitQ"]} == {4, 8}
  assert result["header"]["bytes"] == {
    "qinco": 3, "IVF-PQ": 2, "IVF-RaBitQ": 9,
  }  # fmt: skip
  assert [row["series"] for row in _latency(small)] == list(by_series)
  # Without them, their points and times stay.
  again = _run(small | {"baselines": ""})
  assert again["points"] == result["points"]
  assert {row["series"] for row in _latency(small)} == set(by_series)
  # Those of other vectors do not go into the same record.
  other = str(pathlib.Path(small["output"]).with_name("other.npy"))
  np.save(other, _load(small, "x.npy")[::-1])
  with pytest.raises(ValueError, match="measured with baselines .*, now it is"):
    _run(small | {"train": other})
  top = max(p["recall"]["1-recall@10"] for p in result["points"]
            if p["series"] == "IVF-RaBitQ")  # fmt: skip
  assert top > 0.5  # 10 of 500 at random would be 0.02.


def test_baselines_without_times_of_single_queries(small, ivf, monkeypatch):
  base = str(pathlib.Path(ivf["queries"]).parent / "x.npy")
  small |= {"baselines": "IVF-PQ", "data": base, "train": base}
  small |= {"num_pairwise": "0", "num_network": "0"}
  single, timed = search_measure.latencies, []

  def stop_at_the_baseline(*args):
    timed.append(args)
    if len(timed) == 2:
      raise KeyboardInterrupt
    return single(*args)

  monkeypatch.setattr(search_measure, "latencies", stop_at_the_baseline)
  with pytest.raises(KeyboardInterrupt):
    _run(small)
  assert [row["series"] for row in _latency(small)] == ["qinco"]
  before = json.loads(pathlib.Path(small["output"]).read_text())["points"]
  after = _run(small)
  assert after["points"] == before
  assert {row["series"] for row in _latency(small)} == {"qinco", "IVF-PQ"}
  # Nothing is trained any more.
  monkeypatch.delattr(search.search_data, "fit_baselines")
  assert _run(small)["points"] == before
  path = pathlib.Path(small["output"])
  record = json.loads(path.read_text())
  for row in record["latency"]:  # Times of what is not the best are none.
    row["setting"]["nprobe"] = 7 - row["setting"]["nprobe"]
  path.write_text(json.dumps(record))
  with pytest.raises(AttributeError, match="fit_baselines"):
    _run(small)


def test_a_codec_without_lists(plain, tmp_path):
  plain = plain | {"output": str(tmp_path / "two.json"), "decoders": None}
  result = _run(plain | {"num_network": "10,500"})
  assert result["header"]["num_lists"] == 1
  best = max(result["points"], key=lambda p: p["setting"]["num_network"])
  assert best["recall"]["1-recall@1"] == 1
  assert best["setting"]["nprobe"] == 1


def test_a_codec_without_network_is_searched_without():
  info = {"num_lists": 1, "num_vectors": 9, "coarse": "flat", "codec": "rq"}
  parts = types.SimpleNamespace(refiner=None, pairwise_fn=None)
  config = cli.get_config(search.OPTIONS)
  assert search._ranges(config, info, parts)["num_network"] == [0]


@pytest.mark.parametrize("kind", ["ivf", "plain"])
def test_decode_all_is_exact_search(kind, request, tmp_path):
  files = request.getfixturevalue(kind)
  folder = pathlib.Path(files["queries"]).parent
  values = {
    "codec": files["codec"],
    "codes": str(folder / "codes.npy"),
    "queries": files["queries"],
    "groundtruth": files["groundtruth"],
    "decode_all": True,
    "output": str(tmp_path / "all.json"),
  }
  result = _run(values)
  assert result["recall"]["knn_recall@10"] == 1
  assert json.loads((tmp_path / "all.json").read_text()) == result
  # The true neighbours that exact search finds in the base are the same.
  values |= {"groundtruth": None, "data": str(folder / "x.npy")}
  assert _run(values | {"overwrite": True})["recall"] == result["recall"]
  bad_QD = _load(files, "xq.npy")
  bad_QD[7, 1] = np.nan
  np.save(tmp_path / "bad.npy", bad_QD)
  with pytest.raises(ValueError, match="NaN or Inf in 1 of 40 .* in row 7;"):
    _run(values | {"queries": str(tmp_path / "bad.npy"), "overwrite": True})
  meta = json.loads((folder / "codes.npy.json").read_text())
  meta["codec_fingerprint"] = "another"
  np.save(tmp_path / "codes.npy", np.load(folder / "codes.npy"))
  (tmp_path / "codes.npy.json").write_text(json.dumps(meta))
  with pytest.raises(ValueError, match="was made by codec another, but"):
    _run(values | {"codes": str(tmp_path / "codes.npy"), "overwrite": True})
  wide = str(tmp_path / "wide.npy")
  np.save(wide, np.load(folder / "codes.npy").repeat(2, axis=1))
  with pytest.raises(ValueError, match="codes per vector, but the codec has"):
    _run(values | {"codes": wide, "overwrite": True})


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"index": None}, "--index is needed"),
    ({"output": "x.png"}, r"must end in \.json; got x\.png"),
    ({"nprobe": "1,two"}, "--nprobe must be numbers from 1 on.*'1,two'"),
    ({"num_network": "-1"}, "--num_network must be numbers from 0 on.*'-1'"),
    (
      {"num_pairwise": "5", "num_network": "9"},
      r"above --num_network, and .*num_pairwise=\[5\]",
    ),
    ({"ef_search": "8"}, "effort of a graph, but .* is flat"),
    ({"decoders": None}, "--num_pairwise needs the pairwise decoder"),
    ({"baselines": "IVF-XY"}, "may name IVF-PQ.*; got IVF-XY"),
    ({"baselines": "IVF-PQ"}, "--baselines need --data"),
    ({"groundtruth": None}, "no ground truth; give the vectors"),
    ({"k": NUM + 1}, "--k must lie between 1 and 500, got 501"),
    ({"codes": "codes.npy"}, "--codes are for --decode_all"),
    ({"decode_all": True, "codes": "c.npy"}, "leave --index out"),
    ({"queries": None}, "--queries is needed"),
  ],
)
def test_what_does_not_fit_is_refused(small, change, message):
  with pytest.raises(ValueError, match=message):
    _run(small | change)
  assert not pathlib.Path(small["output"]).exists()


def test_true_neighbours_that_are_not_indexed(small, tmp_path):
  wrong = str(tmp_path / "wrong.npy")
  ids_QG = _load(small, "gt.npy")
  ids_QG[0, 0] = NUM
  np.save(wrong, ids_QG)
  with pytest.raises(ValueError, match="beyond the 500 that are searched"):
    _run(small | {"groundtruth": wrong})
  few = str(tmp_path / "few.npy")
  formats.write_vectors(few, _load(small, "x.npy")[:77])
  with pytest.raises(ValueError, match="has 77 vectors, but 500 are indexed"):
    _run(small | {"groundtruth": None, "data": few})


@pytest.fixture
def wrong(ivf, tmp_path):
  """The vectors farthest from each query as its ground truth."""
  x_ND, xq_QD = _load(ivf, "x.npy"), _load(ivf, "xq.npy")
  sq_QN = ((xq_QD[:, None] - x_ND[None]) ** 2).sum(axis=-1)
  ids_QG = np.ascontiguousarray(sq_QN.argsort(axis=1)[:, -12:])
  np.save(tmp_path / "wrong.npy", ids_QG)
  return str(tmp_path / "wrong.npy")


def test_a_ground_truth_of_other_queries_is_refused(small, ivf, wrong):
  small |= {"data": str(pathlib.Path(ivf["queries"]).with_name("x.npy"))}
  with pytest.raises(ValueError, match="wrong.npy must name the vectors of"):
    _run(small | {"groundtruth": wrong})
  assert not pathlib.Path(small["output"]).exists()


@pytest.mark.parametrize("decode_all", [False, True])
def test_a_ground_truth_that_nothing_finds_is_doubted(
  decode_all, small, ivf, wrong, monkeypatch
):
  said = []
  warn = lambda text, *args: said.append(text % args if args else text)
  monkeypatch.setattr(search.logging, "warning", warn)
  if decode_all:
    codes_file = str(pathlib.Path(ivf["index"]).with_name("codes.npy"))
    small |= {"decode_all": True, "codes": codes_file, "index": None}
  doubted = lambda: [t for t in said if "does --groundtruth belong to" in t]
  _run(small)
  assert not doubted()
  _run(small | {"groundtruth": wrong, "overwrite": True})
  (text,) = doubted()
  assert "best 1-recall@1 is 0.0000" in text


def test_another_base_is_refused(small, ivf, tmp_path):
  other = str(tmp_path / "other.npy")
  np.save(other, _load(small, "x.npy")[::-1])
  message = "holds other codes: their data.check.* vectors that were encoded as"
  with pytest.raises(ValueError, match=f"index.faiss {message} --data"):
    _run(small | {"data": other})
  values = {"decode_all": True, "index": None, "decoders": None, "data": other}
  values["codes"] = str(pathlib.Path(ivf["queries"]).parent / "codes.npy")
  with pytest.raises(ValueError, match=f"codes.npy {message} --data"):
    _run(small | values)
  assert not pathlib.Path(small["output"]).exists()


def test_a_part_is_refused(small, ivf, tmp_path):
  part = {
    "codec": ivf["codec"],
    "decoders": ivf["decoders"],
    "codes": str(pathlib.Path(ivf["index"]).with_name("codes.npy")),
    "rows": "300:",
    "output": str(tmp_path / "part.faiss"),
  }
  build_index.run(cli.get_config(build_index.OPTIONS, **part))
  message = "part.faiss is a part, rows 300:500 of 500, .* Merge all parts"
  with pytest.raises(ValueError, match=message):
    _run(small | {"index": part["output"]})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_snippet_searches_as_was_measured(small, dtype, monkeypatch):
  said = []
  monkeypatch.setattr(
    search.logging, "info", lambda text, *args: said.append(text % args)
  )
  _run(small | {"num_pairwise": "0", "num_network": "0", "dtype": dtype})
  (snippet,) = [text for text in said if "open_searcher(" in text]
  assert "  from vqjax.interop.searchers import open_searcher\n" in snippet
  assert "--results=" in snippet
  end = {"float32": "", "bfloat16": ", dtype='bfloat16'"}[dtype]
  assert f"{small['decoders']!r}{end})\n" in snippet


@pytest.mark.slow
def test_stopped_it_says_how_to_go_on(small):
  output = pathlib.Path(small["output"])
  flags = [f"--{name}={value}" for name, value in small.items()]
  flags += ["--rounds=20", "--nprobe=1,2,3,4,5,6"]
  message = commands.stop_once(output.exists, "search", *flags)
  assert "Run the same command again." in message
  assert json.loads(output.read_text())["points"]


def test_a_folder_needs_no_other_flag_for_its_files(
  small, tmp_path, monkeypatch
):
  folder = tmp_path / "index"
  folder.mkdir()
  names = {"codec": "codec", "index": "i.faiss", "decoders": "d.safetensors"}
  for name in ("codec", "index", "decoders"):
    source = pathlib.Path(small[name])
    copy = shutil.copytree if source.is_dir() else shutil.copy
    copy(source, folder / names[name])
  shutil.copy(f"{small['index']}.json", folder / "i.faiss.json")
  index_folder.write_manifest(folder, names, {"metric": "l2"})
  given = {name: small[name] for name in ("queries", "groundtruth")}
  given |= {"nprobe": "2", "num_pairwise": "0", "num_network": "5"}
  given["dtype"] = "float32"
  config = cli.get_config(search.OPTIONS, index=str(folder), **given, rounds=1)
  said = []
  with monkeypatch.context() as patch:
    patch.setattr(
      search.logging, "info", lambda text, *args: said.append(text % args)
    )
    points = search.run(config)["points"]
  (call,) = re.findall(r"^  (vqjax\.load_index.*)$", said[-1], re.MULTILINE)
  names = {"vqjax": vqjax, "queries": small["queries"]}
  _, ids_QR = eval(call, names)
  assert ids_QR.shape == (40, 10)
  assert (folder / "search.json").exists()
  assert search.run(config)["points"] == points  # Nothing is measured again.
  want = _run(small | given)["points"]
  assert [p["recall"] for p in points] == [p["recall"] for p in want]


def test_a_generation_has_a_search_of_its_own(tmp_path):
  later = "generation-00002"
  (tmp_path / later).mkdir()
  names = {"codec": f"{later}/codec", "index": f"{later}/index.faiss"}
  for name in names.values():
    (tmp_path / name).touch()
  index_folder.write_manifest(tmp_path, names, {"generation": 2})
  config = cli.get_config(search.OPTIONS, index=str(tmp_path))
  opened, _ = search._open_folder(config)
  assert opened.output == str(tmp_path / later / "search.json")
