"""Mini-batch k-means with the API of the FastIVF package.

  kmeans = MiniBatchKMeans(num_centroids=1024, batch_size=1024, metric="l2")
  kmeans.train(x)  # an array, a memory map, a file, or an iterator of batches
  labels = kmeans.predict(x)

The rules are in `vqjax.codecs.minibatch_kmeans`. Other than there, batches of
an array walk through it in random order, so that no vector comes twice before
all have come, and the seed alone decides it; closing passes over an array move
each centroid to the mean of all vectors that it is nearest to.
"""

import contextlib
import functools
import itertools
import warnings

import jax
import numpy as np

from vqjax import progress as progress_lib
from vqjax.codec import open_array
from vqjax.codecs import minibatch_kmeans, minibatch_training
from vqjax.core import check_range
from vqjax.data import batches, formats, unit
from vqjax.fast_ivf import sources

_BLOCK = 16384  # Vectors that are labelled at once.


class _MiniBatchKMeans:
  """What k-means of vectors and of sub-vectors have in common."""

  _num_subvectors = 1

  def __init__(
    self,
    num_centroids: int,
    batch_size: int,
    history_size: int = 10,
    max_steps: int = 5000,
    tol: float = 5e-5,
    min_max_ratio_threshold: float = 0.005,
    metric: str = "cosine",
    *,
    seed: int = 0,
    closing_passes: int = 2,
    allow_fewer: bool = False,
    verbose: bool = True,
  ):
    """Takes the settings; nothing is computed yet.

    Args:
      num_centroids: K.
      batch_size: Vectors of a step.
      history_size: Steps until a batch is labelled again.
      max_steps: Steps at most.
      tol: Training stops when the smoothed share of changed labels is below.
      min_max_ratio_threshold: The fullest cluster is halved for the emptiest if
        the count of the latter is at most this share of the former's.
      metric: "cosine" (vectors are taken as they are, centroids have length 1)
        or "l2".
      seed: The same seed draws the same batches of an array.
      closing_passes: Passes over all vectors of an array at the end; with 0
        the centroids are those of the last step. An iterator has none. With
        vectors in memory more passes and fewer steps lead to lower errors in
        less time, as max_steps=0 and closing_passes=8.
      allow_fewer: Take as many centroids as there are vectors, if fewer.
      verbose: Show progress on standard error.

    Raises:
      ValueError: A value makes no sense.
    """
    check_range("num_centroids", num_centroids, 1, 1 << 24)
    check_range("batch_size", batch_size, 1, 1 << 24)
    check_range("max_steps", max_steps, 0, 10**9)
    check_range("seed", seed, 0, 2**63 - 1)
    check_range("closing_passes", closing_passes, 0, 10_000)
    self.num_centroids, self.batch_size = num_centroids, batch_size
    self.history_size, self.max_steps = history_size, max_steps
    self.tol, self.metric = tol, metric
    self.min_max_ratio_threshold = min_max_ratio_threshold
    self.seed, self.closing_passes = seed, closing_passes
    self.allow_fewer, self.verbose = allow_fewer, verbose
    self._words_MKS = None
    self._history, self.splits, self.num_steps = [], [], 0
    self._parts, self._codes = [], None
    _ = self._rule  # Refuses what makes no sense.

  @property
  def _rule(self) -> minibatch_kmeans.Rule:
    return minibatch_kmeans.Rule(
      self.metric,
      self._num_subvectors,
      self.history_size,
      self.min_max_ratio_threshold,
    )

  @property
  def _is_cosine(self) -> bool:
    return self.metric == "cosine"

  def train(self, data) -> list[float]:
    """Finds the centroids; returns the smoothed shares of changed labels.

    `data` is an array or memory map `[N, D]`, the path of a file of vectors,
    or an iterator of batches `[n, D]`, of which up to 16 are taken ahead. If
    that ends too early, a warning says so. Training begins anew each time.

    Raises:
      ValueError: There are fewer vectors than centroids, or one is not finite,
        or zero under the cosine, or M does not divide the dimensions.
      TypeError: It is none of these, or holds no numbers.
    """
    if sources.is_iterator(data):
      stream, vectors = sources.take(data, no_zeros=self._is_cosine), None
    else:
      vectors = sources.open_vectors(data)
      if not self.allow_fewer:
        sources.check_enough(len(vectors), self.num_centroids)
      sources.check(vectors, no_zeros=self._is_cosine)
      stream = sources.draw(
        vectors, self.seed, self.batch_size, no_zeros=self._is_cosine
      )
    with contextlib.closing(stream):
      run = self._run(stream, len(vectors) if vectors is not None else None)
    words_MKS = run.words_MKS
    if vectors is not None:
      words_MKS = self._close(vectors, words_MKS)
    self._words_MKS, self.num_centroids = words_MKS, words_MKS.shape[1]
    self._history, self.num_steps = list(run.history), run.num_steps
    self.splits = list(run.splits)
    self._parts, self._codes = [], None
    return self._history

  def _run(self, stream, num_vectors: int | None) -> minibatch_training.Run:
    """Steps until they have converged, or no batch is left."""
    wanted = min(self.num_centroids, num_vectors or self.num_centroids)
    first_KD = sources.first_vectors(
      stream, wanted, allow_fewer=self.allow_fewer
    )
    run = minibatch_training.begin(self._rule, first_KD, self.batch_size)
    with self._progress(self.max_steps, "k-means", "step") as done:
      while not run.is_done and run.num_steps < self.max_steps:
        most = min(self.max_steps - run.num_steps, minibatch_kmeans.CHUNK)
        chunk = list(itertools.islice(stream, most))
        if chunk:
          run = minibatch_training.advance(self._rule, run, chunk, tol=self.tol)
        if done:
          done(run.num_steps, self.max_steps)
        if len(chunk) < most and not run.is_done:
          _warn_dry(run)
          break
    return run

  def _close(self, vectors, words_MKS) -> np.ndarray:
    """Centroids after the closing passes."""
    return minibatch_training.close(
      self._rule,
      vectors,
      words_MKS,
      self.closing_passes,
      progress_fn=lambda number: self._progress(
        len(vectors), f"closing pass {number + 1}", "vec"
      ),
    )

  def _progress(self, total: int, what: str, unit: str):
    return progress_lib.progress(total, what, unit=unit, is_shown=self.verbose)

  def add(self, data) -> None:
    """Labels vectors `[n, D]`, which are kept: `data` is as in `train`.

    An array is kept as it is, not copied. Ids go on from the last call.
    """
    if sources.is_iterator(data):
      data = np.concatenate([np.asarray(x_ND) for x_ND in data])
    vectors = sources.open_vectors(data)
    codes_NM = self._assign(vectors, "assigning")
    codes_NM = codes_NM.astype(np.min_scalar_type(self.num_centroids - 1))
    if self._codes is not None:
      codes_NM = np.concatenate([self._codes, codes_NM])
    self._parts, self._codes = [*self._parts, vectors], codes_NM

  @property
  def num_vectors(self) -> int:
    """Vectors that were added."""
    return 0 if self._codes is None else len(self._codes)

  @property
  def vectors(self):
    """All vectors that were added, `[N, D]`; a copy if `add` came twice."""
    if len(self._parts) > 1:
      self._parts = [np.concatenate(self._parts)]
    return self._parts[0] if self._parts else None

  @property
  def _vectors(self):
    return self.vectors

  def _open(self, x):
    """Opens vectors of the dimension of the centroids."""
    if self._words_MKS is None:
      raise ValueError("There are no centroids yet: call train first.")
    m, _, s = self._words_MKS.shape
    return open_array(x, dim=m * s)

  def _assign(self, x, what: str) -> np.ndarray:
    """Labels `[N, M]`, int32."""
    vectors = self._open(x)
    fn = minibatch_training.make_assign_fn(self._rule, self._words_MKS)
    label = lambda x_ND: fn(_padded(x_ND))[0][: len(x_ND)]
    found = [np.zeros((0, self._num_subvectors), np.int32)]
    is_shown = self.verbose and len(vectors) > _BLOCK
    with progress_lib.progress(len(vectors), what, is_shown=is_shown) as done:
      for start, (labels_NM, is_zero_N) in batches.map_blocks(
        lambda x_ND: (label(x_ND), ~x_ND.any(axis=1)),
        vectors,
        block_size=_BLOCK,
        progress=done,
      ):
        if self._is_cosine:
          rows = range(start, start + len(is_zero_N))
          name = formats.name_of(vectors)
          unit.refuse_zeros(is_zero_N, name=name, rows=rows)
        found.append(labels_NM)
    return np.concatenate(found)

  def _scores(self, x) -> np.ndarray:
    """Scores `[M, N, K]`, by blocks of vectors."""
    vectors = self._open(x)
    m, k, _ = self._words_MKS.shape
    scores_MNK = np.empty((m, len(vectors), k), np.float32)
    fn = _score_program(self._rule)

    def score(x_ND):
      scores_MNK = fn(_padded(x_ND), self._words_MKS)
      return np.swapaxes(scores_MNK[:, : len(x_ND)], 0, 1)

    for start, scores_NMK in batches.map_blocks(
      score, vectors, block_size=_BLOCK
    ):
      here = slice(start, start + len(scores_NMK))
      scores_MNK[:, here] = np.swapaxes(scores_NMK, 0, 1)
    return scores_MNK


