import json
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import ivf_centroids
from experiments.lib import cli, two_level_start
from tests import oracles
from vqjax.codecs import kmeans, minibatch_training
from vqjax.fast_ivf import MiniBatchKMeans

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def data(tmp_path):
  """300 vectors of 6 dimensions around 12 points."""
  rng = np.random.default_rng(0)
  points = rng.normal(size=(12, 6))[rng.integers(12, size=300)]
  path = tmp_path / "x.npy"
  np.save(path, (points + rng.normal(size=(300, 6)) / 9).astype(np.float32))
  return str(path)


def _config(data, **values):
  output = str(pathlib.Path(data).parent / "centroids.npy")
  given = dict(data=data, num_centroids=9, num_iterations=4, output=output)
  return cli.get_config(ivf_centroids.OPTIONS, **{**given, **values})


def _checkpoint(config):
  return pathlib.Path(f"{config.output}.checkpoint.npz")


def _stop_after(monkeypatch, num_passes):
  """Interrupts the pass with this number, as a signal would."""
  done, pass_over = [], kmeans.pass_over

  def interrupted(*args, **kwargs):
    if len(done) == num_passes:
      raise KeyboardInterrupt
    done.append(0)
    return pass_over(*args, **kwargs)

  monkeypatch.setattr(kmeans, "pass_over", interrupted)


