"""What the processor of this machine is, as Linux tells, and what follows.

Elsewhere nothing is known, and libraries choose for themselves.
"""

import functools
import os
import pathlib

_CPU_INFO = pathlib.Path("/proc/cpuinfo")
_AVX512 = {"avx512f", "avx512dq", "avx512bw", "avx512vl"}


@functools.cache
def _words() -> frozenset[str]:
  """Vendor and flags among all words of the description."""
  try:
    return frozenset(_CPU_INFO.read_text(encoding="ascii").split())
  except (OSError, UnicodeDecodeError):
    return frozenset()


def has_bfloat16() -> bool:
  """True on a processor with products of bfloat16, which XLA then uses."""
  return bool({"avx512_bf16", "amx_bf16"} & _words())


def is_intel_avx512() -> bool:
  """True on a processor of Intel with AVX-512."""
  return "GenuineIntel" in _words() and _words() >= _AVX512


def blas_kernels() -> str | None:
  """Returns an OPENBLAS_CORETYPE for the OpenBLAS of faiss, None for its own.

  That version of 2021 does not know newer Intel processors and takes SSE3
  kernels there, which are two to four times slower.
  """
  if is_intel_avx512():
    return "SkylakeX"
  if "GenuineIntel" in _words() and _words() >= {"avx2", "fma"}:
    return "Haswell"
  return None


def prepare_libraries() -> None:
  """Sets up OpenMP and OpenBLAS for use with XLA, before faiss is imported.

  The commands and `vqjax.fit` and its like call this; importing a module does
  not. What the user has set stays.

  Threads of faiss that wait for work by spinning take the cores from XLA, which
  our searches call alternately: up to ten times slower on busy machines.
  """
  os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
  if blas_kernels():
    os.environ.setdefault("OPENBLAS_CORETYPE", blas_kernels())


def thread_variables(count: int) -> dict[str, str]:
  """Returns the environment of a process that works with `count` threads.

  OpenMP and OpenBLAS read it when they are loaded, XLA when it starts.
  """
  names = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NPROC",
  )
  return {name: str(count) for name in names}


@functools.cache
def _blas():
  """The OpenBLAS of NumPy, whose threads can be set."""
  import threadpoolctl

  return threadpoolctl.ThreadpoolController().select(user_api="blas")


def one_blas_thread():
  """Returns a context in which a matrix product takes one thread.

  For many small products that threads of ours share out: threads of OpenBLAS
  that wait for each other take several times as long, on a busy machine above
  all. What the limit was before is set again at the end.
  """
  return _blas().limit(limits=1)
