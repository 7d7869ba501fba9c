"""An index: vectors as codes in inverted lists, with all that a search needs.

  index = vqjax.build_index(codec, x, num_lists=1024)
  distances, ids = index.search(queries, k=10, nprobe=16)
  index.add(more)
  index.save("my_index")
  index = vqjax.load_index("my_index")

A saved index is a folder: `manifest.json` names its files, by default
`codec.safetensors`, `index.faiss` (for any faiss program, with its description
`index.faiss.json`), and if there are such `decoders.safetensors` and
`refiner.safetensors` or `refiner.faiss`. `index.faiss.order.npy` has the ids in
list order: a search maps it, and keeps no id in memory.
"""

import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import evaluation, index_drift
from vqjax.codec import Codec, open_array
from vqjax.codec import load as load_codec
from vqjax.codecs import additive
from vqjax.core import check_range, check_shape
from vqjax.data import batches, files, item_ids, unit
from vqjax.data import codes as codes_lib
from vqjax.interop import (
  faiss_fastscan,
  faiss_ivf,
  faiss_lists,
  refining,
  searchers,
)
from vqjax.progress import count
from vqjax.search import footprint, residual_bits, truth_check
from vqjax.search.footprint import Footprint
from vqjax.storage import (
  codec_file,
  decoder_file,
  folders,
  index_folder,
  refiner_file,
)

METRICS = ("l2", "ip", "cosine")
_BLOCK = 65_536


def load_index(folder) -> "Index":
  """Opens the folder that `Index.save` or `vqjax ivf_pipeline` has written.

  Raises:
    FileNotFoundError: There is no such folder, or a file is missing.
    ValueError: A file is damaged, or they do not belong together.
  """
  paths, info = index_folder.read_manifest(folder)
  codec = load_codec(paths["codec"])
  faiss_index, meta = faiss_ivf.load(paths["index"])
  faiss_ivf.check_codec(paths["index"], meta, codec.fingerprint)
  pairwise_params, refiner = None, None
  if "decoders" in paths:
    found = decoder_file.load(paths["decoders"])
    decoder_file.check_codec(found, codec.fingerprint)
    pairwise_params = found.pairwise
  if "refiner" in paths:
    refiner = searchers.load_refiner(paths["refiner"], meta)
  metric = info.get("metric") or codec.info.get("metric") or meta["metric"]
  if metric not in METRICS or (metric == "ip") != (meta["metric"] == "ip"):
    raise ValueError(
      f"{folder} is damaged: its manifest says metric {metric!r}, its index is "
      f"of {meta['metric']!r}."
    )
  return Index(
    codec,
    faiss_index,
    metric,
    pairwise_params,
    refiner,
    settings=info.get("encode"),
    items_N=item_ids.load_beside(paths["index"], meta, faiss_index.ntotal),
    path=paths["index"],
  )


