import numpy as np
import pytest

from vqjax.codecs import near_assign
from vqjax.data.batches import WithLists


@pytest.mark.parametrize(
  ("by_product", "offset"), [(False, 0.0), (False, 1e3), (True, 0.0)]
)
@pytest.mark.parametrize(("n", "k"), [(2000, 90), (1, 90), (700, 5)])
def test_the_nearest_of_those_near_is_found(n, k, by_product, offset):
  rng = np.random.default_rng(0)
  x_ND = (rng.normal(size=(n, 8)) + offset).astype(np.float32)
  words_KD = (rng.normal(size=(k, 8)) + offset).astype(np.float32)
  lists_N = rng.integers(k, size=n).astype(np.int32)
  assign_fn = near_assign.make_assign_fn(words_KD, by_product=by_product)
  ids_N, error_N = assign_fn(WithLists(x_ND, lists_N))
  far = lambda a, b: (
    -a @ b.T
    if by_product
    else ((a[:, None].astype(float) - b[None]) ** 2).sum(axis=2)
  )
  between_KK = far(words_KD, words_KD)
  np.fill_diagonal(between_KK, -np.inf)
  near_KC = np.argsort(between_KK, axis=1)[:, : near_assign.NUM_NEAR]
  far_NK = far(x_ND, words_KD)
  for i, found in enumerate(np.asarray(ids_N)):
    near = np.sort(near_KC[lists_N[i]])
    # float32 products of numbers near 1.
    assert found in near
    assert far_NK[i, found] <= far_NK[i, near].min() + 1e-3
  want_N = ((x_ND.astype(float) - words_KD[ids_N]) ** 2).sum(axis=1)
  np.testing.assert_allclose(error_N, want_N, atol=1e-3)


def test_ties_go_to_the_lower_codeword():
  words_KD = np.zeros((70, 3), np.float32)
  words_KD[10:20] = 1
  rows = WithLists(np.ones((5, 3), np.float32), np.full(5, 19, np.int32))
  ids_N, error_N = near_assign.make_assign_fn(words_KD)(rows)
  # 19 itself, and the lowest 63 of the others, the ten equal ones first.
  np.testing.assert_array_equal(ids_N, 10)
  np.testing.assert_array_equal(error_N, 0)


def test_it_pays_with_many_codewords_alone():
  assert not near_assign.pays(4 * near_assign.NUM_NEAR - 1)
