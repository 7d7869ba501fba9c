"""Semantic ids end to end: library, folder and command."""

import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import vqjax
from experiments import semantic_ids as command
from vqjax import semantic_ids
from vqjax.codec import Codec
from vqjax.codecs.pq import PQParams
from vqjax.codecs.rq import RQParams
from vqjax.ids import pictures
from vqjax.storage import id_folder

K, D, N = 5, 6, 60


@pytest.fixture(name="codec", scope="module")
def _codec():
  rng = np.random.default_rng(0)
  books = rng.normal(size=(3, K, D)) * np.array([1, 0.6, 0.3])[:, None, None]
  return Codec("rq", RQParams(jnp.asarray(books, jnp.float32)))


@pytest.fixture(name="x", scope="module")
def _x():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(6, D))[rng.integers(0, 6, N)]
  x = (x + 0.4 * rng.normal(size=(N, D))).astype("f4")
  x[50], x[51] = x[3], x[3]
  return x


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
  """Drawing takes a second; id_report_test.py does it."""
  monkeypatch.setattr(
    pictures, "draw", lambda path, *_, **__: path.write_bytes(b"")
  )


@pytest.fixture(name="files")
def _files(codec, x, tmp_path, monkeypatch):
  """The codec and data of a command, in the folder where it runs."""
  monkeypatch.chdir(tmp_path)
  codec.save("codec")
  np.save("x.npy", x)
  return tmp_path


