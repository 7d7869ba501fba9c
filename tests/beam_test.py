import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.codecs import beam


@pytest.mark.parametrize(
  ("num", "k"), [(16, 1), (64, 4), (96, 16), (256, 8), (512, 512), (35, 9)]
)
def test_top_k_smallest_equals_a_full_sort(num, k):
  x_NC = np.random.default_rng(num).normal(size=(12, num)).astype(np.float32)
  values_NR, at_NR = beam.top_k_smallest(jnp.asarray(x_NC), k)
  np.testing.assert_array_equal(at_NR, np.argsort(x_NC, axis=1)[:, :k])
  np.testing.assert_array_equal(values_NR, np.sort(x_NC, axis=1)[:, :k])


def test_top_k_smallest_uses_groups_where_they_pay():
  assert beam._group_size(2048, 16) > 1
  assert beam._group_size(16, 16) == 1


def test_top_k_smallest_with_empty_slots():
  x_NC = np.full((3, 64), np.inf, np.float32)
  x_NC[:, 40] = 1
  values_NR, at_NR = beam.top_k_smallest(jnp.asarray(x_NC), 4)
  assert (np.asarray(at_NR)[:, 0] == 40).all()
  assert np.isinf(np.asarray(values_NR)[:, 1:]).all()


def _propose(words_KD, x_ND, hypotheses):
  """Every word for each hypothesis, the slow way."""
  n, f, d = hypotheses.xhat_NFD.shape
  xhat_NFKD = hypotheses.xhat_NFD[:, :, None] + words_KD[None, None]
  error_NFK = jnp.sum((x_ND[:, None, None] - xhat_NFKD) ** 2, axis=-1)
  error_NFK = jnp.where(
    jnp.isinf(hypotheses.error_NF)[..., None], jnp.inf, error_NFK
  )
  k = words_KD.shape[0]
  parents_C, ids_C = np.divmod(np.arange(f * k), k)
  spread = lambda x_C: jnp.broadcast_to(jnp.asarray(x_C)[None], (n, f * k))
  ids_NC = spread(ids_C)
  words_fn = lambda slots_NF: words_KD[
    jnp.take_along_axis(ids_NC, slots_NF, axis=1)
  ]
  return beam.Candidates(
    spread(parents_C), ids_NC, error_NFK.reshape(n, -1), words_fn
  )


def test_a_beam_wider_than_the_words_has_empty_slots():
  words_KD = jnp.asarray([[1.0, 0.0], [0.0, 1.0]])
  x_ND = jnp.asarray([[1.0, 1.0]])
  one, (_, ids_NF) = beam.advance(
    _propose, words_KD, x_ND, beam.start(x_ND), beam_size=3
  )
  np.testing.assert_array_equal(one.error_NF, [[1, 1, np.inf]])
  np.testing.assert_array_equal(ids_NF[:, :2], [[0, 1]])
  two, steps = beam.advance_all(_propose, words_KD[None], x_ND, one)
  np.testing.assert_array_equal(two.error_NF, [[0, 0, 2]])
  ids_TN, slot_N = beam.backtrack(*steps, jnp.asarray([0]))
  np.testing.assert_array_equal(ids_TN, [[1]])  # Parent 0 had word 0.
  np.testing.assert_array_equal(slot_N, [0])


def test_trace_follows_parents():
  parents_TNF = jnp.asarray([[[1, 0]], [[1, 1]]])
  ids_TNF = jnp.asarray([[[5, 6]], [[7, 8]]])
  ids_TN, slot_N = beam.backtrack(parents_TNF, ids_TNF, jnp.asarray([0]))
  np.testing.assert_array_equal(ids_TN, [[6], [7]])
  np.testing.assert_array_equal(slot_N, [0])