class MiniBatchKMeans(_MiniBatchKMeans):
  """K-means in mini-batches.

  Attributes:
    splits: `(step, 0, fullest, emptiest)` of each split.
    num_steps: Steps of the last training.
    num_vectors, vectors: What was added.
  """

  @property
  def centroids(self) -> np.ndarray | None:
    """Centroids `[K, D]`; None before training."""
    return None if self._words_MKS is None else self._words_MKS[0]

  @property
  def _centroids(self):
    return None if self._words_MKS is None else self.centroids.T

  @property
  def _labels(self) -> np.ndarray | None:
    """Labels `[N]` of the vectors that were added, int64."""
    return None if self._codes is None else self._codes[:, 0].astype(np.int64)

  def predict(self, x) -> np.ndarray:
    """Returns the nearest centroid of each vector `[N, D]`: int64 `[N]`."""
    return self._assign(x, "predicting")[:, 0].astype(np.int64)

  def predict_scores(self, x) -> np.ndarray:
    """Returns `[N, K]`: inner products, or squared L2 distances."""
    return self._scores(x)[0]

  def add(self, data) -> None:
    """Labels and keeps vectors; see `_MiniBatchKMeans.add`."""
    super().add(data)
    self.__dict__.pop("centroids_indices", None)

  @functools.cached_property
  def centroids_indices(self) -> list[np.ndarray]:
    """Ids of the vectors of each centroid, in rising order, int64."""
    labels_N = np.zeros(0, np.int64) if self._codes is None else self._labels
    counts_K = np.bincount(labels_N, minlength=self.num_centroids)
    order_N = np.argsort(labels_N, kind="stable")
    return np.split(order_N, np.cumsum(counts_K)[:-1])

  def get_centroids_assignments(self) -> dict[int, list[int]]:
    """Returns the ids of the vectors of each centroid."""
    return {k: ids.tolist() for k, ids in enumerate(self.centroids_indices)}

  def get_vectors(self, idx) -> np.ndarray:
    """Returns the added vectors with these ids."""
    return self.vectors[np.asarray(idx)]

  def get_dataset_iterator(self, batch_size: int = 32):
    """Yields `(vectors, labels)` of all that was added, in its order, once."""
    labels_N = self._labels
    for start in range(0, self.num_vectors, batch_size):
      here = slice(start, start + batch_size)
      yield self.vectors[here], labels_N[here]


