"""Processors by their descriptions, and what libraries are told of them."""

import os
import pathlib
import subprocess
import sys

import pytest

import vqjax
from vqjax import cpu

ROOT = pathlib.Path(__file__).parents[1]
AVX512 = "avx2 fma avx512f avx512dq avx512bw avx512vl"


@pytest.fixture
def describe(tmp_path, monkeypatch):
  """Makes this machine's processor one of a vendor with some flags."""

  def run(vendor, flags):
    path = tmp_path / "cpuinfo"
    path.write_text(f"vendor_id\t: {vendor}\nflags\t\t: fpu {flags}\n")
    monkeypatch.setattr(cpu, "_CPU_INFO", path)
    cpu._words.cache_clear()

  yield run
  cpu._words.cache_clear()


@pytest.mark.parametrize(
  ("flags", "has"), [("sse avx512_bf16", True), ("avx512f avx512bw", False)]
)
def test_products_of_bfloat16_are_found(flags, has, describe):
  describe("AuthenticAMD", flags)
  assert cpu.has_bfloat16() == has


@pytest.mark.parametrize(
  ("vendor", "flags", "kernels"),
  [
    ("GenuineIntel", AVX512, "SkylakeX"),
    ("GenuineIntel", "avx2 fma avx512f", "Haswell"),
    ("GenuineIntel", "sse4_2", None),
    ("AuthenticAMD", AVX512, None),
  ],
)
def test_blas_gets_kernels_for_the_processor(vendor, flags, kernels, describe):
  describe(vendor, flags)
  assert cpu.blas_kernels() == kernels
  assert cpu.is_intel_avx512() == (kernels == "SkylakeX")


def test_of_a_machine_that_says_nothing_nothing_is_known(monkeypatch):
  monkeypatch.setattr(cpu, "_CPU_INFO", pathlib.Path("none"))
  cpu._words.cache_clear()
  assert not cpu.has_bfloat16()
  assert cpu.blas_kernels() is None
  cpu._words.cache_clear()


@pytest.mark.parametrize("given", [None, "Nehalem"])
def test_faiss_is_told_unless_the_user_has(given):
  environ = {k: v for k, v in os.environ.items() if k != "OPENBLAS_CORETYPE"}
  if given:
    environ["OPENBLAS_CORETYPE"] = given
  program = (
    "import os, vqjax.interop; print(os.environ.get('OPENBLAS_CORETYPE')); "
    "import experiments; print(os.environ.get('OPENBLAS_CORETYPE'))"
  )
  done = subprocess.run(
    [sys.executable, "-c", program],
    cwd=ROOT, env=environ, capture_output=True, text=True, check=True,
  )  # fmt: skip
  # Importing the library leaves the process as it is.
  assert done.stdout == f"{given}\n{given or cpu.blas_kernels()}\n"


def test_the_doors_for_programs_tell_libraries_too(monkeypatch):
  told = []
  monkeypatch.setattr(cpu, "prepare_libraries", lambda: told.append(1))
  assert callable(vqjax.load)
  assert told
  with pytest.raises(AttributeError, match="no_such"):
    vqjax.no_such  # noqa: B018
