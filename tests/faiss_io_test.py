import faiss
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles
from vqjax.codecs import pq, rq
from vqjax.interop import faiss_io

KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("one_thread")


def _vectors(n=300, d=8, seed=0):
  rng = np.random.default_rng(seed)
  # Correlated dimensions, so that a rotation has something to find.
  mix = np.random.default_rng(9).normal(size=(d, d))
  return (rng.normal(size=(n, d)) @ mix).astype(np.float32)


def _mse(x_ND, xhat_ND):
  return float(np.mean(np.sum((x_ND - np.asarray(xhat_ND)) ** 2, axis=-1)))


def _same_codes(x_ND, ours, theirs, decode_fn):
  """Equal codes, or where they differ equally good ones."""
  rows = np.flatnonzero((np.asarray(ours) != np.asarray(theirs)).any(axis=1))
  assert len(rows) <= 0.02 * len(x_ND)
  error = lambda codes: np.sum(
    (x_ND[rows] - np.asarray(decode_fn(jnp.asarray(codes)[rows]))) ** 2, -1
  )
  np.testing.assert_allclose(error(ours), error(theirs), rtol=1e-4)


@pytest.mark.parametrize("num_blocks", [None, 1, 7])
def test_knn_is_exact(num_blocks):
  queries, base = _vectors(9, seed=1), _vectors(60)
  blocks = (
    base if num_blocks is None else iter(np.array_split(base, num_blocks))
  )
  distances_QR, ids_QR = faiss_io.knn(queries, blocks, 10)
  want = oracles.sq_distances(queries, base)
  order = np.argsort(want, axis=1)[:, :10]
  np.testing.assert_array_equal(ids_QR, order)
  np.testing.assert_allclose(
    distances_QR, np.take_along_axis(want, order, 1), rtol=1e-4, atol=1e-3
  )


@pytest.mark.parametrize("in_blocks", [False, True])
def test_knn_by_inner_product(in_blocks):
  queries, base = _vectors(9, seed=1), _vectors(60)
  blocks = iter(np.array_split(base, 4)) if in_blocks else base
  products_QR, ids_QR = faiss_io.knn(queries, blocks, 10, "ip")
  want = queries.astype(np.float64) @ base.T
  order = np.argsort(-want, axis=1)[:, :10]
  np.testing.assert_array_equal(ids_QR, order)
  np.testing.assert_allclose(
    products_QR, np.take_along_axis(want, order, 1), rtol=1e-4, atol=1e-3
  )


@pytest.mark.parametrize(("metric", "worst"), [("l2", np.inf), ("ip", -np.inf)])
def test_knn_marks_the_slots_that_a_small_base_leaves(metric, worst):
  # Integers, and blocks that are smaller than k.
  queries, base = np.eye(8, dtype=np.uint8)[:3], np.eye(8, dtype=np.uint8)[:5]
  blocks = iter([base[:2], base[2:2], base[2:]])
  distances_QR, ids_QR = faiss_io.knn(queries, blocks, 7, metric)
  np.testing.assert_array_equal(ids_QR[:, 0], [0, 1, 2])
  np.testing.assert_array_equal(np.sort(ids_QR[:, :5]), [list(range(5))] * 3)
  assert (ids_QR[:, 5:] == -1).all()
  assert (distances_QR[:, 5:] == worst).all()
  assert np.isfinite(distances_QR[:, :5]).all()


def test_train_opq_gives_a_rotation_that_helps_ours():
  x_ND = _vectors(600)
  rotation_DD = faiss_io.train_opq(x_ND, 4, 4, num_iterations=20)
  np.testing.assert_allclose(rotation_DD @ rotation_DD.T, np.eye(8), atol=1e-5)
  errors = []
  for rotation in (None, rotation_DD, rotation_DD.T):
    params = pq.fit(
      KEY, jnp.asarray(x_ND), num_codes=4, codebook_size=16, rotation=rotation
    )
    codes = pq.encode(params, jnp.asarray(x_ND))
    errors.append(_mse(x_ND, pq.decode(params, codes)))
  # The transpose would not do.
  assert errors[1] < 0.95 * min(errors[0], errors[2])


@pytest.mark.parametrize("num_bits", [3, 5])
def test_baselines_code_and_decode(num_bits):
  x_ND, errors = _vectors(), {}
  for name in faiss_io.ADDITIVE:
    codec = faiss_io.fit_additive(name, x_ND, 4, num_bits)
    codes_NM = codec.encode(x_ND)
    assert (codes_NM.shape, codes_NM.dtype) == ((300, 4), np.int32)
    assert codes_NM.min() == 0
    assert codes_NM.max() == 2**num_bits - 1
    packed = codec.index.sa_encode(x_ND)
    np.testing.assert_array_equal(
      codec.decode(codes_NM), codec.index.sa_decode(packed)
    )
    errors[name] = _mse(x_ND, codec.decode(codes_NM))
  assert max(errors, key=errors.get) == "PQ"


