"""Learned vector compression, and search with compressed vectors, in JAX.

codec = vqjax.fit(x, "qinco2_xs", num_codes=8)
codes = codec.encode(x)
xhat = codec.decode(codes)

index = vqjax.build_index(codec, x, num_lists=1024)
distances, ids = index.search(queries, k=10, nprobe=16)

ids = vqjax.make_ids(codec, x)
"""

__version__ = "0.1.0"
_DOORS = {
  "Codec": "vqjax.codec",
  "Index": "vqjax.index",
  "build_index": "vqjax.index_build",
  "fit": "vqjax.fitting",
  "load": "vqjax.codec",
  "load_dataset": "vqjax.data.datasets",
  "load_ids": "vqjax.semantic_ids",
  "load_index": "vqjax.index",
  "make_ids": "vqjax.semantic_ids",
}
__all__ = [  # noqa: F822 (loaded on demand, below)
  "Codec",
  "Index",
  "build_index",
  "fit",
  "load",
  "load_dataset",
  "load_ids",
  "load_index",
  "make_ids",
]


def __getattr__(name: str):
  """Imports what programs use when they ask for it: `import vqjax` is cheap."""
  if name not in _DOORS:
    raise AttributeError(f"module 'vqjax' has no attribute {name!r}.")
  import importlib

  from vqjax import cpu

  cpu.prepare_libraries()  # Before what follows imports faiss.
  return getattr(importlib.import_module(_DOORS[name]), name)


def __dir__() -> list[str]:
  """Names what `__getattr__` knows too, for completion in a notebook."""
  return sorted({*globals(), *_DOORS})