class Index:
  """Vectors as codes in inverted lists; made by `index_build.build_index`."""

  def __init__(
    self,
    codec: Codec,
    faiss_index,
    metric: str,
    pairwise_params=None,
    refiner=None,
    *,
    settings: dict | None = None,
    items_N: np.ndarray | None = None,
    path: str | None = None,
  ):
    """Takes the parts as they are.

    `faiss_index` is from `faiss_ivf`; `settings` of encoding are for `add`. The
    refiner is `ResidualBits`, `faiss_fastscan.Loaded`, or None. `items_N` are
    item ids, if the ids in the lists are row numbers. `path` is the file of
    `faiss_index`, whose ids stay on disk; without they are in memory.
    """
    self.codec, self.metric = codec, metric
    self.settings = dict(settings or {})
    # The codes are in the lists of faiss until a search, in a searcher then.
    self._index, self._searcher = faiss_index, None
    self._pairwise, self._refiner = pairwise_params, refiner
    self._items_N, self._path = items_N, path

  @property
  def faiss(self):
    """The index with all its codes; closes the searcher that has them."""
    if self._searcher is not None:
      searchers.refill(self._index, self._searcher)
      self._searcher = None
    return self._index

  def __len__(self) -> int:
    """Number of vectors."""
    if self._searcher is not None:
      return len(self._searcher.parts.ids_N)
    return self._index.ntotal

  def __repr__(self) -> str:
    """Says what it is in a line."""
    return (
      f"Index({len(self):,} vectors of {self.dim} dimensions, "
      f"{count(self.num_lists, 'list')}, {self.metric}, {self.codec.title} "
      f"codes of {self.codec.num_bytes:g} bytes)"
    )

  @property
  def dim(self) -> int:
    """Dimensions of the vectors."""
    return self._index.d

  @property
  def refiner(self):
    """What was given as such, or made; None without one."""
    return self._refiner

  @property
  def num_lists(self) -> int:
    """L, inverted lists."""
    return self._index.nlist

  def footprint(self) -> Footprint:
    """Returns its bytes in memory, as after a search, and on disk, by part.

    `footprint().each` are those of one more vector in memory, code, norm, id
    and refiner; `str` of it is a line. Disk is empty unless it is saved.
    """
    if not len(self):
      return Footprint(0, {}, {})
    paths = {}
    if self._path is not None:
      folder = pathlib.Path(self._path).parent
      paths = index_folder.read_manifest(folder)[0]
    disk = searchers.disk_bytes(**paths) if paths else {}
    found = self._open_searcher().footprint(disk)
    ram = dict(found.ram)
    ram["codec"] += footprint.array_bytes(self.codec.params)
    if self._items_N is not None:
      ram["ids"] = ram.get("ids", 0) + item_ids.num_bytes(self._items_N)
    return found._replace(ram=ram)

  @property
  def _words(self) -> additive.AdditiveParams:
    return additive.AdditiveParams(faiss_lists.words_of(self._index.rq))

  @property
  def ids(self) -> np.ndarray:
    """Ids of all vectors `[N]`: integers, rising, or item ids by row."""
    if self._items_N is not None:
      return self._items_N.copy()
    if self._searcher is not None:
      return np.sort(self._searcher.parts.ids_N).astype(np.int64)
    return np.sort(faiss_lists.ids_of(self._index))

  def items_of(self, ids_N) -> np.ndarray:
    """Returns item ids of ids in the lists; the same if there are none."""
    if self._items_N is None:
      return ids_N
    return item_ids.pick(self._items_N, ids_N)

  def search(
    self, queries, k: int = 10, *, nprobe: int | None = None, **settings
  ) -> tuple[np.ndarray, np.ndarray]:
    """Finds the `k` nearest of each query: distances and ids, `[Q, k]`.

    Distances are squared, the least first; for "ip" and "cosine" they are
    inner products and cosines, the largest first. Results that there are not
    have id -1, None if ids are text.

    Args:
      queries: `[Q, D]`, or one `[D]`: an array, a memory map, or a path.
      k: Results; more than there are vectors leaves -1 at the end.
      nprobe: Lists that are searched, at most all; None for 16.
      **settings: `num_refined`, `num_pairwise`, `num_network`, `ef_search`, see
        `vqjax.search.pipeline.Searcher.search`.

    Raises:
      ValueError: Queries are not finite or of another dimension, or a setting
        does not fit.
    """
    distances_QR, ids_QR = self._find(queries, k, nprobe=nprobe, **settings)
    return distances_QR, self.items_of(ids_QR)

  def _find(self, queries, k: int, *, nprobe: int | None = None, **settings):
    """Distances and the ids in the lists, see `search`."""
    check_range("k", k, 1, 1 << 20)
    if not isinstance(queries, str | pathlib.Path):
      queries = np.atleast_2d(np.asarray(queries))
    queries = open_for(queries, self.dim, self.metric, "queries")
    queries_QD = batches.read_rows(queries, np.arange(len(queries)))
    if nprobe is not None:
      check_range("nprobe", nprobe, 1, 1 << 31)
      nprobe = min(nprobe, self.num_lists)
    if not len(self):
      shape = (len(queries_QD), k)
      none = np.inf if self.metric == "l2" else -np.inf
      return np.full(shape, none, np.float32), np.full(shape, -1, np.int64)
    found = self._open_searcher().search(
      queries_QD, min(k, len(self)), nprobe=nprobe, **settings
    )
    distances_QR = found.distances_QR
    if self.metric == "cosine":  # Of vectors of length 1.
      distances_QR = 1 - distances_QR / 2
    missing = [(0, 0), (0, k - found.ids_QR.shape[1])]
    none = np.inf if self.metric == "l2" else -np.inf
    return (
      np.pad(distances_QR, missing, constant_values=none).astype(np.float32),
      np.pad(found.ids_QR, missing, constant_values=-1),
    )

  def sample(self, num: int, *, seed: int = 0) -> np.ndarray:
    """Returns vectors `[num, D]` that codes of the index stand for, by chance.

    Raises:
      ValueError: There are no vectors.
    """
    check_range("the number of vectors", len(self), 1, np.inf)
    rows_N = np.random.default_rng(seed).integers(len(self), size=num)
    return self._open_searcher().decode_rows(rows_N)

  def evaluate(self, queries, true_ids, k: int = 10, **settings) -> dict:
    """Measures the recall and the speed of `search`.

    Args:
      queries: As for `search`.
      true_ids: Ids `[Q, G]` of their true neighbours, nearest first, -1 for
        none; an array or a path. Row numbers if item ids are text, or were
        read from a file.
      k: Results.
      **settings: Of `search`, as `nprobe=16`.

    Returns:
      `1-recall@R` for R of 1, 10 and 100 up to `k`, `knn_recall@10` if `k`
      and G are 10 or more, and `queries_per_second`.
    """
    opened = open_for(queries, self.dim, self.metric, "queries")
    true_ids = open_array(true_ids, name="true_ids")
    names = {"groundtruth": "true_ids"}
    ids_QG = truth_check.read_ids(
      truth_check.Files(opened, None, true_ids, self.metric, names)
    )
    self._find(queries, k, **settings)  # Compiles.
    began = time.perf_counter()
    _, ids_QR = self._find(queries, k, **settings)
    seconds = time.perf_counter() - began
    recalls = evaluation.Truth(opened, ids_QG).recalls(ids_QR)
    return {**recalls, "queries_per_second": len(opened) / seconds}

  def open_vectors(self, x):
    """Returns vectors `[N, D]`, unread; of length 1 for the cosine."""
    return open_for(x, self.dim, self.metric)

  drift = index_drift.compare

  def check_new(self, num: int, ids=None) -> tuple[np.ndarray, Any]:
    """Returns ids in the lists `[num]` for new vectors, and item ids or None.

    Raises:
      TypeError: `ids` are of another kind than those of the index.
      ValueError: They are not as many, or not new and distinct.
    """
    items_N = None
    if self._items_N is not None:
      items_N, ids = item_ids.check_items(ids, num, self._items_N), None
    ids_N = check_ids(ids, num, faiss_lists.ids_of(self.faiss))
    return ids_N, items_N

  def add(self, x, ids=None, *, codes=None, progress: bool = False) -> None:
    """Encodes more vectors `[n, D]` and adds them; what is there stays.

    Args:
      x: As in `build_index`.
      ids: As in `build_index`, none that is in the index; None for integers
        that follow its largest.
      codes: Codes of the vectors by the codec of the index, if they are known.
      progress: Shows a progress line.

    Raises:
      ValueError: Vectors or ids do not fit; nothing is added then.
    """
    vectors = self.open_vectors(x)
    ids_N, items_N = self.check_new(len(vectors), ids)
    before = faiss_lists.contents(self.faiss)
    if not len(vectors):
      return
    if codes is not None:
      sizes = self.codec.codebook_sizes
      check_shape("codes", codes, (len(vectors), len(sizes)))
      codes_lib.check_ids(np.asarray(codes), sizes)
    else:
      codes = self.codec.encode(vectors, progress=progress, **self.settings)
    self.append(vectors, codes, ids_N)
    if items_N is not None:
      self._items_N = np.concatenate([self._items_N, items_N])
    if self._refiner is not None:
      self._extend_refiner(vectors, ids_N, before)

  def save(
    self, folder, *, overwrite: bool = False, made_of: dict | None = None
  ) -> pathlib.Path:
    """Writes the folder, whole or not at all, and returns its path.

    `made_of` goes into the manifest: by it the same index is known again.

    Raises:
      FileExistsError: There is something already, and not `overwrite`.
    """
    folder = files.user_path(folder)
    with folders.new_folder(
      folder, index_folder.KIND[0], overwrite=overwrite
    ) as temporary:
      codec_file.save_codec(
        temporary,
        self.codec.name,
        self.codec.params,
        info=self.codec.info,
        ranker=self.codec.ranker,
      )
      info = faiss_ivf.save(
        self.faiss,
        temporary / "index.faiss",
        {
          "codec": self.codec.name,
          "codec_fingerprint": self.codec.fingerprint,
          "decoders_fingerprint": codec_file.fingerprint(self._words),
          "is_cosine": self.metric == "cosine",
          **item_ids.describe(self._items_N),
        },
      )
      item_ids.save_beside(temporary / "index.faiss", self._items_N)
      paths = {"codec": "codec.safetensors", "index": "index.faiss"}
      paths |= self._save_decoders(temporary)
      paths |= self._save_refiner(temporary, info)
      about = {"metric": self.metric, "encode": self.settings}
      about |= {"made_of": made_of} if made_of else {}
      index_folder.write_manifest(temporary, paths, about)
    self._path = str(folder / "index.faiss")
    return folder

  def _save_decoders(self, folder) -> dict[str, str]:
    if self._pairwise is None:
      return {}
    decoder_file.save(
      folder / "decoders.safetensors",
      self._words,
      self._pairwise,
      codec_fingerprint=self.codec.fingerprint,
      info={},
    )
    return {"decoders": "decoders.safetensors"}

  def _save_refiner(self, folder, info: dict) -> dict[str, str]:
    if self._refiner is None:
      return {}
    if isinstance(self._refiner, residual_bits.ResidualBits):
      path = folder / "refiner.safetensors"
      refiner_file.save(path, self._refiner, of_index=info["sha256"], info={})
    else:
      path = folder / "refiner.faiss"
      faiss_fastscan.save(
        self._refiner.index,
        path,
        of_index=info["sha256"],
        info=self._refiner.info,
      )
    return {"refiner": path.name}

  def append(self, vectors, codes_NM, ids_N) -> None:
    """Puts codes into their lists."""
    lists_N, codes_NM = self.split(vectors, codes_NM)
    faiss_ivf.add_codes(self.faiss, lists_N, codes_NM, ids_N)
    faiss_ivf.fit_norms(self.faiss)
    self._path = None

  def split(self, vectors, codes_NM):
    """Lists `[N]` of vectors, and codes without the list number."""
    if self.codec.is_ivf:
      return codes_NM[:, 0].astype(np.int64), codes_NM[:, 1:]
    if self.num_lists == 1:
      return np.zeros(len(codes_NM), np.int64), codes_NM
    coarse = self._index.quantizer
    lists = [
      faiss_lists.assign_lists(coarse, x_nD)
      for _, x_nD in batches.map_blocks(
        lambda x_nD: x_nD, vectors, block_size=_BLOCK
      )
    ]
    return np.concatenate(lists).astype(np.int64), codes_NM

  def make_refiner(self, kind: str, vectors, ids_N, seed: int) -> None:
    """Makes the refiner of the vectors in the index."""
    contents = faiss_lists.contents(self.faiss)
    read_fn = _make_read_fn(vectors, ids_N, contents)
    if kind == "rabitq":
      metric = "ip" if self.metric == "ip" else "l2"
      self._refiner = refining.rabitq(
        contents, read_fn, metric=metric, seed=seed
      )
      return
    decode_fn = self._decode_fn()
    if self.metric == "cosine":
      decode_fn = searchers.at_length_1(decode_fn)
    index, weights = refining.fastscan(self.faiss, contents, read_fn, decode_fn)
    info = {**weights, **faiss_fastscan.describe(index)}
    self._refiner = faiss_fastscan.Loaded(index, info)

  def _extend_refiner(self, vectors, ids_N, before) -> None:
    """Takes more vectors, which were added after `before`, into the refiner."""
    after = faiss_lists.contents(self.faiss)
    read_fn = _make_read_fn(vectors, ids_N, after)
    if isinstance(self._refiner, residual_bits.ResidualBits):
      metric = "ip" if self.metric == "ip" else "l2"
      self._refiner = refining.extend_rabitq(
        self._refiner, before, after, read_fn, metric=metric
      )
      return
    for start in range(0, len(ids_N), _BLOCK):
      rows = np.arange(start, min(start + _BLOCK, len(ids_N)))
      x_nD = batches.read_rows(vectors, rows)
      faiss_fastscan.add(self._refiner.index, x_nD, ids_N[rows])

  def _decode_fn(self):
    return searchers.make_decode_fn(self.codec, "float32")

  def _open_searcher(self):
    if self._searcher is None:
      if isinstance(self._refiner, residual_bits.ResidualBits):
        # Or the searcher had them once more.
        self._refiner = jax.tree.map(jnp.asarray, self._refiner)
      self._searcher = searchers.make_searcher(
        self._index,
        "ip" if self.metric == "ip" else "l2",
        self._decode_fn(),
        pairwise_params=self._pairwise,
        refiner=self._refiner,
        is_cosine=self.metric == "cosine",
        ids_of=self._path,
      )
      faiss_ivf.keep_coarse(self._index)  # Its codes are in memory once.
    return self._searcher


