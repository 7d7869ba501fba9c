"""Index files without a description, as released with QINCo and QINCo2.

Such a file does not say which codec made its codes. It is compared with the
codec that it is opened with: sizes, centroids, and for a sample of its vectors
what codec and additive decoder make of the same code. Both stand for the same
vectors, so they are near each other; for codes of another codec they are not.
"""

import functools
import os
from typing import Any, NamedTuple

import numpy as np

from vqjax.codecs import registry
from vqjax.data import files
from vqjax.interop import faiss_ivf, faiss_lists, torch_pairwise

_NUM_SAMPLED = 1000
_MOST_DIFFERENT = 0.7  # Of the distance to the codes of another vector.
_NEAR = 0.01  # Centroids, relative to their spread.


class Found(NamedTuple):
  """An index, its description, and what was compared, empty for nothing."""

  index: Any  # Of faiss.
  info: dict
  said: str


def open_index(path, loaded, decode_fn, *, mmap: bool = False) -> Found:
  """Reads an index of a codec, with or without a description.

  Args:
    path: Of the index file.
    loaded: The codec, of `codec_file.load_codec`.
    decode_fn: Decodes its codes `[n, M]` of lists `[n]`.
    mmap: See `faiss_files.load`.

  Raises:
    FileNotFoundError: There is no such file.
    ValueError: It is damaged, or of another codec.
  """
  is_described = files.description_path(path).is_file()
  check_fn = functools.partial(_describe, path, loaded, decode_fn)
  index, info = faiss_ivf.load(
    path, mmap=mmap, describe_fn=None if is_described else check_fn
  )
  faiss_ivf.check_codec(path, info, loaded.fingerprint)
  return Found(index, info, info.pop("said", ""))


def _describe(path, loaded, decode_fn, index) -> dict:
  """Returns what a description would say; raises if the codec is another."""
  stat = os.stat(path)
  sizes = faiss_ivf.describe(index)
  _check_sizes(path, loaded, sizes)
  is_ivf = registry.get(loaded.name).is_ivf(loaded.params)
  if is_ivf:
    _check_centroids(path, loaded, index)
  ratio, num = _compare(index, decode_fn)
  said = (
    f"{path} has no description, so it was compared with the codec. Sizes"
    f"{' and centroids' if is_ivf else ''} are equal; of {num:,} sampled codes "
    "its additive decoder and the codec make vectors that are apart by "
    f"{100 * ratio:.0f} % of the squared distance to those of other codes"
  )
  if not ratio < _MOST_DIFFERENT:
    raise ValueError(
      f"{said}: they are of another codec. Give the one that made them, or "
      "build the index again."
    )
  return {
    "codec": loaded.name,
    "codec_fingerprint": loaded.fingerprint,
    "bytes": stat.st_size,
    "sha256": _checksum(str(path), stat.st_size, stat.st_mtime_ns),
    **sizes,
    "said": f"{said}: it is of this codec.",
  }


@functools.lru_cache(maxsize=8)
def _checksum(path: str, size: int, time: int) -> str:
  """The checksum of a file as it was then; a search asks more than once."""
  del size, time
  return files.sha256(path)


def _check_sizes(path, loaded, sizes: dict) -> None:
  module = registry.get(loaded.name)
  of_codec = list(module.codebook_sizes(loaded.params))
  is_ivf = module.is_ivf(loaded.params)
  num_lists = of_codec[0] if is_ivf else sizes["num_lists"]
  wanted = {
    "dimensions": (sizes["dim"], module.dim(loaded.params)),
    "lists": (sizes["num_lists"], num_lists),
    "codes of residuals": (sizes["by_residual"], is_ivf),
    "codebooks": (
      [sizes["codebook_size"]] * sizes["num_codes"],
      of_codec[is_ivf:],
    ),
  }
  if not is_ivf and sizes["num_lists"] == 1:
    wanted.pop("codes of residuals")  # Of a centroid of zero.
  for name, (found, want) in wanted.items():
    if found != want:
      raise ValueError(
        f"{path} is of another codec: its {name} are {found}, those of the "
        f"codec {want}. Give the codec that made it."
      )


def _check_centroids(path, loaded, index) -> None:
  """Raises ValueError if the lists have other centroids than the codec."""
  wanted_LD = np.asarray(registry.get(loaded.name).centroids(loaded.params))
  found_LD = faiss_lists.centroids_of(faiss_lists.check_index(index))
  shift_LD = found_LD - wanted_LD
  off = np.abs(
    shift_LD - shift_LD.mean(axis=0)
  ).mean()  # A centre may be moved.
  spread = np.abs(wanted_LD - wanted_LD.mean(axis=0)).mean()
  if not off <= _NEAR * max(spread, np.finfo(np.float32).tiny):
    raise ValueError(
      f"{path} is of another codec: its {len(found_LD)} centroids differ from "
      f"those of the codec by {off:.4g} on average, and these spread by "
      f"{spread:.4g}. Give the codec that made it."
    )


def sample(index, loaded, decode_fn) -> torch_pairwise.Sample:
  """Codes spread over all lists of an index, and what the codec decodes."""
  lists_n, packed = faiss_lists.sample(index, _NUM_SAMPLED)
  codes_nM = faiss_lists.unpack(index, packed)
  centroids_LD = faiss_lists.centroids_of(index)
  if not index.by_residual:
    centroids_LD = np.zeros_like(centroids_LD)
  return torch_pairwise.Sample(
    lists_n,
    codes_nM,
    np.asarray(decode_fn(codes_nM, lists_n), np.float32),
    centroids_LD,
    np.asarray(getattr(loaded.params, "mean_D", 0 * centroids_LD[0])),
    float(getattr(loaded.params, "std", 1.0)),
  )


def _compare(index, decode_fn) -> tuple[float, int]:
  """How far codec and additive decoder are apart, and of how many vectors.

  Relative to sums of codewords of other vectors: near 1 if the codec has
  nothing to do with the codes.
  """
  lists_n, packed = faiss_lists.sample(index, _NUM_SAMPLED)
  codes_nM = faiss_lists.unpack(index, packed)
  decoded_nD = np.array(decode_fn(codes_nM, lists_n), np.float32)
  if index.by_residual:
    decoded_nD -= faiss_lists.centroids_of(index)[lists_n]
  sums_nD = index.rq.decode(packed)
  apart = lambda x_nD: float(np.square(decoded_nD - x_nD).sum(dtype=float))
  other = apart(np.roll(sums_nD, 1, axis=0))
  return (apart(sums_nD) / other if other else 1.0), len(lists_n)