class SubvectorsMiniBatchKMeans(_MiniBatchKMeans):
  """K-means of each of M sub-vectors of equal length, as PQ needs it.

  Attributes:
    splits: `(step, sub-vector, fullest, emptiest)` of each split.
    num_steps: Steps of the last training.
    num_vectors, vectors: What was added.
  """

  def __init__(
    self,
    num_centroids: int,
    num_subvectors: int,
    batch_size: int,
    history_size: int = 10,
    max_steps: int = 1000,
    tol: float = 5e-5,
    min_max_ratio_threshold: float = 0.005,
    metric: str = "cosine",
    *,
    seed: int = 0,
    closing_passes: int = 2,
    allow_fewer: bool = False,
    verbose: bool = True,
  ):
    """Takes the settings of `MiniBatchKMeans`, and M."""
    self.num_subvectors = self._num_subvectors = num_subvectors
    super().__init__(
      *(num_centroids, batch_size, history_size, max_steps, tol),
      *(min_max_ratio_threshold, metric),
      seed=seed,
      closing_passes=closing_passes,
      allow_fewer=allow_fewer,
      verbose=verbose,
    )

  @property
  def centroids(self) -> np.ndarray | None:
    """Centroids `[M, K, D / M]`; None before training."""
    return self._words_MKS

  @property
  def _centroids(self):
    words_MKS = self._words_MKS
    return None if words_MKS is None else np.swapaxes(words_MKS, 1, 2)

  @property
  def _labels(self) -> np.ndarray | None:
    """Labels `[N, M]` of the vectors that were added, int64."""
    return None if self._codes is None else self._codes.astype(np.int64)

  def predict(self, x) -> np.ndarray:
    """Returns the nearest centroids of vectors `[N, D]`: int64 `[N, M]`."""
    return self._assign(x, "predicting").astype(np.int64)

  def predict_labels(self, x) -> np.ndarray:
    """Returns the transpose of `predict`: int64 `[M, N]`."""
    return self.predict(x).T

  def predict_scores(self, x) -> np.ndarray:
    """Returns `[M, N, K]`: inner products, or squared L2 distances."""
    return self._scores(x)

  def predict_all(self, x):
    """Returns sub-vectors `[M, N, D / M]` and `(scores, labels)` of them."""
    vectors = self._open(x)
    x_NMS = np.asarray(vectors[:], np.float32).reshape(
      len(vectors), self.num_subvectors, -1
    )
    scores = self.predict_scores(vectors), self.predict_labels(vectors)
    return np.swapaxes(x_NMS, 0, 1), scores


@functools.lru_cache(maxsize=32)
def _score_program(rule: minibatch_kmeans.Rule):
  return jax.jit(functools.partial(minibatch_kmeans.scores, rule))


def _padded(x_ND) -> np.ndarray:
  """Repeats the last row up to a power of two: few sizes are compiled."""
  missing = (1 << (len(x_ND) - 1).bit_length()) - len(x_ND)
  return np.pad(x_ND, ((0, missing), (0, 0)), "edge")


def _warn_dry(run) -> None:
  warnings.warn(
    f"The iterator ended after {run.num_steps} steps, before the training had "
    f"converged (share of changed labels {run.history[-1]:.4f}); the centroids "
    "are those of these steps. An endless iterator, or an array, goes on.",
    stacklevel=3,
  )
