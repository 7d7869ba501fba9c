"""Times programs that take turns with each other and with a matrix product.

They take turns so that a machine that slows down slows all of them. The best
of several matrix products, timed in the same turns, is what the machine can
do: the peak that rates are shares of.
"""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib.bench_arithmetic import Work

REST = 0.25  # Seconds after which threads of OpenMP have stopped to spin.
_CALL_SECONDS = 0.3  # What one timed call should last at least.
_TURN_SECONDS = 10.0  # Per program; no new round is begun after that.
_MAX_ROWS = 1 << 20
# Sizes of the products whose best is the peak; how many are queued at a time.
_PRODUCTS = {
  "cpu": (((1024,) * 3, (2048,) * 3, (16384, 384, 384), (16384, 512, 512)), 1),
  "gpu": (((4096,) * 3, (8192,) * 3, (32768, 4096, 4096)), 4),
}


class Contender(NamedTuple):
  """Something to time: `fn` returns when it is done with its vectors."""

  fn: Callable[[], Any]
  num_vectors: int
  work: Work | None
  first_s: float  # Of the first call, with compilation.
  block: int | None = None  # Vectors at once.


class Peak(NamedTuple):
  """A matrix product to measure the machine by, and its GFLOP a call."""

  fn: Callable[[], Any]
  gflop: float


def contender(make_fn, blocks, work: Work | None) -> Contender:
  """Returns what makes calls long enough to time, at the best block size.

  `make_fn(num_vectors, block)` returns a function that works on as many
  vectors, `block` at a time; its first call for a block compiles. Block sizes
  grow; larger ones gain nothing once one takes a second.
  """
  best = None
  for block in blocks:
    fn = make_fn(block, block)
    first_s, block_s = seconds(fn), seconds(fn)
    if best is None or block_s / block < best[0]:
      best = block_s / block, block, first_s
    if block_s > 1.0:
      break
  pace, block, first_s = best
  num_blocks = max(int(_CALL_SECONDS / pace / block) + 1, 4)
  num = min(num_blocks * block, max(_MAX_ROWS, block))
  return Contender(make_fn(num, block), num, work, first_s, block)


def seconds(fn: Callable[[], Any]) -> float:
  """Returns how long a call takes, what it queues on devices included."""
  start = time.perf_counter()
  jax.block_until_ready(fn())
  return time.perf_counter() - start


def race(
  fns: dict[str, Callable[[], Any]],
  *,
  repeats: int,
  max_seconds: float,
  rest: float = 0.0,
) -> dict[str, np.ndarray]:
  """Returns the seconds of every call of functions that take turns.

  Ends after `repeats` rounds, or with the round in which `max_seconds` are
  over. `rest` are seconds without work before each call.
  """
  times, began = {name: [] for name in fns}, time.perf_counter()
  for _ in range(repeats):
    for name, fn in fns.items():
      time.sleep(rest)
      times[name].append(seconds(fn))
    if time.perf_counter() - began > max_seconds:
      break
  return {name: np.array(values) for name, values in times.items()}


def find_peak(dtype: str) -> Peak:
  """Returns the fastest of some matrix products with factors of a type."""
  is_cpu = jax.default_backend() == "cpu"
  shapes, count = _PRODUCTS["cpu" if is_cpu else "gpu"]
  product_fn = jax.jit(
    functools.partial(
      jnp.matmul,
      precision="highest" if dtype == "float32" else None,
      preferred_element_type=jnp.float32,
    )
  )

  def multiply(x, y):
    return [product_fn(x, y) for _ in range(count)]

  # Not of zeros: a GPU is faster with them.
  rng, found = np.random.default_rng(0), {}
  for rows, inner, columns in shapes:
    x, y = (
      jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
      for shape in ((rows, inner), (inner, columns))
    )
    fn = functools.partial(multiply, x, y)
    seconds(fn)  # Compiles.
    peak = Peak(fn, 2e-9 * count * rows * inner * columns)
    times = race({"peak": fn}, repeats=5, max_seconds=1.0)["peak"]
    found[peak.gflop / np.median(times)] = peak
  return found[max(found)]


def measure(
  contenders: dict[str, Contender],
  peak: Peak,
  *,
  repeats: int,
  rest: float = 0.0,
) -> list[dict]:
  """Returns a row of figures for each contender, all timed interleaved.

  Times are in microseconds per vector; `ratio` is in units of the first.
  """
  times = race(
    {"peak": peak.fn, **{name: c.fn for name, c in contenders.items()}},
    repeats=repeats,
    max_seconds=_TURN_SECONDS * len(contenders),
    rest=rest,
  )
  peaks = peak.gflop / times.pop("peak")
  rows = []
  for program, seconds_R in times.items():
    entry = contenders[program]
    us_R = 1e6 * seconds_R / entry.num_vectors
    rows.append(
      {
        "program": program,
        "median_us": np.median(us_R), "min_us": us_R.min(),
        "max_us": us_R.max(), "repeats": len(us_R),
        "num_vectors": entry.num_vectors, "block": entry.block,
        "first_s": entry.first_s, "peak_gflops": np.median(peaks),
        "peak_min": peaks.min(), "peak_max": peaks.max(),
      }
    )  # fmt: skip
    rows[-1]["ratio"] = rows[-1]["median_us"] / rows[0]["median_us"]
    rows[-1] |= _rates(entry.work, rows[-1])
  return rows


def _rates(work: Work | None, row: dict) -> dict:
  """Rates of the whole arithmetic and of the network's, and their shares."""
  if work is None:
    return {}
  total, network = (2e-3 * count / row["median_us"] for count in (
    work.total, work.network,
  ))  # fmt: skip
  return {
    "gflop_per_vector": 2e-9 * work.total,
    "gflops": total,
    "network_gflops": network,
    "share": total / row["peak_gflops"],
    "network_share": network / row["peak_gflops"],
  }
