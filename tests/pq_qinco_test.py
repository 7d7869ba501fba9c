from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.codecs import pq_qinco, qinco
from vqjax.codecs.rule import SearchRule

P, S, K, T = 3, 4, 8, 2  # Blocks of 3 code positions.


def _qinco(seed, *, std=1.0, num_codewords=K, dim=S, **fields):
  rng = np.random.default_rng(seed)
  new = lambda *shape: jnp.asarray(rng.normal(size=shape) / 2, jnp.float32)
  return qinco.QincoParams(
    **dict(
      mean_D=new(dim),
      std=jnp.float32(std),
      first_KD=new(num_codewords, dim),
      codebooks_TKD=new(T, num_codewords, dim),
      preselect_TKD=new(T, num_codewords, dim),
      in_TDE=None,
      word_TEU=new(T, dim, dim),
      state_TDU=new(T, dim, dim),
      mix_TUE=None,
      bias_TE=new(T, dim),
      up_TJEH=new(T, 2, dim, 5),
      down_TJHE=new(T, 2, 5, dim),
      out_TED=None,
    )
    | fields
  )


def _blocks():
  return [_qinco(seed, std=2.0**seed) for seed in range(P)]


def _rotation():
  rng = np.random.default_rng(9)
  q, _ = np.linalg.qr(rng.normal(size=(P * S, P * S)))
  return jnp.asarray(q, jnp.float32)


def _x(n=20):
  return jnp.asarray(np.random.default_rng(5).normal(size=(n, P * S)) * 2.0)


RULE = SearchRule(3, 4)
ENCODE_BLOCK = jax.jit(partial(qinco.encode, rule=RULE))
ENCODE = jax.jit(partial(pq_qinco.encode, rule=RULE))
GREEDY = jax.jit(
  lambda params, x_ND, num_steps=None: pq_qinco.encode(
    params, x_ND, None, SearchRule(0, 1, num_steps=num_steps)
  ),
  static_argnames="num_steps",
)


@pytest.mark.parametrize("rotated", [False, True])
def test_is_one_qinco_per_block(rotated):
  blocks, x_ND = _blocks(), _x()
  params = pq_qinco.recombine(blocks, _rotation() if rotated else None)
  y_ND = x_ND @ _rotation() if rotated else x_ND
  codes = [
    ENCODE_BLOCK(block, y_ND[:, p * S : (p + 1) * S])
    for p, block in enumerate(blocks)
  ]
  got = ENCODE(pq_qinco.prepare(params), x_ND)
  assert got.dtype == jnp.int32
  np.testing.assert_array_equal(got, np.concatenate(codes, axis=1))
  decoded = [qinco.decode(*pair) for pair in zip(blocks, codes, strict=True)]
  want = np.concatenate(decoded, axis=1)
  if rotated:
    want = want @ np.asarray(_rotation()).T
  # float32 sums in another order.
  np.testing.assert_allclose(
    pq_qinco.decode(pq_qinco.prepare(params), got), want, rtol=1e-4, atol=1e-4
  )


def test_sizes_of_parameters_and_tables():
  params = pq_qinco.recombine(_blocks())
  for x in (params, pq_qinco.prepare(params)):
    assert pq_qinco.dim(x) == P * S
    assert pq_qinco.num_blocks(x) == P
    assert pq_qinco.codebook_sizes(x) == (K,) * 9


def test_split_is_what_blocks_are_trained_on():
  x_ND = _x()
  params = pq_qinco.recombine(_blocks(), _rotation())
  parts = pq_qinco.split(x_ND, params)
  assert parts.shape == (P, 20, S)
  joined = np.concatenate(list(parts), axis=1)
  np.testing.assert_allclose(
    joined @ np.asarray(_rotation()).T, x_ND, atol=1e-5
  )


def test_fewer_steps_cut_every_block():
  params, x_ND = pq_qinco.recombine(_blocks()), _x()
  all_NM = GREEDY(params, x_ND).reshape(-1, P, 3)
  few_NM = GREEDY(params, x_ND, num_steps=2 * P)
  np.testing.assert_array_equal(few_NM.reshape(-1, P, 2), all_NM[:, :, :2])
  parts = [
    qinco.decode(block, few_NM.reshape(-1, P, 2)[:, p])
    for p, block in enumerate(_blocks())
  ]
  np.testing.assert_allclose(
    pq_qinco.decode(params, few_NM), np.concatenate(parts, axis=1), atol=1e-4
  )


@pytest.mark.parametrize("num_steps", [0, 1, 4, 12])
def test_refuses_steps_that_are_not_shared_out(num_steps):
  params = pq_qinco.recombine(_blocks())
  said = f"of 3 blocks has codes of 3 to 9 .* multiple of 3; got {num_steps}"
  with pytest.raises(ValueError, match=said):
    pq_qinco.encode(params, _x(), rule=RULE.replace(num_steps=num_steps))
  with pytest.raises(ValueError, match=said):
    pq_qinco.decode(params, jnp.zeros((5, num_steps), jnp.int32))


def test_refuses_wrong_arrays():
  params = pq_qinco.recombine(_blocks())
  with pytest.raises(ValueError, match=r"x must have shape \(None, 12\), got"):
    pq_qinco.encode(params, _x()[:, :8])
  with pytest.raises(TypeError, match="codes must be integers, got float32"):
    pq_qinco.decode(params, jnp.zeros((5, 9)))
  with pytest.raises(ValueError, match=r"codes must have shape .* got \(9,\)"):
    pq_qinco.decode(params, jnp.zeros(9, jnp.int32))
  with pytest.raises(ValueError, match=r"rotation must have shape \(12, 12\)"):
    pq_qinco.recombine(_blocks(), _rotation()[:, :4])


@pytest.mark.parametrize(
  ("fields", "said"),
  [
    (
      dict(num_codewords=7),
      r"first_KD is \(8, 4\) in block 0, \(7, 4\) in block 1",
    ),
    (dict(dim=5), r"mean_D is \(4,\) in block 0, \(5,\) in block 1"),
    (
      dict(preselect_TKD=None),
      r"preselect_TKD is \(2, 8, 4\) .* None in block",
    ),
    (dict(add_word=False), "block 0 and block 1 is a QINCo1 and the other"),
    (dict(is_ivf=True), "Block 1 is an IVF model"),
  ],
)
def test_refuses_blocks_that_differ(fields, said):
  with pytest.raises(ValueError, match=said):
    pq_qinco.recombine([_qinco(0), _qinco(1, **fields)])


def test_refuses_no_blocks():
  with pytest.raises(ValueError, match="at least one block, got none"):
    pq_qinco.recombine([])
