"""Two processes on loopback: trained, stopped, killed, resumed, encoded."""

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments import evaluate, ivf_centroids
from experiments.lib import cli, codecs
from vqjax.data import formats
from vqjax.storage import codec_file
from vqjax.training import writers

ROOT = pathlib.Path(__file__).parents[1]
SAMPLE = ROOT / "third_party" / "sample_sift"
TRAIN = [
  "train", "--config=configs/qinco2_s.py:smoke", "--config.train.log_every=1",
  "--config.train.epoch_size=1000", "--config.train.batch_size=8",
  "--config.train.num_epochs=2", "--config.train.checkpoint_minutes=0.03",
]  # fmt: skip
STEPS = 2 * 62


def _free_port() -> int:
  with socket.socket() as listener:
    listener.bind(("127.0.0.1", 0))
    return listener.getsockname()[1]


@contextlib.contextmanager
def _two(name, *args, setup=""):
  """Starts a command as two processes; none outlives the block."""
  environ = {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{_free_port()}",
    "JAX_NUM_PROCESSES": "2",
  }
  command = [sys.executable, "-m", f"experiments.{name}", *args, "--multihost"]
  if setup:
    start = f"; __import__('runpy').run_module('experiments.{name}', None, "
    command[1:3] = ["-c", setup + start + "'__main__')"]
  running = [
    subprocess.Popen(
      command, cwd=ROOT, env={**environ, "JAX_PROCESS_ID": str(index)},
      stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )
    for index in range(2)
  ]  # fmt: skip
  try:
    yield running
  finally:
    for process in running:
      process.kill()
      process.communicate()


def _finish(running, code=0) -> list[str]:
  texts = [process.communicate(timeout=100)[0] for process in running]
  assert [process.returncode for process in running] == [code] * 2, texts
  return texts


def _wait_for_step(running, folder, step):
  while all(process.poll() is None for process in running):
    rows = writers.read_rows(folder / "metrics.jsonl")
    if rows and rows[-1]["step"] >= step:
      return
    time.sleep(0.02)
  raise AssertionError([process.communicate()[0] for process in running])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "whole"
  with _two(*TRAIN, f"--workdir={folder}") as running:
    first, second = _finish(running)
  assert "Trained in" in first
  assert "Trained in" not in second  # One of them speaks.
  return folder


def _assert_same_run(whole, part):
  a, b = (codec_file.load_codec(folder) for folder in (whole, part))
  assert a.fingerprint == b.fingerprint
  a, b = (
    [{**row, "seconds": 0} for row in writers.read_rows(f / "metrics.jsonl")]
    for f in (whole, part)
  )
  assert a == b


@pytest.mark.slow
def test_killed_and_resumed_equals_uninterrupted(whole, tmp_path):
  command = [*TRAIN, f"--workdir={tmp_path}"]
  with _two(*command) as running:
    _wait_for_step(running, tmp_path, 80)
    for process in running:
      process.send_signal(signal.SIGKILL)
  assert not (tmp_path / "summary.json").exists()
  with _two(*command) as running:
    assert "Resuming from step" in _finish(running)[0]
  _assert_same_run(whole, tmp_path)


@pytest.mark.slow
def test_a_signal_to_one_stops_both_at_the_same_step(whole, tmp_path):
  command = [*TRAIN, f"--workdir={tmp_path}"]
  with _two(*command) as running:
    _wait_for_step(running, tmp_path, 10)
    running[1].send_signal(signal.SIGTERM)
    texts = _finish(running, 130)
  steps = [text.split("Stopped at step ")[1].split()[0] for text in texts]
  assert steps[0] == steps[1]
  assert int(steps[0]) < STEPS
  with _two(*command) as running:
    assert f"Resuming from step {steps[0]} of" in _finish(running)[0]
  _assert_same_run(whole, tmp_path)


@pytest.mark.slow
def test_two_processes_measure_as_one(whole, tmp_path):
  output = tmp_path / "two.json"
  args = [f"--codec={whole}", f"--output={output}", "--num_vectors=333"]
  with _two("evaluate", *args) as running:
    _finish(running)
  config = cli.get_config(evaluate.OPTIONS)
  config.update({"codec": str(whole), "num_vectors": 333})
  (one,) = evaluate.run(config)["rows"]
  (two,) = json.loads(output.read_text())["rows"]
  for name in ("mse", "1-recall@1", "1-recall@10", "1-recall@100"):
    assert one[name] == pytest.approx(two[name], rel=1e-6)


def test_two_processes_encode_their_shards(whole, tmp_path):
  data = f"--data={SAMPLE / 'base.bvecs'}"
  args = [f"--codec={whole}", data, "--num_vectors=333"]
  with _two("encode", *args, f"--output={tmp_path / 'two'}") as running:
    _finish(running)
  shards = sorted((tmp_path / "two").glob("*.npy"))
  codec = codecs.open_codec(str(whole))
  encode_fn, _ = codec.encoder(codec.rule)
  x_ND = formats.open_vectors(SAMPLE / "base.bvecs")[:333].astype(np.float32)
  assert len(shards) == 2  # One by each.
  np.testing.assert_array_equal(
    np.concatenate([np.load(shard) for shard in shards]), encode_fn(x_ND)
  )


def test_centroids_of_two_processes_are_those_of_one(tmp_path):
  """Killed after some iterations, and resumed."""
  output = tmp_path / "two" / "centroids.npy"
  output.parent.mkdir()
  args = {
    "data": str(SAMPLE / "base.bvecs"), "num_vectors": 3001, "seed": 3,
    "num_centroids": 50, "num_iterations": 120, "output": str(output),
  }  # fmt: skip
  command = ["ivf_centroids", *(f"--{k}={v}" for k, v in args.items())]
  setup = "from experiments.lib import cli; cli.SAVE_SECONDS = 0"
  with _two(*command, setup=setup) as running:
    checkpoint = ivf_centroids.checkpoint_path(output)
    while not checkpoint.exists():
      assert all(process.poll() is None for process in running)
      time.sleep(0.02)
    for process in running:
      process.send_signal(signal.SIGKILL)
  assert not output.exists()
  with _two(*command) as running:
    first, second = _finish(running)
  assert "Resuming after" in first
  assert "50 centroids in" in first
  assert "centroids in" not in second
  args["output"] = str(tmp_path / "one.npy")
  record = ivf_centroids.run(cli.get_config(ivf_centroids.OPTIONS, **args))
  found = json.loads((tmp_path / "two" / "centroids.npy.json").read_text())
  errors = [r["mean_squared_errors"] for r in (found, record)]
  np.testing.assert_allclose(*errors, rtol=1e-6)
  np.testing.assert_allclose(
    np.load(output), np.load(tmp_path / "one.npy"), rtol=1e-5, atol=1e-3
  )
