"""The HAKES command and its index file, the way a user calls them."""

import json
import pathlib
import shutil

import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import hakes as config_file
from experiments import hakes
from experiments.lib import hakes_data, hakes_stages
from tests import commands
from vqjax.codecs import hakes as codec
from vqjax.interop import faiss_hakes, faiss_io, hakes_files
from vqjax.training import hakes_learner

ROOT = pathlib.Path(__file__).parents[1]
TEXT = ROOT / "third_party" / "sample_text"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "hakes"
  return folder, hakes.run(config_file.get_config("smoke"), folder)


def _base(n=2000):
  return np.load(TEXT / "base.npy")[:n].astype(np.float32)


def _queries(n=50):
  return np.load(TEXT / "query.npy")[:n].astype(np.float32)


def _sides(folder):
  return [
    hakes_files.load(folder / name).side
    for name in ("findex.bin", "uindex.bin")
  ]


def test_smoke_writes_all_and_does_it_once(smoke):
  folder, result = smoke
  for _, output in hakes.STAGES.values():
    assert (folder / output).exists()
  assert (folder / "operating_points.png").exists()
  assert set(result["points"]) == {"base", "learned"}
  ram = result["memory"]["base, learned"]["ram"]
  num = result["num_base"]
  assert ram["ids"] == 8 * num
  assert ram["vectors"] in (4 * num * 128, 4 * num * 384, 2 * num * 384)
  stamps = {p: p.stat().st_mtime_ns for p in folder.glob("*.*")}
  assert hakes.run(config_file.get_config("smoke"), folder) == result
  assert stamps == {p: p.stat().st_mtime_ns for p in folder.glob("*.*")}


def test_learning_lowers_the_divergence(smoke):
  folder, _ = smoke
  config = config_file.get_config("smoke")
  data = hakes_data.open_data(config)
  start = hakes_stages._start(folder)
  with np.load(folder / "samples.npz") as file:
    x_ND, near_NG = file["queries"], file["neighbours"]
  table = hakes_stages._look_up(start.base, data, x_ND, near_NG)
  old, new = _sides(folder)
  ours = start.replace(query=jax.tree.map(jnp.asarray, new))
  kl = lambda params: hakes_learner.validation(
    params, table, slice(256, 320), {}
  )
  before, after = kl(start), kl(ours)
  assert after["coded_kl"] < 0.95 * before["coded_kl"]
  assert after["reduced_kl"] < 0.97 * before["reduced_kl"]
  rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
  held_out = [row["validation_kl"] for row in rows if "epoch" in row]
  assert after["coded_kl"] == pytest.approx(min(held_out), rel=1e-4)
  assert not np.array_equal(old.centroids_LE, new.centroids_LE)


def test_samples_are_neighbours_without_the_query_itself(smoke):
  folder, _ = smoke
  with np.load(folder / "samples.npz") as file:
    x_ND, near_NG = file["queries"][:40], file["neighbours"][:40]
  base_ND = _base()
  for x, near_G in zip(x_ND, near_NG, strict=True):
    scores = base_ND @ x
    itself = np.flatnonzero((base_ND == x).all(axis=1))
    scores[itself] = -np.inf
    np.testing.assert_allclose(
      scores[near_G], np.sort(scores)[::-1][: len(near_G)], rtol=1e-5
    )


def _search_by_hand(folder, x_QD, base_ND, k, num_probes, factor):
  """Lists, codes, words and refinement in numpy, by the files' parameters."""
  old, new = _sides(folder)
  lists_N = np.asarray(codec.assign(old, base_ND, "ip"))
  codes_NM = np.asarray(codec.encode(old, base_ND))
  words_NE = np.concatenate(
    [book_KS[codes_NM[:, m]] for m, book_KS in enumerate(new.codebooks_MKS)],
    axis=1,
  )
  found = []
  for x in x_QD:
    r = new.reduction_ED @ x + new.bias_E
    probed = np.argsort(-new.centroids_LE @ r)[:num_probes]
    ids = np.flatnonzero(np.isin(lists_N, probed))
    ids = ids[np.argsort(-words_NE[ids] @ r)][: k * factor]
    found.append(ids[np.argsort(-base_ND[ids] @ x)][:k])
  return found


def test_stock_faiss_searches_by_the_learned_side(smoke):
  folder, _ = smoke
  base_ND, x_QD = _base(), _queries()
  index = faiss.read_index(str(folder / "index.faiss"))
  inner = faiss.SearchParametersPreTransform(
    index_params=faiss.SearchParametersIVF(nprobe=4)
  )
  params = faiss.IndexRefineSearchParameters(
    k_factor=8, base_index_params=inner
  )
  _, ids_QR = index.search(x_QD, 5, params=params)
  want = _search_by_hand(folder, x_QD, base_ND, 5, 4, 8)
  # Fast scan rounds its tables to 8 bits: few candidates change places.
  same = np.mean(
    [np.isin(a, b).mean() for a, b in zip(ids_QR, want, strict=True)]
  )
  assert same > 0.97


