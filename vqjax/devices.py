"""One mesh over all devices of all processes: data sharded, params copied."""

import functools

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = "data"


@functools.cache
def data_mesh() -> Mesh:
  """Returns the one-axis mesh over every device of every process."""
  return jax.make_mesh(
    (jax.device_count(),), (DATA_AXIS,), axis_types=(AxisType.Auto,)
  )


def shard(x):
  """Spreads this process's rows of a global batch over its devices."""
  sharding = NamedSharding(data_mesh(), PartitionSpec(DATA_AXIS))
  put = functools.partial(jax.make_array_from_process_local_data, sharding)
  return jax.tree.map(lambda leaf: put(np.asarray(leaf)), x)


def replicate(tree):
  """Copies a tree of arrays to every device."""
  return jax.device_put(tree, NamedSharding(data_mesh(), PartitionSpec()))


def abstract(tree):
  """Returns shapes and dtypes of a tree, placed as `replicate` would."""
  sharding = NamedSharding(data_mesh(), PartitionSpec())
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )


def check_batch(batch_size: int) -> None:
  """Raises ValueError unless the devices can share a batch evenly."""
  if batch_size % jax.device_count():
    raise ValueError(
      f"The global batch of {batch_size} vectors must be a multiple of the "
      f"{jax.device_count()} devices."
    )
