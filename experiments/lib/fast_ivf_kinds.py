"""The kinds of index of the command fast_ivf: a row of `KINDS` for each."""

import math
from typing import NamedTuple

import numpy as np

from vqjax import fast_ivf
from vqjax.core import check_range
from vqjax.search import pipeline

_FEW = 8  # Vectors of a list, at least, if nlist is unset.


class Kind(NamedTuple):
  """A class of `vqjax.fast_ivf`, and what the command tells it."""

  class_name: str
  options: tuple[str, ...]  # Arguments of its own.
  has_candidates: bool  # Codes find some, whole vectors score them.


KINDS = {
  "flat": Kind("FastIVF", (), False),
  "pq": Kind(
    "FastIVFPQ", ("pq_num_centroids", "pq_num_subvectors", "engine"), True
  ),
  "compressed": Kind("CompressedFastIVF", ("compression_ndim",), True),
}


def get(name: str) -> Kind:
  """Returns a kind; ValueError if there is none of this name."""
  if name not in KINDS:
    raise ValueError(f"--kind must be one of {', '.join(KINDS)}; got {name!r}.")
  kind = KINDS[name]
  if kind.class_name not in fast_ivf.__all__:
    raise ValueError(
      f"--kind={name} needs {kind.class_name}, which this version of vqjax "
      "does not have; take --kind=pq."
    )
  return kind


def settings(config, kind: Kind, num: int, dim: int) -> dict:
  """Returns the arguments of the index, with what the data say of those unset.

  Raises:
    ValueError: An argument does not fit `num` vectors of `dim` dimensions.
  """
  nlist = config.nlist
  if nlist is None:
    nlist = 2 ** round(math.log2(3 * math.sqrt(num)))
    nlist = max(min(nlist, num // _FEW), 1)
  check_range("--nlist", nlist, 1, num, "vectors in --data")
  found = {
    "ndim": dim,
    "nlist": nlist,
    "metric": config.metric,
    "seed": config.seed,
  }
  own = {name: config[name] for name in kind.options}
  if "engine" in own:
    own["pq_num_subvectors"] = num_subvectors(config, dim)
    if own["engine"] == "auto":
      is_fast = config.pq_num_centroids == 16
      own["engine"] = "fastscan" if is_fast else "tables"
    check_range(
      *("--pq_num_centroids", config.pq_num_centroids, 1, num),
      "vectors in --data",
    )
  if "compression_ndim" in own and own["compression_ndim"] is None:
    own["compression_ndim"] = max(dim // 4, 1)
  found |= {k: v for k, v in own.items() if v is not None}
  make(kind, found)  # Refuses what it cannot be made of.
  return found


def num_subvectors(config, dim: int) -> int:
  """Code positions: as asked for, else of four dimensions or a little more."""
  if config.pq_num_subvectors is not None:
    return config.pq_num_subvectors
  most = max(dim // 4, 1)
  return next(m for m in range(most, 0, -1) if dim % m == 0)


def class_of(kind: Kind) -> type:
  """The class of `vqjax.fast_ivf`."""
  return getattr(fast_ivf, kind.class_name)


def make(kind: Kind, found: dict, num_threads: int | None = None):
  """Returns an untrained index with these settings."""
  return class_of(kind)(**found, num_threads=num_threads)


def search_fn(kind: Kind, index, k: int):
  """Returns a search with a setting, as `Searcher.search`."""

  def search(xq_QD, *, nprobe, ratio_threshold=0, num_candidates=None):
    index.nprobe, index.ratio_threshold = nprobe, ratio_threshold
    index.min_lists = max(nprobe // 4, 1)
    if kind.has_candidates:
      ids_QK = index.search(
        xq_QD, k, rescore=True, num_candidates=num_candidates
      )[1]
    else:
      ids_QK = index.search(xq_QD, k)[1]
    return pipeline.Result(ids_QK, np.zeros(ids_QK.shape), {}, 0)

  return search