def _reopened(index):
  return faiss.deserialize_index(faiss.serialize_index(index))


@pytest.mark.parametrize("has_rotation", [False, True])
def test_pq_in_faiss_codes_like_ours(has_rotation):
  x_ND = _vectors()
  turn = np.linalg.qr(_vectors(8))[0] if has_rotation else None
  params = pq.fit(
    KEY, jnp.asarray(x_ND), num_codes=4, codebook_size=8, rotation=turn
  )
  index = _reopened(faiss_io.pq_to_faiss(params))
  theirs = faiss_io.to_codec(index, 4, 3)
  codes_NM = theirs.encode(x_ND)
  decode_fn = lambda codes: pq.decode(params, codes)
  _same_codes(x_ND, pq.encode(params, jnp.asarray(x_ND)), codes_NM, decode_fn)
  np.testing.assert_allclose(
    theirs.decode(codes_NM),
    decode_fn(jnp.asarray(codes_NM)),
    rtol=1e-4,
    atol=1e-4,
  )


@pytest.mark.parametrize("beam_size", [1, 4])
def test_rq_in_faiss_codes_like_ours(beam_size):
  x_ND = _vectors()
  params = rq.fit(KEY, jnp.asarray(x_ND), num_codes=4, codebook_size=8)
  index = _reopened(faiss_io.rq_to_faiss(params, beam_size=beam_size))
  theirs = faiss_io.to_codec(index, 4, 3)
  codes_NM = theirs.encode(x_ND)
  decode_fn = lambda codes: rq.decode(params, codes)
  ours_NM = rq.encode(params, jnp.asarray(x_ND), beam_size=beam_size)
  _same_codes(x_ND, ours_NM, codes_NM, decode_fn)
  np.testing.assert_allclose(
    theirs.decode(codes_NM),
    decode_fn(jnp.asarray(codes_NM)),
    rtol=1e-4,
    atol=1e-4,
  )


def test_rq_fit_is_as_good_as_that_of_faiss():
  x_ND = _vectors(1000)
  theirs = faiss_io.fit_additive("RQ", x_ND, 3, 4, beam_size=4)
  params = rq.fit(
    KEY, jnp.asarray(x_ND), num_codes=3, codebook_size=16, beam_size=4
  )
  codes_NM = rq.encode(params, jnp.asarray(x_ND), beam_size=4)
  ours = _mse(x_ND, rq.decode(params, codes_NM))
  # Another draw of the start may cost a few percent.
  assert ours < 1.06 * _mse(x_ND, theirs.decode(theirs.encode(x_ND)))


def test_senseless_arguments_are_refused():
  x_ND = _vectors()
  with pytest.raises(ValueError, match="got 'cosine'"):
    faiss_io.knn(x_ND, x_ND, 3, "cosine")
  with pytest.raises(ValueError, match=r"base .*\(None, 8\), got \(300, 7\)"):
    faiss_io.knn(x_ND, x_ND[:, :7], 3)
  with pytest.raises(ValueError, match="divide the 8 dimensions .* got 3"):
    faiss_io.train_opq(x_ND, 3)
  with pytest.raises(
    ValueError, match="got 10: each position has 2.8 codewords"
  ):
    faiss_io.train_opq(x_ND[:10], 4)
  with pytest.raises(ValueError, match="got 'IVF'"):
    faiss_io.fit_additive("IVF", x_ND, 4)
  with pytest.raises(
    ValueError, match="got 100: each position has 2.8 codewords"
  ):
    faiss_io.fit_additive("RQ", x_ND[:100], 4)
  with pytest.raises(ValueError, match="power of two .* got 6"):
    faiss_io.rq_to_faiss(rq.RQParams(jnp.zeros((2, 6, 8))))
  with pytest.raises(ValueError, match="orthonormal"):
    faiss_io.pq_to_faiss(pq.PQParams(jnp.zeros((4, 4, 2)), 2 * jnp.eye(8)))
  with pytest.raises(ValueError, match="make 2 bytes, .* have 3"):
    faiss_io.to_codec(faiss.IndexPQ(8, 4, 5), 4, 4)


def test_distances_to_rows_of_each_query():
  rng = np.random.default_rng(0)
  xq_QD, xb_ND = rng.normal(size=(4, 6)), rng.normal(size=(9, 6))
  rows_QR = rng.integers(-1, 9, (4, 5))
  found_QR = faiss_io.distances_to(xq_QD, xb_ND, rows_QR)
  for q, rows_R in enumerate(rows_QR):
    for r, row in enumerate(rows_R):
      want = np.inf if row < 0 else np.sum((xq_QD[q] - xb_ND[row]) ** 2)
      assert found_QR[q, r] == pytest.approx(want, rel=1e-5)
  with pytest.raises(ValueError, match="Rows must lie below 9, got 9"):
    faiss_io.distances_to(xq_QD, xb_ND, rows_QR + 9 * (rows_QR == 0))
