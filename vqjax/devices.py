"""All devices of all processes: data sharded, params copied.

Training runs over one mesh of every device (`shard`, `replicate`,
`shard_map_over_data`). Encoding needs no other process: each one takes its rows
(`process_rows`), spreads them over its own devices (`data_parallel`) and passes
results on by `gather`.
"""

import contextlib
import functools
import os
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vqjax.core import check_range

DATA_AXIS = "data"
_COPIED, _SPLIT = PartitionSpec(), PartitionSpec(DATA_AXIS)
_OWN_VARIABLES = (
  "JAX_COORDINATOR_ADDRESS",
  "JAX_NUM_PROCESSES",
  "JAX_PROCESS_ID",
)
_TORCH_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
_PATIENCE = 7 * 86_400  # Seconds to wait at the end for slower processes.


def start_processes() -> None:
  """Joins this process to the others of its run; before JAX is used.

  Who they are is in the environment: `JAX_COORDINATOR_ADDRESS` (host:port of
  the first process), `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, else what
  torchrun sets (`MASTER_ADDR`, `MASTER_PORT`, `WORLD_SIZE`, `RANK`), else
  what JAX knows to ask: Slurm, Open MPI, Kubernetes, TPU pods.

  Raises:
    ValueError: Nothing is found, or what is found makes no sense.
  """
  address, count, index = _processes_of(os.environ)
  try:
    jax.distributed.initialize(
      address,
      count,
      index,
      local_device_ids=_local_devices_of(os.environ),
      cluster_detection_method="deactivate" if address else None,
      shutdown_timeout_seconds=_PATIENCE,
    )
  except ValueError as error:
    raise ValueError(
      "--multihost found no other processes: start it by srun or mpirun, or "
      f"set {', '.join(_OWN_VARIABLES)}, or {', '.join(_TORCH_VARIABLES)} "
      f"({error})"
    ) from error


def _processes_of(environ) -> tuple[str | None, int | None, int | None]:
  """Address of the first process, number of processes, index of this one."""
  value = environ.get
  for names, address in (
    (_OWN_VARIABLES, value("JAX_COORDINATOR_ADDRESS")),
    (_TORCH_VARIABLES, f"{value('MASTER_ADDR')}:{value('MASTER_PORT')}"),
  ):
    if any(name not in environ for name in names):
      continue
    count, index = (value(name) for name in names[-2:])
    if not (count.isdigit() and index.isdigit() and int(index) < int(count)):
      raise ValueError(
        f"{names[-2]} must be a number of processes and {names[-1]} one of "
        f"them, counted from 0; got {count!r} and {index!r}."
      )
    return address, int(count), int(index)
  return None, None, None


def _local_devices_of(environ) -> list[int] | None:
  """The accelerator of this process if torchrun starts one for each."""
  if int(environ.get("LOCAL_WORLD_SIZE", 1)) > 1:
    return [int(environ["LOCAL_RANK"])]
  return None


def num_cpus() -> int:
  """Returns on how many CPUs the threads of this process may run."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def limit_cpus(count: int) -> None:
  """Keeps all threads of this process to its first `count` CPUs.

  To be called before JAX is used, which takes as many threads as it finds
  CPUs. If the system cannot do it (macOS), nothing happens.

  Raises:
    ValueError: The process has fewer CPUs.
  """
  check_range("--threads", count, 1, num_cpus(), "CPUs of this process")
  if hasattr(os, "sched_setaffinity"):
    cpus = sorted(os.sched_getaffinity(0))[:count]
    for thread in os.listdir("/proc/self/task"):
      with contextlib.suppress(ProcessLookupError):  # It has just ended.
        os.sched_setaffinity(int(thread), cpus)


def check_platforms() -> None:
  """Raises ValueError if JAX lacks what JAX_PLATFORMS asks for."""
  asked = jax.config.jax_platforms
  if not asked:
    return
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as error:  # The latter for "cuda".
    reason, *_ = str(error).splitlines() or ["there is no plugin for them"]
    raise ValueError(
      f"JAX_PLATFORMS={asked} asks for devices that JAX cannot use here "
      f"({reason}). For NVIDIA GPUs install vqjax[cuda]; with "
      "JAX_PLATFORMS=cpu everything runs on the CPU."
    ) from error


def is_first() -> bool:
  """True in the process that writes files and speaks for the others."""
  return jax.process_index() == 0


@functools.cache
def data_mesh() -> Mesh:
  """Returns the one-axis mesh over every device of every process."""
  return jax.make_mesh(
    (jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,)
  )


@functools.cache
def _own_mesh() -> Mesh:
  """The one-axis mesh over the devices of this process."""
  return Mesh(np.array(jax.local_devices()), (DATA_AXIS,))


def shard(x):
  """Spreads this process's rows of a global batch over its devices."""
  sharding = NamedSharding(data_mesh(), _SPLIT)
  put = functools.partial(jax.make_array_from_process_local_data, sharding)
  return jax.tree.map(lambda leaf: put(np.asarray(leaf)), x)


def replicate(tree):
  """Copies a tree of arrays, the same in all processes, to every device."""
  return jax.device_put(tree, NamedSharding(data_mesh(), _COPIED))


def abstract(tree):
  """Returns shapes and dtypes of a tree, placed as `replicate` would."""
  sharding = NamedSharding(data_mesh(), _COPIED)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def to_local_devices(tree):
  """Copies a tree, of `replicate` too, to the devices of this process."""
  spans = lambda x: isinstance(x, jax.Array) and not x.is_fully_addressable
  own = lambda x: x.addressable_data(0) if spans(x) else x
  sharding = NamedSharding(_own_mesh(), _COPIED)
  return jax.device_put(jax.tree.map(own, tree), sharding)