def test_vectors_are_added_by_the_base_side(smoke):
  folder, _ = smoke
  base_ND, (old, new) = _base(600), _sides(folder)
  at_once = faiss_hakes.make_index(old, "ip")
  faiss_hakes.add(at_once, old, [base_ND])
  faiss_hakes.set_side(at_once, new)
  later = faiss_hakes.make_index(old, "ip")
  faiss_hakes.add(later, old, [base_ND[:250]])
  faiss_hakes.set_side(later, new)
  faiss_hakes.add(later, old, [base_ND[250:400], base_ND[400:]])
  knobs = dict(num_probes=3, refine_factor=4)
  ids = [
    faiss_hakes.search(index, _queries(), 5, **knobs)
    for index in (at_once, later)
  ]
  np.testing.assert_array_equal(*ids)
  # By the learned side they would have gone elsewhere.
  wrong = faiss_hakes.make_index(old, "ip")
  faiss_hakes.add(wrong, new, [base_ND])
  faiss_hakes.set_side(wrong, new)
  other = faiss_hakes.search(wrong, _queries(), 5, **knobs)
  assert (other != ids[0]).any()


@pytest.mark.parametrize("metric", ["ip", "l2"])
@pytest.mark.parametrize("store", faiss_hakes.STORES)
def test_an_index_that_looks_everywhere_is_exact(metric, store, tmp_path):
  x_ND = np.random.default_rng(0).normal(size=(400, 12)).astype(np.float32)
  side = faiss_hakes.fit_base(
    x_ND, reduced_dim=8, num_codes=4, num_lists=6, metric=metric,
    opq_iterations=3, kmeans_iterations=4,
  )  # fmt: skip
  index = faiss_hakes.make_index(side, metric, store=store, sample_ND=x_ND)
  faiss_hakes.add(index, side, [x_ND[:150], x_ND[150:]])
  faiss_hakes.save(index, tmp_path / "x.faiss")
  index = faiss_hakes.load(tmp_path / "x.faiss")
  got = faiss_hakes.side_of(index)
  np.testing.assert_array_equal(got.codebooks_MKS, side.codebooks_MKS)
  ids_QR = faiss_hakes.search(
    index, x_ND[:30], 10, num_probes=6, refine_factor=40
  )
  _, want = faiss_io.knn(x_ND[:30], x_ND, 10, metric)
  overlap = np.mean(
    [np.isin(a, b).mean() for a, b in zip(ids_QR, want, strict=True)]
  )
  assert overlap >= (0.95 if store == "sq8" else 0.995)