def test_balanced_levels(codec, x):
  ids = vqjax.make_ids(codec, x, resolve="none", is_balanced=True)
  for codes_N in ids.codes.T:
    assert set(np.bincount(codes_N)) == {N // K}
  fitted = Codec("rq", codec.params, {"is_balanced": True})
  again = vqjax.make_ids(fitted, x, resolve="none")
  np.testing.assert_array_equal(again.codes, ids.codes)
  more = again.append(x[:3] + 1, [100, 101, 102], codec=fitted)
  np.testing.assert_array_equal(more.codes[N:], fitted.encode(x[:3] + 1))
  plain = vqjax.make_ids(fitted, x, resolve="none", is_balanced=False)
  np.testing.assert_array_equal(plain.codes, codec.encode(x))
  with pytest.raises(ValueError, match="without a beam: leave beam_size out"):
    vqjax.make_ids(codec, x, is_balanced=True, beam_size=3)


def _run(**options):
  return command.run(codec="codec", data="x.npy", **options)


def _read(path):
  return json.loads((path).read_text())


def test_the_command_balances_unless_told_otherwise(codec, x, files):
  Codec("rq", codec.params, {"is_balanced": True}).save("codec", overwrite=True)
  _run(output="ids", resolve="none")
  _run(output="plain", resolve="none", balanced=False)
  codes = [semantic_ids.load_ids(name).codes for name in ("ids", "plain")]
  assert set(np.bincount(codes[0][:, 0])) == {N // K}
  np.testing.assert_array_equal(codes[1], codec.encode(x))


@pytest.mark.parametrize("resolve", ["nearest", "backtrack"])
def test_distinct_items_have_distinct_ids(codec, x, resolve):
  ids = vqjax.make_ids(codec, x, resolve=resolve)
  assert len(np.unique(ids.codes, axis=0)) == N - 2
  assert (ids.codes[[50, 51]] == ids.codes[3]).all()
  assert ids.report["duplicates"]["groups"] == [[3, 50, 51]]
  before, after = ids.report["before"], ids.report["after"]
  assert after["collision_rate"] == pytest.approx(2 / N)
  assert after["collision_rate"] == ids.report["duplicates"]["floor"]
  raw = codec.encode(x)
  assert before["distinct"] == len(np.unique(raw, axis=0)) < N - 10
  found = ids.report["resolver"]
  assert found["moved"] == (ids.codes != raw).any(axis=1).sum()
  mse = lambda codes: float(((codec.decode(codes) - x) ** 2).sum(axis=1).mean())
  assert before["mse"] == pytest.approx(mse(raw), rel=1e-5)
  assert after["mse"] == pytest.approx(mse(ids.codes), rel=1e-5)
  assert found["added_error"] == pytest.approx(mse(ids.codes) / mse(raw) - 1)
  spread = ((x - x.mean(axis=0)) ** 2).sum(axis=1).mean()
  assert before["relative_error"] == pytest.approx(mse(raw) / spread, rel=1e-4)
  assert ids.report["delta"]["distinct"] == N - 2 - before["distinct"]
  again = vqjax.make_ids(codec, x.copy(), resolve=resolve)
  assert (again.codes == ids.codes).all()


@pytest.mark.parametrize("how", ["token", "backtrack"])
def test_duplicates_are_told_apart_on_request(codec, x, how):
  ids = vqjax.make_ids(codec, x, separate_duplicates=how)
  assert len(np.unique(ids.codes, axis=0)) == N
  shared = vqjax.make_ids(codec, x)
  if how == "token":
    assert (ids.codes[:, :3] == shared.codes).all()
    assert ids.codes[[3, 50, 51], 3].tolist() == [0, 1, 2]
    assert (np.delete(ids.codes[:, 3], [3, 50, 51]) == -1).all()
  else:
    assert ids.codes.shape == (N, 3)


def test_a_token_tells_all_items_apart(codec, x):
  ids = vqjax.make_ids(codec, x, resolve="token")
  assert len(np.unique(ids.codes, axis=0)) == N
  assert (ids.codes[:, :3] == codec.encode(x)).all()
  assert ids.report["resolver"]["moved"] == 0
  lengths = {len(tokens) for tokens in ids.tokens}
  assert lengths == {3, 4}
  every = vqjax.make_ids(codec, x, resolve="token", token_for="all")
  assert {len(tokens) for tokens in every.tokens} == {4}
  assert every.sizes == (K, K, K, every.codes[:, 3].max() + 1)
  assert every.token_numbers[0].tolist() == [
    *(every.codes[0, :3] + [0, K, 2 * K]),
    every.codes[0, 3] + 3 * K,
  ]


def test_capacity_lets_items_share(codec, x):
  ids = vqjax.make_ids(codec, x, capacity=2)
  groups = np.unique(ids.codes, axis=0, return_counts=True)[1]
  assert np.sort(groups)[-2:].tolist() in ([2, 3], [2, 4], [2, 2])
  once = vqjax.make_ids(codec, x)
  moved = [i.report["resolver"]["moved"] for i in (ids, once)]
  assert 0 < moved[0] < moved[1]


def test_any_codec_has_ids(x):
  books = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("f4")
  codec = Codec("pq", PQParams(jnp.asarray(books)))
  ids = vqjax.make_ids(codec, x[:14], list("abcdefghijklmn"))
  assert len(np.unique(ids.codes, axis=0)) == 14
  assert ids.report["after"]["mse"] > ids.report["before"]["mse"]
  full = vqjax.make_ids(codec, x[:20])  # 16 ids.
  assert full.report["resolver"]["left"] > 0
  assert full.report["after"]["distinct"] == 16


def test_append_moves_no_published_id(codec, x, tmp_path):
  items = [f"i{row}" for row in range(N)]
  old = vqjax.make_ids(codec, x[:40], items[:40])
  old.save(tmp_path / "old")
  loaded = vqjax.load_ids(tmp_path / "old")
  assert loaded.items.tolist() == items[:40]
  new = loaded.append(x[40:], items[40:], codec=codec)
  assert (new.codes[:40] == old.codes).all()
  assert len(np.unique(new.codes, axis=0)) == N - 2
  assert (new.codes[[50, 51]] == old.codes[3]).all()  # Published duplicates.
  new.save(tmp_path / "new")
  index = _read(tmp_path / "new" / "index.json")
  delta = _read(tmp_path / "new" / "delta.json")
  assert list(delta) == items[40:]
  assert index == _read(tmp_path / "old" / "index.json") | delta
  figures = new.report["append"]
  assert figures["items"] == 20
  assert figures["published_mse"] == old.report["before"]["mse"]
  assert figures["warnings"] == []
  far = vqjax.load_ids(tmp_path / "new").append(
    np.repeat(3 * x[:1], 20, axis=0) + np.arange(20)[:, None] / 1000,
    [f"far{row}" for row in range(20)],
    codec=codec,
  )
  text = " ".join(far.report["append"]["warnings"])
  for word in ("trained on other vectors", "codewords of level 1"):
    assert word in text
  assert (far.codes[:N] == new.codes).all()


def test_append_counts_tokens_on(codec, x):
  old = vqjax.make_ids(codec, x[:40], resolve="token")
  new = old.append(x[40:])
  assert new.items.tolist() == list(range(N))
  assert (new.codes[:40] == old.codes).all()
  assert len(np.unique(new.codes, axis=0)) == N
  loop = vqjax.make_ids(codec, x[:40], resolve="sinkhorn").append(x[40:])
  assert loop.info["resolver"]["resolve"] == "nearest"


def test_append_refuses_what_does_not_fit(codec, x):
  old = vqjax.make_ids(codec, x[:40])
  other = Codec("rq", RQParams(codec.params.codebooks_MKD + 1))
  with pytest.raises(ValueError, match=f"this is codec {other.fingerprint}"):
    old.append(x[40:], codec=other)
  with pytest.raises(ValueError, match="1 of the new.*is 7 in row 1"):
    old.append(x[40:42], [99, 7])
  with pytest.raises(TypeError, match="integers, but the new ones are text"):
    old.append(x[40:42], ["a", "b"])
  text = vqjax.make_ids(codec, x[:2], ["a", "b"])
  with pytest.raises(TypeError, match="give those of the new items"):
    text.append(x[40:42])


def test_the_folder_holds_all_that_is_promised(files, codec, x):
  pa = pytest.importorskip("pyarrow")
  parquet = pytest.importorskip("pyarrow.parquet")
  items = [f"item {row}" for row in range(N)]
  table = pa.table({"embedding": x.tolist(), "name": items})
  parquet.write_table(table, "items.parquet")
  command.run(
    codec="codec",
    data="items.parquet#embedding",
    ids="name",
    output="ids",
    separate_duplicates="token",
  )
  index = _read(files / "ids" / "index.json")
  assert list(index) == items
  ids = vqjax.load_ids("ids")
  assert ids.tokens == list(index.values())
  assert re.fullmatch(r"<a_\d>", index["item 0"][0])
  assert [len(index[name]) for name in ("item 0", "item 3")] == [3, 4]
  lookup = _read(files / "ids" / "id_to_items.json")
  for name, tokens in index.items():
    assert lookup["".join(tokens)] == [name]
  table = np.load("ids/ids.npy")
  assert (table["codes"] == ids.codes).all()
  assert (table["tokens"] == ids.token_numbers).all()
  columns = parquet.read_table("ids/ids.parquet").to_pydict()
  assert columns["item"] == items
  for row, codes in enumerate(ids.codes.tolist()):
    assert columns["codes"][row] == [code for code in codes if code >= 0]
  manifest = id_folder.describe("ids")
  assert manifest["codec_fingerprint"] == codec.fingerprint
  assert manifest["data"]["num_vectors"] == N
  assert set(manifest["files"]) == {
    *("index.json", "id_to_items.json", "ids.npy", "ids.parquet"),
    *("report.json", "report.png"),
  }


def test_the_command_goes_on_or_refuses(files, caplog):
  caplog.set_level("INFO")
  first = _run(output="ids")
  assert "collision rate" in caplog.text
  assert _run(output="ids") == first
  assert "is made already" in caplog.text
  with pytest.raises(FileExistsError, match="resolve=nearest, now it is token"):
    _run(output="ids", resolve="token")
  _run(output="ids", resolve="token", overwrite=True)
  (files / "other").mkdir()
  with pytest.raises(FileExistsError, match="is no semantic ids"):
    _run(output="other", overwrite=True)
  new = np.random.default_rng(5).normal(size=(9, D)).astype("f4")
  np.save("new.npy", new)
  append = {"codec": "codec", "data": "new.npy", "append": "ids"}
  command.run(**append, output="more")
  command.run(**append, output="more")
  assert caplog.text.count("is made already") == 2
  for options, word in (
    ({"output": "ids"}, "another folder"),
    ({"output": "b", "resolve": "none"}, "leave --resolve out"),
    ({"output": "b", "beam_size": 2}, "leave --beam_size out"),
  ):
    with pytest.raises(ValueError, match=word):
      command.run(**append, **options)


def test_the_command_reports_on_ids_of_other_programs(files, caplog):
  caplog.set_level("INFO")
  _run(output="ids")
  wanted = vqjax.load_ids("ids").report["after"]
  (files / "a.json").write_text((files / "ids" / "index.json").read_text())
  found = command.run(
    report="a.json", data="x.npy", codebook_sizes=f"{K},{K},{K}", output="r"
  )["after"]
  assert found == {name: wanted[name] for name in found}
  assert (files / "r" / "report.png").exists()
  np.save("codes.npy", vqjax.load_ids("ids").codes)
  for source in ("ids", "codes.npy"):
    assert command.run(report=source)["after"]["distinct"] == N - 2
  for options, word in (
    ({"report": "a.json", "codec": "codec"}, "leave --codec out"),
    ({"report": "a.json", "codebook_sizes": "5,5,2"}, "at least 5,5,5"),
    ({"report": "a.json", "codebook_sizes": "5,x"}, "whole numbers"),
  ):
    with pytest.raises(ValueError, match=word):
      command.run(**options)
  with pytest.raises(FileNotFoundError, match="no file or folder none"):
    command.run(report="none")


@pytest.mark.parametrize(
  ("options", "word"),
  [
    ({"resolve": "best"}, "resolve must be one of nearest.*'best'"),
    ({"capacity": 0}, "capacity must lie between 1.*got 0"),
    ({"sk_epsilon": -1.0}, "sk_epsilon must be above 0, got -1"),
    ({"token_for": "none"}, "token_for must be one of"),
    ({"resolve": "token", "separate_duplicates": "backtrack"}, "take 'token'"),
    ({"ids": [1] * N}, "ids must differ, but 1 is in rows 0 and 1"),
    ({"ids": [1, 2]}, r"ids must have shape \(60,\).*got \(2,\)"),
  ],
)
def test_settings_that_do_not_fit_are_named(codec, x, options, word):
  with pytest.raises(ValueError, match=word):
    vqjax.make_ids(codec, x, **options)


def test_vectors_that_do_not_fit_are_named(codec, x):
  bad = x.copy()
  bad[[4, 9], 1] = np.nan
  with pytest.raises(ValueError, match=r"2 of 60 rows, first in row 4, 9"):
    vqjax.make_ids(codec, bad)
  with pytest.raises(ValueError, match=r"\(None, 6\), got \(60, 4\)"):
    vqjax.make_ids(codec, x[:, :4])
  with pytest.raises(ValueError, match="no items"):
    vqjax.make_ids(codec, x[:0])
  with pytest.raises(TypeError, match="integers or text, got float"):
    vqjax.make_ids(codec, x, np.ones(N))
  one = vqjax.make_ids(codec, x[:1])
  assert one.report["after"]["collision_rate"] == 0
  long = Codec("rq", RQParams(jnp.ones((27, 2, 1), jnp.float32)))
  with pytest.raises(ValueError, match="at most 26 tokens.*got 27: 27 codes"):
    vqjax.make_ids(long, np.ones((3, 1), "f4"))


def test_a_folder_that_is_damaged_is_refused(codec, x, tmp_path):
  with pytest.raises(FileNotFoundError, match="no folder of semantic ids"):
    vqjax.load_ids(tmp_path)
  vqjax.make_ids(codec, x).save(tmp_path / "a")
  with pytest.raises(FileExistsError, match="exists already"):
    vqjax.make_ids(codec, x).save(tmp_path / "a")
  path = tmp_path / "a" / "ids.npy"
  path.write_bytes(path.read_bytes()[:-1] + b"x")
  with pytest.raises(ValueError, match="ids.npy is damaged"):
    vqjax.load_ids(tmp_path / "a")


def test_without_pyarrow_one_line_says_so(files, monkeypatch, caplog):
  caplog.set_level("INFO")
  monkeypatch.setattr(id_folder, "has_parquet", lambda: False)
  _run(output="ids", ids=None)
  assert "ids.parquet is left out" in caplog.text
  assert not (files / "ids" / "ids.parquet").exists()
  assert semantic_ids.load_ids("ids").codes.shape == (N, 3)
