"""The command fast_ivf: an index, points beside those of faiss, a picture."""

import json

import faiss
import numpy as np
import pytest

from experiments import fast_ivf
from experiments.lib import fast_ivf_kinds, search_measure, search_record
from vqjax.fast_ivf import CompressedFastIVF, FastIVF, FastIVFPQ, memory
from vqjax.interop import faiss_fast_baselines

NUM, DIM = 400, 8


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  rng = np.random.default_rng(0)
  folder = tmp_path_factory.mktemp("vectors")
  centres = rng.normal(size=(8, DIM))
  x = centres[rng.integers(8, size=NUM)] + rng.normal(size=(NUM, DIM))
  np.save(folder / "base.npy", x.astype(np.float32))
  np.save(
    folder / "query.npy",
    (x[:30] + rng.normal(size=(30, DIM))).astype(np.float32),
  )
  return {"data": folder / "base.npy", "queries": folder / "query.npy"}


@pytest.fixture(scope="module", autouse=True)
def _short_rounds():
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(search_measure, "_MIN_SECONDS", 0)
    yield


@pytest.fixture(scope="module")
def flat(paths, tmp_path_factory):
  output = tmp_path_factory.mktemp("flat") / "lists"
  options = {**paths, "output": output, "nlist": 4, "rounds": 1, "single": True}
  return options, fast_ivf.run(**options)


def _points(made, series):
  return {
    p["setting"]["nprobe"]: p for p in made["points"] if p["series"] == series
  }


def test_recall_is_that_of_numpy_and_of_faiss_on_the_same_lists(paths, flat):
  options, made = flat
  index = FastIVF.load(options["output"] / "index")
  assert index.nlist == 4
  assert len(index) == NUM
  x, xq = np.load(paths["data"]), np.load(paths["queries"])
  unit = lambda v: v / np.linalg.norm(v, axis=1, keepdims=True)
  true = np.argsort(-unit(xq) @ unit(x).T, axis=1)[:, :10]
  ours, theirs = _points(made, "FastIVF"), _points(made, "IVFFlat")
  assert list(ours) == list(theirs) == [1, 2, 4]
  for nprobe in ours:
    index.nprobe = nprobe
    _, ids = index.search(xq, k=10)
    want = np.mean(
      [len({*a} & {*b}) / 10 for a, b in zip(true, ids, strict=True)]
    )
    assert ours[nprobe]["recall"]["knn_recall@10"] == pytest.approx(want)
    assert ours[nprobe]["recall"] == theirs[nprobe]["recall"]
  assert ours[4]["recall"]["knn_recall@10"] == 1


def test_the_record_has_bytes_and_times_of_all_series(flat):
  options, made = flat
  names = {"FastIVF", "IVFFlat", "IVFPQfs+RFlat"}
  assert {row["series"] for row in made["latency"]} == names
  of = made["header"]["memory"]
  assert set(of) == names
  for name in names:  # Vectors, an id, centroids.
    assert of[name]["ram_per_vector"] > 4 * DIM + 4
    assert of[name]["disk_per_vector"] >= 4 * DIM + 8
  file = options["output"] / "search.json"
  assert json.loads(file.read_text())["points"] == made["points"]
  assert file.with_suffix(".png").stat().st_size > 10_000


def test_the_same_command_finds_all_made_and_more_points_are_added(
  flat, monkeypatch
):
  options, made = flat
  refuse = lambda *_: pytest.fail("Work was done again.")
  with monkeypatch.context() as patch:
    patch.setattr(FastIVF, "train", refuse)
    patch.setattr(fast_ivf.evaluation, "open_truth", refuse)
    assert fast_ivf.run(**options)["points"] == made["points"]
  monkeypatch.setattr(FastIVF, "train", refuse)
  more = fast_ivf.run(**options, nprobe="2,3", baselines="")
  assert more["points"][:-1] == made["points"]
  assert more["points"][-1]["setting"] == {"nprobe": 3, "ratio_threshold": 0}
  with pytest.raises(ValueError, match="measured with settings.*--overwrite"):
    fast_ivf.run(**options | {"nlist": 5})


