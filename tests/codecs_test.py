"""Laws that every codec obeys, over a table of codecs.

To add a codec add a row to `ROWS`.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import qinco_cases
from vqjax.codec import Codec
from vqjax.codecs import (
  pq,
  pq_qinco,
  registry,
  rq,
  rqvae,
  rqvae_start,
)
from vqjax.codecs.rule import SearchRule
from vqjax.storage import codec_file

KEY = jax.random.key(0)
D = 8
NUM_VECTORS = 23


@pytest.fixture(autouse=True)
def _strict_dtypes():
  with jax.numpy_dtype_promotion("strict"):
    yield


@dataclasses.dataclass(frozen=True)
class Row:
  """A codec of `D` dimensions, and what the laws need to know of it."""

  name: str
  codec: str  # Name in the registry.
  make_fn: Callable[[], Any]  # Parameters.
  knobs: tuple[tuple[str, Any], ...] = ()  # Of encode, as `dict.items()`.
  # Knobs of a search with one hypothesis; None where no prefix is a code.
  greedy: tuple[tuple[str, Any], ...] | None = None
  # Knobs of ever wider searches; empty for a codec without a search.
  wider: tuple[tuple[tuple[str, Any], ...], ...] = ()
  # Parameters that code sums of their words exactly; None where there are none.
  exact_fn: Callable[[], Any] | None = None
  is_fitted: bool = True  # To `_vectors(60, 0)`.

  def __str__(self):
    return self.name


def _vectors(n=NUM_VECTORS, seed=1):
  rng = np.random.default_rng(seed)
  # NumPy, for slicing a JAX array compiles a program for each slice.
  return rng.normal(size=(n, D)).astype(np.float32)


def _knobs(**kwargs):
  return tuple(kwargs.items())


def _make_pq(has_rotation=False):
  turn = np.linalg.qr(_vectors(D, 5))[0] if has_rotation else None
  return pq.fit(
    KEY,
    _vectors(60, 0),
    num_codes=4,
    codebook_size=8,
    num_iterations=3,
    rotation=turn,
  )


def _make_rq():
  return rq.fit(
    KEY, _vectors(60, 0), num_codes=4, codebook_size=8, num_iterations=3
  )


def _make_exact_rq():
  """Every step's words lie within a hundredth of the distances before."""
  rng = np.random.default_rng(2)
  scales_M11 = 100.0 ** -np.arange(3)[:, None, None]
  # 8 signs of 3 dimensions: words of a step are far from each other.
  signs_KD = np.sign(rng.normal(size=(8, D)))
  signs_KD[:, :3] = 1 - 2 * ((np.arange(8)[:, None] >> np.arange(3)) & 1)
  return rq.RQParams(jnp.asarray(scales_M11 * signs_KD[None], jnp.float32))


