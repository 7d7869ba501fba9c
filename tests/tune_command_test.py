"""vqjax tune: what it tries, chooses, writes, and keeps."""

import importlib
import json
import shlex
import shutil

import numpy as np
import pytest

from experiments import tune
from experiments.lib import tune_budget, tune_choice, tune_codecs, tune_search
from experiments.lib.tune_choice import Asked
from vqjax import shipped


def _normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A folder of `tune` of two codecs, with searches."""
  folder = tmp_path_factory.mktemp("tune")
  np.save(folder / "x.npy", _normal(0, 600, 4))
  np.save(folder / "q.npy", _normal(1, 20, 4))
  _run(folder)
  return folder


def _run(folder, **values):
  options = {
    "data": folder / "x.npy",
    "queries": folder / "q.npy",
    "bytes": 1,
    "codecs": "pq,pq_4bit",
    "recall": 0.2,
    "output": folder / "out",
  }
  return tune.run({**options, **values})


def test_it_writes_a_configuration_commands_and_tables(made):
  record = json.loads((made / "out/tune.json").read_text())
  config = shipped.read_config(str(made / "out/config.py"))
  (model,) = [
    c.model
    for c in tune_codecs.candidates(1)
    if c.name == record["choice"]["codec"]
  ]
  assert {k: config.model[k] for k in model} == model
  assert config.data.train == str(made / "x.npy")
  assert record["choice"]["recall"]["knn_recall@10"] >= 0.2
  text = (made / "out/tune.md").read_text()
  assert "knn_recall@10" in text
  assert record["said"] in text
  for line in record["commands"]:
    _, name, *flags = shlex.split(line)
    known = importlib.import_module(f"experiments.{name}")
    given = {flag.partition("=")[0].removeprefix("--") for flag in flags}
    if name != "train":  # It has --config and --workdir.
      assert given <= set(known.OPTIONS)
    assert line in text


def test_again_nothing_is_tried_and_other_limits_choose_anew(
  made, monkeypatch, caplog
):
  caplog.set_level("INFO", logger="absl")
  monkeypatch.setattr(tune_codecs, "draw", None)
  monkeypatch.setattr(tune_codecs, "fit", None)
  before = (made / "out/config.py").read_bytes()
  _run(made)
  assert "All was tried already: " in caplog.text
  assert (made / "out/config.py").read_bytes() == before
  with pytest.raises(
    ValueError, match=r"at most 10 bytes \(--memory\) for 600"
  ):
    _run(made, memory="10")
  assert (
    "within the limits reaches knn_recall@10 1; it has the most"
    in (_run(made, recall=1.0)["said"])
  )
  assert "least squared error" in _run(made, recall=None)["said"]


def test_a_folder_of_something_else_is_refused(made):
  with pytest.raises(ValueError, match="another bytes: it was 1, now it is 2"):
    _run(made, bytes=2)
  path = made / "out/config.py"
  text = path.read_text()
  path.write_text(text + "# Mine.\n")
  with pytest.raises(FileExistsError, match="has been changed since tune"):
    _run(made)
  path.write_text(text)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"bytes": 65}, "--bytes must lie between 1"),
    ({"recall": 1.5}, "--recall is a share of the ten nearest.*got 1.5"),
    ({"latency": -1.0}, "--latency is in milliseconds, above 0"),
    ({"memory": "2 apples"}, "as 500MB, 2GB or 1000000; got '2 apples'"),
    (
      {"codecs": "pq,lsq"},
      "--codecs must be some of pq,rq,qinco2_xs.*got 'lsq'",
    ),
    ({"sample": 5}, "--sample must lie between 512"),
    ({"bytes": 3, "codecs": "pq"}, "4 dimensions cannot be cut into 3 equal"),
    ({"metric": "l3"}, "metric must be one of"),
  ],
)
def test_wrong_flags_get_a_sentence_before_any_work(made, values, message):
  with pytest.raises(ValueError, match=message):
    _run(made, output=made / "none", **values)
  assert not (made / "none").exists()


def test_too_few_vectors(tmp_path):
  np.save(tmp_path / "x.npy", _normal(0, 300, 4))
  with pytest.raises(ValueError, match="has 300 vectors; tune needs at least"):
    _run(tmp_path, queries=None)


def test_bytes_have_units():
  found = [tune._bytes(text) for text in ("1000", "2 kB", "1.5MB", "3GB")]
  assert found == [1000, 2000, 1.5e6, 3e9]


@pytest.mark.parametrize("has_queries", [False, True])
@pytest.mark.parametrize("size", [150, 400])
def test_samples_are_apart_if_they_can_be(size, has_queries, monkeypatch):
  x_ND = np.arange(2 * size, dtype=np.float32).reshape(size, 2)
  queries = _normal(0, 9, 2) if has_queries else None
  monkeypatch.setattr(tune_codecs, "_MOST_BYTES", 1200)  # 150 vectors.
  found = tune_codecs.draw(x_ND, queries, "l2", 100, 3)
  rows = lambda x: {tuple(row) for row in x.tolist()}
  fit, base = rows(found.xt_ND), rows(found.xb_ND)
  assert len(fit) == len(base) == 100
  assert found.is_apart == (size == 400)
  assert fit.isdisjoint(base) if found.is_apart else fit == base
  many = rows(found.many_ND)
  assert fit <= many
  assert len(many) == (150 if found.is_apart else 100)
  assert many.isdisjoint(base) == found.is_apart
  if not has_queries:
    mine = rows(found.truth.xq_QD)
    assert len(mine) == size // 10
    assert mine.isdisjoint(fit | base)
  again = tune_codecs.draw(x_ND, queries, "l2", 100, 3)
  np.testing.assert_array_equal(again.xb_ND, found.xb_ND)
  other = tune_codecs.draw(x_ND, queries, "l2", 100, 4)
  assert rows(other.xt_ND) != fit


def _budget(seconds, names, rows, **guesses):
  by_name = {c.name: c for c in tune_codecs.candidates(8)}
  record = {"header": {"bytes": 8}, "codecs": rows, "guesses": guesses}
  budget = tune_budget.Budget(seconds, [by_name[n] for n in names], record)
  return budget, lambda name: budget.too_long(by_name[name])


_PQ = {"codec": "pq", "mse": 1.0, "seconds": 27.0}
_RQ = {"codec": "rq", "mse": 1.0, "seconds": 528.0}


def test_a_codec_that_would_take_too_long_is_left_out():
  budget, said = _budget(120, ["pq", "rq"], [_PQ], rq=500.2)
  assert said("rq") == (
    "it would take about 501 s more, with 27 s spent; --seconds=528 tries it"
  )
  assert said("pq") is None
  assert not budget.passed()
  assert _budget(528, ["pq", "rq"], [_PQ], rq=500.2)[1]("rq") is None
  assert _budget(120, ["pq"], [_PQ])[1]("rq") is None  # Not measured yet.


@pytest.mark.parametrize("rq", [0.1, 500.0])
def test_a_greater_network_never_seems_to_take_less(rq):
  by_name = {c.name: c for c in tune_codecs.candidates(8)}
  for rows in ([_PQ], [_PQ, {**_RQ, "seconds": rq}]):
    budget, _ = _budget(120, list(by_name), rows, rq=rq)
    xs, s = (budget.guess(by_name[f"qinco2_{n}"]) for n in ("xs", "s"))
    assert xs >= 20
    assert s == 3 * xs


def test_only_codecs_that_were_asked_for_count():
  budget, said = _budget(120, ["pq", "pq_4bit"], [_PQ, _RQ], pq_4bit=9.0)
  assert budget.spent == 27
  assert said("pq_4bit") is None
  passed = _budget(120, ["pq", "rq"], [_PQ, _RQ])[0].passed()
  assert passed == "Fitting took 555 s, more than --seconds=120."


def test_what_is_too_long_is_not_begun_and_the_choice_stays(
  made, tmp_path, monkeypatch, caplog
):
  caplog.set_level("INFO", logger="absl")
  shutil.copytree(made / "out", tmp_path / "out")
  monkeypatch.setattr(tune_codecs, "fit", None)
  monkeypatch.setattr(tune_codecs, "seconds_of", lambda *_: 500.0)
  out = {"output": tmp_path / "out", "recall": None}
  run = lambda codecs: _run(made, codecs=codecs, **out)
  choice = run("pq,pq_4bit")["choice"]
  assert run("rq,qinco2_s")["choice"] == choice
  text = (tmp_path / "out/tune.md").read_text()
  assert "rq was not tried: it would take about 500 s more, with 0 s" in text
  assert "qinco2_s was not tried: it would take about 3750 s" in text
  assert "\npq " in text  # It was tried for another command.
  run("rq,qinco2_s")
  assert "Nothing new was tried; written:" in caplog.text
  caplog.clear()
  other = "pq" if choice["codec"] == "pq_4bit" else "pq_4bit"
  assert run(other)["choice"] == choice
  assert "All was tried already:" in caplog.text
  assert "was not tried" not in caplog.text
  with pytest.raises(
    ValueError, match="Nothing was tried.*--seconds=500 tries"
  ):
    _run(made, output=tmp_path / "new", codecs="rq")


def test_the_caption_says_that_recall_is_lower_in_the_whole_file():
  x_ND = _normal(0, 400, 2)
  sample = tune_codecs.draw(x_ND, None, "l2", 100, 0)
  said = tune_codecs.describe(sample, 400)
  assert "a search in 100: in all 400 it is lower" in said
  whole = tune_codecs.draw(x_ND[:100], x_ND[:5], "l2", 100, 0)
  assert "in all" not in tune_codecs.describe(whole, 100)


def _series(codec, *points, refiner=None, each=1000):
  memory = {"num_vectors": 10, "ram": {"codes": each}, "disk": {}}
  return {
    "codec": codec,
    "refiner": refiner,
    "num_lists": 1,
    "memory": memory,
    "points": [
      {"setting": {"nprobe": i + 1}, "recall": {"knn_recall@10": r}, "us": us}
      | {"ms": us / 100}
      for i, (r, us) in enumerate(points)
    ],
  }


@pytest.mark.parametrize(
  ("asked", "codec", "nprobe"),
  [
    (Asked(0.5, None, None), "a", 2),  # The fastest that reaches it.
    (Asked(0.8, None, None), "b", 3),
    (Asked(None, None, None), "b", 3),  # .002 less are the same, and faster.
    (Asked(None, None, 0.52), "b", 1),  # In milliseconds.
    (Asked(0.8, 1000, None), "a", 2),  # b does not fit.
  ],
)
def test_choices(asked, codec, nprobe):
  a = _series("a", (0.4, 10), (0.6, 50))
  b = _series("b", (0.7, 52), (0.9, 500), (0.898, 400), each=2000)
  found = tune_choice.of_searches([a, b], asked, 10)
  assert (found.codec, found.point["setting"]["nprobe"]) == (codec, nprobe)


def test_no_search_is_fast_enough():
  with pytest.raises(ValueError, match=r"in 0.01 ms \(--latency\).* 0.1 ms"):
    tune_choice.of_searches(
      [_series("a", (0.4, 10))], Asked(None, None, 0.01), 9
    )


def test_what_a_limit_leaves_out_is_named():
  found = [_series("a", (0.4, 10)), _series("b", (0.9, 500), each=2000)]
  choice = tune_choice.of_searches(found, Asked(0.8, 1000, None), 10)
  assert choice.codec == "a"
  assert choice.why.endswith("0.400. b reaches it, in 2,000 bytes of memory")


def test_of_nearly_equal_errors_the_fastest():
  row = lambda codec, mse, us: {"codec": codec, "mse": mse, "encode_us": us}
  rows = [row("a", 1.0, 50), row("b", 1.005, 5), row("c", 1.2, 1)]
  rows.append({"codec": "d", "left_out": "late"})
  assert tune_choice.of_codecs(rows).codec == "b"
  assert tune_choice.of_codecs(rows[::2]).codec == "a"


def test_bytes_grow_with_vectors_and_lists():
  ram = {"codes": 90, "ids": 80, "centroids": 16, "tables": 7, "graph": 999}
  memory = {"num_vectors": 10, "ram": ram, "disk": {}}
  # 2,500 vectors get 64 lists at most; 1,000 one.
  assert tune_search.bytes_of_all(memory, 1, 1000) == 9000 + 16 + 7
  assert tune_search.bytes_of_all(memory, 1, 2500) == 22_500 + 64 * 16 + 7


def test_the_same_share_of_lists():
  assert tune_choice.scaled_probes(4, 64, 256) == 16
  assert tune_choice.scaled_probes(1, 256, 64) == 1
  assert tune_choice.scaled_probes(64, 64, 256) == 256


@pytest.mark.slow
def test_a_network_is_tried_and_recommended(tmp_path):
  base = _normal(0, 40, 8)
  x_ND = base[np.random.default_rng(1).integers(0, 40, 1500)]
  np.save(tmp_path / "x.npy", x_ND + 0.3 * _normal(2, 1500, 8))
  values = {"queries": None, "codecs": "rq,qinco2_xs", "bytes": 2}
  record = _run(tmp_path, **values, seconds=1e6)
  assert {s["codec"] for s in record["searches"]} == {"rq", "qinco2_xs"}
  assert any(
    "num_network" in p["setting"]
    for s in record["searches"]
    for p in s["points"]
  )
  config = shipped.read_config(str(tmp_path / "out/config.py"))
  assert config.codec in ("rq", "qinco")
