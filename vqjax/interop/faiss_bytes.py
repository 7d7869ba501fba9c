"""Bytes that an index of faiss takes, of any kind.

What faiss writes to a file it also has in memory; beside that it keeps tables
that it computes when it opens the file.
"""

import faiss

from vqjax.search.footprint import Footprint

_COMPUTED = (  # Tables that no file has, of an index or of its quantiser.
  *("precomputed_table", "sdc_table", "transposed_centroids"),
  *("centroids_sq_lengths", "centroid_norms", "codebook_cross_products"),
)


def footprint(
  index: faiss.Index, num_file_bytes: int | None = None
) -> Footprint:
  """Returns the `Footprint` of an index.

  `num_file_bytes` are those of its file; None for what a file would have.
  """
  ram = by_part(index)
  on_disk = num_file_bytes
  if on_disk is None:
    on_disk = stored_bytes(index)
  return Footprint(index.ntotal, ram, {"index": on_disk})


def by_part(index: faiss.Index) -> dict[str, int]:
  """Bytes in memory by part; what has no name of its own is in the tables."""
  names = ("codes", "ids", "vectors", "links", "graph", "centroids")
  ram = dict.fromkeys(names, 0)
  for part in _parts(index):
    if isinstance(part, faiss.IndexIVF):
      ram["codes"] += part.ntotal * part.code_size
      ram["ids"] += part.ntotal * 8
      for coarse in _parts(part.quantizer):
        ram["graph"] += _graph_bytes(coarse)
        if isinstance(coarse, faiss.IndexFlatCodes):
          ram["centroids"] += coarse.ntotal * coarse.code_size
    elif isinstance(part, faiss.IndexFlat):
      ram["vectors"] += part.ntotal * part.code_size
    elif isinstance(part, faiss.IndexFlatCodes):
      ram["codes"] += part.ntotal * part.code_size
    ram["links"] += _graph_bytes(part)  # Of the vectors themselves.
  named = sum(ram.values())
  computed = sum(_computed_bytes(part) for part in _parts(index))
  tables = max(stored_bytes(index) - named, 0) + computed
  return {**{k: v for k, v in ram.items() if v}, "tables": tables}


def stored_bytes(index: faiss.Index) -> int:
  """Bytes of the file of an index, which is not written."""
  sizes = []
  write = faiss.PyCallbackIOWriter(lambda block: sizes.append(len(block)))
  faiss.write_index(index, write)
  return sum(sizes)


def _parts(index) -> list:
  """An index and those that it consists of, but for quantisers of lists."""
  index = faiss.downcast_index(index)
  found = [index]
  inner = ("index", "base_index", "refine_index", "storage")
  for name in inner:
    if (part := getattr(index, name, None)) is not None:
      found += _parts(part)
  return found


def _graph_bytes(index) -> int:
  """Bytes of the links of a graph."""
  if not isinstance(index, faiss.IndexHNSW):
    return 0
  graph = index.hnsw
  return 4 * (graph.neighbors.size() + graph.levels.size()) + 8 * (
    graph.offsets.size()
  )


def _computed_bytes(index) -> int:
  """Bytes of tables that are not stored."""
  owners = [index] + [
    getattr(index, name) for name in ("pq", "rq") if hasattr(index, name)
  ]
  tables = [
    getattr(owner, name, None) for owner in owners for name in _COMPUTED
  ]
  return sum(4 * table.size() for table in tables if table is not None)