@pytest.mark.parametrize("block_size", [37, 65536])
def test_a_pass_matches_loops(block_size):
  rng = np.random.default_rng(1)
  x_ND = rng.normal(size=(120, 4)).astype(np.float32)
  # Nobody chooses the two far words.
  words_KD = np.concatenate([x_ND[:5], np.full((2, 4), 1e3, np.float32)])
  assign_fn = kmeans.make_assign_fn(words_KD)
  got = kmeans.pass_over(x_ND, words_KD, assign_fn, block_size=block_size)
  words, counts, objective = oracles.kmeans_step(x_ND, np.ones(120), words_KD)
  # Distances are float32, and the refilled words follow their order.
  np.testing.assert_allclose(got.words_KD, words, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(got.counts_K, counts)
  np.testing.assert_allclose(got.objectives[0], objective, rtol=1e-5)
  assert int(got.num_refilled) == 2


def test_a_pass_over_many_rows_sums_in_float64():
  x_ND = np.full((60_000, 1), 0.1, np.float32)
  zeros = lambda x_ND: (np.zeros(len(x_ND), np.int32), x_ND[:, 0])
  got = kmeans.pass_over(x_ND, x_ND[:1], zeros)
  # The mean of equal numbers is that number; in float32 it is off by 1e-4.
  np.testing.assert_array_equal(got.words_KD, x_ND[:1])


@pytest.mark.parametrize("total", [1, 7, 40, 99, 100])
def test_shares_are_in_proportion(total):
  sizes = np.array([50, 0, 1, 30, 19])
  got = two_level_start.shares(sizes, total)
  assert got.sum() == total
  assert (got <= sizes).all()
  assert (np.abs(got - total * sizes / 100) < 1).all()


def test_many_centroids_go_in_blocks_of_seconds(data, monkeypatch):
  assert ivf_centroids._block_size(1 << 20) == 8192
  sizes, make_fn = set(), kmeans.make_assign_fn

  def make_noting_fn(*args):
    assign_fn = make_fn(*args)
    return lambda x_ND: sizes.add(len(x_ND)) or assign_fn(x_ND)

  monkeypatch.setattr(kmeans, "make_assign_fn", make_noting_fn)
  monkeypatch.setattr(ivf_centroids, "_BLOCK_DISTANCES", 9 * 50 + 8)
  ivf_centroids.run(_config(data, start="random"))
  assert sizes == {50}


@pytest.mark.parametrize("start", ivf_centroids.STARTS)
def test_the_record_is_that_of_the_file(start, data):
  config = _config(data, start=start)
  record = ivf_centroids.run(config)
  words_KD, x_ND = np.load(config.output), np.load(data)
  assert words_KD.dtype == np.float32
  assert words_KD.shape == (9, 6)
  beside = pathlib.Path(f"{config.output}.json")
  assert json.loads(beside.read_text()) == record
  sq_NK = oracles.sq_distances(x_ND, words_KD)
  assert record["mean_squared_error"] == pytest.approx(
    sq_NK.min(axis=1).mean(), rel=1e-4
  )
  counts_K = np.bincount(sq_NK.argmin(axis=1), minlength=9)
  assert record["lists"]["smallest"] == counts_K.min()
  assert record["lists"]["largest"] == counts_K.max()
  assert record["lists"]["imbalance"] == pytest.approx(
    9 * ((counts_K / 300) ** 2).sum()
  )
  assert record["num_iterations"] == 4
  errors = record["mean_squared_errors"]
  assert (np.diff(errors) <= 1e-6).all()
  assert not _checkpoint(config).exists()


def test_two_levels_start_lower_than_random(data):
  errors = {
    start: ivf_centroids.run(
      _config(
        data, start=start, num_centroids=36, num_iterations=0, overwrite=True
      )
    )["mean_squared_error"]
    for start in ivf_centroids.STARTS
  }
  assert errors["two-level"] < 0.8 * errors["random"]


def test_as_many_centroids_as_vectors_are_the_vectors(data):
  config = _config(data, num_vectors=30, num_centroids=30, num_iterations=9)
  assert ivf_centroids.run(config)["mean_squared_error"] < 1e-6


@pytest.mark.parametrize("num_passes", [0, 3])
def test_stopped_and_resumed_equals_uninterrupted(
  num_passes, data, monkeypatch
):
  whole = _config(data, output=data + ".whole.npy")
  want = ivf_centroids.run(whole)
  config = _config(data)
  with monkeypatch.context() as patch:
    _stop_after(patch, num_passes)
    with pytest.raises(KeyboardInterrupt):
      ivf_centroids.run(config)
  assert not pathlib.Path(config.output).exists()
  with np.load(_checkpoint(config)) as file:
    assert len(file["errors"]) == num_passes
  record = ivf_centroids.run(config)
  assert pathlib.Path(config.output).read_bytes() == (
    pathlib.Path(whole.output).read_bytes()
  )
  assert {**record, "seconds": 0} == {**want, "seconds": 0}
  assert not _checkpoint(config).exists()
  assert ivf_centroids.run(config) == record  # It is made already.
  with pytest.raises(
    FileExistsError, match="was made with seed=0, now it is 1"
  ):
    ivf_centroids.run(_config(data, seed=1))


MINIBATCH = dict(minibatch=True, batch_size=32, max_steps=40)


def test_minibatch_steps_are_those_of_the_class(data, tmp_path):
  config = _config(data, **MINIBATCH, num_iterations=None)
  record = ivf_centroids.run(config)
  words_KD = np.load(config.output)
  ours = MiniBatchKMeans(
    9, 32, max_steps=40, metric="l2", closing_passes=1, verbose=False
  )
  history = ours.train(np.load(data))
  np.testing.assert_allclose(words_KD, ours.centroids, atol=1e-6)
  assert record["num_steps"] == 40
  assert record["changed_labels"] == history[-1]
  assert (record["start"], record["num_iterations"]) == ("minibatch", 1)
  error = ours.predict_scores(np.load(data)).min(axis=1).mean()
  assert record["mean_squared_error"] == pytest.approx(error, rel=1e-4)
  assert ivf_centroids.run(config) == record
  with pytest.raises(FileExistsError, match="max_steps=40, now it is 41"):
    ivf_centroids.run(_config(data, **{**MINIBATCH, "max_steps": 41}))


@pytest.mark.parametrize("where", ["steps", "first", "pass"])
def test_minibatch_stopped_and_resumed_equals_uninterrupted(
  where, data, monkeypatch
):
  # So that labels change after the stop.
  few = {**MINIBATCH, "batch_size": 50, "num_centroids": 40}
  whole = _config(data, **few, output=data + ".whole.npy")
  want = ivf_centroids.run(whole)
  config, done = _config(data, **few), []
  advance = minibatch_training.advance

  def interrupted(*args, **kwargs):
    if len(done) == (1 if where == "steps" else 0):
      raise KeyboardInterrupt
    done.append(0)
    return advance(*args, **kwargs)

  with monkeypatch.context() as patch:
    if where == "pass":
      _stop_after(patch, 1)
    else:
      patch.setattr(minibatch_training, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
      ivf_centroids.run(config)
  with pytest.raises(ValueError, match="with batch_size=50, now it is 64"):
    ivf_centroids.run(_config(data, **{**few, "batch_size": 64}))
  record = ivf_centroids.run(config)
  assert pathlib.Path(config.output).read_bytes() == (
    pathlib.Path(whole.output).read_bytes()
  )
  assert {**record, "seconds": 0} == {**want, "seconds": 0}
  assert not _checkpoint(config).exists()


def test_minibatch_steps_save_and_damage_is_seen(data, monkeypatch):
  monkeypatch.setattr(cli, "SAVE_SECONDS", 0.0)
  saved, save = [], ivf_centroids._save_arrays

  def noting(path, arrays, meta):
    saved.append(int(arrays.get("num_steps", -1)))
    save(path, arrays, meta)

  monkeypatch.setattr(ivf_centroids, "_save_arrays", noting)
  config = _config(data, **MINIBATCH)
  ivf_centroids.run(config)
  assert saved == [16, 32, 40, -1, -1, -1, -1]
  meta = ivf_centroids.describe(config, np.load(data))
  kept = {"num_steps": np.int64(3), "words_KD": np.ones((9, 6))}
  save(_checkpoint(config), kept, meta)
  pathlib.Path(config.output).unlink()
  with pytest.raises(ValueError, match="damaged .* anew with --overwrite"):
    ivf_centroids.run(config)


def test_iterations_save(data, monkeypatch):
  monkeypatch.setattr(cli, "SAVE_SECONDS", 0.0)
  saved, save = [], ivf_centroids._save
  monkeypatch.setattr(
    ivf_centroids,
    "_save",
    lambda path, state, meta: (
      saved.append(len(state.errors)) or save(path, state, meta)
    ),
  )
  ivf_centroids.run(_config(data))
  assert saved == [1, 2, 3, 4]


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(seed=1), "with seed=0, now it is 1"),
    (dict(num_centroids=8), "with num_centroids=9, now it is 8"),
    (dict(num_vectors=299), "with num_vectors=300, now it is 299"),
    (dict(start="random"), "with start=two-level, now it is random"),
    (dict(num_iterations=2), "done 3 iterations, more than .*=2"),
  ],
)
def test_resume_refuses_another_run(values, message, data, monkeypatch):
  config = _config(data)
  with monkeypatch.context() as patch:
    _stop_after(patch, 3)
    with pytest.raises(KeyboardInterrupt):
      ivf_centroids.run(config)
  with pytest.raises(ValueError, match=message):
    ivf_centroids.run(_config(data, **values))
  assert _checkpoint(config).exists()


