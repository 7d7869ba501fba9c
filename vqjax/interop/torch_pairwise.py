"""The pairwise decoder of the program released with QINCo2, a `.pt`.

It holds, by name:

  ivf_code_map      [L, V] int64: codes of each list
  combine_mvals_m   [2, R] int64: the two positions of each table
  codebook_MKD      [R, K * K, D] float32: the tables

What it does not hold is how these are meant: whether the codes of the list come
before or after those of the vector, which code of a pair counts in steps of K,
whether the sum of rows is a vector or what its centroid leaves of it, in which
unit. All of these are tried on codes of the index that it is used with: the
right one is near to what the network makes of them.

Reference: arXiv 2501.03078, section 3.4.
"""

import itertools
import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from absl import logging

from vqjax.codecs.pairwise import PairwiseParams
from vqjax.interop import torch_archive
from vqjax.interop.torch_archive import Refused

SUFFIX = ".pt"
_MOST_DIFFERENT = 0.7  # Of the distance to the codes of another vector.


class Sample(NamedTuple):
  """Codes of an index, and what the codec makes of them, in data units."""

  lists_n: np.ndarray
  codes_nM: np.ndarray
  decoded_nD: np.ndarray
  centroids_LD: np.ndarray
  mean_D: np.ndarray
  std: float


class _Tables(NamedTuple):
  """What a file holds."""

  list_codes_LV: np.ndarray
  pairs_R2: np.ndarray
  tables_RZD: np.ndarray

  @property
  def codebook_size(self) -> int:
    """K."""
    return math.isqrt(self.tables_RZD.shape[1])


class _Meaning(NamedTuple):
  """One way to read the tables."""

  lists_first: bool
  is_swapped: bool
  is_whole: bool
  is_normalised: bool


class Released(NamedTuple):
  """The decoder; `added_LD` is what it leaves out of vectors of each list."""

  params: PairwiseParams
  added_LD: np.ndarray


def load(path, sample: Sample) -> Released:
  """Loads the tables, and finds by a sample what they mean.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is no such file, damaged, or of other codes.
  """
  with torch_archive.open_archive(path) as (archive, root):
    found = _read(archive, root)
    _check(found, sample)
  meanings = [
    _Meaning(*each) for each in itertools.product((False, True), repeat=4)
  ]
  ratios = [_compare(found, sample, meaning) for meaning in meanings]
  best = int(np.argmin(ratios))
  if not ratios[best] < _MOST_DIFFERENT:
    raise ValueError(
      f"{path} is of other codes than the index: what it makes of "
      f"{len(sample.lists_n):,} of them is as far from what the codec does as "
      "from other vectors. Give the pairwise decoder of this codec."
    )
  meaning = meanings[best]
  logging.info(
    "%s does not say which codec it is of: in a sample of %d codes it is near "
    "to the codec, at %.0f %% of the squared distance to other vectors, if its "
    "sums are %s in %s units. It is taken as that.",
    *(path, len(sample.lists_n), 100 * ratios[best]),
    "vectors" if meaning.is_whole else "what centroids leave",
    "normalised" if meaning.is_normalised else "data",
  )
  return _convert(found, sample, meaning)


def _read(archive, root) -> _Tables:
  """The three arrays of a file."""
  names = ("ivf_code_map", "combine_mvals_m", "codebook_MKD")
  if not isinstance(root, dict) or not all(
    isinstance(root.get(name), torch_archive.Tensor) for name in names
  ):
    raise Refused(
      f"is no pairwise decoder: expected tensors {', '.join(names)}. A codec "
      "is given by --codec."
    )
  list_codes, pairs, tables = (archive.array(n, root[n]) for n in names)
  ranks = (list_codes.ndim, pairs.ndim, tables.ndim)
  if ranks != (2, 2, 3) or pairs.shape != (2, len(tables)):
    raise Refused(
      "is no pairwise decoder that is known: its tensors have shapes "
      f"{list_codes.shape}, {pairs.shape} and {tables.shape}."
    )
  to_int = lambda x: x.astype(np.int32)
  found = _Tables(to_int(list_codes), to_int(pairs.T), tables)
  if found.codebook_size**2 != tables.shape[1]:
    raise Refused(f"has tables of {tables.shape[1]} rows, which is no square.")
  return found


