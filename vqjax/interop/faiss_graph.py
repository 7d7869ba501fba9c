"""The graph of the centroids, made once and kept in a file.

With many lists it takes minutes to make. Training writes it into the run
folder; whoever encodes with that codec or builds an index of it reads it there.
"""

import pathlib

import faiss
import numpy as np
from absl import logging

from vqjax.data import files
from vqjax.interop import faiss_files, faiss_lists

NAME = "centroids.graph.faiss"  # Next to centroids.npy.
_KIND = ("vqjax graph of centroids", 1)
_ROUNDING = 1e-5  # Of the largest number: centroids in and out of a codec.


def path_of(folder) -> pathlib.Path | None:
  """Where a run folder keeps its graph; None if it has no lists."""
  folder = pathlib.Path(folder)
  if folder.is_file():
    folder = folder.parent
  return folder / NAME if (folder / "centroids.npy").is_file() else None


def find_or_make(
  centroids_LD: np.ndarray, path=None, *, progress=None
) -> faiss.Index:
  """Returns a graph of the centroids, from the file if it has it.

  Else makes it, and writes the file. None as the path keeps nothing.

  Args:
    centroids_LD: Centroids, in data units.
    path: File of `path_of`.
    progress: Called with `(lists done, lists in all)` while a graph is made.

  Raises:
    ValueError: The file is damaged.
  """
  graph = None if path is None else _find(centroids_LD, pathlib.Path(path))
  if graph is not None:
    return faiss_lists.move(graph, centroids_LD)
  graph = faiss_lists.make_coarse(centroids_LD, "hnsw", progress=progress)
  if path is not None:
    try:
      faiss_files.save(graph, path, {}, kind=_KIND, overwrite=True)
    except PermissionError as error:
      logging.info("The graph of the lists is not kept: %s.", error)
  return graph


def _find(centroids_LD, path: pathlib.Path):
  """The graph in the file; None if there is none, or it is of others."""
  if not (path.is_file() and files.description_path(path).is_file()):
    return None
  graph, _ = faiss_files.load(path, kind=_KIND)
  if (graph.ntotal, graph.d) != centroids_LD.shape:
    return None
  found_LD = graph.reconstruct_n(0, graph.ntotal)
  most = _ROUNDING * float(np.abs(centroids_LD).max())
  is_same = np.allclose(found_LD, centroids_LD, rtol=0, atol=most)
  return graph if is_same else None
