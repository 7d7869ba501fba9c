"""Makes refiners of the vectors in an index; `search.refiners` says what for.

Vectors are read by `read_fn`, which takes rows `[n]` of the index, numbered as
in `faiss_lists.Contents`, and returns vectors `[n, D]`. It is called in the
order of their ids: the order of the file, if ids are its rows.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from vqjax.data import batches
from vqjax.interop import faiss_fastscan, faiss_lists
from vqjax.search import residual_bits

_BLOCK = 16384
_MAX_TRAINED = 65536  # Vectors that rotation and codewords are learned from.
_NUM_COMPARED = 4096  # Vectors that the weights are fitted to.
_DECODE_ROWS = 512


def rabitq(
  contents: faiss_lists.Contents,
  read_fn: Callable,
  *,
  metric: str = "l2",
  seed: int = 0,
  progress: Callable | None = None,
) -> residual_bits.ResidualBits:
  """Returns one-bit residual codes of all vectors of an index.

  The metric "ip" has no use for norms; `seed` is of the random rotation,
  `progress` is called with `(vectors done, vectors in all)`.
  """
  dim = contents.centroids_LD.shape[1]
  rotation_DE = residual_bits.random_rotation(dim, seed)
  found = describe_residuals(
    contents, read_fn, rotation_DE, metric=metric, progress=progress
  )
  return residual_bits.make_bits(*found, rotation_DE)


def extend_rabitq(
  bits: residual_bits.ResidualBits,
  before: faiss_lists.Contents,
  after: faiss_lists.Contents,
  read_fn: Callable,
  *,
  metric: str = "l2",
) -> residual_bits.ResidualBits:
  """Returns residual bits of an index to which vectors were added.

  Those of the vectors that it had stay as they are, unless the new ones exceed
  the range of a byte.

  `bits` are of the rows of `before`, what the index held; `read_fn` is called
  with new rows of `after`, what it holds.
  """
  lists_N = faiss_lists.lists_of(before, np.arange(len(before.ids_N)))
  moved = after.starts[:-1] - before.starts[:-1]
  old_N = np.arange(len(before.ids_N)) + moved[lists_N]
  is_new_N = np.ones(len(after.ids_N), bool)
  is_new_N[old_N] = False
  new_N = np.flatnonzero(is_new_N)
  new = describe_residuals(
    after, read_fn, np.asarray(bits.rotation_DE), new_N, metric=metric
  )
  return residual_bits.insert(bits, old_N, new_N, *new)


def describe_residuals(
  contents,
  read_fn: Callable,
  rotation_DE: np.ndarray,
  rows_N=None,
  *,
  metric: str = "l2",
  progress: Callable | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """Returns bits, scales and offsets of rows, all if `rows_N` is None."""
  rows_N = np.arange(len(contents.ids_N)) if rows_N is None else rows_N
  num, dim = len(rows_N), contents.centroids_LD.shape[1]
  order_N = np.argsort(contents.ids_N[rows_N], kind="stable")
  out = (
    np.empty((num, residual_bits.num_numbers(dim)), np.uint32),
    np.empty(num, np.float32),
    np.empty(num, np.float32),
  )
  decode_fn = faiss_lists.make_decode_fn(contents.codebooks_MKD)
  for start in range(0, num, _BLOCK):
    at_n = order_N[start : start + _BLOCK]
    rows_n = rows_N[at_n]
    found = residual_bits.describe(
      read_fn(rows_n) - contents.centre_D,
      *_scanned(contents, decode_fn, rows_n),
      rotation_DE,
    )
    for whole, part in zip(out, found, strict=True):
      whole[at_n] = np.asarray(part)
    if progress is not None:
      progress(start + len(rows_n), num)
  if metric == "ip":  # The offset is all norms.
    out[2][:] = 0
  return out


def _scanned(contents, decode_fn, rows_n):
  """Vectors of rows as the scan knows them, and what it takes for |xhat|^2.

  Less the centre that the scan subtracts.
  """
  lists_n = faiss_lists.lists_of(contents, rows_n)
  centroids_nD = contents.centroids_LD[lists_n] - contents.centre_D
  xhat_nD = centroids_nD + decode_fn(contents.codes_NM[rows_n])
  scanned_n = np.square(centroids_nD).sum(axis=1)
  scanned_n += contents.low_L[lists_n]
  scanned_n += contents.step_L[lists_n] * contents.norm_N[rows_n]
  return xhat_nD, scanned_n


def fastscan(
  like,
  contents: faiss_lists.Contents,
  read_fn: Callable,
  decode_fn: Callable,
  *,
  num_parts: int | None = None,
  progress: Callable | None = None,
) -> tuple[Any, dict]:
  """Returns 4-bit codes of all vectors of an index, and how they are weighted.

  The coarse quantiser of `like`, the index, is copied. `decode_fn` takes codes
  `[n, M]` and lists `[n]` to vectors, by the codec; `progress` is called with
  `(vectors done, vectors in all)`.

  Raises:
    ValueError: Sizes do not fit each other, or the metric is not l2.
  """
  order_N = np.argsort(contents.ids_N, kind="stable")
  num = len(order_N)
  xt_ND = read_fn(order_N[batches.evenly_spaced_rows(num, _MAX_TRAINED)])
  index = faiss_fastscan.fit(like, xt_ND, num_parts=num_parts)
  for start in range(0, num, _BLOCK):
    rows_n = order_N[start : start + _BLOCK]
    faiss_fastscan.add(index, read_fn(rows_n), contents.ids_N[rows_n])
    if progress is not None:
      progress(start + len(rows_n), num)
  rows_n = order_N[batches.evenly_spaced_rows(num, _NUM_COMPARED)]
  errors = _errors(index, contents, rows_n, read_fn(rows_n), decode_fn)
  return index, _fit_weights(errors)


def _errors(index, contents, rows_N, x_ND, decode_fn) -> dict[str, np.ndarray]:
  """Residuals of vectors after each of the codes, `[N, D]`."""
  lists_N = faiss_lists.lists_of(contents, rows_N)
  network = []
  for start in range(0, len(rows_N), _DECODE_ROWS):
    n = rows_N[start : start + _DECODE_ROWS]
    codes_nM = contents.codes_NM[n].astype(np.int32)
    lists_n = lists_N[start : start + _DECODE_ROWS].astype(np.int32)
    pad = (0, _DECODE_ROWS - len(n))
    found_nD = decode_fn(
      np.pad(codes_nM, (pad, (0, 0)), "edge"), np.pad(lists_n, pad, "edge")
    )
    network.append(np.asarray(found_nD)[: len(n)])
  return {
    "refiner": x_ND - faiss_fastscan.reconstruct(index, x_ND),
    "codewords": x_ND - faiss_lists.make_rows_fn(contents)(rows_N),
    "network": x_ND - np.concatenate(network),
  }


def _fit_weights(errors: dict[str, np.ndarray]) -> dict:
  """Mean squared errors, and the weights with the least joint error."""
  mse = lambda left_ND: float(np.mean(np.sum(left_ND**2, axis=1), dtype=float))
  found = {f"mse_{name}": mse(left_ND) for name, left_ND in errors.items()}
  for name in ("codewords", "network"):
    # Of e + (f - e) (1 - weight) with errors e and f, least squares.
    differs_ND = (errors["refiner"] - errors[name]).astype(float)
    along = np.sum(errors["refiner"] * differs_ND)
    weight = along / max(np.sum(differs_ND**2), 1e-30)
    found[f"{name}_weight"] = float(np.clip(weight, 0, 1))
  return found