def test_a_run_that_was_stopped_goes_on_with_its_index(
  paths, tmp_path, monkeypatch
):
  monkeypatch.setattr(search_record.Record, "draw", lambda _: None)
  options = {**paths, "output": tmp_path / "lists", "nlist": 4, "nprobe": 2}
  with monkeypatch.context() as patch:
    patch.setattr(fast_ivf, "_explore", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
      fast_ivf.run(**options)
  monkeypatch.setattr(FastIVF, "train", lambda *_: pytest.fail("Again."))
  assert len(fast_ivf.run(**options)["points"]) == 4  # PQ has two.
  (tmp_path / "lists/search.json").unlink()
  with pytest.raises(FileExistsError, match="search.json beside it.*overwrite"):
    fast_ivf.run(**options)


def test_codes_of_faiss_and_ours(paths, tmp_path, monkeypatch):
  monkeypatch.setattr(search_record.Record, "draw", lambda _: None)
  made = fast_ivf.run(
    **paths, output=tmp_path / "codes", kind="pq", metric="ip", nlist=4,
    nprobe=16, num_candidates="10,400", baselines="ivfpqfs+rflat,IVFPQ+RFlat",
  )  # fmt: skip
  best = [
    p for p in made["points"] if p["setting"].get("num_candidates") == 400
  ]
  assert len(best) == 3
  for point in best:  # All lists, all vectors scored.
    assert point["recall"]["knn_recall@10"] == 1
  assert made["header"]["settings"]["engine"] == "fastscan"
  index = FastIVFPQ.load(tmp_path / "codes/index")
  found = memory.footprint_of(index, tmp_path / "codes/index")
  # A vector, two codes in a byte, an id in the lists and one of the codes.
  assert found.each == pytest.approx(4 * DIM + 1 + 4 + 8)
  stored = faiss.read_index(str(tmp_path / "codes/index/index.faiss"))
  assert stored.ntotal == NUM


def test_short_vectors_are_counted_as_codes(paths, tmp_path):
  index = CompressedFastIVF(
    DIM, 4, 2, compressor_steps_per_epoch=10, compressor_epochs=1, verbose=False
  )
  index.train(paths["data"])
  index.save(tmp_path / "short")
  index = CompressedFastIVF.load(tmp_path / "short")
  found = memory.footprint_of(index, tmp_path / "short")
  room = len(index._lists.ids_N) / NUM
  assert found.of("codes") == pytest.approx(4 * 2 * room)
  assert found.of("ids") == pytest.approx((4 + 8) * room)  # 8: a slot.
  want = index.bytes_per_vector["ram"]
  assert found.ram_per_vector == pytest.approx(want, rel=0.02)


@pytest.mark.parametrize(
  ("values", "what"),
  [
    ({"kind": "flaat"}, "--kind must be one of flat, pq, compressed; got 'fl"),
    ({"nlist": 401}, "--nlist must lie between 1 and 400.*got 401"),
    ({"baselines": "HNSW"}, "may name IVFFlat.*got HNSW"),
    ({"metric": "dot"}, "metric must be one of.*got 'dot'"),
    ({"k": 500}, "--k must lie between 1 and 400.*got 500"),
    ({"nprobe": "2,x"}, "--nprobe must be numbers.*got '2,x'"),
    ({"ratio_threshold": "2"}, "--ratio_threshold must be.*got '2'"),
    ({"kind": "pq", "pq_num_subvectors": 3}, "must divide the 8.*got 3"),
    (
      {"kind": "pq", "pq_num_centroids": 500},
      "--pq_num_centroids must.*1 and 400, got 500",
    ),
  ],
)
def test_wrong_flags_are_refused_before_any_work(
  paths, values, what, tmp_path, monkeypatch
):
  monkeypatch.setattr(FastIVF, "train", lambda *_: pytest.fail("Work began."))
  with pytest.raises(ValueError, match=what):
    fast_ivf.run(**paths, output=tmp_path / "lists", **values)
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  ("rows", "what"),
  [
    (np.ones((3, 5)), "one dimension.*queries .*has 5"),
    (np.full((3, DIM), np.nan), "bad.npy.*row 0"),
    (np.zeros((3, DIM)), "bad.npy.*row 0.*zeros, which has no cosine"),
  ],
)
def test_wrong_queries_are_refused_before_any_work(paths, rows, what, tmp_path):
  np.save(tmp_path / "bad.npy", rows.astype(np.float32))
  output = tmp_path / "lists"
  with pytest.raises(ValueError, match=what):
    fast_ivf.run(
      data=paths["data"], queries=tmp_path / "bad.npy", output=output
    )
  assert not output.exists()


def test_lists_follow_from_the_number_of_vectors():
  config = fast_ivf.cli.get_config(fast_ivf.OPTIONS)
  for num, want in [(1, 1), (50, 6), (3000, 128), (10**6, 4096)]:
    kind = fast_ivf_kinds.get("flat")
    found = fast_ivf_kinds.settings(config, kind, num, 12)
    assert found["nlist"] == want


def test_baselines_need_vectors_for_their_codewords():
  x = np.ones((9, 8), np.float32)
  with pytest.raises(ValueError, match="fs.RFlat needs 16 vectors.*got 9"):
    faiss_fast_baselines.fit("IVFPQfs+RFlat", x[:1], x, "ip", 2)
  with pytest.raises(ValueError, match="must be one of.*'IVF'"):
    faiss_fast_baselines.fit("IVF", x[:1], x, "ip", 2)
