"""The two-level start of k-means over a file, for `ivf_centroids`."""

import functools

import numpy as np

from experiments.lib import cli
from vqjax import devices
from vqjax.codecs import kmeans
from vqjax.data import batches
from vqjax.interop import faiss_io
from vqjax.progress import progress_bar

_ITERATIONS = 10  # Of k-means, on either level.
_VECTORS = 256  # For each centroid, at most.


def run(vectors, num_codewords: int, seed: int) -> np.ndarray:
  """Coarse clusters, then in each of them a share of the codewords.

  Every process assigns its share of the vectors, and fits its share of the
  clusters.
  """
  num_groups = round(num_codewords**0.5)
  sample_ND = batches.subsample(vectors, _VECTORS * num_groups, seed)
  coarse_KD = faiss_io.fit_kmeans(
    sample_ND, num_groups, num_iterations=_ITERATIONS, seed=seed
  )
  coarse_KD = devices.gather(coarse_KD)[0]
  assign_fn = kmeans.make_assign_fn(coarse_KD)
  own = devices.process_rows(len(vectors))
  with cli.progress(len(own), "coarse clusters") as done:
    blocks = batches.map_blocks(
      lambda x_ND: assign_fn(x_ND)[0],
      vectors,
      block_size=65536,
      rows=own,
      progress=done,
    )
    group_N = np.concatenate([group_N for _, group_N in blocks])
  group_N = devices.gather_rows(group_N, len(vectors))
  sizes = np.bincount(group_N, minlength=num_groups)
  groups = np.split(np.argsort(group_N, kind="stable"), np.cumsum(sizes)[:-1])
  num_each = shares(sizes, num_codewords)
  ends = np.cumsum(num_each)
  mine = devices.process_rows(num_groups)
  own = slice(mine.start, mine.stop)
  fit_fn = functools.partial(fit_group, vectors, seed)
  words_KD = np.zeros((num_codewords, vectors.shape[1]), np.float32)
  with (
    progress_bar(int(num_each[own].sum()), "start", unit="centroid") as bar,
    faiss_io.thread_pool() as pool,
  ):
    try:
      found = pool.map(fit_fn, groups[own], num_each[own])
      for end, some_KD in zip(ends[own], found, strict=True):
        words_KD[end - len(some_KD) : end] = some_KD
        bar.update(len(some_KD))
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise
  return devices.sum_over_processes(words_KD)  # Zero in all but one.


def fit_group(vectors, seed: int, rows, num_codewords: int) -> np.ndarray:
  """Codewords of one coarse cluster, from a limited number of its rows."""
  if not num_codewords:
    return np.empty((0, vectors.shape[1]), np.float32)
  most = min(len(rows), _VECTORS * num_codewords)
  rng = np.random.default_rng([seed, rows[0]])
  rows = np.sort(rng.choice(rows, most, replace=False))
  return faiss_io.fit_kmeans(
    batches.read_rows(vectors, rows),
    int(num_codewords),
    num_iterations=_ITERATIONS,
    seed=seed,
  )


def shares(sizes, total: int) -> np.ndarray:
  """Splits `total` in proportion to `sizes`, none above its size.

  By largest remainders, ties to the lower position.
  """
  num = sizes.sum()
  share, remainder = np.divmod(total * sizes, num)
  order = np.argsort(-remainder, kind="stable")
  share[order[: total - share.sum()]] += 1
  return share
