"""What the indexes of this family have in common: lists, vectors, folders.

A subclass says how candidates in the lists are found and scored (`_find`), and
may keep codes beside the vectors: `_fit`, `_added` and `_removed` are called
when there is something to learn, to encode or to drop.
"""

import functools
import pathlib

import numpy as np

from vqjax import __version__
from vqjax.codecs.distances import centre_of
from vqjax.core import check_range, check_shape
from vqjax.data import files, formats, json_files, unit, values
from vqjax.fast_ivf import sources
from vqjax.fast_ivf.kmeans import MiniBatchKMeans
from vqjax.index import METRICS, check_ids, open_for
from vqjax.interop import faiss_fast_ivf, faiss_files
from vqjax.search import flat_lists, probing
from vqjax.storage import folders

KIND = ("vqjax fast_ivf index", 1)
_MOST_QUERIES = 8192
_SETTINGS = (  # Arguments that a folder keeps.
  "ndim",
  "nlist",
  "nprobe",
  "ratio_threshold",
  "min_lists",
  "metric",
  "seed",
)


class BaseIVF:
  """Vectors in lists, of which a query looks into the best `nprobe`.

  Attributes:
    nprobe: Lists of a query; more than there are means all.
    ratio_threshold: Skips lists far behind the best, see
      `vqjax.search.probing`; 0 or None skips none.
    min_lists: So many of the best lists are never skipped; a quarter of
      `nprobe` makes `ratio_threshold` harmless to recall.
    num_threads: Of a search of many queries; None for all of OpenMP.
    kmeans: The k-means that finds the centroids.
    ndim, nlist, metric, seed, verbose: As given; nlist as found.
  """

  _file = "index.faiss"  # Of a folder.

  def __init__(
    self,
    ndim: int,
    nlist: int,
    nprobe: int = 10,
    ratio_threshold: float | None = 0.0,
    kmeans_batch_size: int = 1024,
    kmeans_tol: float = 5e-5,
    kmeans_max_steps: int = 1000,
    *,
    metric: str = "cosine",
    min_lists: int = 1,
    allow_fewer: bool = False,
    seed: int = 0,
    num_threads: int | None = None,
    verbose: bool = True,
  ):
    """Takes the settings; nothing is computed yet.

    Args:
      ndim: D.
      nlist: L, lists.
      nprobe: See the attributes.
      ratio_threshold: See the attributes.
      kmeans_batch_size: Vectors of a step of k-means.
      kmeans_tol: k-means stops when less than this share of labels changes.
      kmeans_max_steps: Steps of k-means at most.
      metric: "cosine" (vectors and queries are made of length 1), "ip" for
        inner products, or "l2" for squared distances.
      min_lists: See the attributes.
      allow_fewer: Make as many lists as there are vectors, if fewer.
      seed: Of k-means.
      num_threads: See the attributes.
      verbose: Show progress on standard error.

    Raises:
      ValueError: A value makes no sense.
    """
    check_range("ndim", ndim, 1, 1 << 24)
    check_range("nlist", nlist, 1, 1 << 24)
    if metric not in METRICS:
      raise ValueError(
        f"metric must be one of {', '.join(METRICS)}; got {metric!r}."
      )
    self.ndim, self.nlist, self.metric = ndim, nlist, metric
    self.nprobe, self.ratio_threshold = nprobe, ratio_threshold
    self.min_lists, self.num_threads = min_lists, num_threads
    self.allow_fewer, self.seed, self.verbose = allow_fewer, seed, verbose
    self.kmeans = MiniBatchKMeans(
      nlist,
      kmeans_batch_size,
      max_steps=kmeans_max_steps,
      tol=kmeans_tol,
      metric="l2" if metric == "l2" else "cosine",
      seed=seed,
      allow_fewer=allow_fewer,
      verbose=verbose,
    )
    self._centroids_LD, self._lists = None, None
    probing.check(nprobe, ratio_threshold, min_lists)

  def __len__(self) -> int:
    """Number of vectors."""
    return 0 if self._lists is None else len(self._lists)

  def __repr__(self) -> str:
    """Says what it is in a line."""
    return (
      f"{type(self).__name__}({len(self):,} vectors of {self.ndim} dimensions, "
      f"{self.nlist:,} lists, {self.metric})"
    )

  @property
  def is_trained(self) -> bool:
    """Whether there are lists to add vectors to."""
    return self._lists is not None or self.kmeans.centroids is not None

  @property
  def centroids(self) -> np.ndarray | None:
    """Centroids `[L, D]`; None before training."""
    found = self._centroids_LD
    return self.kmeans.centroids if found is None else found

  @property
  def ids(self) -> np.ndarray:
    """Ids of all vectors, list after list: int64 `[N]`."""
    if self._lists is None:
      return np.zeros(0, np.int64)
    used_N = flat_lists.used_slots(self._lists)
    return self._lists.ids_N[used_N].astype(np.int64)

  @property
  def list_sizes(self) -> np.ndarray:
    """Vectors in each list, int64 `[L]`."""
    if self._lists is None:
      return np.zeros(self.nlist, np.int64)
    return self._lists.sizes_L.copy()

  def train(self, data, ids=None) -> "BaseIVF":
    """Finds lists for vectors `[N, D]`, and adds these; starts anew each time.

    `data` is an array, a memory map, the path of a file, or an iterator of
    batches, which is read to its end first: `itertools.islice` ends one that
    would not. `ids` are as in `add`.

    Raises:
      ValueError: There are fewer vectors than lists, or one is not finite, or
        zero under the cosine.
      TypeError: They are no numbers.
    """
    vectors = self._open(self._collect(data), "data")
    check_ids(ids, len(vectors), np.empty(0, np.int64))
    self._check_training(vectors)
    self.kmeans.train(vectors)
    self.set_centroids(self.kmeans.centroids)
    self._fit(vectors)
    self._add(vectors, ids)
    return self

  def set_centroids(self, centroids_LD) -> None:
    """Makes empty lists around centroids `[L, D]` that come from elsewhere.

    For the metrics "cosine" and "ip" they are to be of length 1.
    """
    check_shape("centroids", centroids_LD, (None, self.ndim))
    formats.check_vectors(np.asarray(centroids_LD), name="centroids")
    self._centroids_LD = np.ascontiguousarray(centroids_LD, np.float32)
    self.nlist = len(centroids_LD)
    self.kmeans.num_centroids = self.nlist
    self.kmeans._words_MKS = self._centroids_LD[None]
    centre_D = np.zeros(self.ndim, np.float32)
    if self.metric == "l2":
      centre_D = centre_of(self._centroids_LD)
    self._centre_D = centre_D if centre_D.any() else None
    self._coarse = faiss_fast_ivf.make_coarse(
      self._centroids_LD - centre_D, self.metric
    )
    self._lists = flat_lists.empty(
      self.nlist, self.ndim, has_norms=self.metric == "l2"
    )

  def add(self, x, ids=None) -> None:
    """Adds vectors `[n, D]` to the lists of their nearest centroids.

    `x` is an array, a memory map, the path of a file, or an iterator of
    batches. `ids` are distinct integers from 0 to 2^63 - 1; None goes on from
    the largest in the index.

    Raises:
      ValueError: Shapes do not fit, a number is not finite, an id is taken, or
        there are no lists yet; nothing is added then.
      TypeError: They are no numbers.
    """
    self._check_trained()
    self._add(self._open(self._collect(x), "x"), ids)

  def remove(self, ids) -> int:
    """Removes the vectors with these ids; returns how many there were.

    Ids that the index does not have are passed over.
    """
    ids_N = np.atleast_1d(np.asarray(ids))
    if ids_N.size and ids_N.dtype.kind not in "iu":
      raise TypeError(f"ids must be integers, got {ids_N.dtype}.")
    check_shape("ids", ids_N, (None,))
    if self._lists is None or not ids_N.size:
      return 0
    num = flat_lists.remove(self._lists, ids_N.astype(np.int64))
    if num:
      self._removed()
    return num

  def choose_lists(self, queries) -> np.ndarray:
    """Returns the lists that queries look into: `[Q, P]`, best first, or -1."""
    blocks = self._query_blocks(queries)
    found = [self._lists_of(block_QD) for block_QD in blocks]
    width = min(int(self.nprobe), self.nlist)
    return np.concatenate([np.zeros((0, width), np.int64), *found])

  def save(self, folder, *, overwrite: bool = False) -> pathlib.Path:
    """Writes a folder, whole or not at all, and returns its path.

    `index.faiss` in it is an index that any faiss program reads and searches.

    Raises:
      FileExistsError: There is something already, and not `overwrite`.
      ValueError: The index is not trained.
    """
    self._check_trained()
    folder = files.user_path(folder)
    with folders.new_folder(folder, KIND[0], overwrite=overwrite) as temporary:
      manifest = {
        "format": KIND[0],
        "version": KIND[1],
        "kind": type(self).__name__,
        "files": {"index": self._file},
        "settings": self._settings(),
        "vqjax_version": __version__,
      }
      self._write(temporary)
      files.write_json(temporary / folders.MANIFEST, manifest)
    return folder

  @classmethod
  def load(cls, folder) -> "BaseIVF":
    """Opens a folder that `save` has written.

    Raises:
      FileNotFoundError: There is no such folder, or a file is missing.
      ValueError: A file is damaged, or of another kind of index.
    """
    path = files.user_path(folder) / folders.MANIFEST
    if not path.is_file():
      raise FileNotFoundError(
        f"{folder} is no folder of an index: it has no {folders.MANIFEST}. "
        f"{cls.__name__}.save makes one."
      )
    manifest = files.parse_description(path, KIND)
    json_files.check_fields(path, manifest, {"kind": str, "settings": dict})
    if manifest["kind"] != cls.__name__:
      raise ValueError(
        f"{folder} holds a {manifest['kind']}; open it by "
        f"{manifest['kind']}.load."
      )
    try:
      index = cls(**manifest["settings"])
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"{path} is damaged: its settings make no index ({error})."
      ) from error
    index._restore(files.user_path(folder) / cls._file)
    return index

  def to_faiss(self):
    """Returns a copy as an index of stock faiss, with the same results."""
    raise NotImplementedError

  def write_faiss(self, path, *, overwrite: bool = False) -> None:
    """Writes `to_faiss` to a file that any faiss program reads."""
    info = {"num_vectors": len(self), "dim": self.ndim, "metric": self.metric}
    faiss_files.save(
      self.to_faiss(),
      path,
      info,
      kind=faiss_fast_ivf.KIND,
      overwrite=overwrite,
    )

  def _write(self, folder: pathlib.Path) -> None:
    """Writes the files of a folder, from which `_restore` makes the index."""
    self.write_faiss(folder / self._file)

  def _settings(self) -> dict:
    """What a folder keeps, plain values."""
    kmeans = {
      "kmeans_batch_size": self.kmeans.batch_size,
      "kmeans_tol": self.kmeans.tol,
      "kmeans_max_steps": self.kmeans.max_steps,
    }
    return {name: getattr(self, name) for name in _SETTINGS} | kmeans

  def _restore(self, path) -> None:
    """Reads what `to_faiss` has made into an untrained index."""
    raise NotImplementedError

  def _fit(self, vectors) -> None:
    """Learns what codes need, when the lists are known."""

  def _added(self, lists_N, read_fn) -> None:
    """Encodes vectors that were added to the lists, in this order."""

  def _removed(self) -> None:
    """Drops the codes of what is no longer in the lists."""

  def _check_trained(self) -> None:
    """Raises ValueError unless there are lists; takes those of `kmeans`."""
    if not self.is_trained:
      raise ValueError(
        "The index has no lists yet: call train with vectors first."
      )
    if self._lists is None:
      self.set_centroids(self.kmeans.centroids)

  def _check_training(self, vectors) -> None:
    if len(vectors) < self.nlist and not self.allow_fewer:
      raise ValueError(
        f"nlist={self.nlist} needs at least as many vectors, got "
        f"{len(vectors)}; ask for fewer lists, or give allow_fewer=True."
      )

  def _collect(self, data):
    """Vectors of an iterator as one array; anything else as it is."""
    if not sources.is_iterator(data):
      return data
    found = list(sources.take(data, no_zeros=self.metric == "cosine"))
    if not found:
      raise ValueError("The iterator has no vectors.")
    return np.concatenate(found)

  def _open(self, x, name: str):
    if getattr(x, "ndim", 2) != 2:
      check_shape(name, x, (None, self.ndim))
    vectors = open_for(x, self.ndim, self.metric, name)
    if isinstance(vectors, unit.UnitVectors):
      vectors.name = formats.name_of(vectors.vectors, name)
    return vectors

  def _add(self, vectors, ids) -> None:
    ids_N = check_ids(ids, len(vectors), self.ids)

    read = functools.partial(_read, vectors)
    lists_N = np.empty(len(vectors), np.int32)
    for start in range(0, len(vectors), flat_lists.BLOCK):
      stop = min(start + flat_lists.BLOCK, len(vectors))
      lists_N[start:stop] = self._best_lists(read(start, stop), 1)[1][:, 0]
    flat_lists.add(self._lists, lists_N, ids_N, read)
    self._added(lists_N, read)

  def _best_lists(self, x_ND, num: int):
    """Scores and numbers of the best lists `[N, num]`, the best first."""
    if self._centre_D is not None:
      x_ND = x_ND - self._centre_D
    return faiss_fast_ivf.best_lists(self._coarse, x_ND, num)

  def _lists_of(self, queries_QD) -> np.ndarray:
    """The lists that queries look into, `[Q, P]`, -1 for a skipped one."""
    probing.check(self.nprobe, self.ratio_threshold, self.min_lists)
    scores_QP, lists_QP = self._best_lists(
      queries_QD, min(int(self.nprobe), self.nlist)
    )
    return probing.skip_far(
      *(scores_QP, lists_QP, self.ratio_threshold),
      min_lists=self.min_lists,
      is_distance=self.metric == "l2",
    )

  def _search(
    self, queries, k: int, find_fn, *, is_distance: bool
  ) -> tuple[np.ndarray, np.ndarray]:
    """Scores and ids `[Q, k]`, block by block of the queries.

    `find_fn(queries_QD, lists_QP, k)` returns those of a block, padded at the
    end by id -1 and the worst score, inf for distances, else -inf. Its k may be
    smaller, if the index has fewer vectors.
    """
    check_range("k", k, 1, 2**31 - 1)
    width = max(min(k, len(self)), 1)
    found = [
      find_fn(queries_QD, self._lists_of(queries_QD), width)
      for queries_QD in self._query_blocks(queries)
    ]
    if not found:
      found = [(np.zeros((0, width), t) for t in (np.float32, np.int64))]
    scores_QK, ids_QK = map(_concatenate, zip(*found, strict=True))
    if k > width:
      worst = np.inf if is_distance else -np.inf
      room = (0, 0), (0, k - width)
      scores_QK = np.pad(scores_QK, room, constant_values=worst)
      ids_QK = np.pad(ids_QK, room, constant_values=-1)
    return scores_QK, ids_QK

  def _is_plain(self, queries) -> bool:
    """Whether queries are one good block as they are: checked sooner so."""
    return (
      type(queries) is np.ndarray
      and queries.dtype == np.float32
      and queries.shape[1:] == (self.ndim,)
      and 0 < len(queries) <= _MOST_QUERIES
      and queries.flags.c_contiguous
      and float(np.abs(queries).max()) <= values.LARGEST  # No NaN is.
    )

  def _query_blocks(self, queries):
    """Yields blocks of checked queries, float32, of length 1 for the cosine."""
    self._check_trained()
    if self._is_plain(queries):
      is_cosine = self.metric == "cosine"
      yield unit.normalise(queries, name="queries") if is_cosine else queries
      return
    queries = np.asarray(queries) if isinstance(queries, list) else queries
    if getattr(queries, "ndim", 2) == 1:
      queries = queries[None]
    queries = self._open(queries, "queries")
    for start in range(0, len(queries), _MOST_QUERIES):
      yield _read(queries, start, start + _MOST_QUERIES)


def _read(vectors, start: int, stop: int) -> np.ndarray:
  """Rows as float32, checked."""
  return formats.to_float32(
    np.asarray(vectors[start:stop]),
    name=formats.name_of(vectors),
    first_row=start + getattr(vectors, "first_row", 0),
  )


def _concatenate(parts) -> np.ndarray:
  return parts[0] if len(parts) == 1 else np.concatenate(parts)
