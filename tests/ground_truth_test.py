"""True neighbours: exact, ties to the lower row, the same however cut."""

import numpy as np
import pytest

from experiments import ground_truth as command
from vqjax import ground_truth

NUM, DIM, K = 700, 5, 9


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
  monkeypatch.setattr(ground_truth, "_BLOCK", 256)
  monkeypatch.setattr(ground_truth, "_SPARE", 3)


def _vectors(seed: int, num: int, *, has_ties: bool = True):
  """Small integers: many distances are equal, and some vectors."""
  rng = np.random.default_rng(seed)
  if has_ties:
    return rng.integers(0, 3, (num, DIM)).astype(np.float32)
  return rng.normal(size=(num, DIM)).astype(np.float32)


def _unit(x_ND):
  return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-9)


def _want(xq_QD, xb_ND, metric):
  """By loops: sorted by error and row."""
  found = []
  for q_D in xq_QD.astype(float):
    if metric == "l2":
      error_N = [((q_D - x_D) ** 2).sum() for x_D in xb_ND.astype(float)]
    else:
      error_N = [-(q_D * x_D).sum() for x_D in xb_ND.astype(float)]
    found.append(sorted(range(len(xb_ND)), key=lambda i: (error_N[i], i))[:K])
  return np.array(found)


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("has_ties", [True, False])
def test_the_nearest_and_of_equal_ones_the_lower_row(metric, has_ties):
  xb_ND = _vectors(0, NUM, has_ties=has_ties)
  xq_QD = _vectors(1, 11, has_ties=has_ties)
  want = _want(xq_QD, xb_ND, metric)
  whole = ground_truth.search(xq_QD, xb_ND, K, metric)
  np.testing.assert_array_equal(whole.ids_QK, want)
  for cuts in ([0, 1, 256, 300, NUM], [0, 5, NUM]):
    rows = [range(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    parts = [ground_truth.search(xq_QD, xb_ND, K, metric, rows=r) for r in rows]
    merged = ground_truth.merge(parts[::-1], K)
    np.testing.assert_array_equal(merged.ids_QK, whole.ids_QK)
    np.testing.assert_array_equal(merged.error_QK, whole.error_QK)


def test_vectors_far_from_the_origin():
  far = np.float32(3000)
  xb_ND, xq_QD = _vectors(0, NUM, has_ties=False), _vectors(1, 11)
  want = _want(xq_QD + far, xb_ND + far, "l2")
  found = ground_truth.search(xq_QD + far, xb_ND + far, K)
  np.testing.assert_array_equal(found.ids_QK, want)


def test_vectors_that_float32_cannot_tell_apart():
  """Their squared distances, 1e4, differ by less than 1e-3."""
  xb_ND = np.zeros((200, DIM), np.float32)
  xb_ND[:, 0], xb_ND[:, 1] = 100, np.linspace(0.03, 0.001, 200)
  found = ground_truth.search(np.zeros((2, DIM), np.float32), xb_ND, K)
  assert (found.ids_QK == np.arange(199, 199 - K, -1)).all()


def test_fewer_vectors_than_neighbours():
  found = ground_truth.search(_vectors(1, 2), _vectors(0, 3), K)
  assert (np.sort(found.ids_QK[:, :3]) == [0, 1, 2]).all()
  assert (found.ids_QK[:, 3:] == -1).all()
  assert np.isinf(found.error_QK[:, 3:]).all()
  with pytest.raises(ValueError, match="at least 1 part"):
    ground_truth.merge([], K)


@pytest.fixture
def given(tmp_path):
  np.save(tmp_path / "xb.npy", 1 + _vectors(0, NUM))
  np.save(tmp_path / "xq.npy", 1 + _vectors(1, 11))
  paths = {
    "data": str(tmp_path / "xb.npy"),
    "queries": str(tmp_path / "xq.npy"),
  }
  return {**paths, "metric": "cosine", "k": K}


def test_shards_give_the_file_of_one_process(given, tmp_path):
  one, other = str(tmp_path / "one.ivecs"), str(tmp_path / "other.ivecs")
  assert command.run(**given, output=one)["shape"] == (11, K)
  for shard in ("2/3", "0/3"):
    found = command.run(**given, output=other, shard=shard)
    assert found["output"].endswith(f"part-0000{shard[0]}-of-00003.npz")
  path = tmp_path / "other.ivecs.parts" / "part-00000-of-00003.npz"
  path.write_bytes(path.read_bytes()[:-1] + b"!")  # It is made again.
  note = path.with_name("note.txt")
  note.touch()  # Not ours: it stays.
  command.run(**given, output=other, shards=3)
  files = [tmp_path / f"{name}.ivecs" for name in ("one", "other")]
  assert files[0].read_bytes() == files[1].read_bytes()
  assert list(path.parent.iterdir()) == [note]
  times = (tmp_path / "other.ivecs").stat().st_mtime_ns
  command.run(**given, output=other, shard="1/3")  # All is done.
  assert (tmp_path / "other.ivecs").stat().st_mtime_ns == times


def test_another_process_may_have_merged_first(given, tmp_path, monkeypatch):
  output, read = str(tmp_path / "truth.npy"), command._read

  def late(path):
    monkeypatch.setattr(command, "_read", read)
    command.run(**given, output=output, shards=3)  # And removes the parts.
    return read(path)

  monkeypatch.setattr(command, "_read", late)
  assert command.run(**given, output=output, shards=3)["shape"] == (11, K)
  assert np.load(output).shape == (11, K)


def test_parts_of_another_search_are_refused(given, tmp_path):
  output = str(tmp_path / "truth.npy")
  command.run(**given, output=output, shard="0/3")
  with pytest.raises(ValueError, match="parts of something else: remove"):
    command.run(**{**given, "k": 3}, output=output, shards=3)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"output": "x.txt"}, "--output must end in .npy, .ivecs, .ibin; got"),
    ({"k": NUM + 1}, "--k must lie between 1 and 700, got 701"),
    ({"shards": NUM + 1}, "number of shards must lie between 1 and 700"),
    ({"shard": "3/3"}, "--shard must lie between 0/3 and 2/3"),
    ({"metric": "hamming"}, "metric must be one of"),
    ({"workers": 2}, "--workers is for --engine=ray"),
    ({"engine": "slurm"}, "--engine must be ray; got 'slurm'"),
    ({"engine": "ray"}, "give --shards=n, some for each worker"),
  ],
)
def test_refusals_before_any_work(values, message, given, tmp_path):
  given["output"] = str(tmp_path / "truth.npy")
  with pytest.raises(ValueError, match=message):
    command.run(**{**given, **values})
  assert not list(tmp_path.glob("truth*"))
