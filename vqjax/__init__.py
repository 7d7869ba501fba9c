"""Learned vector compression, and search with compressed vectors, in JAX.

codec = vqjax.load("runs/qinco2_s")
codes = codec.encode(x)
xhat = codec.decode(codes)
"""

__version__ = "0.1.0"
_DOORS = {
  "Codec": "vqjax.codec",
  "load": "vqjax.codec",
}
__all__ = ["Codec", "load"]  # noqa: F822 (loaded on demand, below)


def __getattr__(name: str):
  """Imports what programs use when they ask for it: `import vqjax` is cheap."""
  if name not in _DOORS:
    raise AttributeError(f"module 'vqjax' has no attribute {name!r}.")
  import importlib

  from vqjax import cpu

  cpu.prepare_libraries()  # Before what follows imports faiss.
  return getattr(importlib.import_module(_DOORS[name]), name)
