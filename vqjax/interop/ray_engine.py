"""Numbered parts of a work on Ray: one task each, threads, retries, progress.

A part is a pure piece of work whose result is a file: done twice, it is the
same. So a part whose worker or host was lost is done again, and nothing else is
lost. Only this module knows Ray, which is an optional dependency.

with ray_engine.connect(None) as hosts:
  share = ray_engine.share_out(hosts, workers=2)
  ray_engine.run(work_fn, {0: 500, 1: 500}, share)
"""

import contextlib
import io
import logging as std_logging
import os
import secrets
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

from absl import logging

from vqjax import cpu, devices

_STORE_BYTES = 80 << 20  # For objects that tasks share, of which we have none.
_SECONDS = 1.0  # Between looks at the progress, and between reports of it.


class Host(NamedTuple):
  """What Ray may use of a host."""

  cpus: int
  gpus: int


class Share(NamedTuple):
  """How many tasks run at a time, and what each of them has."""

  workers: int
  cpus: int
  gpus: int


def _import_ray():
  try:
    import ray
  except ImportError as error:
    raise ImportError(
      "--engine=ray needs Ray, which is not installed; run "
      "pip install 'vqjax[ray]'."
    ) from error
  return ray


@contextlib.contextmanager
def connect(address: str | None = None):
  """Yields the hosts of a Ray cluster, and leaves it at the end.

  A program that is connected to Ray stays so.

  Args:
    address: Of the cluster, "auto" for the one of this host; None for
      RAY_ADDRESS, without which Ray is started for this host alone, without
      dashboard and usage reports, and ended again.

  Raises:
    ImportError: Ray is not installed.
    ConnectionError: There is no such cluster, or Ray does not start.
  """
  ray = _import_ray()
  if ray.is_initialized():
    yield _hosts(ray)
    return
  address = address or os.environ.get("RAY_ADDRESS") or "local"
  with _own_sigterm():
    try:
      _start(ray, address)
    except (OSError, RuntimeError, ValueError) as error:
      reason = (str(error).splitlines() or [type(error).__name__])[0]
      raise ConnectionError(
        f"There is no Ray at --address={address} ({reason.rstrip('.')}). Start "
        "one with `ray start --head`, or leave --address out. If it asks for a "
        "token, set RAY_AUTH_MODE=token."
      ) from error
  try:
    # Ray prints of lost workers, at length; `_Watch` says it.
    with contextlib.redirect_stdout(io.StringIO()):
      yield _hosts(ray)
  finally:
    ray.shutdown()


def _start(ray, address: str) -> None:
  """Connects, or starts Ray here; quiet, and nothing is left in the home."""
  host, _, port = address.rpartition(":")
  if port.isdigit() and "/" not in host:  # Ray itself takes minutes to tell.
    socket.create_connection((host, int(port)), timeout=10).close()
  options = {"log_to_driver": False, "logging_level": std_logging.ERROR}
  if address == "local":
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Else Ray writes a token into the home folder. It keeps others out.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    options |= {
      "include_dashboard": False,
      "num_cpus": devices.num_cpus(),
      "object_store_memory": _STORE_BYTES,
    }
  with warnings.catch_warnings():
    # Of JAX, about forks. Those of Ray become other programs at once.
    warnings.filterwarnings("ignore", r"os\.fork\(\) was called")
    ray.init(address, **options)