def test_resume_refuses_other_data_and_damage(data, monkeypatch):
  config = _config(data)
  x_ND = np.load(data)
  for vectors, words_KD, said in (
    (x_ND + 1, x_ND[:9], "checksum_of_sample"),
    (x_ND, x_ND[:8], r"are not \(9, 6\) finite"),
    (x_ND, x_ND[:9] * np.nan, "are not .* finite"),
  ):
    meta = ivf_centroids.describe(config, vectors)
    state = ivf_centroids.State(words_KD, (1.0,))
    ivf_centroids._save(_checkpoint(config), state, meta)
    with pytest.raises(ValueError, match=said):
      ivf_centroids.run(config)
  _checkpoint(config).write_bytes(b"PK not a checkpoint")
  with pytest.raises(ValueError, match="damaged .* anew with --overwrite"):
    ivf_centroids.run(config)
  ivf_centroids.run(_config(data, overwrite=True))  # Anew.
  assert not _checkpoint(config).exists()


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(num_centroids=301), "between 1 and 300, got 301: .*300 vectors"),
    (dict(num_centroids=0), "--num_centroids is needed"),
    (dict(num_vectors=5), "between 1 and 5, got 9"),
    (dict(start="best"), "--start must be one of two-level.* got 'best'"),
    (dict(output="centroids.txt"), r"must end in \.npy"),
    (dict(num_iterations=-1), "between 0 and 100000, got -1"),
    (dict(batch_size=0), "--batch_size must lie between 1 .* got 0"),
    (dict(max_steps=-1), "--max_steps must lie between 0 .* got -1"),
    (dict(tol=2.0), "--tol must lie between 0 and 1, got 2"),
    (dict(seed=-1), "seed must lie between 0 .* got -1"),
  ],
)
def test_senseless_options_are_refused(values, message, data):
  with pytest.raises(ValueError, match=message):
    ivf_centroids.run(_config(data, **values))


def test_no_vector_is_taken_that_is_nan_and_no_output_replaced(data):
  x_ND = np.load(data)
  x_ND[123, 4] = np.nan
  np.save(data, x_ND)
  config = _config(data)
  with pytest.raises(ValueError, match="123"):
    ivf_centroids.run(config)
  assert not pathlib.Path(config.output).exists()
  pathlib.Path(config.output).write_text("mine")
  with pytest.raises(FileExistsError, match="exists already"):
    ivf_centroids.run(config)


@pytest.mark.slow
def test_a_signal_saves_and_the_same_command_goes_on(tmp_path):
  sample = ROOT / "third_party" / "sample_sift" / "learn.bvecs"
  command = lambda name, *more: [
    *(sys.executable, "-m", "experiments.ivf_centroids", f"--data={sample}"),
    *("--num_centroids=64", "--num_vectors=4000", "--num_iterations=400"),
    *(f"--output={tmp_path / name}", *more),
  ]
  call = lambda *args: subprocess.run(
    command(*args), cwd=ROOT, check=True, capture_output=True
  )
  call("whole.npy")
  with subprocess.Popen(
    command("part.npy"), cwd=ROOT, stderr=subprocess.PIPE, text=True
  ) as process:
    # The start is done where it says how long it took.
    for line in process.stderr:
      if "two-level start: " in line:
        break
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    message = process.stderr.read()
  assert process.returncode == 130
  assert "Saved " in message
  assert "Run the same command again." in message
  assert "Traceback" not in message
  call("part.npy")
  whole, part = (tmp_path / f"{name}.npy" for name in ("whole", "part"))
  assert whole.read_bytes() == part.read_bytes()
