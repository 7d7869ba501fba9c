"""Lance data sets with an IVF-PQ index made of our centroids and codewords.

  OUTPUT/vectors.lance   columns `id`, `vector` if it is kept, and the one that
                         the index is of
  OUTPUT/model.npz       what turns a query into that column's space, and the
                         centroids and codewords of the index
  OUTPUT/manifest.json   last

Lance codes what the centroid leaves of a vector for "L2", and whole vectors for
"dot". `open_index` searches such a folder; any Lance program can.
"""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from vqjax.core import check_range, check_shape
from vqjax.data import files, lance_rows, numpy_files, unit
from vqjax.interop import faiss_io
from vqjax.storage import folders

KIND = ("vqjax lance index", 1)
VECTORS, MODEL = "vectors.lance", "model.npz"
METRICS = {"L2": "l2", "dot": "ip"}  # Of Lance, and what we call them.
NUM_BITS = (4, 8)  # Of a code, that Lance has.


class Model(NamedTuple):
  """What an index is made of, arrays of float32."""

  metric: str  # Of Lance.
  centroids_LE: np.ndarray
  codebooks_MKS: np.ndarray
  reduction_ED: np.ndarray | None = None  # None: the column has the vectors.
  bias_E: np.ndarray | None = None
  is_cosine: bool = False  # Vectors and queries are made of length 1.

  def to_unit(self, x_ND) -> np.ndarray:
    """Returns vectors as float32, of length 1 for the cosine."""
    x_ND = np.asarray(x_ND, np.float32)
    return unit.normalise(x_ND) if self.is_cosine else x_ND

  def apply(self, x_ND) -> np.ndarray:
    """Returns vectors, or queries, as the index has them: `[N, E]`."""
    x_ND = self.to_unit(x_ND)
    if self.reduction_ED is None:
      return x_ND
    x_NE = x_ND @ self.reduction_ED.T
    return x_NE if self.bias_E is None else x_NE + self.bias_E

  def decode(self, lists_N, codes_NM) -> np.ndarray:
    """Returns what the index knows of vectors: `[N, E]`."""
    m = len(self.codebooks_MKS)
    parts = [self.codebooks_MKS[i][codes_NM[:, i]] for i in range(m)]
    x_NE = np.concatenate(parts, axis=1)
    return x_NE + self.centroids_LE[lists_N] if self.metric == "L2" else x_NE


def check_model(model: Model) -> None:
  """Raises ValueError unless Lance can make an index of these parts."""
  m, k, s = model.codebooks_MKS.shape
  check_shape("centroids", model.centroids_LE, (None, m * s))
  if k not in [1 << bits for bits in NUM_BITS]:
    raise ValueError(
      f"Lance has codes of 16 or 256 codewords, but these codebooks have {k}; "
      "train with --config.model.codebook_size=256, or --to=parquet."
    )


def write(
  path: pathlib.Path,
  model: Model,
  blocks: Iterator[dict],
  *,
  column: str,
  lists_N=None,
) -> None:
  """Writes data set and model into a folder that is there.

  Args:
    path: The folder.
    model: Of the index.
    blocks: Columns of consecutive rows, names to arrays `[n]` or `[n, X]`.
    column: The one that the index is of.
    lists_N: A function that returns the list of each row when all are written;
      None for the nearest centroid.
  """
  lance = lance_rows.import_lance()
  import pyarrow as pa

  batches = map(_to_batch, blocks)
  first = next(batches)

  def every():
    yield first
    yield from batches

  reader = pa.RecordBatchReader.from_batches(first.schema, every())
  data = lance.write_dataset(reader, str(path / VECTORS))
  m, k, _ = model.codebooks_MKS.shape
  options = {
    "num_partitions": len(model.centroids_LE),
    "ivf_centroids": model.centroids_LE,
    "pq_codebook": model.codebooks_MKS,
    "num_sub_vectors": m,
    "num_bits": k.bit_length() - 1,
  }
  with contextlib.ExitStack() as stack:
    if lists_N is not None:
      folder = stack.enter_context(tempfile.TemporaryDirectory(dir=path))
      options["precomputed_partition_dataset"] = _write_lists(
        lance, data, lists_N(), f"{folder}/lists.lance"
      )
    data.create_index(column, "IVF_PQ", metric=model.metric, **options)
  arrays = {k: v for k, v in model._asdict().items() if v is not None}
  arrays["column"] = column
  with open(path / MODEL, "xb") as file:
    np.savez(file, **arrays)


def _write_lists(lance, data, lists_N, path: str) -> str:
  """A data set of the list of each row, as Lance takes it."""
  import pyarrow as pa

  rows_N = data.to_table(columns=[], with_row_id=True).column("_rowid")
  columns = {
    "row_id": rows_N.cast(pa.uint64()),
    "partition": pa.array(lists_N.astype(np.uint32)),
  }
  lance.write_dataset(pa.table(columns), path)
  return path


