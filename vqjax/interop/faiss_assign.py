"""How the list of a vector is found: among all centroids, or by a graph."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vqjax import devices
from vqjax.codecs.distances import nearest
from vqjax.interop import faiss_graph, faiss_ivf

ASSIGN = ("auto", "blocks", "hnsw")
_MANY_LISTS = 65536  # From here on a graph is faster, on CPUs.
_BLOCK = 4096


def takes_graph(how: str, num_lists: int) -> bool:
  """Whether vectors find their lists by a graph of the centroids.

  Raises:
    ValueError: `how` is none of `ASSIGN`.
  """
  if how not in ASSIGN:
    raise ValueError(f"assign must be one of {', '.join(ASSIGN)}; got {how!r}.")
  is_many = jax.default_backend() == "cpu" and num_lists >= _MANY_LISTS
  return how == "hnsw" or (how == "auto" and is_many)


def make_assign_fn(
  centroids_LD,
  how: str = "auto",
  *,
  graph_file=None,
  progress: Callable | None = None,
) -> tuple[Callable, int]:
  """Returns `x_ND -> lists_N`, int32, and how many vectors to give it.

  Args:
    centroids_LD: Centroids in data units.
    how: `blocks` compares each vector with all centroids; `hnsw` walks a graph
      of them, which may miss the nearest and takes minutes to make for a
      million; `auto` is the graph for 65,536 lists or more, on CPUs.
    graph_file: Where the graph is kept, see `faiss_graph`; None for nowhere.
    progress: Called with `(lists done, lists in all)` while a graph is made.
  """
  if takes_graph(how, len(centroids_LD)):
    coarse = faiss_graph.find_or_make(
      centroids_LD, graph_file, progress=progress
    )
    return functools.partial(faiss_ivf.assign_lists, coarse), _BLOCK
  assign_fn = devices.data_parallel(
    lambda centroids_LD, x_ND: nearest(x_ND, centroids_LD)
  )
  centroids_LD = devices.to_local_devices(jnp.asarray(centroids_LD))
  num_rows = _BLOCK * jax.local_device_count()
  return functools.partial(assign_fn, centroids_LD), num_rows
