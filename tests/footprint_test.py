"""Bytes of indexes against counts by hand."""

import functools

import faiss
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.interop import faiss_bytes
from vqjax.search import footprint

_N, _D, _L = 600, 8, 4
_X_ND = np.random.default_rng(0).normal(size=(_N, _D)).astype(np.float32)


@pytest.mark.parametrize(
  ("name", "want", "each"),
  [
    ("Flat", {"vectors": 32}, 32),
    ("IVF4,Flat", {"codes": 32, "ids": 8}, 40),
    ("IVF4,PQ4x4fs", {"codes": 2, "ids": 8}, 10),
    ("IVF4_HNSW8,SQ8", {"codes": 8, "ids": 8}, 16),
    ("IVF4,RQ2x4_Nqint8", {"codes": 2, "ids": 8}, 10),
    ("PCA4,IVF4,SQ8", {"codes": 4, "ids": 8}, 12),
    ("IVF4,PQ4x4fs,RFlat", {"codes": 2, "ids": 8, "vectors": 32}, 42),
  ],
)
def test_indexes_of_faiss(name, want, each):
  index = faiss.index_factory(_D, name)
  index.train(_X_ND)
  index.add(_X_ND)
  found = faiss_bytes.footprint(index)
  for part, size in want.items():
    assert found.ram[part] == size * _N
  assert found.each == each
  stored = len(faiss.serialize_index(index))
  assert found.disk == {"index": stored}
  assert sum(found.ram.values()) >= stored
  if "IVF" in name:
    dim = 4 if name.startswith("PCA") else _D
    assert found.ram["centroids"] == _L * dim * 4
  assert ("graph" in found.ram) == ("HNSW" in name)


def test_tables_that_faiss_computes_count():
  index = faiss.index_factory(_D, "IVF4,PQ2x4")
  index.train(_X_ND)
  index.use_precomputed_table = 1
  index.precompute_table()
  index.add(_X_ND)
  stored = len(faiss.serialize_index(index))
  ram = sum(faiss_bytes.by_part(index).values())
  assert ram >= stored + 4 * _L * 2 * 16  # Lists, positions, codewords.


def test_links_of_a_graph_grow_with_its_vectors():
  index = faiss.index_factory(_D, "HNSW8")
  index.add(_X_ND)
  found = faiss_bytes.footprint(index)
  assert found.ram["vectors"] == 32 * _N
  assert found.ram["links"] > 4 * 16 * _N  # 2 x 8 links on the lowest level.
  assert found.each == pytest.approx(found.ram_per_vector, rel=0.01)


def test_sums_and_words():
  found = footprint.Footprint(
    1000,
    {
      **{"codes": 8000, "norms": 1000, "rows": 4000},
      **{"codec": 800_000, "tables": 2_200_000},
    },
    {"index": 17_000, "ids": 4000},
  )
  assert (found.each, found.shared) == (13, 3_000_000)
  assert (found.ram_per_vector, found.disk_per_vector) == (3013, 21)
  assert str(found) == (
    "13 bytes per vector in memory (8 codes, 1 norms, 4 rows) and 3.0 MB "
    "shared by all (tables 2.2 MB); 21 bytes per vector on disk"
  )
  assert footprint.from_json(found.to_json()) == found
  cells = footprint.table({"ours": found})[1][0]
  assert cells == ["ours", "9", "0", "4", "13", "3.0", "3,013.0", "21.0"]
  assert footprint.Footprint(0, {}, {}).ram_per_vector == 0


def test_arrays_count_once_and_mapped_ones_not_at_all(tmp_path):
  x_N = np.ones(10, np.float32)
  fn = functools.partial(lambda a, b: None, x_N, b={"y": jnp.zeros(3)})
  assert footprint.array_bytes(fn, x_N) == 52
  np.save(tmp_path / "x.npy", x_N)
  assert footprint.array_bytes(np.load(tmp_path / "x.npy", mmap_mode="r")) == 0
  assert footprint.file_bytes(tmp_path / "x.npy", None, "no such file") == 168
