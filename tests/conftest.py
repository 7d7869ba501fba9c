"""Settings of the whole suite: CPU, and no broadcasting by accident."""

import os

# A machine with an accelerator runs the others by JAX_PLATFORMS=cuda.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import faiss
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module")
def one_thread():
  """Gives faiss one thread: those that wait take time from those of JAX."""
  num_threads = faiss.omp_get_max_threads()
  faiss.omp_set_num_threads(1)
  yield
  faiss.omp_set_num_threads(num_threads)