@contextlib.contextmanager
def _own_sigterm():
  """Keeps the handler of SIGTERM, which Ray takes."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  before = signal.getsignal(signal.SIGTERM)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


def _hosts(ray) -> list[Host]:
  found = [n["Resources"] for n in ray.nodes() if n["Alive"]]
  hosts = [Host(int(r.get("CPU", 0)), int(r.get("GPU", 0))) for r in found]
  return [host for host in hosts if host.cpus]


def share_out(
  hosts: list[Host], workers: int | None = None, *, uses_gpus: bool = True
) -> Share:
  """Divides hosts evenly among tasks that run at a time.

  Each gets the most CPUs with which all of them fit on the hosts, and a GPU
  where there are any.

  Args:
    hosts: As of `connect`.
    workers: Tasks at a time; None for one of each GPU, else of each host.
    uses_gpus: Whether tasks take GPUs.

  Raises:
    ValueError: The hosts have fewer GPUs or CPUs.
  """
  num_gpus = sum(host.gpus for host in hosts) if uses_gpus else 0
  num_cpus = sum(host.cpus for host in hosts)
  most, kind = (num_gpus, "GPUs") if num_gpus else (num_cpus, "CPUs")
  workers = workers or num_gpus or len(hosts)
  if not 1 <= workers <= most:
    raise ValueError(
      f"--workers must lie between 1 and {most}, the {kind} of Ray's hosts; "
      f"got {workers}."
    )
  gpus = int(num_gpus > 0)

  def fits(cpus: int) -> int:
    return sum(min(h.cpus // cpus, h.gpus if gpus else h.cpus) for h in hosts)

  cpus = max(host.cpus for host in hosts)
  while fits(cpus) < workers and cpus > 1:
    cpus -= 1
  return Share(min(workers, fits(cpus)), cpus, gpus)


def run(
  work_fn: Callable,
  sizes: dict[int, int],
  share: Share,
  *,
  max_retries: int = 3,
  what: str = "shard",
  take_fn: Callable = lambda part, result: None,
  progress=None,
) -> dict:
  """Calls `work_fn(part, report)` for each part, and returns what they return.

  Args:
    work_fn: Calls `report(done)` as it goes on. Its errors are raised here as
      Ray raises them: what people are to read it had better return.
    sizes: What there is to do in each part, in units of `done`.
    share: What a task has, from `share_out`.
    max_retries: How often a part is done again whose worker was lost.
    what: What messages call a part.
    take_fn: Called with a part and what it returned; if it raises, all ends.
    progress: Called with `(done, total)` over all parts.

  Returns:
    What `work_fn` returned, by part.

  Raises:
    ChildProcessError: The workers of a part were lost too often.
  """
  ray = _import_ray()
  counter = _make_counter(ray)
  task = ray.remote(
    num_cpus=share.cpus,
    num_gpus=share.gpus,
    max_retries=max_retries,
    max_calls=0,  # Else a worker with a GPU ends after each task.
    runtime_env={"env_vars": _variables(share)},
  )(_work)
  waiting, running, found = sorted(sizes, reverse=True), {}, {}
  watch = _Watch(sizes, what, progress)
  try:
    while waiting or running:
      while waiting and len(running) < share.workers:
        part = waiting.pop()
        running[task.remote(work_fn, part, counter)] = part
      ready, _ = ray.wait(list(running), timeout=_SECONDS)
      for ref in ready:
        part = running.pop(ref)
        found[part] = _result(ray, ref, f"{what} {part}", max_retries)
        take_fn(part, found[part])
      watch.look(ray, counter, found)
  finally:
    for ref in running:
      ray.cancel(ref)
    ray.kill(counter)
  return found


def _variables(share: Share) -> dict[str, str]:
  """The environment of a worker, set before it imports anything."""
  variables = cpu.thread_variables(share.cpus)
  if not share.gpus:  # Ray hides GPUs from such a task; JAX would complain.
    variables["JAX_PLATFORMS"] = "cpu"
  return variables


def _result(ray, ref, name: str, max_retries: int):
  """What a task returned."""
  try:
    return ray.get(ref)
  except ray.exceptions.RayTaskError:
    raise  # An error in the program, with its traceback.
  except ray.exceptions.RayError as error:
    reason = (str(error).splitlines() or [""])[0].rstrip(".")
    raise ChildProcessError(
      f"The worker of {name} was lost {max_retries + 1} times, the last time "
      f"by {type(error).__name__} ({reason}). It may need more memory than "
      "there is: try fewer --workers."
    ) from error


def _work(work_fn, part: int, counter):
  """Runs in a worker: one part, with its progress."""
  last = 0.0

  def report(done: int, first: bool = False) -> None:
    nonlocal last
    now = time.monotonic()
    if first or now - last >= _SECONDS:
      last = now
      counter.add.remote(part, int(done), first)

  report(0, first=True)
  return work_fn(part, report)


def _make_counter(ray):
  """Starts the actor that counts; its class goes with it, not its module.

  So its process need not import JAX.
  """

  class Counter:
    def __init__(self):
      self._done, self._starts = {}, {}

    def add(self, part, done, is_first):
      self._done[part] = done
      if is_first:
        self._starts[part] = self._starts.get(part, 0) + 1

    def read(self):
      return self._done, self._starts

  here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
    ray.get_runtime_context().get_node_id(),
    soft=True,  # It counts on after the loss of any other host.
  )
  counter = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=here)
  return counter(Counter).remote()


class _Watch:
  """Says how far all parts are, and which are done again."""

  def __init__(self, sizes: dict[int, int], what: str, progress):
    self._sizes, self._what, self._progress = sizes, what, progress
    self._total, self._starts = sum(sizes.values()), {}
    self._next = time.monotonic() + _SECONDS

  def look(self, ray, counter, found: dict) -> None:
    """Reads the counter, at most once in a while."""
    is_over = len(found) == len(self._sizes)
    if time.monotonic() < self._next and not is_over:
      return
    self._next = time.monotonic() + _SECONDS
    done = sum(self._sizes[part] for part in found)
    try:
      reported, starts = ray.get(counter.read.remote(), timeout=5 * _SECONDS)
    except ray.exceptions.RayError:  # It comes back; only the line waits.
      reported, starts = {}, {}
    done += sum(n for part, n in reported.items() if part not in found)
    for part, count in starts.items():
      if count > max(self._starts.get(part, 1), 1):
        logging.warning(
          "The worker of %s %d was lost; it is made again.", self._what, part
        )
    self._starts |= starts
    if self._progress is not None:
      self._progress(done, self._total)
