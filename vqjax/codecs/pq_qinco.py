"""PQ-QINCo: an optional rotation, then one QINCo per block of dimensions.

A vector of `D` dimensions is rotated, cut into `Y` equal blocks, and block y
is coded by a QINCo of its own with its own scale. Codes are concatenated block
by block: `[block 0 step 0, block 0 step 1, ..., block 1 step 0, ...]`. All
blocks have the same sizes, so one `vmap` serves them.

Reference: arXiv 2401.14732, section 3.3.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import struct

from vqjax.codecs import qinco
from vqjax.codecs.codec import CodecSpec
from vqjax.codecs.qinco import QincoParams, QincoTables
from vqjax.codecs.rule import PUBLISHED, SearchRule
from vqjax.core import Array, check_shape


@struct.dataclass
class PqQincoParams:
  """`x_ND @ rotation_DD` is cut into blocks; None for no rotation.

  Every array of `blocks` has a leading axis `Y`.
  """

  rotation_DD: Array | None
  blocks: QincoParams


@struct.dataclass
class PqQincoTables:
  """What encode and decode need of `PqQincoParams`; made by `prepare`."""

  rotation_DD: Array | None
  blocks: QincoTables


def _one_block(params: PqQincoParams | PqQincoTables):
  """Shapes of one block, as a pytree of the same class."""
  one = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  return jax.tree.map(one, params.blocks)


def num_blocks(params: PqQincoParams | PqQincoTables) -> int:
  """Returns Y, the number of blocks."""
  return params.blocks.mean_D.shape[0]


def dim(params: PqQincoParams | PqQincoTables) -> int:
  """Returns the number of dimensions of the vectors."""
  return num_blocks(params) * qinco.dim(_one_block(params))


def codebook_sizes(params: PqQincoParams | PqQincoTables) -> tuple[int, ...]:
  """Returns the number of codewords at each code position, block by block."""
  return qinco.codebook_sizes(_one_block(params)) * num_blocks(params)


def recombine(
  blocks: Sequence[QincoParams], rotation_DD: Array | None = None
) -> PqQincoParams:
  """Makes one codec of a QINCo per block, trained apart.

  Raises:
    ValueError: If the blocks differ in anything but their numbers.
  """
  if not blocks:
    raise ValueError("A PQ-QINCo needs at least one block, got none.")
  described = [jax.tree.map(jnp.shape, block) for block in blocks]
  for at, block in enumerate(blocks):
    if block.is_ivf:
      raise ValueError(
        f"Block {at} is an IVF model; the blocks of a PQ-QINCo have no lists."
      )
    if block.add_word != blocks[0].add_word:
      raise ValueError(
        f"All blocks must be of one kind, but one of block 0 and block {at} "
        "is a QINCo1 and the other a QINCo2."
      )
    if described[at] != described[0]:
      raise ValueError(
        f"All blocks must have the same shapes; {_difference(blocks, at)}."
      )
  params = PqQincoParams(
    rotation_DD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
  )
  if rotation_DD is not None:
    check_shape("rotation", rotation_DD, (dim(params), dim(params)))
  return params


def _difference(blocks: Sequence[QincoParams], at: int) -> str:
  """Says in which field block `at` is unlike block 0."""
  for name, x in vars(blocks[0]).items():
    y = getattr(blocks[at], name)
    shapes = [getattr(z, "shape", None) for z in (x, y)]
    if shapes[0] != shapes[1]:
      return f"{name} is {shapes[0]} in block 0, {shapes[1]} in block {at}"
  return f"block {at} is unlike block 0"


def split(x_ND: Array, params: PqQincoParams | PqQincoTables) -> Array:
  """Rotates vectors and cuts them: `[N, D]` to `[Y, N, S]`.

  Block y is what QINCo y is trained on and encodes.
  """
  p = num_blocks(params)
  check_shape("x", x_ND, (None, dim(params)))
  x_ND = x_ND.astype(jnp.float32)
  if params.rotation_DD is not None:
    x_ND = jnp.matmul(x_ND, params.rotation_DD, precision="highest")
  n, d = x_ND.shape
  return x_ND.reshape(n, p, d // p).swapaxes(0, 1)


def prepare(params: PqQincoParams) -> PqQincoTables:
  """Makes the tables of every block; differentiable."""
  return PqQincoTables(
    params.rotation_DD, jax.vmap(qinco.prepare)(params.blocks)
  )


def _tables(params: PqQincoParams | PqQincoTables) -> PqQincoTables:
  return prepare(params) if isinstance(params, PqQincoParams) else params


def encode(
  params: PqQincoParams | PqQincoTables,
  x_ND: Array,
  lists_N: None = None,
  rule: SearchRule = PUBLISHED,
) -> Array:
  """Finds codes of vectors `[N, D]` in data units: `[N, Y * M]` int32.

  As `qinco.encode` in every block. The `num_steps` of the rule counts the code
  positions of all blocks together, a multiple of Y: every block is cut, so the
  result is no prefix of the full codes.
  """
  tables = _tables(params)
  rule = _block_rule(tables, rule)
  one_fn = lambda block, x_NS: qinco.encode(block, x_NS, lists_N, rule)
  codes_YNM = jax.vmap(one_fn)(tables.blocks, split(x_ND, tables))
  p, n, m = codes_YNM.shape
  return codes_YNM.swapaxes(0, 1).reshape(n, p * m)


def decode(
  params: PqQincoParams | PqQincoTables,
  codes_NM: Array,
  *,
  dtype: str = "float32",
) -> Array:
  """Vectors `[N, D]` in data units of the codes that `encode` returns."""
  tables = _tables(params)
  check_shape("codes", codes_NM, (None, None))
  n, num_codes = codes_NM.shape
  shape = (n, num_blocks(tables), _per_block(tables, num_codes))
  one_fn = lambda block, codes: qinco.decode(block, codes, dtype=dtype)
  x_YNS = jax.vmap(one_fn)(
    tables.blocks, codes_NM.reshape(shape).swapaxes(0, 1)
  )
  x_ND = x_YNS.swapaxes(0, 1).reshape(n, dim(tables))
  if tables.rotation_DD is None:
    return x_ND
  return jnp.matmul(x_ND, tables.rotation_DD.T, precision="highest")


def _per_block(tables: PqQincoTables, num_codes: int) -> int:
  """Code positions of one block, if all have `num_codes` together."""
  p, most = num_blocks(tables), len(codebook_sizes(tables))
  if num_codes % p or not p <= num_codes <= most:
    raise ValueError(
      f"A PQ-QINCo of {p} blocks has codes of {p} to {most} positions, a "
      f"multiple of {p}; got {num_codes}."
    )
  return num_codes // p


def _block_rule(tables, rule: SearchRule) -> SearchRule:
  """The search in one block."""
  if rule.num_steps is None:
    return rule
  return rule.replace(num_steps=_per_block(tables, rule.num_steps))


def _check_rule(params, rule: SearchRule) -> None:
  """Raises ValueError unless the sizes of a search fit the blocks."""
  qinco.check_rule(_one_block(params), _block_rule(params, rule))


CODEC = CodecSpec(
  name="pq_qinco",
  Params=PqQincoParams,
  prepare=prepare,
  dim=dim,
  codebook_sizes=codebook_sizes,
  encode=encode,
  decode=decode,
  knobs=tuple(name for name in qinco.CODEC.knobs if name != "num_ranked"),
  check_rule=_check_rule,
)
