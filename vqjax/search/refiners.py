"""A refiner: a second code of every vector, for better estimates of distances.

The codewords of an index are M bytes a vector. A refiner keeps some bytes more
next to them, of one of two kinds:

  rabitq    one bit for each dimension of the residual (`residual_bits.py`); it
            re-orders the best of a scan
  fastscan  4-bit codes that faiss compares 32 at a time; they are scanned in
            place of the codewords, which re-order the best of that scan

Either way the head of the scan gets a distance that joins both codes. If the
network follows, its distances and these are averaged by `network_weight`,
because the refiner knows of a vector what its codes do not.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from vqjax.search import footprint, residual_bits

KINDS = ("rabitq", "fastscan")
# Of the network's distances against those by residual bits. The best of .2 to
# .6 on SIFT; recall changes by less than .005 between .3 and .5.
_RABITQ_NETWORK_WEIGHT = 0.4


class Refiner(NamedTuple):
  """What a search needs of a refiner; weights are 0 to 1.

  `map_fn` is as `map`, in threads that are worth their start for these
  functions; None for the threads of the searcher.
  """

  kind: str
  distances_fn: Callable  # (xq_QD, rows_QC, scanned_QC) -> distances [Q, C].
  network_weight: float
  scan_fn: Callable | None = None  # (xq_QD, probes_QP, k) -> rows, distances.
  map_fn: Callable | None = None
  num_bytes: dict[str, int] | None = None  # In memory, see `footprint`.


def rabitq(bits: residual_bits.ResidualBits) -> Refiner:
  """Returns the refiner of residual bits, which lie on the device."""
  compiled_fn = jax.jit(residual_bits.distances)

  def distances(queries_QD, rows_QC, scanned_QC):
    # Padded to few sizes, so that few are compiled.
    num = len(queries_QD)
    pad = ((0, round_up(num) - num), (0, 0))
    args = (np.pad(x, pad, "edge") for x in (queries_QD, rows_QC, scanned_QC))
    return np.asarray(compiled_fn(bits, *args))[:num]

  shared = bits.rotation_DE.nbytes
  num_bytes = {
    "refiner": footprint.array_bytes(bits) - shared,
    "tables": shared,
  }
  return Refiner(
    *("rabitq", distances, _RABITQ_NETWORK_WEIGHT), num_bytes=num_bytes
  )


def fastscan(
  scan_fn: Callable,
  codewords_fn: Callable,
  distances_to_fn: Callable,
  map_fn: Callable,
  *,
  codewords_weight: float,
  network_weight: float,
  num_bytes: dict[str, int] | None = None,
) -> Refiner:
  """Returns the refiner of 4-bit codes that are scanned by `scan_fn`.

  Args:
    scan_fn: `(xq_QD, probes_QP, k)` to rows and squared distances `[Q, k]`.
    codewords_fn: Rows `[n]` to vectors `[n, D]`, the sums of their codewords.
    distances_to_fn: `(xq_QD, x_ND, at_QC)` to squared distances `[Q, C]`.
    map_fn: See `Refiner`.
    codewords_weight: Of distances by codewords, against distances of the scan.
    network_weight: See `Refiner`.
    num_bytes: See `Refiner`.
  """

  def distances(queries_QD, rows_QC, scanned_QC):
    # A vector of several queries is decoded for each: cheaper than finding it.
    x_ND = codewords_fn(np.maximum(rows_QC, 0).ravel())
    at_QC = np.arange(rows_QC.size).reshape(rows_QC.shape)
    by_codewords_QC = distances_to_fn(
      queries_QD, x_ND, np.where(rows_QC < 0, -1, at_QC)
    )
    return weighted(by_codewords_QC, scanned_QC, codewords_weight)

  return Refiner(
    *("fastscan", distances, network_weight, scan_fn, map_fn, num_bytes)
  )


def weighted(new_QC, old_QC, weight: float):
  """The mean of two estimates of distances, by the `weight` of the new."""
  if weight == 1:
    return new_QC
  return weight * new_QC + (1 - weight) * old_QC


def round_up(size: int, num_steps: int = 2) -> int:
  """The least of few sizes that is not below `size`, at least 1.

  They are `num_steps` to a doubling: 1, 2, 3, 4, 6, 8, 12, 16, ... for 2.
  """
  step = max((1 << max(size - 1, 0).bit_length()) // (2 * num_steps), 1)
  return max(-(-size // step) * step, 1)
