"""Nearest centroids among those near the last one: a fraction of the products.

After a first pass most vectors stay with their centroid, or change to one near
it. So each is compared with the `NUM_NEAR` centroids nearest to the last one,
itself included: the error never grows by that, though a few vectors of a
hundred miss the nearest of all. Vectors of one list are gathered in tiles, each
tile is one matrix product.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vqjax import devices
from vqjax.codecs.distances import argmin_rows, centre_of, sq_norms
from vqjax.core import Array

NUM_NEAR = 64
_TILE, _GROUP = 32, 16  # Vectors of a tile, tiles at a time.


def pays(num_codewords: int) -> bool:
  """Whether it saves time: on one CPU, with many codewords."""
  is_cpu = jax.default_backend() == "cpu"
  one = devices.num_own_devices() == 1
  return is_cpu and one and num_codewords >= 4 * NUM_NEAR


def make_assign_fn(words_KD, *, by_product: bool = False):
  """Returns `rows -> (ids_N, squared distances_N)`, of `WithLists`.

  `lists_N` are the codewords that the vectors had. `by_product` takes the
  largest inner product for the nearest. Ties go to the lower codeword.
  """
  words_KD = jnp.asarray(words_KD)
  near_KC = _near(words_KD, by_product=by_product)

  def assign_fn(rows):
    rows_TR, lists_T = _tiles(np.asarray(rows.lists_N), len(words_KD))
    num = -(-len(lists_T) // _GROUP)
    # Few shapes are compiled: as many tiles as there could be.
    most = -(-(len(rows.x_ND) // _TILE + len(words_KD)) // _GROUP) * _GROUP
    missing = most - len(lists_T)
    return _assign(
      rows.x_ND,
      np.pad(rows_TR, ((0, missing), (0, 0)), constant_values=len(rows.x_ND)),
      np.pad(lists_T, (0, missing)),
      num,
      words_KD,
      near_KC,
      by_product=by_product,
    )

  return assign_fn


def _tiles(lists_N, num_lists: int):
  """Rows `[T, R]` of tiles, N where one is not full, and their lists `[T]`."""
  n = len(lists_N)
  counts_L = np.bincount(lists_N, minlength=num_lists)
  tiles_L = -(-counts_L // _TILE)
  shift_L = _TILE * (np.cumsum(tiles_L) - tiles_L)  # Places before a list.
  shift_L -= np.cumsum(counts_L) - counts_L
  at_N = np.arange(n) + np.repeat(shift_L, counts_L)
  rows = np.full(_TILE * tiles_L.sum(), n, np.int32)
  rows[at_N] = np.argsort(lists_N, kind="stable")
  lists_T = np.repeat(np.arange(num_lists, dtype=np.int32), tiles_L)
  return rows.reshape(-1, _TILE), lists_T


@functools.partial(jax.jit, static_argnames="by_product")
def _near(words_KD: Array, *, by_product: bool) -> Array:
  """The nearest codewords of each, itself first, then in rising order."""
  k = len(words_KD)
  centred_KD = words_KD - centre_of(words_KD)[None]
  half_K = sq_norms(centred_KD) / 2
  half_K = jnp.zeros_like(half_K) if by_product else half_K
  score_KK = jnp.matmul(centred_KD, centred_KD.T, precision="highest")
  score_KK = score_KK - half_K[None]
  score_KK = score_KK.at[jnp.arange(k), jnp.arange(k)].set(jnp.inf)
  _, near_KC = lax.top_k(score_KK, min(NUM_NEAR, k))
  return jnp.sort(near_KC, axis=1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="by_product")
def _assign(
  x_ND, rows_TR, lists_T, num_groups, words_KD, near_KC, *, by_product: bool
):
  """Compares the vectors of the first groups of tiles with near codewords."""
  n, dim = x_ND.shape
  zero_1D = jnp.zeros((1, dim), jnp.float32)
  centre_1D = zero_1D if by_product else centre_of(words_KD)[None]
  sq_K = sq_norms(words_KD - centre_1D)
  half_K = jnp.zeros_like(sq_K) if by_product else sq_K / 2

  def compare(i, found):
    cut = lambda x: lax.dynamic_slice_in_dim(x, i * _GROUP, _GROUP)
    rows_GR, near_GC = cut(rows_TR), near_KC[cut(lists_T)]
    x_MD = x_ND[jnp.minimum(rows_GR.reshape(-1), n - 1)] - centre_1D
    x_GRD = x_MD.reshape(_GROUP, _TILE, dim)
    y_GCD = words_KD[near_GC] - centre_1D[None]
    dot_GRC = jnp.einsum("grd,gcd->grc", x_GRD, y_GCD, precision="highest")
    score_GRC = half_K[near_GC][:, None] - dot_GRC
    at_M, score_M = argmin_rows(score_GRC.reshape(len(x_MD), -1))
    near_MC = jnp.repeat(near_GC, _TILE, axis=0)
    ids_M = jnp.take_along_axis(near_MC, at_M[:, None], axis=1)[:, 0]
    dot_M = half_K[ids_M] - score_M
    error_M = jnp.maximum(sq_norms(x_MD) - 2 * dot_M + sq_K[ids_M], 0)
    put = lambda all_N, new_M: all_N.at[rows_GR.reshape(-1)].set(
      new_M, mode="drop"
    )
    return put(found[0], ids_M), put(found[1], error_M)

  found = jnp.zeros(n, jnp.int32), jnp.zeros(n, jnp.float32)
  return lax.fori_loop(0, num_groups, compare, found)