def open_for(x, dim: int, metric: str, name: str = "x"):
  """Returns vectors `[N, dim]`, unread; of length 1 for the cosine."""
  vectors = open_array(x, dim, name)
  return unit.UnitVectors(vectors) if metric == "cosine" else vectors


def check_ids(ids, num: int, taken_N: np.ndarray) -> np.ndarray:
  """Returns ids `[num]` as int64; raises unless all are new and distinct."""
  if ids is None:
    first = int(taken_N.max()) + 1 if len(taken_N) else 0
    return np.arange(first, first + num)
  ids_N = np.asarray(ids)
  if ids_N.dtype.kind not in "iu":
    is_text = ids_N.dtype.kind in "UO"
    got = "text, and those of the index are none" if is_text else ids_N.dtype
    raise TypeError(f"ids must be integers, got {got}.")
  check_shape("ids", ids_N, (num,))
  if num and (ids_N.min() < 0 or int(ids_N.max()) >= 1 << 63):
    row = int(np.argmin(ids_N) if ids_N.min() < 0 else np.argmax(ids_N))
    raise ValueError(
      f"ids must lie between 0 and 2^63 - 1, got {ids_N[row]} in row {row}."
    )
  ids_N = ids_N.astype(np.int64)
  values, rows = np.unique(ids_N, return_index=True)
  if len(values) < num:
    row = int(np.setdiff1d(np.arange(num), rows)[0])
    raise ValueError(f"ids must be distinct, got {ids_N[row]} twice.")
  if (known := np.isin(ids_N, taken_N)).any():
    row = int(np.argmax(known))
    raise ValueError(
      f"ids must not be in the index yet, got {ids_N[row]} in row {row}."
    )
  return ids_N


def _make_read_fn(vectors, ids_N, contents):
  """Returns `rows -> x_nD`: vectors of rows of the index, by their ids."""
  order_N = np.argsort(ids_N)
  sorted_N = ids_N[order_N]

  def read(rows_n):
    at_n = np.searchsorted(sorted_N, contents.ids_N[rows_n])
    return batches.read_rows(vectors, order_N[at_n])

  return read