def _to_batch(columns: dict):
  """Arrays as a record batch; `[n, X]` as lists of fixed size."""
  import pyarrow as pa

  arrays = {}
  for name, array in columns.items():
    if array.ndim == 2:
      flat = pa.array(np.ascontiguousarray(array).ravel())
      arrays[name] = pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
    else:
      arrays[name] = pa.array(array.tolist())
  return pa.RecordBatch.from_pydict(arrays)


class LanceIndex:
  """A folder of `write`, searched by pylance."""

  def __init__(self, path):
    """Opens it; see `open_index`."""
    path = pathlib.Path(path)
    found = numpy_files.load_npz(path / MODEL)
    found |= {"metric": str(found["metric"])}
    found |= {"is_cosine": bool(found["is_cosine"])}
    self.column = str(found.pop("column"))
    self.model = Model(**found)
    self.data = lance_rows.open_data(path / VECTORS)

  def __len__(self) -> int:
    """Number of vectors."""
    return self.data.count_rows()

  def search(
    self, queries, k: int = 10, *, nprobe: int = 16, num_refined: int = 0
  ) -> tuple[np.ndarray, list]:
    """Finds the `k` nearest of each query: distances `[Q, k]` and ids.

    Distances are squared for "L2", those of vectors of length 1 for the cosine,
    and 1 minus inner products for "dot", the least first. Fewer results leave
    inf and None.

    Args:
      queries: `[Q, D]`, in data units.
      k: Results.
      nprobe: Lists that are searched.
      num_refined: Candidates that are ordered by the column `vector`; 0 for
        none.
    """
    check_range("k", k, 1, 1 << 20)
    nprobe = min(nprobe, len(self.model.centroids_LE))
    queries_QD = self.model.to_unit(np.atleast_2d(np.asarray(queries)))
    distances_QR, ids_QR = [], []
    columns = ["id", "_distance"] + ["vector"] * bool(num_refined)
    for x_D, x_E in zip(queries_QD, self.model.apply(queries_QD), strict=True):
      near = {"column": self.column, "q": x_E, "k": max(k, num_refined)}
      near |= {"nprobes": nprobe, "refine_factor": None}
      found = self.data.to_table(columns=columns, nearest=near)
      distance_R = found.column("_distance").to_numpy()
      if num_refined:
        distance_R = self._exact(x_D, found.column("vector"))
      order_R = np.argsort(distance_R, kind="stable")[:k]
      ids = found.column("id").to_pylist()
      missing = k - len(order_R)
      distances_QR.append(
        np.pad(distance_R[order_R], (0, missing), constant_values=np.inf)
      )
      ids_QR.append([ids[i] for i in order_R] + [None] * missing)
    return np.array(distances_QR, np.float32), ids_QR

  def _exact(self, x_D, vectors) -> np.ndarray:
    x_RD = vectors.combine_chunks().flatten().to_numpy()
    x_RD = x_RD.reshape(-1, len(x_D)).astype(np.float32)
    if self.model.metric == "dot":
      return 1 - x_RD @ x_D
    return ((x_RD - x_D) ** 2).sum(axis=1)


def open_index(path) -> LanceIndex:
  """Opens a folder that `vqjax export --to=lance` has written.

  Raises:
    FileNotFoundError: There is none.
    ImportError: pylance is not installed.
  """
  path = files.user_path(path)
  if not folders.is_of(path, KIND[0]):
    raise FileNotFoundError(
      f"{path} is no folder of vqjax export --to=lance: it has no "
      f"{folders.MANIFEST} that says so."
    )
  return LanceIndex(path)


def compare(
  path, queries_QD, decoded_fn: Callable[[], Iterator], k: int = 10
) -> dict:
  """Compares what Lance finds in all lists with exact search in decoded ones.

  Args:
    path: The folder; it need not have a manifest yet.
    queries_QD: Queries.
    decoded_fn: Returns an iterator of what `Model.decode` makes of all rows.
    k: Results.

  Returns:
    `queries`; `same`, the share of results that both find; and
    `largest_difference` of the distances of the same rank, and
    `largest_distance`.
  """
  found = LanceIndex(path)
  metric = METRICS[found.model.metric]
  got_QR, ids_QR = found.search(queries_QD, k, nprobe=1 << 30)
  want_QR, rows_QR = faiss_io.knn(
    found.model.apply(queries_QD), decoded_fn(), k, metric
  )
  if metric == "ip":
    want_QR = 1 - want_QR
  ids_N = lance_rows.read_ids(path / VECTORS, "id")
  pairs = zip(ids_QR, ids_N[rows_QR].tolist(), strict=True)
  same = [len(set(a) & set(b)) / len(b) for a, b in pairs]
  return {
    "queries": len(queries_QD),
    "same": float(np.mean(same)),
    "largest_difference": float(np.abs(got_QR - want_QR).max()),
    "largest_distance": float(np.abs(want_QR).max()),
  }
