"""Short vectors in lists, whose best results may be scored by whole vectors.

  index = CompressedFastIVF(384, nlist=1024, compression_ndim=96)
  index.train(x)
  scores, ids = index.search(queries, k=100, rescore=True)

Lists are chosen by whole vectors. Those in them are compared by the cosine of
short vectors, which a learned linear map makes. The whole ones are kept too.
"""

import dataclasses
import pathlib

import jax
import numpy as np

from vqjax.codecs import compressor as compressor_lib
from vqjax.core import check_range, check_shape
from vqjax.data import batches, formats
from vqjax.fast_ivf import rescoring
from vqjax.fast_ivf.flat import FastIVF
from vqjax.interop import faiss_fast_ivf, faiss_files, faiss_io
from vqjax.search import flat_lists, flat_scan
from vqjax.storage import tensors
from vqjax.training import compressor_learner

COMPRESSORS = ("network", "hakes")
_MAP = "compressor.safetensors"
_FORMAT = {"format": "vqjax compressor", "version": 1}
_MOST_LEARNED = 100_000  # Vectors among which neighbours are looked for.
_MOST_QUERIES, _NEIGHBOURS = 10_000, 50


class CompressedFastIVF(FastIVF):
  """Inverted lists that are scanned by short vectors.

  Attributes:
    rescore_num_samples: See `search`; may be set at any time.
    compression_ndim, compressor: As given.

  A saved folder has the whole vectors as a plain faiss file, `vectors.faiss`,
  and the map. `write_faiss` writes one that stock faiss searches as this index.
  """

  _file = "vectors.faiss"

  def __init__(
    self,
    ndim: int,
    nlist: int,
    compression_ndim: int,
    nprobe: int = 10,
    ratio_threshold: float | None = 0.0,
    kmeans_batch_size: int = 1024,
    kmeans_tol: float = 5e-5,
    kmeans_max_steps: int = 1000,
    compressor_batch_size: int = 128,
    compressor_steps_per_epoch: int = 2000,
    compressor_epochs: int = 10,
    rescore_num_samples: int = -1,
    *,
    compressor: str = "hakes",
    **settings,
  ):
    """Takes the settings of `BaseIVF`, and of the short vectors.

    Args:
      ndim: D.
      nlist: L, lists.
      compression_ndim: E, numbers of a short vector.
      nprobe: Lists of a query.
      ratio_threshold: Skips lists far behind the best; 0 skips none.
      kmeans_batch_size: Of the lists.
      kmeans_tol: Of the lists.
      kmeans_max_steps: Of the lists.
      compressor_batch_size: Vectors of a step that learns the map.
      compressor_steps_per_epoch: Its steps; -1 for as many as use each vector
        once. "hakes" takes a tenth of them.
      compressor_epochs: How many times as many.
      rescore_num_samples: See `search`.
      compressor: "hakes" learns to keep the order of neighbours, which gives
        more recall; "network" to tell lists, as the FastIVF package does.
      **settings: The keywords of `BaseIVF`.

    Raises:
      ValueError: A value makes no sense.
    """
    super().__init__(
      *(ndim, nlist, nprobe, ratio_threshold, kmeans_batch_size),
      *(kmeans_tol, kmeans_max_steps),
      **settings,
    )
    check_range("compression_ndim", compression_ndim, 1, ndim)
    check_range("compressor_batch_size", compressor_batch_size, 1, 1 << 20)
    check_range("compressor_epochs", compressor_epochs, 1, 1 << 20)
    if compressor_steps_per_epoch != -1:
      check_range(
        "compressor_steps_per_epoch", compressor_steps_per_epoch, 1, 1 << 30
      )
    if compressor not in COMPRESSORS:
      raise ValueError(
        f"compressor must be one of {', '.join(COMPRESSORS)}; got "
        f"{compressor!r}."
      )
    self.compression_ndim, self.compressor = compression_ndim, compressor
    self.compressor_batch_size = compressor_batch_size
    self.compressor_steps_per_epoch = compressor_steps_per_epoch
    self.compressor_epochs = compressor_epochs
    self.rescore_num_samples = rescore_num_samples
    self._map, self._short = None, None

  @property
  def is_trained(self) -> bool:
    """Whether there are lists and a map to add vectors by."""
    return super().is_trained and self._map is not None

  def set_compressor(self, weight_DE, bias_E) -> None:
    """Takes the map `x W + b` from elsewhere."""
    weight_DE = np.asarray(weight_DE, np.float32)
    bias_E = np.asarray(bias_E, np.float32)
    check_shape("weight", weight_DE, (self.ndim, self.compression_ndim))
    check_shape("bias", bias_E, (self.compression_ndim,))
    formats.check_vectors(weight_DE, name="weight")
    formats.check_vectors(bias_E[None], name="bias")
    self._map = compressor_lib.Compressor(weight_DE, bias_E)
    self._short = None

  def compress(self, x) -> np.ndarray:
    """Returns short vectors `[N, E]` of length 1 of vectors `[N, D]`."""
    self._check_trained()
    blocks = [self._shorten(x_ND) for x_ND in self._query_blocks(x)]
    return np.concatenate(
      [np.zeros((0, self.compression_ndim), np.float32), *blocks]
    )

  def search(
    self,
    queries,
    k: int = 100,
    rescore: bool = False,
    sort: bool = True,
    *,
    num_candidates: int | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and ids `[Q, k]` of the best in the lists.

    Without `rescore`, scores are cosines of short vectors, the largest first.
    With it the k found get a score of the metric, exactly or by a straight
    line, see `FastIVFPQ.search`. If a query finds fewer than k, the slots left
    are id -1 at score -inf, inf for distances.

    Args:
      queries: `[Q, D]`, or one query `[D]`.
      k: Results of a query.
      rescore: See above.
      sort: By the new score; False keeps the order of the short vectors.
      num_candidates: How many are found and scored, if more than k; with
        `rescore` and `sort` alone does it change results.

    Raises:
      ValueError: Shapes do not fit, or a number is not finite, or zero under
        the cosine.
    """
    return rescoring.search(
      *(self, queries, k, self._candidates),
      rescore=rescore,
      sort=sort,
      num_candidates=num_candidates,
      is_distance=False,
    )

  def _candidates(self, queries_QD, lists_QP, k: int, *, is_ordered: bool):
    """Cosines of short vectors and slots `[Q, k]`, the largest first."""
    del is_ordered  # They always are.
    short = self._get_short()
    score_fn = lambda queries_QE, slots_QR: faiss_fast_ivf.exact_scores(
      queries_QE, short.x_ND, slots_QR, "ip"
    )
    return flat_scan.search(
      *(short, self._shorten(queries_QD), lists_QP, k, score_fn),
      num_threads=self.num_threads or faiss_fast_ivf.num_threads(),
    )

  def _get_short(self) -> flat_lists.FlatLists:
    """The short vectors, slot by slot; made anew after a change."""
    if self._short is None:
      x_ND = self._lists.x_ND
      blocks = [
        self._shorten(x_ND[start : start + flat_lists.BLOCK])
        for start in range(0, len(x_ND), flat_lists.BLOCK)
      ]
      self._short = dataclasses.replace(
        self._lists,
        x_ND=np.concatenate(
          [np.zeros((0, self.compression_ndim), np.float32), *blocks]
        ),
        ids_N=np.arange(len(x_ND)),  # The slots themselves.
        half_N=None,
        largest=1.0,
      )
    return self._short

  def _shorten(self, x_ND) -> np.ndarray:
    y_NE = x_ND @ self._map.weight_DE + self._map.bias_E
    norm_N1 = np.linalg.norm(y_NE, axis=1, keepdims=True)
    return np.ascontiguousarray(y_NE / np.where(norm_N1 > 0, norm_N1, 1))

  def _fit(self, vectors) -> None:
    """Learns the map."""
    steps = self.compressor_steps_per_epoch
    if steps == -1:
      steps = max(len(vectors) // self.compressor_batch_size, 1)
    shared = {
      "num_epochs": self.compressor_epochs,
      "batch_size": self.compressor_batch_size * jax.local_device_count(),
      "seed": self.seed,
      "is_shown": self.verbose,
    }
    if self.compressor == "network":
      lists_N = self._lists_of_all(vectors)
      found = compressor_learner.fit_network(
        *(vectors, lists_N, self.nlist, self.compression_ndim),
        steps_per_epoch=steps,
        **shared,
      )
    else:
      x_ND = batches.subsample(vectors, _MOST_LEARNED, self.seed)
      rows_Q = batches.evenly_spaced_rows(len(x_ND), _MOST_QUERIES)
      num = min(_NEIGHBOURS, len(x_ND) - 1)
      kind = "l2" if self.metric == "l2" else "ip"
      _, near_QG = faiss_io.knn(x_ND[rows_Q], x_ND, num + 1, kind)
      near_QG = _without(near_QG, rows_Q)
      found = compressor_learner.fit_neighbours(
        *(x_ND, rows_Q, near_QG, self.compression_ndim),
        steps_per_epoch=max(steps // 10, 1),
        **shared,
      )
    self.set_compressor(found.weight_DE, found.bias_E)

  def _lists_of_all(self, vectors) -> np.ndarray:
    blocks = [
      self._best_lists(np.ascontiguousarray(x_nD), 1)[1][:, 0]
      for _, x_nD in batches.map_blocks(
        lambda x_nD: x_nD, vectors, block_size=flat_lists.BLOCK
      )
    ]
    return np.concatenate(blocks).astype(np.int32)

  def _added(self, lists_N, read_fn) -> None:
    del lists_N, read_fn
    self._short = None

  def _removed(self) -> None:
    self._short = None

  def to_faiss(self):
    """Returns a copy as an index of stock faiss, whose results are the same.

    Scores are larger by the length of the short query. It is an
    `IVF{L},Flat` behind a linear map of queries to D + E dimensions: lists are
    found by the first D, where stored vectors are zero. So it takes more memory
    than this index.

    Raises:
      ValueError: The index is not trained.
    """
    self._check_trained()
    short = self._get_short()
    parts = (
      (number, ids_n, short.x_ND[short.starts[number] :][: len(ids_n)])
      for number, ids_n, _ in flat_lists.parts(self._lists)
    )
    index = faiss_fast_ivf.make_joined(
      self.centroids, parts, self._map.weight_DE, self._map.bias_E, self.metric
    )
    faiss_fast_ivf.set_nprobe(index, min(self.nprobe, self.nlist))
    return index

  def _write(self, folder: pathlib.Path) -> None:
    """The whole vectors as `FastIVF` has them, and the map."""
    info = {"num_vectors": len(self), "dim": self.ndim, "metric": self.metric}
    faiss_files.save(
      super().to_faiss(), folder / self._file, info, kind=faiss_fast_ivf.KIND
    )
    arrays, static = tensors.flatten(self._map)
    tensors.save(
      folder / _MAP, arrays, static, overwrite=False, info={}, **_FORMAT
    )

  def _restore(self, path) -> None:
    super()._restore(path)
    _, arrays = tensors.load(
      path.parent / _MAP,
      what="a compressor",
      missing="save makes one.",
      **_FORMAT,
    )
    self.set_compressor(arrays["weight_DE"], arrays["bias_E"])

  def _settings(self) -> dict:
    names = (
      *("compression_ndim", "compressor", "compressor_batch_size"),
      *("compressor_steps_per_epoch", "compressor_epochs"),
      "rescore_num_samples",
    )
    return super()._settings() | {name: getattr(self, name) for name in names}

  @property
  def bytes_per_vector(self) -> dict[str, float]:
    """Bytes of a vector in memory and on disk, with all that it takes."""
    found, num = super().bytes_per_vector, max(len(self), 1)
    short = self._get_short()
    each = (short.x_ND.nbytes + short.ids_N.nbytes) / num
    of_map = (self._map.weight_DE.nbytes + self._map.bias_E.nbytes) / num
    return {
      "ram": found["ram"] + each + of_map,
      "disk": found["disk"] + of_map,
    }


def _without(near_QG: np.ndarray, rows_Q: np.ndarray) -> np.ndarray:
  """Neighbours less the query itself, or less the last if it is not there."""
  is_other_QG = near_QG != rows_Q[:, None]
  is_other_QG[is_other_QG.all(axis=1), -1] = False
  return near_QG[is_other_QG].reshape(len(rows_Q), -1)
