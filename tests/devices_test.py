"""Eight simulated devices against one, and who belongs to a run."""

import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import qinco2_s
from experiments import train
from experiments.lib import codecs
from tests import commands
from vqjax import devices, fitting, recipe_qinco
from vqjax.codecs import minibatch_kmeans, minibatch_training
from vqjax.training import loop, writers

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "third_party" / "golden"
BATCH = 128  # Of all devices together.


def make_figures(folder: str) -> None:
  """Trains and encodes on the devices there are; writes what came out."""
  folder = pathlib.Path(folder)
  config = qinco2_s.get_config("smoke")
  config.train.batch_size = BATCH // jax.device_count()
  config.train.log_every = 1
  train.run(config, folder / "run")
  codec = codecs.open_codec(str(GOLDEN / "ivf_qinco2_tiny.pt"))
  encode_fn, _ = codec.encoder(codec.rule.replace(beam_size=4))
  x_ND = np.load(GOLDEN / "ivf_qinco2_tiny.npz")["x"][:29]
  codes_NM = encode_fn(x_ND)
  xhat_ND = codec.decoder()(codes_NM)
  np.savez(folder / "codes.npz", codes=codes_NM, xhat=xhat_ND)
  np.savez(folder / "lists.npz", **_cluster())
  compiled = _compile_step(config)
  (folder / "step.txt").write_text(compiled.as_text())
  (folder / "figures.json").write_text(
    json.dumps(
      {
        "devices": jax.device_count(),
        "flops": compiled.cost_analysis()["flops"],
      }
    )
  )


def _cluster() -> dict:
  """Mini-batch k-means with batches that eight devices cannot share."""
  x_ND = np.random.default_rng(0).normal(size=(900, 6)).astype(np.float32)
  rule = minibatch_kmeans.Rule("cosine")
  run = minibatch_training.begin(rule, x_ND[:10], 45)
  batches = [x_ND[first : first + 45] for first in range(0, 900, 45)]
  for first in range(0, len(batches), minibatch_kmeans.CHUNK):
    some = batches[first : first + minibatch_kmeans.CHUNK]
    run = minibatch_training.advance(rule, run, some, tol=0)
  assign_fn = minibatch_training.make_assign_fn(rule, run.words_MKS)
  return {
    "centroids": run.words_KD,
    "history": run.history,
    "labels": assign_fn(x_ND)[0],
  }


def _compile_step(config):
  """The training step of the configuration, compiled."""
  plan = fitting.make_plan(config, 1000, 1.0)
  x_ND = np.random.default_rng(0).normal(size=(BATCH, 128)).astype(np.float32)
  job = fitting.prepare(config, None, x_ND, BATCH, slice(0, BATCH), plan)
  state = recipe_qinco.make_state(config, job.tx, None, jnp.asarray(x_ND))
  step_fn = loop.make_train_step(job.learner, job.tx, job.schedule, seed=0)
  wish_N = np.zeros(jax.device_count(), np.int32)
  args = devices.replicate(state), *devices.shard((wish_N, x_ND))
  return step_fn.lower(*args).compile()


@pytest.fixture(scope="module")
def one_and_eight(tmp_path_factory):
  one, eight = (tmp_path_factory.mktemp(name) for name in ("one", "eight"))
  program = "import sys; from tests import devices_test as t; " + (
    "t.make_figures(sys.argv[1])"
  )
  flags = os.environ.get("XLA_FLAGS", "")
  flags += " --xla_force_host_platform_device_count="
  running = [
    subprocess.Popen(
      [sys.executable, "-c", program, str(folder)],
      cwd=ROOT,
      env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags}{num}"},
    )
    for folder, num in ((one, 1), (eight, 8))
  ]
  assert [process.wait() for process in running] == [0, 0]
  return one, eight


def _figures(folder):
  return json.loads((folder / "figures.json").read_text())


def test_eight_devices_give_the_codes_of_one(one_and_eight):
  assert [_figures(folder)["devices"] for folder in one_and_eight] == [1, 8]
  one, eight = (np.load(folder / "codes.npz") for folder in one_and_eight)
  assert one["codes"].shape[0] == 29  # Which eight devices cannot share.
  np.testing.assert_array_equal(one["codes"], eight["codes"])
  np.testing.assert_allclose(one["xhat"], eight["xhat"], rtol=1e-6)


def test_mini_batches_on_eight_devices_are_those_of_one(one_and_eight):
  one, eight = (np.load(folder / "lists.npz") for folder in one_and_eight)
  assert len(one["history"]) > 10
  np.testing.assert_allclose(one["history"], eight["history"], rtol=1e-12)
  np.testing.assert_allclose(one["centroids"], eight["centroids"], atol=1e-6)
  np.testing.assert_array_equal(one["labels"], eight["labels"])


