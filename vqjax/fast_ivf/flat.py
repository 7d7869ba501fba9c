"""Whole vectors in lists: those in the lists of a query are compared exactly.

index = FastIVF(384, nlist=1024)
index.train(x)
scores, ids = index.search(queries, k=10)
"""

import functools

import numpy as np

from vqjax.fast_ivf.base import BaseIVF
from vqjax.interop import faiss_fast_ivf
from vqjax.search import flat_lists, flat_scan


class FastIVF(BaseIVF):
  """Inverted lists of whole vectors; see `BaseIVF` for the settings."""

  def search(self, queries, k: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and ids `[Q, k]` of the best in the lists, best first.

    Scores are inner products, cosines, or for "l2" squared distances. Of equal
    ones the lower id comes first. If a query finds fewer than k, the slots left
    are id -1 at score -inf, inf for "l2".

    `queries` are `[Q, D]`, or one query `[D]`.

    Raises:
      ValueError: Shapes do not fit, or a number is not finite, or zero under
        the cosine.
    """
    return self._search(queries, k, self._find, is_distance=self.metric == "l2")

  def _find(self, queries_QD, lists_QP, k: int):
    scores_QK, ids_QK = flat_scan.search(
      *(self._lists, queries_QD, lists_QP, k, self._score),
      num_threads=self.num_threads or faiss_fast_ivf.num_threads(),
    )
    return (-scores_QK if self.metric == "l2" else scores_QK), ids_QK

  def _score(self, queries_QD, slots_QR):
    return faiss_fast_ivf.exact_scores(
      queries_QD, self._lists.x_ND, slots_QR, self.metric
    )

  def to_faiss(self):
    """Returns a copy as an `IVF{L},Flat` of stock faiss.

    Its `nprobe` is that of this index. For the cosine it makes vectors and
    queries of length 1 by itself.

    Raises:
      ValueError: The index is not trained.
    """
    self._check_trained()
    index = faiss_fast_ivf.make_flat(
      self.centroids, flat_lists.parts(self._lists), self.metric
    )
    faiss_fast_ivf.set_nprobe(index, min(self.nprobe, self.nlist))
    return index

  def _restore(self, path) -> None:
    found = faiss_fast_ivf.read_flat(path, self.metric)
    self.set_centroids(found.centroids_LD)
    flat_lists.add(
      self._lists,
      np.repeat(np.arange(self.nlist, dtype=np.int32), found.sizes_L),
      found.ids_N,
      functools.partial(faiss_fast_ivf.read_rows, found),
    )

  @property
  def bytes_per_vector(self) -> dict[str, float]:
    """Bytes of a vector in memory and on disk, ids and centroids included."""
    self._check_trained()
    num = max(len(self), 1)
    return {
      "ram": (self._lists.num_bytes + 2 * self.centroids.nbytes) / num,
      "disk": faiss_fast_ivf.flat_bytes(len(self), self.nlist, self.ndim) / num,
    }