def _check(found: _Tables, sample: Sample) -> None:
  """Raises Refused unless sizes fit the index, and codes their range."""
  num_lists, dim = sample.centroids_LD.shape
  num_all = sample.codes_nM.shape[1] + found.list_codes_LV.shape[1]
  for name, got, want in (
    ("lists", len(found.list_codes_LV), num_lists),
    ("dimensions", found.tables_RZD.shape[2], dim),
  ):
    if got != want:
      raise Refused(f"is for {got} {name}, but the index has {want}.")
  for name, x, stop in (
    ("positions of pairs", found.pairs_R2, num_all),
    ("codes of lists", found.list_codes_LV, found.codebook_size),
    ("codes", sample.codes_nM, found.codebook_size),
  ):
    if x.size and not 0 <= x.min() <= x.max() < stop:
      raise Refused(
        f"does not fit the index: {name} go from {x.min()} to {x.max()}, and "
        f"must lie between 0 and {stop - 1}."
      )


def _pairs(found: _Tables, num_codes: int, meaning: _Meaning) -> np.ndarray:
  """Pairs of positions among codes, then those of lists; first times K."""
  num_levels = found.list_codes_LV.shape[1]
  order = np.arange(num_codes + num_levels)
  if meaning.lists_first:
    order = np.roll(order, num_levels)
  pairs_R2 = order[found.pairs_R2]
  return pairs_R2[:, ::-1] if meaning.is_swapped else pairs_R2


def _compare(found: _Tables, sample: Sample, meaning: _Meaning) -> float:
  """Squared distance to what the codec decodes, relative to other vectors."""
  list_codes_nV = found.list_codes_LV[sample.lists_n]
  all_nX = np.concatenate([sample.codes_nM, list_codes_nV], axis=1)
  pairs_R2 = _pairs(found, sample.codes_nM.shape[1], meaning)
  k, sums_nD = found.codebook_size, 0.0
  for table_ZD, (first, second) in zip(found.tables_RZD, pairs_R2, strict=True):
    sums_nD = sums_nD + table_ZD[all_nX[:, first] * k + all_nX[:, second]]
  if meaning.is_normalised:
    sums_nD = sums_nD * sample.std
  x_nD = sums_nD + _added(sample, meaning)[sample.lists_n]
  other_nD = (
    np.roll(sums_nD, 1, axis=0) + _added(sample, meaning)[sample.lists_n]
  )
  apart = lambda x: float(np.square(sample.decoded_nD - x).sum(dtype=float))
  # Vectors of lists and not what they leave: the lists alone would be near.
  return apart(x_nD) / max(min(apart(other_nD), _spread(sample)), 1e-30)


def _spread(sample: Sample) -> float:
  """Squared distance of the vectors to their centroids."""
  left_nD = sample.decoded_nD - sample.centroids_LD[sample.lists_n]
  return float(np.square(left_nD).sum(dtype=float))


def _added(sample: Sample, meaning: _Meaning) -> np.ndarray:
  """What is added to the sums of a list, `[L, D]`."""
  if not meaning.is_whole:
    return sample.centroids_LD
  of_all_D = sample.mean_D if meaning.is_normalised else 0 * sample.mean_D
  return np.broadcast_to(of_all_D, sample.centroids_LD.shape)


def _convert(found: _Tables, sample: Sample, meaning: _Meaning) -> Released:
  """The tables as ours, in float16 and data units."""
  k, m = found.codebook_size, sample.codes_nM.shape[1]
  scale_R = np.abs(found.tables_RZD).max(axis=(1, 2))
  scale_R = np.where(scale_R > 0, scale_R, 1).astype(np.float32)
  tables = [
    (table_ZD / scale).astype(np.float16).reshape(k, k, -1)
    for table_ZD, scale in zip(found.tables_RZD, scale_R, strict=True)
  ]
  unit = sample.std if meaning.is_normalised else 1.0
  params = PairwiseParams(
    pairs_R2=jnp.array(_pairs(found, m, meaning), jnp.int32),
    tables_RKKD=jnp.asarray(np.stack(tables)),
    scale_R=jnp.asarray(scale_R * np.float32(unit)),
    list_codes_LV=jnp.asarray(found.list_codes_LV),
    num_codes=m,
  )
  return Released(params, _added(sample, meaning))
