"""The lists of an IVF model in training: their centroids, who is in which.

Both are made once, before the first step, and lie in the run folder, so that a
resumed run goes on with the same: `centroids.npy` float32 `[L, D]` in data
units and `lists.npy` int32 `[N]`, the list of every training vector.
"""

import pathlib

import numpy as np
from absl import logging

from experiments import codecs, common
from vqjax import devices
from vqjax.core import check_range
from vqjax.data import batches, formats
from vqjax.interop import faiss_io

_PER_LIST = 256  # Vectors that k-means looks at, for each list.


def prepare(config, workdir: pathlib.Path, xt_ND, num_rows: int):
  """Returns the centroids, and the vectors `[N, D + 1]` with their list last.

  Without lists in the configuration: None, and the vectors as they are.
  """
  if not (config.ivf.num_lists or config.ivf.centroids):
    return None, xt_ND
  paths = workdir / "centroids.npy", workdir / "lists.npy"
  if devices.is_first():
    if not paths[0].exists():
      centroids_LD = _centroids(config, xt_ND, num_rows)
      _save(paths[0], centroids_LD)
    if not paths[1].exists():
      _save(paths[1], _assign(config, xt_ND, np.load(paths[0])))
  devices.gather(0)  # They are there for all.
  centroids_LD, lists_N = np.load(paths[0]), np.load(paths[1], mmap_mode="r")
  if len(lists_N) != len(xt_ND):
    raise ValueError(
      f"{paths[1]} is of {len(lists_N)} vectors, the training file has "
      f"{len(xt_ND)}; start again in another --workdir."
    )
  return centroids_LD, batches.WithColumn(xt_ND, lists_N)


def split(x_NE):
  """Takes vectors with their list apart: `[N, D]`, and int32 `[N]`."""
  return x_NE[:, :-1], x_NE[:, -1].astype(np.int32)


def _centroids(config, xt_ND, num_rows: int) -> np.ndarray:
  """Those of the file that was named, else of k-means."""
  ivf, dim = config.ivf, xt_ND.shape[1]
  if ivf.centroids:
    centroids_LD = formats.open_vectors(ivf.centroids)
    formats.check_vectors(centroids_LD, dim=dim, name=ivf.centroids)
    if ivf.num_lists not in (0, len(centroids_LD)):
      raise ValueError(
        f"{ivf.centroids} has {len(centroids_LD)} centroids, but "
        f"ivf.num_lists is {ivf.num_lists}; set --config.ivf.num_lists=0 to "
        "take what the file has."
      )
    return np.asarray(centroids_LD, np.float32)
  check_range("ivf.num_lists", ivf.num_lists, 2, num_rows, "training vectors")
  x_ND = batches.subsample(
    xt_ND, _PER_LIST * ivf.num_lists, config.seed, num_rows=num_rows
  )
  logging.info("k-means: %d centroids of %d vectors.", ivf.num_lists, len(x_ND))
  return faiss_io.fit_kmeans(
    x_ND, ivf.num_lists, num_iterations=ivf.num_iterations, seed=config.seed
  )


def _assign(config, xt_ND, centroids_LD) -> np.ndarray:
  """The list of every training vector, int32 `[N]`."""
  assign_fn, block_size = codecs.make_assign_fn(centroids_LD, config.ivf.assign)
  with common.progress(len(xt_ND), "lists") as done:
    blocks = batches.map_blocks(
      assign_fn, xt_ND, block_size=block_size, progress=done
    )
    return np.concatenate([lists_N for _, lists_N in blocks])


def _save(path, array) -> None:
  with (
    formats.atomic_output(path, overwrite=True) as temporary,
    open(temporary, "wb") as file,
  ):
    np.save(file, array)