def test_bad_indexes_are_refused(tmp_path, smoke):
  folder, _ = smoke
  (old, _), x_ND = _sides(folder), _base(300)
  with pytest.raises(ValueError, match="store .* got 'int4'"):
    faiss_hakes.make_index(old, "ip", store="int4")
  with pytest.raises(ValueError, match="no index 'Nothing'"):
    faiss_hakes.fit_factory("Nothing", x_ND, "ip")
  with pytest.raises(ValueError, match="Flat must refine .* got IndexFlat"):
    faiss_hakes.fit_factory("Flat", x_ND, "ip")
  index = faiss_hakes.make_index(old, "ip")
  fewer = old.replace(centroids_LE=old.centroids_LE[:3])
  with pytest.raises(ValueError, match=r"16\), the parameters .* 3\)"):
    faiss_hakes.set_side(index, fewer)
  whole = (folder / "index.faiss").read_bytes()
  (tmp_path / "cut.faiss").write_bytes(whole[: len(whole) // 2])
  with pytest.raises(ValueError, match="cut.faiss is no index file"):
    faiss_hakes.load(tmp_path / "cut.faiss")
  with pytest.raises(ValueError, match="divide the 8 reduced dimensions"):
    faiss_hakes.fit_base(x_ND, reduced_dim=8, num_codes=3, num_lists=4)


def test_own_raw_files_queries_and_cosine(tmp_path):
  rng = np.random.default_rng(0)
  length_N1 = rng.uniform(0.5, 2, (900, 1)).astype(np.float32)
  base_ND = _base(900)
  (base_ND * length_N1).tofile(tmp_path / "train.bin")
  queries_ND = np.load(TEXT / "query.npy")[50:350].astype(np.float32)
  queries_ND.tofile(tmp_path / "queries.bin")
  near_NG = np.argsort(-queries_ND @ base_ND.T, axis=1)[:, :20]
  near_NG.astype("<i4").tofile(tmp_path / "neighbors.bin")
  config = config_file.get_config("smoke")
  config.data.update(
    base=str(tmp_path / "train.bin"),
    train_queries=str(tmp_path / "queries.bin"),
    train_neighbours=str(tmp_path / "neighbors.bin"),
    metric="cosine",
    dim=384,
  )
  config.train.update(num_epochs=1)
  config.samples.num_validation = 30
  data = hakes_data.open_data(config)
  np.testing.assert_allclose(hakes_data.read_all(data.base), base_ND, atol=1e-3)
  # Measured on the held-out training queries.
  result = hakes.run(config, tmp_path / "run")
  assert (result["num_queries"], result["metric"]) == (30, "cosine")
  assert max(p["recall"] for p in result["points"]["learned"]) > 0.3


def test_base_parameters_are_taken_over(smoke, tmp_path):
  folder, _ = smoke
  config = config_file.get_config("smoke")
  config.base.path = str(folder / "findex.bin")
  hakes.run(config, tmp_path / "run", stage="base")
  assert (tmp_path / "run" / "findex.bin").read_bytes() == (
    folder / "findex.bin"
  ).read_bytes()
  assert not (tmp_path / "run" / "samples.npz").exists()


@pytest.mark.parametrize("rule", ["mean of base", "mean of queries", "learned"])
def test_rules_for_the_centroids(smoke, rule, tmp_path):
  folder, _ = smoke
  config = config_file.get_config("smoke")
  for name in ("findex.bin", "samples.npz", "learned.bin"):
    (tmp_path / name).write_bytes((folder / name).read_bytes())
  config.centroids.rule = rule.split()[0]
  config.centroids.sample = 0.0 if rule.endswith("queries") else 1.0
  hakes.run(config, tmp_path, stage="centroids")
  new = hakes_files.load(tmp_path / "uindex.bin").side
  learned = hakes_files.load(tmp_path / "learned.bin").side
  if rule == "learned":
    np.testing.assert_array_equal(new.centroids_LE, learned.centroids_LE)
    return
  np.testing.assert_allclose(
    np.linalg.norm(new.centroids_LE, axis=1), 1, rtol=1e-5
  )
  np.testing.assert_array_equal(new.reduction_ED, learned.reduction_ED)
  assert not np.allclose(new.centroids_LE, learned.centroids_LE, atol=1e-2)


def test_itself_is_dropped_from_the_neighbours():
  near_NG = np.array([[4, 1, 2], [5, 6, 7]])
  got = hakes_stages._without_itself(near_NG, np.array([1, 9]))
  np.testing.assert_array_equal(got, [[4, 2], [5, 6]])


def test_mistakes_get_a_sentence(smoke, tmp_path):
  folder, _ = smoke
  run = lambda config, **kw: hakes.run(config, tmp_path / "new", **kw)
  config = config_file.get_config("smoke")
  with pytest.raises(ValueError, match="--stage must be one of .* got 'train'"):
    run(config, stage="train")
  with pytest.raises(
    ValueError, match="learn needs .*findex.bin; run --stage=base"
  ):
    run(config, stage="learn")
  config.train.reduction_lr = 0.5
  with pytest.raises(ValueError, match="--config.train.reduction_lr was 0.001"):
    hakes.run(config, folder)
  config = config_file.get_config("smoke")
  config.data.metric = "hamming"
  with pytest.raises(ValueError, match="data.metric .* got 'hamming'"):
    run(config)
  config.data.update(metric="ip", queries=str(TEXT / "query.npy"))
  with pytest.raises(ValueError, match="need data.base"):
    run(config)
  sift = ROOT / "third_party" / "sample_sift" / "query.bvecs"
  config.data.update(base=str(TEXT / "base.npy"), queries=str(sift))
  with pytest.raises(ValueError, match="384 dimensions of data.base, got 128"):
    run(config)
  with pytest.raises(ValueError, match="Unknown argument 'bigann'"):
    config_file.get_config("bigann")


def test_evaluate_again_with_another_grid(smoke):
  folder, result = smoke
  config = config_file.get_config("smoke")
  config.evaluate.update(num_probes=(16,), refine_factors=(50.0,))
  again = hakes.run(config, folder)
  assert [p["num_probes"] for p in again["points"]["base"]] == [16]
  assert again["points"]["base"][0]["recall"] > 0.9
  assert again != result


def test_a_run_knows_its_vectors_not_their_names(tmp_path):
  config = config_file.get_config("smoke")
  files = {"base": "b.npy", "queries": "q.npy"}
  np.save(tmp_path / "b.npy", _base(500))
  np.save(tmp_path / "q.npy", _queries())
  config.data.update({k: str(tmp_path / v) for k, v in files.items()})
  config.data.update(metric="ip", num_base=None, num_queries=None)
  folder = tmp_path / "run"
  hakes.run(config, folder, stage="base")
  (folder / "evaluation.json").write_text("{}")
  for name in files.values():  # Moved.
    (tmp_path / name).rename(tmp_path / f"moved_{name}")
  config.data.update(
    {k: str(tmp_path / f"moved_{v}") for k, v in files.items()}
  )
  hakes.run(config, folder, stage="base")
  assert (folder / "evaluation.json").exists()
  np.save(tmp_path / "moved_q.npy", _queries()[::-1])
  hakes.run(config, folder, stage="base")
  assert not (folder / "evaluation.json").exists()  # Of other queries.
  np.save(tmp_path / "moved_b.npy", _base(600)[100:])
  with pytest.raises(ValueError, match="what is in --config.data.base was"):
    hakes.run(config, folder, stage="base")


@pytest.mark.parametrize("damage", ["cut", "other", "none held out"])
def test_damaged_samples_say_what_to_do(smoke, tmp_path, damage):
  whole = (smoke[0] / "samples.npz").read_bytes()
  path = tmp_path / "samples.npz"
  if damage == "cut":
    path.write_bytes(whole[: len(whole) // 2])
  elif damage == "other":
    np.savez(path, x=np.zeros(3))
  else:
    np.savez(path, queries=[0], neighbours=[0], num_held_out=0)
  with pytest.raises(ValueError, match="Remove .*samples.npz, and the same"):
    hakes_stages.read_samples(tmp_path)


def test_a_damaged_evaluation_is_made_again(smoke, tmp_path):
  folder, _ = smoke
  shutil.copytree(folder, tmp_path / "copy")
  (tmp_path / "copy" / "evaluation.json").write_text("{")
  again = hakes.run(config_file.get_config("smoke"), tmp_path / "copy")
  assert set(again["points"]) == {"base", "learned"}


@pytest.mark.slow
def test_killed_and_run_again_equals_uninterrupted(tmp_path):
  whole, part = tmp_path / "whole", tmp_path / "part"
  command_fn = lambda folder: [
    "hakes", "--config=configs/hakes.py:smoke", "--config.train.num_epochs=40",
    "--config.train.batch_size=16", "--config.train.log_every=1",
    "--config.train.early_stop=1000", "--stage=learn",
    f"--workdir={folder}",
  ]  # fmt: skip
  for folder in (whole, part):
    config = config_file.get_config("smoke")
    config.train.update(num_epochs=40, batch_size=16, log_every=1)
    config.train.early_stop = 1000
    for stage in ("base", "samples"):
      hakes.run(config, folder, stage=stage)
  commands.run(*command_fn(whole))
  message = commands.stop_once(
    lambda: commands.has_metrics(part, 70), *command_fn(part)
  )
  assert message.count("Run the same command again to resume") == 1
  assert not (part / "learned.bin").exists()
  commands.run(*command_fn(part))
  learned = [(f / "learned.bin").read_bytes() for f in (whole, part)]
  assert learned[0] == learned[1]


@pytest.mark.parametrize(
  ("name", "change", "match"),
  [
    (
      "groundtruth",
      lambda ids: ids + 1,
      "gt.npy must .*counted from 1: subtra",
    ),
    ("groundtruth", lambda ids: ids[:, ::-1], "gt.npy must .*reverse each row"),
    (
      "train_neighbours",
      lambda ids: ids + 1,
      "tn.npy must .*counted from 1: s",
    ),
    (
      "train_neighbours",
      lambda ids: ids[::-1],
      "tn.npy must .*no metric in any",
    ),
  ],
)
def test_wrong_neighbours_are_refused_before_any_work(
  name, change, match, tmp_path
):
  base_ND, xq_QD = _base(900), _queries(40)
  ids_QG = (-(xq_QD @ base_ND.T)).argsort(axis=1)[:, :20]
  if name == "train_neighbours":  # An approximate search has missed one.
    ids_QG[:5] = np.roll(ids_QG[:5], -1, axis=1)
  ids_QG = ids_QG[:, :18]
  short = {"groundtruth": "gt", "train_neighbours": "tn"}
  paths = {"base": base_ND, "queries": xq_QD, "train_queries": xq_QD}
  config = config_file.get_config("smoke")
  for key, values in {**paths, name: np.ascontiguousarray(ids_QG)}.items():
    path = tmp_path / f"{short.get(key, key)}.npy"
    np.save(path, values)
    config.data[key] = str(path)
  config.data.metric = "ip"
  hakes_data.open_data(config)
  np.save(tmp_path / f"{short[name]}.npy", np.ascontiguousarray(change(ids_QG)))
  with pytest.raises(ValueError, match=match):
    hakes.run(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()
