"""The lists of an IVF model in training: their centroids, who is in which.

Both are made once, before the first step, and lie in the run folder, so that a
resumed run uses the same: `centroids.npy` float32 `[L, D]` in data
units and `lists.npy` int32 `[N]`, the list of every training vector; if lists
are found by a graph of the centroids, `centroids.graph.faiss` too. Next to
each, in `*.npy.json`, is what it was made of; until the first checkpoint it is
made anew if that has changed.
"""

import contextlib
import pathlib
import shlex

import numpy as np
from absl import logging

from vqjax import devices
from vqjax.core import check_range
from vqjax.data import (
  batches,
  files,
  formats,
  numpy_files,
  unit,
)
from vqjax.interop import faiss_assign, faiss_graph, faiss_io
from vqjax.progress import progress

_PER_LIST = 256  # Vectors that k-means looks at, for each list.
_MOST_LISTS = 1 << 16  # K-means in memory; 8 GiB for 128 dimensions.


def prepare(config, workdir: pathlib.Path, xt_ND, num_rows: int):
  """Returns the centroids, and the vectors `[N, D]` with their lists.

  Without lists in the configuration: None, and the vectors as they are.
  """
  if not (config.ivf.num_lists or config.ivf.centroids):
    return None, xt_ND
  data = {"num_vectors": len(xt_ND), **files.identify(xt_ND)}
  source, make_fn = _centroids(config, xt_ND, num_rows)
  centroids_LD = _kept(workdir / "centroids.npy", source | data, make_fn)
  lists_N = _kept(
    workdir / "lists.npy",
    {"assign": config.ivf.assign, "centroids": _identify(centroids_LD)} | data,
    lambda: _assign(config, xt_ND, centroids_LD, workdir / faiss_graph.NAME),
  )
  return np.asarray(centroids_LD), batches.WithLists(xt_ND, lists_N)


def _kept(path: pathlib.Path, made_of: dict, make_fn) -> np.ndarray:
  """Opens the array of a file, which is made unless it is there already.

  Raises:
    ValueError: The training has begun with it, and it is of something else or
      damaged.
  """
  try:
    is_made = files.find_made(path, made_of) is not None
  except (FileExistsError, ValueError) as error:
    if (path.parent / "checkpoints").exists():
      raise ValueError(_refusal(path, error)) from error
    is_made = False
  devices.gather(0)  # All have looked.
  if devices.is_first() and not is_made:
    array, described = make_fn(), dict(made_of)
    with (
      files.atomic_output(path, True, description=described) as temporary,
      open(temporary, "wb") as file,
    ):
      np.save(file, array)
  devices.gather(0)  # It is there for all.
  return numpy_files.open_array(path)


def _refusal(path: pathlib.Path, error: Exception) -> str:
  """What to do about an array that is not the one the training began with."""
  said, is_other, _ = str(error).partition("; choose another name")
  if is_other:
    return (
      f"{said}, and the training has begun with it: use the same data and "
      "configuration, or choose another --workdir."
    )
  return (
    f"{said} Or remove {path} and {files.description_path(path).name} next to "
    "it: the same command makes them again."
  )


def _identify(centroids_LD) -> dict:
  return {"num_lists": len(centroids_LD), **files.identify(centroids_LD)}


def _centroids(config, xt_ND, num_rows: int):
  """What the centroids are of, and a function that returns them.

  Those of the file that was named, else of k-means.
  """
  ivf, dim = config.ivf, xt_ND.shape[1]
  if ivf.centroids:
    centroids_LD = formats.open_vectors(ivf.centroids)
    formats.check_vectors(centroids_LD, dim=dim, name=ivf.centroids)
    if ivf.num_lists not in (0, len(centroids_LD)):
      raise ValueError(
        f"{ivf.centroids} has {len(centroids_LD)} centroids, but "
        f"--config.ivf.num_lists is {ivf.num_lists}; set it to 0 to "
        "take what the file has."
      )
    _check_unit(ivf.centroids, centroids_LD, xt_ND)
    source = {"file": _identify(centroids_LD)}
    return source, lambda: np.asarray(centroids_LD, np.float32)
  check_range(
    "--config.ivf.num_lists", ivf.num_lists, 2, num_rows, "training vectors"
  )
  _check_memory(config, num_rows)
  knobs = dict(num_iterations=ivf.num_iterations, seed=config.seed)
  source = {"num_lists": ivf.num_lists, "num_rows": num_rows, **knobs}
  return source, lambda: _fit(xt_ND, ivf.num_lists, num_rows, knobs)


def _check_unit(path, centroids_LD, xt_ND) -> None:
  """Raises ValueError if they cannot be means of vectors of length 1."""
  norm = float(np.linalg.norm(centroids_LD, axis=1).max())
  if isinstance(xt_ND, unit.UnitVectors) and norm > 1.001:
    raise ValueError(
      f"{path} has a centroid of length {norm:.4g}, but for the cosine vectors "
      "are of length 1; make it with ivf_centroids --metric=cosine."
    )


def _check_memory(config, num_rows: int) -> None:
  """Raises ValueError if k-means would need too many vectors at once."""
  num_lists = config.ivf.num_lists
  if num_lists > _MOST_LISTS:
    data = shlex.quote(str(config.data.train or "TRAINING-VECTORS"))
    raise ValueError(
      f"For {num_lists} lists, more than {_MOST_LISTS}, training does not find "
      "the centroids itself. Make them with "
      f"vqjax ivf_centroids --data={data} --num_vectors={num_rows} "
      f"--num_centroids={num_lists} --output=centroids.npy, and set "
      "--config.ivf.centroids=centroids.npy."
    )


def _fit(xt_ND, num_lists: int, num_rows: int, knobs: dict) -> np.ndarray:
  """Centroids by k-means over a sample in memory."""
  num = _PER_LIST * num_lists
  x_ND = batches.subsample(xt_ND, num, knobs["seed"], num_rows=num_rows)
  logging.info("k-means: %d centroids of %d vectors.", num_lists, len(x_ND))
  return faiss_io.fit_kmeans(x_ND, num_lists, **knobs)


def _assign(config, xt_ND, centroids_LD, graph_file) -> np.ndarray:
  """The list of every training vector, int32 `[N]`."""
  how, num_lists = config.ivf.assign, len(centroids_LD)
  is_graph = faiss_assign.takes_graph(how, num_lists)
  line = progress(num_lists, "graph", unit="list")
  with line if is_graph else contextlib.nullcontext() as done:
    assign_fn, block_size = faiss_assign.make_assign_fn(
      centroids_LD, how, graph_file=graph_file, progress=done
    )
  with progress(len(xt_ND), "lists") as done:
    blocks = batches.map_blocks(
      assign_fn, xt_ND, block_size=block_size, progress=done
    )
    return np.concatenate([lists_N for _, lists_N in blocks])
