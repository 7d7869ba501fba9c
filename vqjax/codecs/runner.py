"""Compiles encode and decode of a codec, and says how many rows to give them.

All devices of this process share a block of rows. Rows do not depend on each
other, so that neither do codes on the size of the blocks, near ties in the last
bits of float32 aside.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from vqjax import devices
from vqjax.codecs.codec import CodecSpec
from vqjax.codecs.rule import SearchRule
from vqjax.data import batches

# Without a network, as many vectors at once; with one, as many codewords that
# go through it: on CPUs they stay in the caches.
_PLAIN_ROWS = 4096
_CPU_CODEWORDS, _DEVICE_CODEWORDS = 1 << 11, 1 << 20
_CPU_DECODE, _DEVICE_DECODE = 1 << 11, 1 << 16


def encode_block(spec: CodecSpec, tables, rule: SearchRule) -> int:
  """Returns how many vectors all devices of this process encode at once."""
  rows = _PLAIN_ROWS
  if spec.has_network:
    at_once = _CPU_CODEWORDS if _is_cpu() else _DEVICE_CODEWORDS
    # A ranker looks at many more than it lets through.
    count = rule.num_joint_candidates // 2 if rule.num_ranked else 0
    count = max(count, rule.num_evaluated)
    count = count or rule.beam_size * spec.codebook_sizes(tables)[-1]
    rows = int(np.clip(at_once // count, 8, 65536))
  return rows * jax.local_device_count()


def decode_block() -> int:
  """Returns how many codes all devices of this process decode at once."""
  rows = _CPU_DECODE if _is_cpu() else _DEVICE_DECODE
  return rows * jax.local_device_count()


def make_encode_fn(
  spec: CodecSpec, tables, rule: SearchRule, assign_fn: Callable | None = None
) -> Callable:
  """Returns `x_ND -> codes_NM`, compiled, on all devices of this process.

  Args:
    spec: The codec.
    tables: From its `prepare`.
    rule: The search.
    assign_fn: `rows -> (x_ND, lists_N)`, for an IVF model whose lists are
      known or found otherwise than by comparing with all centroids.

  Raises:
    ValueError: The rule does not fit the codec.
  """
  spec.check_rule(tables, rule)
  tables = devices.to_local_devices(tables)
  if assign_fn is None:
    encode_fn = devices.data_parallel(
      lambda tables, x_ND: spec.encode(tables, x_ND, None, rule)
    )
    return functools.partial(encode_fn, tables)
  encode_fn = devices.data_parallel(
    lambda tables, rows: spec.encode(tables, *rows, rule)
  )
  return lambda rows: encode_fn(tables, assign_fn(rows))


def decoder(spec: CodecSpec, dtype: str = "float32") -> Callable:
  """Returns `(tables, codes_NM) -> x_ND`, not compiled.

  `dtype` is the type of a network's products; codecs without one have none.
  """
  if not spec.has_network:
    return spec.decode
  return functools.partial(spec.decode, dtype=dtype)


def make_decode_fn(
  spec: CodecSpec,
  tables,
  *,
  dtype: str = "float32",
  block_size: int | None = None,
) -> Callable:
  """Returns `codes_NM -> x_ND` for any number of rows, compiled.

  It takes all devices of this process; `dtype` is that of `decoder`.
  """
  decode_fn = devices.data_parallel(decoder(spec, dtype))
  decode_fn = functools.partial(decode_fn, devices.to_local_devices(tables))
  return batches.in_blocks(decode_fn, block_size or decode_block())


def _is_cpu() -> bool:
  return jax.default_backend() == "cpu"
