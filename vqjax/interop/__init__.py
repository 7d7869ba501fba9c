"""The only doors to other programs and their files."""

import os

from vqjax import cpu

# Threads of faiss that wait for work by spinning take the cores from XLA, which
# our searches call in turn with it: up to ten times slower on busy machines.
# OpenMP reads this when faiss is first imported, as OpenBLAS does the next.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if cpu.blas_kernels():
  os.environ.setdefault("OPENBLAS_CORETYPE", cpu.blas_kernels())