def test_eight_devices_learn_as_one(one_and_eight):
  one, eight = (
    writers.read_rows(folder / "run" / "metrics.jsonl")
    for folder in one_and_eight
  )
  assert [row["step"] for row in one] == [row["step"] for row in eight]
  names = ("loss", "grad_norm", "train_mse", "validation_mse", "usage_M")
  for a, b in zip(one, eight, strict=True):
    for name in set(names) & set(a):
      np.testing.assert_allclose(a[name], b[name], rtol=1e-4, err_msg=name)


def test_a_step_sums_over_devices_and_nothing_else(one_and_eight):
  text = (one_and_eight[1] / "step.txt").read_text()
  assert "all-reduce" in text
  others = r"(all-gather|all-to-all|collective-permute|reduce-scatter)\S*\("
  assert not re.findall(others, text)
  one, eight = (_figures(folder)["flops"] for folder in one_and_eight)
  # An eighth, and tables and optimiser, which every device computes.
  assert eight < one / 4


def test_all_rows_belong_to_one_process(monkeypatch):
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  for num_rows in (0, 1, 2, 3, 10, 11):
    rows = []
    for index in range(3):
      monkeypatch.setattr(jax, "process_index", lambda index=index: index)
      mine = devices.process_rows(num_rows)
      assert len(mine) <= -(-num_rows // 3)
      rows += mine
    assert rows == list(range(num_rows))


@pytest.mark.parametrize("dtype", [np.float64, np.int32, bool])
def test_gather_keeps_every_bit(dtype):
  x_N = np.array([0.1, 1 / 3, 2.0]).astype(dtype)
  got = devices.gather(x_N)
  assert got.dtype == dtype
  np.testing.assert_array_equal(got, x_N[None])
  assert devices.gather(x_N[0]).shape == (1,)
  np.testing.assert_array_equal(devices.gather_rows(x_N, 3), x_N)


@pytest.fixture
def join(monkeypatch):
  """`start_processes` in an environment; returns what JAX would be told."""

  def run(**environ):
    for name in (*devices._OWN_VARIABLES, *devices._TORCH_VARIABLES):
      monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
      monkeypatch.setenv(name, value)
    told = []
    monkeypatch.setattr(
      jax.distributed, "initialize", lambda *a, **k: told.append((a, k))
    )
    devices.start_processes()
    ((args, kwargs),) = told
    return *args, kwargs["local_device_ids"], kwargs["cluster_detection_method"]

  return run


def test_processes_find_each_other(join):
  own = dict(
    JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="3", JAX_PROCESS_ID="2"
  )
  torchrun = dict(
    MASTER_ADDR="b", MASTER_PORT="9", WORLD_SIZE="8", RANK="7",
    LOCAL_RANK="3", LOCAL_WORLD_SIZE="4",
  )  # fmt: skip
  assert join(**torchrun) == ("b:9", 8, 7, [3], "deactivate")
  torchrun["LOCAL_WORLD_SIZE"] = "1"  # One process for all of the host.
  assert join(**torchrun) == ("b:9", 8, 7, None, "deactivate")
  assert join(**own, **torchrun) == ("a:1", 3, 2, None, "deactivate")
  assert join() == (None, None, None, None, None)  # Slurm and others.


@pytest.mark.parametrize(
  ("count", "index"), [("2", "2"), ("two", "0"), ("2", "-1")]
)
def test_processes_that_do_not_add_up_are_refused(count, index, join):
  with pytest.raises(
    ValueError, match=f"JAX_NUM_PROCESSES .* got '{count}' and '{index}'"
  ):
    join(
      JAX_COORDINATOR_ADDRESS="a:1",
      JAX_NUM_PROCESSES=count,
      JAX_PROCESS_ID=index,
    )


def test_multihost_alone_is_refused():
  environ = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("SLURM", "OMPI", "JAX_", "MASTER", "KUBERNETES"))
  }
  done = subprocess.run(
    [sys.executable, "-m", "experiments.evaluate", "--multihost"],
    cwd=ROOT, env=environ, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 1
  assert "set JAX_COORDINATOR_ADDRESS" in done.stderr
  assert "Traceback" not in done.stderr


def test_a_process_can_be_kept_to_one_cpu():
  program = (
    "import faiss, jax; from vqjax import devices; devices.limit_cpus(1); "
    "import os; jax.numpy.ones((300, 300)) @ jax.numpy.ones((300, 300)); "
    "print({len(os.sched_getaffinity(int(t))) for t in "
    "os.listdir('/proc/self/task')}, devices.num_cpus())"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
  )
  assert done.stdout == "{1} 1\n"


def test_more_cpus_than_there_are_are_refused():
  done = commands.run("search", "--threads=1000", check=False)
  assert done.returncode == 1
  assert "--threads must lie between 1 and" in done.stderr
  assert "CPUs of this process" in done.stderr
  assert "Traceback" not in done.stderr


def test_a_batch_that_the_devices_cannot_share_is_refused(monkeypatch):
  monkeypatch.setattr(jax, "device_count", lambda: 3)
  with pytest.raises(ValueError, match="batch of 8 .* multiple of the 3 dev"):
    devices.check_batch(8)
