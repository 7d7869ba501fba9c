"""Settings of the whole suite: CPU, and no broadcasting by accident.

Most of the time goes into compiling programs that run for milliseconds. So XLA
does not optimise them, and all processes of a run share what was compiled.
`XLA_FLAGS= pytest` compiles as users do.
"""

import fcntl
import os
import pathlib
import shutil
import signal
import tempfile

# A machine with an accelerator runs the others by JAX_PLATFORMS=cuda.
if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
  os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
  )
# As the commands set it: threads of faiss that spin take the cores from JAX.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Tests send this signal. A shell ignores it for what runs in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_OWN_CACHE = None if _CACHE in os.environ else tempfile.mkdtemp()
if _OWN_CACHE:  # In the first process; its workers and commands inherit it.
  os.environ[_CACHE] = _OWN_CACHE
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
_TRAINED = "VQJAX_TESTS_TRAINED"
_OWN_TRAINED = None if _TRAINED in os.environ else tempfile.mkdtemp()
if _OWN_TRAINED:  # As the cache.
  os.environ[_TRAINED] = _OWN_TRAINED

import faiss  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_unconfigure():
  for folder in filter(None, (_OWN_CACHE, _OWN_TRAINED)):
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(autouse=True, scope="module")
def free_programs():
  """Frees compiled programs after each file of tests.

  Each takes some ten memory maps. Linux allows a process 65,530, and one with
  more crashes.
  """
  yield
  jax.clear_caches()


@pytest.fixture(scope="session")
def run_dir():
  """The run folder of `qinco2_s:smoke`, trained once for all processes."""
  from configs import qinco2_s
  from experiments import train

  folder = pathlib.Path(os.environ[_TRAINED]) / "qinco2_s"
  with open(f"{folder}.lock", "w") as file:
    fcntl.flock(file, fcntl.LOCK_EX)  # Who comes later finds it finished.
    train.run(qinco2_s.get_config("smoke"), folder)
  return str(folder)


@pytest.fixture
def base_file(tmp_path):
  """A file of 333 of the bundled vectors."""
  from vqjax.data import formats

  path = str(tmp_path / "base.fvecs")
  sample = pathlib.Path(__file__).parents[1] / "third_party" / "sample_sift"
  x_ND = formats.open_vectors(sample / "base.bvecs")[:333]
  formats.write_vectors(path, x_ND, dtype="float32")
  return path


@pytest.fixture(scope="module")
def one_thread():
  """Gives faiss one thread: those that wait take time from those of JAX."""
  num_threads = faiss.omp_get_max_threads()
  faiss.omp_set_num_threads(1)
  yield
  faiss.omp_set_num_threads(num_threads)


@pytest.fixture
def single_calls(monkeypatch):
  """Measures a search by one call, not for a tenth of a second."""
  from experiments.lib import search_measure

  monkeypatch.setattr(search_measure, "_MIN_SECONDS", 0.0)
