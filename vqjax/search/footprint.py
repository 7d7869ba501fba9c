"""Bytes that an index takes in memory and on disk, with nothing left out.

  found = searcher.footprint()          # ours; `faiss_bytes.footprint` of faiss
  found.each                            # 9.0 bytes in memory of each vector
  found.ram_per_vector                  # with its share of all that is shared
  found.disk_per_vector

What grows with the vectors are the parts of `EACH`: codes, norms, ids, what a
refiner adds, rows (maps between the lists of an index and of its refiner), full
vectors, links of a graph of them. All vectors share the others: centroids, the
graph that finds them, tables (codewords, those of the pairwise decoder, what
faiss computes when it opens a file), the codec. Memory is that of the arrays
while nothing is searched; the programs themselves and what a batch of queries
needs for a moment are not in it.
"""

import functools
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

EACH = ("codes", "norms", "ids", "refiner", "rows", "vectors", "links")


class Footprint(NamedTuple):
  """Bytes by part, of all vectors together."""

  num_vectors: int
  ram: dict[str, int]
  disk: dict[str, int]  # By what the files hold; {} if there are none.

  def of(self, *parts: str) -> float:
    """Bytes in memory per vector of these parts."""
    return self._per_vector(self.ram.get(part, 0) for part in parts)

  @property
  def each(self) -> float:
    """Bytes in memory that one more vector takes."""
    return self.of(*EACH)

  @property
  def shared(self) -> int:
    """Bytes in memory that do not grow with the vectors."""
    return sum(self.ram[k] for k in self.ram if k not in EACH)

  @property
  def ram_per_vector(self) -> float:
    """Bytes in memory per vector, with its share of what is shared."""
    return self._per_vector(self.ram.values())

  @property
  def disk_per_vector(self) -> float:
    """Bytes of all files, per vector."""
    return self._per_vector(self.disk.values())

  def _per_vector(self, sizes: Iterable[int]) -> float:
    return sum(sizes) / max(self.num_vectors, 1)

  def to_json(self) -> dict:
    """Bytes per vector, and by part those of all vectors together."""
    return {
      "num_vectors": self.num_vectors,
      "ram_each": round(self.each, 3),
      "ram_per_vector": round(self.ram_per_vector, 3),
      "disk_per_vector": round(self.disk_per_vector, 3),
      "ram": self.ram,
      "disk": self.disk,
    }

  def __str__(self) -> str:
    """Says it in a line."""
    parts = [f"{self.of(k):.3g} {k}" for k in EACH if self.ram.get(k)]
    text = (
      f"{self.each:.3g} bytes per vector in memory ({', '.join(parts)}) and "
      f"{self.shared / 1e6:.1f} MB shared by all"
    )
    sizes = {k: size for k, size in self.ram.items() if k not in EACH}
    if self.shared:
      most = max(sizes, key=sizes.get)
      text += f" ({most} {sizes[most] / 1e6:.1f} MB)"
    if self.disk:
      text += f"; {self.disk_per_vector:.4g} bytes per vector on disk"
    return text


def from_json(found: dict) -> Footprint:
  """Returns what `to_json` was of."""
  return Footprint(found["num_vectors"], found["ram"], found["disk"])


def table(found: dict[str, Footprint]) -> tuple[list[str], list[list[str]]]:
  """Header and cells of a table, a row for each name; bytes per vector."""
  header = [
    *("bytes per vector in memory", "code, norm", "id", "refiner", "together"),
    *("MB shared by all", "all in all", "on disk, all in all"),
  ]
  rows = []
  for name, one in found.items():
    of = lambda *parts, one=one: one.of(*parts)
    rows.append(
      [
        name,
        f"{of('codes', 'norms', 'vectors', 'links'):.4g}",
        f"{of('ids'):.4g}",
        f"{of('refiner', 'rows'):.4g}",
        f"{one.each:.4g}",
        f"{one.shared / 1e6:.1f}",
        f"{one.ram_per_vector:,.1f}",
        f"{one.disk_per_vector:,.1f}",
      ]
    )
  return header, rows


def file_bytes(*paths) -> int:
  """Bytes of these files together; those that are missing have none."""
  found = [pathlib.Path(path) for path in paths if path is not None]
  return sum(path.stat().st_size for path in found if path.is_file())


def array_bytes(*trees) -> int:
  """Bytes of all arrays in these trees, each array once.

  A `functools.partial` has those of its arguments; a mapped file has none.
  """
  leaves, waiting = {}, jax.tree.leaves(trees)
  while waiting:
    leaf = waiting.pop()
    if isinstance(leaf, functools.partial):
      waiting += jax.tree.leaves((leaf.args, leaf.keywords))
    elif hasattr(leaf, "nbytes") and not isinstance(leaf, np.memmap):
      leaves[id(leaf)] = leaf
  return sum(leaf.nbytes for leaf in leaves.values())
