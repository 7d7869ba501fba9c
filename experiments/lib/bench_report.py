"""How results of the benchmark are written: machine, lines of JSON, table."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import re

import jax

import vqjax
from vqjax import devices

_PACKAGES = ("jax", "jaxlib", "numpy", "faiss-cpu", "torch")
_COLUMNS = {  # Title to figure and format.
  "us/vec": ("median_us", ".4g"),
  "min": ("min_us", ".4g"),
  "max": ("max_us", ".4g"),
  "ratio": ("ratio", ".2f"),
  "GFLOP/s": ("gflops", ".4g"),
  "peak": ("peak_gflops", ".4g"),
  "share": ("share", ".0%"),
  "network": ("network_share", ".0%"),
  "block": ("block", "d"),
  "first s": ("first_s", ".1f"),
  "MSE": ("mse", ".5g"),
}


def machine() -> dict:
  """Returns device, versions, threads: what a figure needs to be compared."""
  return {
    "date": datetime.datetime.now().isoformat(timespec="seconds"),
    "platform": jax.default_backend(),
    "device": _processor() or jax.devices()[0].device_kind,
    "num_devices": jax.device_count(),
    "threads": devices.num_cpus(),
    "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    "python": platform.python_version(),
    "vqjax": vqjax.__version__,
    **{name.removesuffix("-cpu"): _version(name) for name in _PACKAGES},
  }


def cells(results: list[dict]) -> tuple[list[str], list[list[str]]]:
  """Returns header and cells of the table."""
  lines = []
  for row in results:
    search = [f"{letter}={row[letter]}" for letter in "ABCF" if row.get(letter)]
    what = [row["name"], row["task"], *search, row["dtype"], row["program"]]
    figures = [
      "" if row.get(name) is None else format(row[name], spec)
      for name, spec in _COLUMNS.values()
    ]
    lines.append([" ".join(what), *figures])
  return ["what", *_COLUMNS], lines


def _version(package: str) -> str | None:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None


def _processor() -> str | None:
  """The model of the processor, if it is the device; JAX says "cpu"."""
  info = pathlib.Path("/proc/cpuinfo")
  if jax.default_backend() != "cpu" or not info.exists():
    return None
  found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
  return found and found[1]