def _make_pq_qinco():
  sizes = dict(dim=D // 2, network_dim=3)
  blocks = [qinco_cases.make_params(seed, **sizes) for seed in (0, 1)]
  return pq_qinco.recombine(blocks, jnp.linalg.qr(_vectors(D, 5))[0])


def _make_rqvae():
  """An RQ-VAE with random networks and random codewords."""
  sizes = dict(layers=(12,), e_dim=5, codebook_sizes=(9, 8, 7))
  return rqvae_start.init(KEY, D, batch_norm=True, **sizes)


def _make_exact_levels():
  """The codec without networks: RQ with levels of several sizes."""
  books_MKD = _make_exact_rq().codebooks_MKD
  codebooks = tuple(book[: 8 - m] for m, book in enumerate(books_MKD))
  return rqvae.RQVAEParams(rqvae.Mlp((), ()), rqvae.Mlp((), ()), codebooks)


def _qinco_row(name, case, num_joint_candidates=0, **sizes):
  """A QINCo with random weights; pre-selection only where it has one."""
  sizes = {**dict(dim=D), **qinco_cases.CASES[case], **sizes}
  num_candidates = 0 if sizes.get("is_qinco1") else 3
  every = lambda beam_size: _knobs(num_candidates=0, beam_size=beam_size)
  return Row(
    name,
    "qinco",
    lambda: qinco_cases.make_params(**sizes),
    knobs=_knobs(
      num_candidates=num_candidates,
      beam_size=3,
      num_joint_candidates=num_joint_candidates,
    ),
    greedy=every(1),
    is_fitted=False,
    wider=tuple(every(size) for size in (1, 2, 4, 7)),
  )


ROWS = (
  Row("pq", "pq", _make_pq, exact_fn=_make_pq),
  Row(
    "pq_rotated",
    "pq",
    lambda: _make_pq(has_rotation=True),
    exact_fn=lambda: _make_pq(has_rotation=True),
  ),
  Row(
    "rq",
    "rq",
    _make_rq,
    knobs=_knobs(beam_size=3),
    greedy=_knobs(beam_size=1),
    wider=tuple(_knobs(beam_size=size) for size in (1, 2, 4, 12)),
    exact_fn=_make_exact_rq,
  ),
  Row(
    "rqvae",
    "rqvae",
    _make_rqvae,
    greedy=_knobs(beam_size=1),
    exact_fn=_make_exact_levels,
    is_fitted=False,
  ),
  _qinco_row("qinco2", "qinco2"),
  _qinco_row("qinco2_joint", "qinco2", num_joint_candidates=6),
  _qinco_row("qinco2_same_dim", "qinco2", network_dim=D),
  _qinco_row("qinco1", "qinco1"),
  _qinco_row("low_rank", "low_rank"),
  _qinco_row("ivf", "ivf"),
  _qinco_row("ivf_joint", "ivf", num_joint_candidates=6),
  Row(
    "pq_qinco",
    "pq_qinco",
    _make_pq_qinco,
    knobs=_knobs(num_candidates=3, beam_size=3),
  ),
)


def _over(has_fn=lambda row: True):
  """Runs a law over the rows that it concerns."""
  return pytest.mark.parametrize("row", [r for r in ROWS if has_fn(r)], ids=str)


@cache
def _params(row):
  return row.make_fn()


def _rule(row, knobs=None) -> SearchRule:
  """The search of a row."""
  knobs = dict(row.knobs if knobs is None else knobs)
  return registry.get(row.codec).rule.replace(**knobs)


@cache
def _encode(row, knobs=None):
  """Jitted `(params, x_ND) -> codes_NM`, a NumPy array."""
  rule = _rule(row, knobs)
  encode = registry.get(row.codec).encode
  jitted = jax.jit(lambda params, x_ND: encode(params, x_ND, None, rule))
  return lambda params, x_ND: np.asarray(jitted(params, x_ND))


@cache
def _decode(row):
  """Jitted `(params, codes_NM) -> x_ND`."""
  return jax.jit(registry.get(row.codec).decode)


def _errors(row, params, x_ND, codes_NM):
  xhat_ND = _decode(row)(params, codes_NM)
  return np.sum((np.asarray(x_ND) - np.asarray(xhat_ND)) ** 2, axis=-1)


def _assert_same(row, params, x_ND, ours_NM, theirs_NM):
  """Equal codes, near ties aside: those must be equally good."""
  assert ours_NM.shape == theirs_NM.shape
  is_same_N = (np.asarray(ours_NM) == np.asarray(theirs_NM)).all(axis=1)
  assert is_same_N.mean() >= 0.9
  np.testing.assert_allclose(
    _errors(row, params, x_ND, ours_NM),
    _errors(row, params, x_ND, theirs_NM),
    rtol=1e-4,
    atol=1e-5,
  )


_ONE = pytest.param(1, marks=pytest.mark.slow)


@_over()
@pytest.mark.parametrize("block_size", [_ONE, 7])
def test_1_blocks_do_not_change_codes(row, block_size):
  params, x_ND, encode_fn = _params(row), _vectors(), _encode(row)
  want_NM = encode_fn(params, x_ND)
  cuts = range(0, NUM_VECTORS, block_size)
  parts = [encode_fn(params, x_ND[at : at + block_size]) for at in cuts]
  _assert_same(row, params, x_ND, np.concatenate(parts), want_NM)


@_over()
@pytest.mark.parametrize("block_size", [None, _ONE, 7])
def test_1_a_codec_has_the_same_codes_for_all_sizes_of_blocks(row, block_size):
  params, x_ND, told = _params(row), _vectors(), []
  codec = Codec(row.codec, params)
  blocks = codec.encode_blocks(
    x_ND,
    _rule(row),
    block_size=block_size,
    progress=lambda *rows: told.append(rows),
  )
  codes_NM = np.concatenate(list(blocks))
  want_NM = _encode(row)(params, x_ND)
  _assert_same(row, params, x_ND, codes_NM, want_NM)
  assert told[-1] == (NUM_VECTORS, NUM_VECTORS)
  decoded = codec.decode_blocks(want_NM, block_size=block_size)
  np.testing.assert_allclose(
    np.concatenate(list(decoded)),
    _decode(row)(params, want_NM),
    rtol=1e-5,
    atol=1e-5,
  )


@_over()
def test_decoding_names_the_row_of_a_code_out_of_range(row):
  codec = Codec(row.codec, _params(row))
  codes_NM = np.array(_encode(row)(codec.params, _vectors()))
  codes_NM[5, 0] = codec.codebook_sizes[0]
  with pytest.raises(ValueError, match="row 5"):
    list(codec.decode_blocks(codes_NM))


@_over()
def test_a_record_declares_the_knobs_of_its_search(row):
  spec, params = registry.get(row.codec), _params(row)
  assert spec.name == row.codec
  assert set(dict(row.knobs)) <= set(spec.knobs)
  assert isinstance(params, spec.Params)
  spec.check_rule(params, _rule(row))
  with pytest.raises(ValueError, match="num_steps|got 99"):
    spec.check_rule(params, _rule(row).replace(num_steps=99))


@_over()
def test_2_rows_do_not_depend_on_each_other(row):
  params, x_ND, encode_fn = _params(row), _vectors(), _encode(row)
  want_NM = encode_fn(params, x_ND)
  order_N = np.random.default_rng(3).permutation(NUM_VECTORS)
  permuted_NM = encode_fn(params, x_ND[order_N])
  _assert_same(row, params, x_ND[order_N], permuted_NM, want_NM[order_N])
  padded_ND = np.concatenate([x_ND, np.full((9, D), 1e3, np.float32)])
  padded_NM = encode_fn(params, padded_ND)[:NUM_VECTORS]
  _assert_same(row, params, x_ND, padded_NM, want_NM)


@_over()
def test_2_no_rows_have_no_codes(row):
  params = _params(row)
  codes_NM = _encode(row)(params, np.zeros((0, D), np.float32))
  assert codes_NM.shape == (
    0,
    len(registry.get(row.codec).codebook_sizes(params)),
  )
  assert _decode(row)(params, codes_NM).shape == (0, D)


@_over()
def test_3_jit_changes_nothing(row):
  params, x_ND, module = _params(row), _vectors(), registry.get(row.codec)
  jitted_NM = _encode(row)(params, x_ND)
  codes_NM = module.encode(params, jnp.asarray(x_ND), None, _rule(row))
  _assert_same(row, params, x_ND, jitted_NM, codes_NM)
  np.testing.assert_allclose(
    _decode(row)(params, codes_NM),
    module.decode(params, codes_NM),
    rtol=1e-5,
    atol=1e-5,
  )


@_over()
def test_3_tables_do_as_well_as_parameters(row):
  params, x_ND, module = _params(row), _vectors(), registry.get(row.codec)
  tables = module.prepare(params)
  codes_NM = _encode(row)(params, x_ND)
  _assert_same(row, params, x_ND, _encode(row)(tables, x_ND), codes_NM)
  np.testing.assert_allclose(
    _decode(row)(tables, codes_NM),
    _decode(row)(params, codes_NM),
    rtol=1e-5,
    atol=1e-5,
  )
  assert module.codebook_sizes(tables) == module.codebook_sizes(params)
  assert module.dim(tables) == module.dim(params) == D


@_over(lambda row: row.exact_fn)
def test_4_sums_of_words_come_back_exactly(row):
  params, module = row.exact_fn(), registry.get(row.codec)
  rng = np.random.default_rng(4)
  sizes = module.codebook_sizes(params)
  codes = rng.integers(0, sizes, size=(NUM_VECTORS, len(sizes)))
  codes_NM = codes.astype(np.int32)
  x_ND = _decode(row)(params, codes_NM)
  found_NM = _encode(row)(params, x_ND)
  np.testing.assert_array_equal(found_NM, codes_NM)
  np.testing.assert_array_equal(_decode(row)(params, found_NM), x_ND)


@_over(lambda row: row.wider)
def test_5_the_error_does_not_grow_with_the_beam(row):
  params, x_ND = _params(row), _vectors(200)
  errors = [
    _errors(row, params, x_ND, _encode(row, knobs)(params, x_ND)).mean()
    for knobs in row.wider
  ]
  assert (np.diff(errors) <= 0).all()
  assert errors[-1] < errors[0]


@_over(lambda row: row.greedy is not None)
def test_6_a_prefix_of_a_greedy_code_is_a_code(row):
  params, x_ND = _params(row), _vectors()
  whole_NM = _encode(row, row.greedy)(params, x_ND)
  for num_steps in (1, 2, 3):
    knobs = _knobs(**dict(row.greedy), num_steps=num_steps)
    prefix_NM = _encode(row, knobs)(params, x_ND)
    num_lists = whole_NM.shape[1] - _num_steps(row, params)
    assert prefix_NM.shape == (NUM_VECTORS, num_lists + num_steps)
    want_NM = whole_NM[:, : num_lists + num_steps]
    _assert_same(row, params, x_ND, prefix_NM, want_NM)
    assert _decode(row)(params, prefix_NM).shape == (NUM_VECTORS, D)


def _num_steps(row, params):
  """Code positions, the list number of an IVF model not counted."""
  num_codes = len(registry.get(row.codec).codebook_sizes(params))
  return num_codes - getattr(params, "is_ivf", False)


@_over(lambda row: row.greedy is not None and row.is_fitted)
def test_6_longer_prefixes_leave_less(row):
  params, x_ND = _params(row), _vectors(60, 0)  # Those that it was fitted to.
  codes_NM = _encode(row, row.greedy)(params, x_ND)
  errors = [
    _errors(row, params, x_ND, codes_NM[:, : m + 1]).mean()
    for m in range(codes_NM.shape[1])
  ]
  assert (np.diff(errors) < 0).all()


@_over(lambda row: registry.get(row.codec).levels)
def test_6_greedy_codes_are_residual_codes_of_the_latent(row):
  spec, params, x_ND = registry.get(row.codec), _params(row), _vectors()
  residual_NE, ids = np.asarray(spec.latent(params, jnp.asarray(x_ND))), []
  for words_KE in map(np.asarray, spec.levels(params)):
    error_NK = ((residual_NE[:, None] - words_KE[None]) ** 2).sum(axis=2)
    ids.append(error_NK.argmin(axis=1))
    residual_NE = residual_NE - words_KE[ids[-1]]
  codes_NM = _encode(row, row.greedy)(params, x_ND)
  _assert_same(row, params, x_ND, codes_NM, np.stack(ids, axis=1))


@_over()
def test_7_codes_are_int32_in_range(row):
  params, x_ND = _params(row), _vectors(200)
  sizes = registry.get(row.codec).codebook_sizes(params)
  codes_NM = _encode(row)(params, x_ND * 3)
  assert codes_NM.shape == (200, len(sizes))
  assert codes_NM.dtype == np.int32
  assert int(codes_NM.min()) >= 0
  assert (np.asarray(codes_NM) < np.asarray(sizes)).all()


@_over()
def test_7_types_stay_where_the_program_has_64_bits(row):
  x_ND = _vectors()
  module = registry.get(row.codec)
  rule = _rule(row)
  encode_fn = jax.jit(lambda p, x_ND: module.encode(p, x_ND, None, rule))
  # Strict promotion is too much for a choice with weights of JAX itself.
  with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
    params = row.make_fn() if row.is_fitted else _params(row)
    codes_NM = encode_fn(params, x_ND)
    xhat_ND = jax.jit(module.decode)(params, codes_NM)
  floats = {x.dtype for x in jax.tree.leaves(params) if x.dtype.kind == "f"}
  assert floats == {np.dtype(np.float32)}
  assert (codes_NM.dtype, xhat_ND.dtype) == (np.int32, np.float32)


@_over()
def test_8_save_and_restore_is_bit_equal(row, tmp_path):
  params = _params(row)
  codec_file.save_codec(tmp_path, row.codec, params, info={})
  restored = codec_file.load_codec(tmp_path)
  assert restored.name == row.codec
  same = jax.tree.map(np.array_equal, restored.params, params)
  assert all(jax.tree.leaves(same))
  assert jax.tree.structure(restored.params) == jax.tree.structure(params)
  x_ND, encode_fn = _vectors(), _encode(row)
  np.testing.assert_array_equal(
    encode_fn(restored.params, x_ND), encode_fn(params, x_ND)
  )


@_over()
def test_encode_is_traced_once(row):
  params, module, traces = _params(row), registry.get(row.codec), []

  @jax.jit
  def encode_fn(params, x_ND):
    traces.append(1)
    return module.encode(params, x_ND, None, _rule(row))

  for seed in range(3):
    encode_fn(params, _vectors(seed=seed))
  assert len(traces) == 1


@_over()
def test_a_wrong_dimension_is_refused(row):
  params, module = _params(row), registry.get(row.codec)
  with pytest.raises(ValueError, match=rf"\(None, {D}\), got \(23, {D - 1}\)"):
    module.encode(params, _vectors()[:, 1:], None, _rule(row))
  with pytest.raises(TypeError, match="codes must be integers, got float32"):
    module.decode(params, jnp.zeros((3, 4)))


def test_an_unknown_codec_is_refused():
  with pytest.raises(ValueError, match="qinco, pq_qinco, rqvae; got 'vq'"):
    registry.get("vq")
  assert set(registry.names()) == {"pq", "rq", "qinco", "pq_qinco", "rqvae"}
