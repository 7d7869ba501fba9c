"""Shards by Ray: those of one process, whatever is killed.

Without Ray only what does not need it is tested. `.ci/run` installs it and runs
this file once more.
"""

import os
import pathlib
import signal
import sys

import numpy as np
import pytest

from experiments import build_index, encode, ground_truth
from experiments.lib import engine
from vqjax.codecs import rq
from vqjax.interop import ray_engine
from vqjax.interop.ray_engine import Host, Share
from vqjax.storage import codec_file

NUM, DIM = 20_000, 4  # More than a block in each of four shards.
BY_RAY = {"shards": 4, "engine": "ray", "workers": 2}


@pytest.mark.parametrize(
  ("hosts", "workers", "share"),
  [
    ([Host(16, 0)], None, Share(1, 16, 0)),
    ([Host(16, 0)], 3, Share(3, 5, 0)),
    ([Host(16, 0)] * 4, None, Share(4, 16, 0)),
    ([Host(16, 0)] * 4, 6, Share(6, 8, 0)),
    ([Host(4, 0), Host(2, 0)], None, Share(2, 2, 0)),
    ([Host(16, 4), Host(16, 4)], None, Share(8, 4, 1)),
    ([Host(16, 4), Host(64, 0)], None, Share(4, 4, 1)),
  ],
)
def test_hosts_are_shared_out(hosts, workers, share):
  assert ray_engine.share_out(hosts, workers) == share


def test_more_workers_than_hosts_have_are_refused():
  with pytest.raises(ValueError, match="between 1 and 2, the CPUs .* got 3"):
    ray_engine.share_out([Host(1, 0), Host(1, 0)], 3)
  with pytest.raises(ValueError, match="between 1 and 1, the GPUs .* got 2"):
    ray_engine.share_out([Host(8, 1)], 2)
  assert ray_engine.share_out([Host(8, 1)], 2, uses_gpus=False).gpus == 0


def test_without_ray_the_extra_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "ray", None)
  with (
    pytest.raises(ImportError, match=r"pip install 'vqjax\[ray\]'"),
    ray_engine.connect(),
  ):
    pass


@pytest.fixture(scope="module")
def ray():
  """Ray on this host, started once for all tests."""
  ray = pytest.importorskip("ray")
  with ray_engine.connect():
    yield ray


@pytest.fixture(scope="module")
def given(tmp_path_factory):
  """A codec and vectors, and what one process makes of them."""
  folder = tmp_path_factory.mktemp("given")
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(NUM, DIM)).astype(np.float32)
  np.save(folder / "x.npy", x_ND)
  params = rq.RQParams(rng.normal(size=(2, 4, DIM)).astype(np.float32))
  codec_file.save_codec(folder / "rq", "rq", params, info={"encode": {}})
  values = {"codec": str(folder / "rq"), "data": str(folder / "x.npy")}
  encode.run(**values, shards=4, output=str(folder / "codes"))
  return values | {"folder": folder}


def _data(given):
  return {name: given[name] for name in ("codec", "data")}


def _same_files(folder, other) -> bool:
  names = {path.name for path in pathlib.Path(folder).iterdir()}
  return all(
    (folder / name).read_bytes() == (other / name).read_bytes()
    for name in names - {"manifest.json"}
  )


def _killing(monkeypatch, folder, shard: int) -> None:
  """Lets a worker die in the middle of a shard, once."""
  make_fn = engine._make_work_fn

  def make_work_fn(*args):
    work = make_fn(*args)

    def deadly(number, report):
      def report_or_die(done):
        (folder / f"made-{number}-by-{os.getpid()}").touch()
        if number == shard and not (folder / "died").exists():
          assert 0 < done < NUM // 4
          (folder / "died").touch()
          os.kill(os.getpid(), signal.SIGKILL)
        report(done)

      return work(number, report_or_die)

    return deadly

  monkeypatch.setattr(engine, "_make_work_fn", make_work_fn)


def test_a_killed_worker_costs_its_shard(ray, given, tmp_path, monkeypatch):
  said = []
  monkeypatch.setattr(
    ray_engine.logging, "warning", lambda text, *args: said.append(text % args)
  )
  monkeypatch.chdir(tmp_path)  # Workers take names as this process does.
  _killing(monkeypatch, tmp_path, shard=2)
  encode.run(**_data(given), **BY_RAY, output="codes")
  assert _same_files(given["folder"] / "codes", tmp_path / "codes")
  counts = [len(list(tmp_path.glob(f"made-{i}-by-*"))) for i in range(4)]
  assert counts == [1, 1, 2, 1]
  assert said == ["The worker of shard 2 was lost; it is made again."]
  before = os.stat("codes/codes-00003-of-00004.npy").st_mtime_ns
  pathlib.Path("codes/codes-00001-of-00004.json").unlink()
  encode.run(**_data(given), **BY_RAY, output="codes")  # What is left alone.
  assert os.stat("codes/codes-00003-of-00004.npy").st_mtime_ns == before
  assert _same_files(given["folder"] / "codes", tmp_path / "codes")


def test_a_part_that_kills_its_workers_ends_the_run(ray):
  def work(part, report):
    if part:
      os.kill(os.getpid(), signal.SIGKILL)

  with pytest.raises(
    ChildProcessError, match="worker of shard 1 was lost 2 ti"
  ):
    ray_engine.run(work, {0: 1, 1: 1}, Share(1, 1, 0), max_retries=1)


def test_what_a_worker_refuses_is_said_plainly(ray, given, tmp_path):
  x_ND = np.load(given["data"])
  x_ND[12_345, 1] = np.nan
  np.save(tmp_path / "x.npy", x_ND)
  values = _data(given) | BY_RAY | {"data": str(tmp_path / "x.npy")}
  with pytest.raises(
    ValueError, match="Shard 2: .*, first in row 12345"
  ) as info:
    encode.run(**values, output=str(tmp_path / "codes"))
  assert "Traceback" not in str(info.value)


def test_an_index_and_neighbours_are_those_of_one_process(ray, given, tmp_path):
  one, two = str(tmp_path / "one.faiss"), str(tmp_path / "two.faiss")
  codes = {"codec": given["codec"], "codes": str(given["folder"] / "codes")}
  build_index.run(**codes, output=one)
  build_index.run(**codes, **BY_RAY, output=two)
  one, two = str(tmp_path / "one.npy"), str(tmp_path / "two.npy")
  np.save(tmp_path / "xq.npy", np.load(given["data"])[:7])
  values = {"data": given["data"], "queries": str(tmp_path / "xq.npy"), "k": 5}
  ground_truth.run(**values, output=one)
  ground_truth.run(**values, **BY_RAY, output=two)
  for suffix in ("faiss", "npy", "faiss.order.npy"):
    files = [tmp_path / f"{name}.{suffix}" for name in ("one", "two")]
    assert files[0].read_bytes() == files[1].read_bytes()
  assert not list(tmp_path.glob("*.parts"))