def shard_map_over_data(fn: Callable) -> Callable:
  """Returns `(*copied, rows) -> copied`; every device has its share of rows.

  `fn` runs as on a single device and must itself reduce its results over
  `DATA_AXIS`. Left to the partitioner of XLA, a top-k would gather all rows
  on all devices.
  """

  def run(*args):
    mapped = jax.shard_map(
      fn,
      mesh=data_mesh(),
      in_specs=(_COPIED,) * (len(args) - 1) + (_SPLIT,),
      out_specs=_COPIED,
      check_vma=False,
    )
    return mapped(*args)

  return run


def data_parallel(fn: Callable) -> Callable:
  """Returns a jitted `(tree, rows) -> rows` over this process's devices.

  Every device runs the program of a single one on its rows, `rows / devices`
  at once, so the results are the same as on one device. Rows are an array or
  a tree of arrays; if the devices cannot share them evenly, the last row is
  repeated. A tree placed by `to_local_devices` is not copied again.
  """
  mapped_fn = jax.jit(
    jax.shard_map(
      fn,
      mesh=_own_mesh(),
      in_specs=(_COPIED, _SPLIT),
      out_specs=_SPLIT,
      check_vma=False,
    ),
  )
  split = NamedSharding(_own_mesh(), _SPLIT)

  def run(tree, rows):
    num = len(jax.tree.leaves(rows)[0])
    missing = -num % _own_mesh().size
    if missing:
      pad = lambda x: np.pad(
        x, [(0, missing)] + [(0, 0)] * (np.ndim(x) - 1), "edge"
      )
      rows = jax.tree.map(pad, rows)
    out = mapped_fn(to_local_devices(tree), jax.device_put(rows, split))
    if not missing:
      return out
    # On the host: on several devices it would be a collective operation, which
    # two threads must not start at once.
    return jax.tree.map(lambda x: np.asarray(x)[:num], out)

  return run


def data_parallel_sums(fn: Callable) -> Callable:
  """Returns a jitted `(tree, rows) -> (tree, rows)` over the own devices.

  `fn` runs as on a single device on its share of the rows, and must itself
  reduce the tree that it returns over `DATA_AXIS`. The devices must be able to
  share the rows evenly.
  """
  return jax.jit(
    jax.shard_map(
      fn,
      mesh=_own_mesh(),
      in_specs=(_COPIED, _SPLIT),
      out_specs=(_COPIED, _SPLIT),
      check_vma=False,
    )
  )


def split_rows(rows):
  """Spreads rows over the devices of this process, which share them evenly."""
  return jax.device_put(rows, NamedSharding(_own_mesh(), _SPLIT))


def num_own_devices() -> int:
  """Returns how many devices this process has."""
  return _own_mesh().size


def process_rows(num_rows: int) -> range:
  """Returns this process's share of `num_rows`, in the order of processes."""
  cut = lambda i: num_rows * i // jax.process_count()
  return range(cut(jax.process_index()), cut(jax.process_index() + 1))


def gather(x) -> np.ndarray:
  """Stacks the arrays, all of one shape, that the processes call it with.

  All processes must call it; it returns the same on all of them.
  """
  x = np.asarray(x)
  # As bytes: JAX would make float32 of float64.
  bytes_N = np.frombuffer(x.tobytes(), np.uint8)
  all_bytes = np.asarray(multihost_utils.process_allgather(bytes_N))
  return np.frombuffer(all_bytes.tobytes(), x.dtype).reshape(-1, *x.shape)


def sum_over_processes(tree):
  """Sums the trees of arrays, of equal shapes, that all processes call it with.

  One all-reduce, in the types of the leaves, which must be of 32 bits; every
  process gets the same NumPy arrays. In a single process the tree as it is.
  """
  if jax.process_count() == 1:
    return tree
  first = {device.process_index: device for device in reversed(jax.devices())}
  mesh = Mesh(np.array([first[i] for i in sorted(first)]), (DATA_AXIS,))
  split, copied = (NamedSharding(mesh, spec) for spec in (_SPLIT, _COPIED))
  put = lambda x: jax.make_array_from_process_local_data(
    split, np.asarray(x)[None]
  )
  sum_fn = jax.jit(
    lambda tree: jax.tree.map(lambda x: x.sum(axis=0), tree),
    out_shardings=copied,
  )
  # One computation at a time: others of the same processes must not mix in.
  summed = jax.block_until_ready(sum_fn(jax.tree.map(put, tree)))
  return jax.tree.map(lambda x: np.asarray(x.addressable_data(0)), summed)


def gather_rows(x_N, num_rows: int) -> np.ndarray:
  """Joins the rows `[n, ...]` of all processes' `process_rows(num_rows)`."""
  x_N = np.asarray(x_N)
  longest = -(-num_rows // jax.process_count())
  padding = [(0, longest - len(x_N))] + [(0, 0)] * (x_N.ndim - 1)
  lengths = gather(len(x_N))
  parts = gather(np.pad(x_N, padding))
  return np.concatenate(
    [part[:n] for part, n in zip(parts, lengths, strict=True)]
  )


def check_batch(batch_size: int) -> None:
  """Raises ValueError unless the devices can share a batch evenly."""
  if batch_size % jax.device_count():
    raise ValueError(
      f"The global batch of {batch_size} vectors must be a multiple of the "
      f"{jax.device_count()} devices."
    )
