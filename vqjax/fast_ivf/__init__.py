"""The API of the FastIVF package, on JAX and stock faiss.

from vqjax.fast_ivf import MiniBatchKMeans

Names, attributes and meaning are those of github.com/kmkolasinski/fast-ivf.
"""

from vqjax import cpu

cpu.prepare_libraries()  # Before what follows imports faiss.

from vqjax.fast_ivf.compressed import CompressedFastIVF  # noqa: E402
from vqjax.fast_ivf.flat import FastIVF  # noqa: E402
from vqjax.fast_ivf.kmeans import (  # noqa: E402
  MiniBatchKMeans,
  SubvectorsMiniBatchKMeans,
)
from vqjax.fast_ivf.pq import FastIVFPQ  # noqa: E402

__all__ = [
  "CompressedFastIVF",
  "FastIVF",
  "FastIVFPQ",
  "MiniBatchKMeans",
  "SubvectorsMiniBatchKMeans",
]
