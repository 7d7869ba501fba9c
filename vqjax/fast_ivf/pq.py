"""Product codes in lists, whose best results may be scored exactly.

  index = FastIVFPQ(384, nlist=1024, pq_num_centroids=16, pq_num_subvectors=96,
                    engine="fastscan")
  index.train(x)
  scores, ids = index.search(queries, k=100, rescore=True)

Codes are of vectors, not of residuals. The whole vectors are kept too.
"""

import numpy as np

from vqjax.core import check_range, check_shape
from vqjax.data import batches
from vqjax.fast_ivf import rescoring
from vqjax.fast_ivf.base import BaseIVF
from vqjax.fast_ivf.kmeans import SubvectorsMiniBatchKMeans
from vqjax.interop import faiss_fast_pq
from vqjax.search import flat_lists

_TRAININGS = ("faiss", "minibatch")


class FastIVFPQ(BaseIVF):
  """Inverted lists of product codes.

  Attributes:
    rescore_num_samples: See `search`; may be set at any time.
    pq_kmeans: Has the codebooks, `[M, K, D / M]`, as `centroids`.
    pq_num_centroids, pq_num_subvectors, engine, pq_training: As given.
  """

  def __init__(
    self,
    ndim: int,
    nlist: int,
    nprobe: int = 10,
    ratio_threshold: float | None = 0.0,
    pq_num_centroids: int = 128,
    pq_num_subvectors: int = 32,
    kmeans_batch_size: int = 1024,
    kmeans_tol: float = 5e-5,
    kmeans_max_steps: int = 1000,
    kmeans_pq_batch_size: int = 128,
    kmeans_pq_max_steps: int = 1000,
    rescore_num_samples: int = -1,
    *,
    engine: str = "tables",
    pq_training: str = "faiss",
    **settings,
  ):
    """Takes the settings of `BaseIVF`, and of the codes.

    Args:
      ndim: D.
      nlist: L, lists.
      nprobe: Lists of a query.
      ratio_threshold: Skips lists far behind the best; 0 skips none.
      pq_num_centroids: K, codewords of a sub-vector.
      pq_num_subvectors: M, which divides D.
      kmeans_batch_size: Of the lists.
      kmeans_tol: Of the lists, and of the codes by "minibatch".
      kmeans_max_steps: Of the lists.
      kmeans_pq_batch_size: Of the codes by "minibatch".
      kmeans_pq_max_steps: Of the codes by "minibatch".
      rescore_num_samples: See `search`.
      engine: "tables" adds up exact numbers; "fastscan" rounds them to bytes,
        which is several times faster and needs K = 16, and costs little recall
        if results are scored exactly.
      pq_training: "faiss" is the better one for the same time; "minibatch" is
        that of the FastIVF package.
      **settings: The keywords of `BaseIVF`.

    Raises:
      ValueError: A value makes no sense.
    """
    super().__init__(
      *(ndim, nlist, nprobe, ratio_threshold, kmeans_batch_size),
      *(kmeans_tol, kmeans_max_steps),
      **settings,
    )
    check_range("pq_num_centroids", pq_num_centroids, 1, 1 << 16)
    check_range("pq_num_subvectors", pq_num_subvectors, 1, ndim)
    if ndim % pq_num_subvectors:
      raise ValueError(
        f"pq_num_subvectors must divide the {ndim} dimensions, got "
        f"{pq_num_subvectors}."
      )
    faiss_fast_pq.check_engine(engine, pq_num_centroids)
    if pq_training not in _TRAININGS:
      raise ValueError(
        f"pq_training must be one of {', '.join(_TRAININGS)}; got "
        f"{pq_training!r}."
      )
    self.pq_num_centroids = pq_num_centroids
    self.pq_num_subvectors = pq_num_subvectors
    self.rescore_num_samples = rescore_num_samples
    self.engine, self.pq_training = engine, pq_training
    self.pq_kmeans = SubvectorsMiniBatchKMeans(
      *(pq_num_centroids, pq_num_subvectors, kmeans_pq_batch_size),
      max_steps=kmeans_pq_max_steps,
      tol=kmeans_tol,
      metric="l2",
      seed=self.seed,
      verbose=self.verbose,
    )
    self._codes = None

  @property
  def is_trained(self) -> bool:
    """Whether there are lists and codebooks to add vectors to."""
    return super().is_trained and self.pq_kmeans.centroids is not None

  @property
  def codebooks(self) -> np.ndarray | None:
    """Codewords `[M, K, D / M]`; None before training."""
    return self.pq_kmeans.centroids

  def set_codebooks(self, codebooks_MKS) -> None:
    """Takes codewords `[M, K, D / M]` from elsewhere, for an empty index."""
    m, k = self.pq_num_subvectors, self.pq_num_centroids
    check_shape("codebooks", codebooks_MKS, (m, k, self.ndim // m))
    if len(self):
      raise ValueError("Codebooks can be set of an empty index only.")
    self.pq_kmeans._words_MKS = np.ascontiguousarray(codebooks_MKS, np.float32)
    self._codes = None

  def search(
    self,
    queries,
    k: int = 100,
    rescore: bool = False,
    sort: bool = True,
    *,
    num_candidates: int | None = None,
  ) -> tuple[np.ndarray, np.ndarray]:
    """Returns scores and ids `[Q, k]` of the best codes in the lists.

    Without `rescore`, scores are squared distances to decoded vectors, least
    first. With it the k found get a score of the metric:

    - exactly, if `rescore_num_samples` is 0 or less, or at least k;
    - else by the straight line through the exact scores of about so many of
      them, clipped to 0 to 1 for the cosine.

    If a query finds fewer than k, the slots left are id -1 at score -inf, inf
    for distances.

    Args:
      queries: `[Q, D]`, or one query `[D]`.
      k: Results of a query.
      rescore: See above.
      sort: By the new score; False keeps the order of the codes.
      num_candidates: Codes that are found and scored, if more than k; with
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
      is_distance=True,
    )

  def to_faiss(self):
    """Returns a copy as an index of stock faiss, `IDMap,IVF{L},PQ..,RFlat`.

    It finds k codes and scores them exactly: the search with `rescore`. Its
    part `base_index` searches as without. Their `nprobe` is that of this index.

    Raises:
      ValueError: The index is not trained.
    """
    self._check_trained()
    used_N = flat_lists.used_slots(self._lists)
    first_L = np.cumsum(self._lists.sizes_L) - self._lists.sizes_L
    return faiss_fast_pq.export(
      self._get_codes(),
      lambda lists_n, places_n: first_L[lists_n] + places_n,
      self._lists.x_ND[used_N],
      self._lists.ids_N[used_N],
      self.metric,
      min(self.nprobe, self.nlist),
    )

  @property
  def bytes_per_vector(self) -> dict[str, float]:
    """Bytes of a vector in memory and on disk, with all that it takes.

    That is codes, whole vectors, ids of both, codewords and centroids.
    """
    self._check_trained()
    num = max(len(self), 1)
    codes = faiss_fast_pq.num_bytes(self._get_codes())
    ram = codes + self._lists.num_bytes + 2 * self.centroids.nbytes
    disk = codes + len(self) * (4 * self.ndim + 8)
    return {"ram": ram / num, "disk": disk / num}

  def _candidates(self, queries_QD, lists_QP, k: int, *, is_ordered: bool):
    """Squared distances to decoded vectors and slots `[Q, k]`, least first.

    Of equal distances the lower id comes first, if they are to be `is_ordered`.
    With tables none is lost: more
    codes are asked for while the last one is as near as the k-th.
    """
    has_more = self.engine == "tables" and k < len(self)
    wanted = k + has_more
    distances_QK, slots_QK = self._scan(queries_QD, lists_QP, wanted)
    cut = lambda *found: _by_lower_id(
      *found, self._lists, k, is_ordered=is_ordered
    )
    is_open_Q = _is_open(distances_QK, k) if has_more else np.zeros(0, bool)
    open_q = np.flatnonzero(is_open_Q)
    distances_QK, slots_QK = cut(distances_QK, slots_QK)
    while len(open_q):
      wanted = min(4 * wanted, len(self))
      found = self._scan(queries_QD[open_q], lists_QP[open_q], wanted)
      distances_QK[open_q], slots_QK[open_q] = cut(*found)
      if wanted == len(self):
        break
      open_q = open_q[_is_open(found[0], k)]
    return distances_QK, slots_QK

  def _scan(self, queries_QD, lists_QP, k: int):
    distances_QK, lists_QK, places_QK = faiss_fast_pq.search(
      self._get_codes(), queries_QD, lists_QP, k
    )
    slots_QK = self._lists.starts[lists_QK] + places_QK
    return distances_QK, np.where(lists_QK < 0, -1, slots_QK)

  def _get_codes(self):
    """The codes of faiss, made empty if there are none."""
    if self._codes is None:
      self._codes = faiss_fast_pq.make_codes(
        self.centroids, self.codebooks, self.metric, self.engine
      )
    return self._codes

  def set_centroids(self, centroids_LD) -> None:
    """See `BaseIVF.set_centroids`."""
    super().set_centroids(centroids_LD)
    self._codes = None

  def _check_training(self, vectors) -> None:
    super()._check_training(vectors)
    check_range(
      *("pq_num_centroids", self.pq_num_centroids, 1, len(vectors)),
      f"{len(vectors)} vectors to learn from",
    )

  def _fit(self, vectors) -> None:
    """Learns the codebooks."""
    if self.pq_training == "minibatch":
      self.pq_kmeans.train(vectors)
      return
    num = faiss_fast_pq.num_training(self.pq_num_centroids)
    sample_ND = batches.subsample(vectors, num, self.seed)
    self.set_codebooks(
      faiss_fast_pq.fit_codebooks(
        *(sample_ND, self.pq_num_subvectors, self.pq_num_centroids),
        seed=self.seed,
      )
    )

  def _added(self, lists_N, read_fn) -> None:
    places_N = flat_lists.places_of_last(self._lists, lists_N)
    for start in range(0, len(lists_N), flat_lists.BLOCK):
      rows = slice(start, min(start + flat_lists.BLOCK, len(lists_N)))
      x_nD = read_fn(rows.start, rows.stop)
      faiss_fast_pq.add(self._get_codes(), x_nD, lists_N[rows], places_N[rows])

  def _removed(self) -> None:
    """Encodes what is left anew: places in the lists have changed."""
    self._codes = None
    for number, _, x_nD in flat_lists.parts(self._lists):
      places_n = np.arange(len(x_nD))
      lists_n = np.full(len(x_nD), number)
      faiss_fast_pq.add(self._get_codes(), x_nD, lists_n, places_n)

  def _settings(self) -> dict:
    names = (
      *("pq_num_centroids", "pq_num_subvectors", "rescore_num_samples"),
      *("engine", "pq_training"),
    )
    return super()._settings() | {
      "kmeans_pq_batch_size": self.pq_kmeans.batch_size,
      "kmeans_pq_max_steps": self.pq_kmeans.max_steps,
      **{name: getattr(self, name) for name in names},
    }

  def _restore(self, path) -> None:
    found = faiss_fast_pq.read(path, self.engine)
    self.set_centroids(found.centroids_LD)
    self.set_codebooks(
      faiss_fast_pq.codebooks_of(found.codes, self.pq_num_centroids)
    )
    flat_lists.add(
      *(self._lists, found.lists_N, found.ids_N),
      lambda start, stop: found.x_ND[start:stop],
    )
    places_N = flat_lists.places_of_last(self._lists, found.lists_N)
    self._codes = faiss_fast_pq.place(found, found.lists_N, places_N)


def _is_open(distances_QR, k: int) -> np.ndarray:
  """Whether there may be more codes as near as the k-th, behind the last."""
  last_Q = distances_QR[:, -1]
  return np.isfinite(last_Q) & (last_Q == distances_QR[:, k - 1])


def _by_lower_id(distances_QR, slots_QR, lists, k: int, *, is_ordered: bool):
  """The k least distances and their slots, of equal ones the lower ids.

  Unless they are to be ordered, it is enough that they are the right ones.
  """
  is_equal_QR = distances_QR[:, 1:] == distances_QR[:, :-1]
  if not is_ordered:
    is_equal_QR = is_equal_QR[:, k - 1 : k]
  rows = np.flatnonzero(is_equal_QR.any(axis=1))
  ids_qR = lists.ids_N[slots_QR[rows]] if len(rows) else slots_QR[rows]
  order_qR = np.lexsort((ids_qR, distances_QR[rows]), axis=1)
  for array in (distances_QR, slots_QR):
    array[rows] = np.take_along_axis(array[rows], order_qR, axis=1)
  return distances_QR[:, :k], slots_QR[:, :k]
