"""Scanning inverted lists of codes by lookup tables, compiled.

A vector of list `l` is approximated by its centroid plus M codewords, one of
each codebook. Of its squared distance to a query x,

  |x - c - r|^2 = |x - c|^2 - 2 <x, r> + (|c + r|^2 - |c|^2)

the first term belongs to the list, <x, r> is the sum of M entries of the
query's table of inner products with all codewords, and the last is kept with
the code, as a byte within the range of its list. Before that a centre of all
lists is subtracted from x and c: far from the origin the last two terms are
large, and cancel. The tables of a block of queries are one matrix product.
Lists are read in tiles of consecutive codes, so that little but the table
lookups is done for each code.

The codewords come from an additive decoder (`vqjax.codecs.additive`).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax import lax

from vqjax.core import Array, check_range, check_shape

TILE = 32  # Codes that are read in one piece.


@struct.dataclass
class Lists:
  """Codes of all lists, one list after the other.

  Codes are packed into 32-bit words, lowest bits first.
  """

  starts_L1: Array  # First row of each list, and the number of rows; int32.
  packed_NW: Array  # uint32.
  norm_N: Array  # uint8 b: |c + r|^2 - |c|^2 is about low + b * step.
  low_L: Array
  step_L: Array
  words_DZ: Array  # Twice the codewords of all positions, `C = M * K`.
  centre_D: Array  # Is subtracted from queries.
  num_codes: int = struct.field(pytree_node=False)
  num_bits: int = struct.field(pytree_node=False)  # 8 or 16 for each code.


def make_lists(
  starts_L1,
  codes_NM,
  norm_N,
  low_L,
  step_L,
  codebooks_MKD,
  centre_D=None,
  *,
  dtype: str = "float32",
) -> Lists:
  """Packs host arrays for `scan`.

  Args:
    starts_L1: First row of each list, and the number of rows.
    codes_NM: Codes, row by row, of any unsigned type.
    norm_N: What the codewords of each code add to the squared norm of the
      centroid less the centre, in steps of its list.
    low_L: What byte 0 stands for, in each list.
    step_L: From one byte to the next.
    codebooks_MKD: Codewords of the additive decoder.
    centre_D: Is to be subtracted from queries; None for zeros.
    dtype: Type of their products with queries; sums are float32.

  Raises:
    ValueError: If shapes do not fit each other.
  """
  m, k, d = codebooks_MKD.shape
  n = len(codes_NM)
  check_shape("codes", codes_NM, (None, m))
  check_shape("norms", norm_N, (n,))
  check_shape("starts", starts_L1, (len(low_L) + 1,))
  check_shape("steps", step_L, (len(low_L),))
  check_range("the number of vectors", n, 1, 2**31 - 1, "rows are int32")
  check_range("the codebook size", k, 2, 65536, "codes are 8 or 16 bits")
  num_bits = 8 if k <= 256 else 16
  return Lists(
    starts_L1=jnp.asarray(starts_L1, jnp.int32),
    # The last tile may reach beyond the last code.
    packed_NW=jnp.asarray(_pack(codes_NM, num_bits, n + TILE)),
    norm_N=jnp.asarray(np.pad(np.asarray(norm_N, np.uint8), (0, TILE))),
    low_L=jnp.asarray(low_L, jnp.float32),
    step_L=jnp.asarray(step_L, jnp.float32),
    words_DZ=jnp.asarray(2 * codebooks_MKD.reshape(m * k, d).T, dtype),
    centre_D=jnp.asarray(
      np.zeros(d) if centre_D is None else centre_D, jnp.float32
    ),
    num_codes=m,
    num_bits=num_bits,
  )


def _pack(codes_NM, num_bits: int, num_rows: int) -> np.ndarray:
  """Joins codes to little-endian words, uint32 `[num_rows, W]`."""
  n, m = codes_NM.shape
  padding = -m % (32 // num_bits)
  dtype = np.uint8 if num_bits == 8 else np.dtype("<u2")
  wide = np.zeros((num_rows, m + padding), dtype)
  wide[:n, :m] = codes_NM
  return wide.view("<u4")


def _unpack(packed_W, num_codes: int, num_bits: int) -> list[Array]:
  """The codes of packed words, position by position, int32."""
  per_word, mask = 32 // num_bits, (1 << num_bits) - 1
  at = [divmod(position, per_word) for position in range(num_codes)]
  return [
    ((packed_W[..., word] >> (num_bits * slot)) & mask).astype(jnp.int32)
    for word, slot in at
  ]


def codes_of(lists: Lists) -> np.ndarray:
  """All codes `[N, M]` on the host, uint8 or uint16."""
  packed_NW = np.ascontiguousarray(lists.packed_NW[:-TILE], "<u4")
  dtype = np.uint8 if lists.num_bits == 8 else np.dtype("<u2")
  return packed_NW.view(dtype)[:, : lists.num_codes]


@jax.jit
def codes_at(lists: Lists, rows: Array) -> Array:
  """Codes `[..., M]` int32 of rows `[...]`."""
  packed = lists.packed_NW[rows]
  return jnp.stack(_unpack(packed, lists.num_codes, lists.num_bits), axis=-1)


@partial(jax.jit, static_argnames=("num_tiles", "num_best"))
def scan(
  lists: Lists,
  queries_QD: Array,
  probes_QP: Array,
  distances_QP: Array,
  *,
  num_tiles: int,
  num_best: int,
) -> tuple[Array, Array, Array]:
  """Finds the nearest codes in the probed lists of each query.

  Args:
    lists: From `make_lists`.
    queries_QD: Queries.
    probes_QP: Lists to look into, -1 for none.
    distances_QP: Squared distances to their centroids.
    num_tiles: At least as many as any query needs, see `count_tiles`.
    num_best: R, at most `num_tiles * TILE`.

  Returns:
    Rows `[Q, R]` of the lists, nearest first and -1 if there are no more,
    the list of each, and its approximate squared distance, inf for none.
  """
  num_slots = num_tiles * TILE
  queries_QD = queries_QD - lists.centre_D[None]
  check_range("num_best", num_best, 1, num_slots, "slots to choose from")
  tables_QZ = jnp.matmul(
    queries_QD.astype(lists.words_DZ.dtype),
    lists.words_DZ,
    precision="highest",
    preferred_element_type=jnp.float32,
  )
  # With the sign for top_k.
  of_list_QP = -distances_QP - lists.low_L[probes_QP]
  score_fn = jax.vmap(partial(_scores, lists, num_tiles))
  score_QC, rows_QI, probe_QI = score_fn(tables_QZ, of_list_QP, probes_QP)
  score_QR, slots_QR = lax.top_k(score_QC, num_best)
  tile_QR, at_QR = jnp.divmod(slots_QR, TILE)
  take = lambda x_QI, i_QR: jnp.take_along_axis(x_QI, i_QR, axis=1)
  found_QR = ~jnp.isneginf(score_QR)
  none = lambda x_QR: jnp.where(found_QR, x_QR, -1)
  rows_QR = none(take(rows_QI, tile_QR) + at_QR)
  lists_QR = none(take(probes_QP, take(probe_QI, tile_QR)))
  return rows_QR, lists_QR, -score_QR


def count_tiles(sizes):
  """How many tiles of `TILE` codes the lists of these sizes need."""
  return -(-sizes // TILE)


def _scores(lists, num_tiles, table_Z, of_list_P, probes_P):
  """The negative squared distances `[C]` of one query to its codes.

  Also the first row of each tile and which probe it is of.
  """
  rows_I, probe_I, num_I = _tiles(lists, probes_P, num_tiles)
  at = lambda x, i: x.at[i].get(mode="promise_in_bounds")
  run = lambda x_N: jax.vmap(
    lambda row: lax.dynamic_slice_in_dim(x_N, row, TILE)
  )(rows_I)
  step_I = lists.step_L[at(probes_P, probe_I)]
  norm_IB = run(lists.norm_N).astype(jnp.float32) * step_I[:, None]
  score_IB = at(of_list_P, probe_I)[:, None] - norm_IB
  num_codewords = len(table_Z) // lists.num_codes
  codes = _unpack(run(lists.packed_NW), lists.num_codes, lists.num_bits)
  for position, code_IB in enumerate(codes):
    score_IB = score_IB + at(table_Z, code_IB + position * num_codewords)
  is_code_IB = jnp.arange(TILE)[None] < num_I[:, None]
  score_IB = jnp.where(is_code_IB, score_IB, -jnp.inf)
  return score_IB.reshape(-1), rows_I, probe_I


def _tiles(lists, probes_P, num_tiles):
  """First row of each tile, its probe, and how many codes it has."""
  first_P = lists.starts_L1[probes_P]
  size_P = jnp.where(probes_P < 0, 0, lists.starts_L1[probes_P + 1] - first_P)
  tiles_P = count_tiles(size_P)
  stop_P = jnp.cumsum(tiles_P)
  tile_I = jnp.arange(num_tiles, dtype=jnp.int32)
  probe_I = jnp.searchsorted(stop_P, tile_I, side="right")
  probe_I = jnp.minimum(probe_I, len(probes_P) - 1)
  begin_I = (tile_I - (stop_P - tiles_P)[probe_I]) * TILE
  num_I = jnp.clip(size_P[probe_I] - begin_I, 0, TILE)
  return jnp.where(num_I > 0, first_P[probe_I] + begin_I, 0), probe_I, num_I
