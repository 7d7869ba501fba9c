"""The API of the FastIVF package, on JAX and stock faiss.

from vqjax.fast_ivf import MiniBatchKMeans

Names, attributes and meaning are those of github.com/kmkolasinski/fast-ivf.
"""

_DOORS = {
  "CompressedFastIVF": "vqjax.fast_ivf.compressed",
  "FastIVF": "vqjax.fast_ivf.flat",
  "FastIVFPQ": "vqjax.fast_ivf.pq",
  "MiniBatchKMeans": "vqjax.fast_ivf.kmeans",
  "SubvectorsMiniBatchKMeans": "vqjax.fast_ivf.kmeans",
}
__all__ = [  # noqa: F822 (loaded on demand, below)
  "CompressedFastIVF",
  "FastIVF",
  "FastIVFPQ",
  "MiniBatchKMeans",
  "SubvectorsMiniBatchKMeans",
]


def __getattr__(name: str):
  """Imports a class when it is asked for."""
  if name not in _DOORS:
    raise AttributeError(f"module 'vqjax.fast_ivf' has no attribute {name!r}.")
  import importlib

  from vqjax import cpu

  cpu.prepare_libraries()  # Before what follows imports faiss.
  return getattr(importlib.import_module(_DOORS[name]), name)


def __dir__() -> list[str]:
  """Names what `__getattr__` knows too, for completion in a notebook."""
  return sorted({*globals(), *_DOORS})
