from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles
from tests.qinco_cases import CASES, make_params, vectors
from vqjax.codecs import qinco, qinco_loss, rq
from vqjax.codecs.rule import SearchRule

RULE = SearchRule(3, 3)


def _rule(params):
  if params.preselect_TKD is None:
    return SearchRule(0, 1)
  return RULE


def _init(x_ND, **kwargs):
  sizes = dict(
    num_steps=3, codebook_size=8, network_dim=4, hidden_dim=5, num_blocks=2
  )
  return qinco_loss.init(
    jax.random.key(0), jnp.asarray(x_ND), **{**sizes, **kwargs}
  )


@pytest.mark.parametrize("case", CASES)
def test_loss_matches_the_plain_sums(case):
  params = make_params(**CASES[case])
  x_ND = vectors()
  loss_fn = jax.jit(partial(qinco_loss.loss, rule=_rule(params)))
  total, aux = loss_fn(params, jax.random.key(0), jnp.asarray(x_ND))
  codes_NM = np.asarray(qinco.encode(params, x_ND, rule=_rule(params)))
  z_ND = (x_ND - np.asarray(params.mean_D)) / float(params.std)
  main, preselect = [], []
  first = 1 if params.is_ivf else 0
  for m in range(first, codes_NM.shape[1]):
    decoded = oracles.qinco_decode(params, codes_NM[:, : m + 1])
    xhat = (decoded - np.asarray(params.mean_D)) / float(params.std)
    main.append(np.mean((xhat - z_ND) ** 2))
    if m > 0 and params.preselect_TKD is not None:
      before = oracles.qinco_decode(params, codes_NM[:, :m])
      before = (before - np.asarray(params.mean_D)) / float(params.std)
      plain = np.asarray(params.preselect_TKD)[m - 1, codes_NM[:, m]]
      preselect.append(np.mean((before + plain - z_ND) ** 2))
  assert float(aux["metrics"]["mse_loss"]) == pytest.approx(sum(main), rel=1e-5)
  assert float(aux["metrics"]["preselect_loss"]) == pytest.approx(
    sum(preselect), rel=1e-5
  )
  assert float(total) == pytest.approx(sum(main) + sum(preselect), rel=1e-5)
  mse = np.mean(np.sum((x_ND - decoded) ** 2, axis=1))
  assert float(aux["metrics"]["mse"]) == pytest.approx(mse, rel=1e-5)
  used_MK = np.asarray(aux["stats"].used_MK)
  for m, used_K in enumerate(used_MK, start=first):
    np.testing.assert_array_equal(
      used_K, np.bincount(codes_NM[:, m], minlength=len(used_K))
    )


@pytest.mark.parametrize("case", ["qinco2", "ivf", "low_rank"])
def test_gradient_matches_finite_differences(case):
  # Of the main term, with the codes held: they are chosen without gradient.
  params = make_params(**CASES[case])
  x_ND = vectors(8)
  grads = jax.jit(
    jax.grad(
      lambda p: qinco_loss.loss(
        p, jax.random.key(0), jnp.asarray(x_ND), rule=_rule(params)
      )[1]["metrics"]["mse_loss"]
    )
  )(params)
  codes_NM = np.asarray(qinco.encode(params, x_ND, rule=_rule(params)))
  rng = np.random.default_rng(0)
  frozen = qinco_loss.frozen(params)
  direction = jax.tree.map(
    lambda leaf, is_frozen: rng.normal(size=leaf.shape) * (not is_frozen),
    params,
    frozen,
  )

  def main_term(eps):
    moved = jax.tree.map(
      lambda p, d: np.asarray(p) + eps * d, params, direction
    )
    decoded = [
      oracles.qinco_decode(moved, codes_NM[:, : m + 1])
      for m in range(params.is_ivf, codes_NM.shape[1])
    ]
    return (
      sum(np.mean((x - x_ND) ** 2) for x in decoded) / float(params.std) ** 2
    )

  numeric = (main_term(1e-5) - main_term(-1e-5)) / 2e-5
  exact = jax.tree.map(lambda g, d: np.vdot(g, d), grads, direction)
  assert sum(jax.tree.leaves(exact)) == pytest.approx(numeric, rel=1e-4)


def test_steps_written_out_have_the_gradient_of_a_scan(monkeypatch):
  params, x_ND = make_params(), jnp.asarray(vectors())
  counts, scan = [], jax.lax.scan

  def counted(*args, unroll=1, **kwargs):
    counts.append(unroll)
    return scan(*args, unroll=unroll, **kwargs)

  def grads():
    loss_fn = lambda p: qinco_loss.loss(p, jax.random.key(0), x_ND, rule=RULE)[
      0
    ]
    return jax.tree.leaves(jax.jit(jax.grad(loss_fn))(params))

  monkeypatch.setattr(jax.lax, "scan", counted)
  written_out = grads()
  assert 3 in counts
  monkeypatch.setattr(qinco_loss, "_MAX_UNROLLED", 0)
  counts.clear()
  scanned = grads()
  assert set(counts) == {1}
  for a, b in zip(written_out, scanned, strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  ("sizes", "count"),
  [
    (dict(), 7),  # QINCo2-S.
    (dict(network_dim=384, hidden_dim=384, num_blocks=4), 7),  # M
    (dict(network_dim=384, hidden_dim=384, num_blocks=16), 1),  # L
    (dict(num_networks=33), 1),
  ],
)
def test_few_and_small_steps_are_written_out(sizes, count):
  published = dict(
    dim=128, num_networks=7, num_codewords=256, network_dim=128, hidden_dim=256
  )
  params = jax.eval_shape(lambda: make_params(**{**published, **sizes}))
  stacked = jax.eval_shape(qinco.prepare, params).steps
  assert qinco_loss._num_unrolled(stacked) == count


@pytest.mark.parametrize("num_lists", [None, 11])
def test_the_scale_of_the_data_and_the_centroids_of_lists_are_frozen(num_lists):
  frozen = qinco_loss.frozen(make_params(num_lists=num_lists))
  names = {
    name for name, is_frozen in vars(frozen).items() if is_frozen is True
  }
  lists = {"first_KD", "is_ivf"} if num_lists else set()  # Static is_ivf.
  assert names - {"add_word"} == {"mean_D", "std"} | lists


@pytest.mark.parametrize("network_dim", [4, 6])
def test_init_is_residual_quantisation(network_dim):
  x_ND = vectors(200)
  params = _init(x_ND, network_dim=network_dim, noise=0.0)
  z_ND = qinco.normalise(params, x_ND)
  quantiser = rq.fit(
    jax.random.split(jax.random.key(0), 3)[0],
    z_ND,
    num_codes=3,
    codebook_size=8,
    is_rising=False,
  )
  codes_NM = rq.encode(quantiser, z_ND, beam_size=4)
  want_ND = rq.decode(quantiser, codes_NM) * params.std + params.mean_D[None]
  np.testing.assert_allclose(
    qinco.decode(params, codes_NM), want_ND, rtol=1e-5, atol=1e-5
  )


def test_init_normalises_the_data():
  x_ND = vectors(300) * 5 + 3
  params = _init(x_ND)
  z_ND = np.asarray(qinco.normalise(params, x_ND))
  np.testing.assert_allclose(z_ND.mean(axis=0), 0, atol=1e-5)
  assert z_ND.std() == pytest.approx(1, rel=1e-5)
  one = _init(x_ND, is_qinco1=True, network_dim=None)
  assert np.abs(qinco.normalise(one, x_ND)).max() == pytest.approx(1)
  assert not np.asarray(one.mean_D).any()


def test_the_scale_is_of_all_vectors_whatever_their_order():
  x_ND = np.zeros((100_300, 3), np.float32)
  x_ND[100_000:] = 10_000  # As in a file that is sorted by its source.
  mean_D, std = qinco_loss._scale(jnp.asarray(x_ND), is_qinco1=False)
  np.testing.assert_allclose(mean_D, x_ND.mean(axis=0, dtype=float), rtol=1e-6)
  np.testing.assert_allclose(std, x_ND.std(dtype=float), rtol=1e-6)


def test_uses_are_counted_beyond_what_float32_holds():
  params = make_params()
  stats = qinco_loss.empty_stats(params)
  many = stats.replace(used_MK=stats.used_MK + (1 << 26))
  one = stats.replace(used_MK=stats.used_MK + 1)
  merged = qinco_loss.merge_stats(many, one)
  assert int(merged.used_MK[0, 0]) == (1 << 26) + 1


def test_init_with_lists_quantises_what_they_leave():
  x_ND = vectors(200)
  centroids_LD = x_ND[:20]
  params = _init(x_ND, centroids_LD=jnp.asarray(centroids_LD), noise=0.0)
  assert params.is_ivf
  np.testing.assert_allclose(
    params.first_KD * params.std + params.mean_D[None],
    centroids_LD,
    rtol=1e-5,
    atol=1e-5,
  )
  codes_NM = np.asarray(qinco.encode(params, x_ND, rule=RULE))
  np.testing.assert_array_equal(
    codes_NM[:, 0], oracles.nearest(x_ND, centroids_LD)
  )
  assert codes_NM.shape[1] == 4


def test_lists_found_elsewhere_are_taken():
  x_ND = vectors(200)
  centroids_LD = jnp.asarray(x_ND[:20])
  start = dict(centroids_LD=centroids_LD, noise=0.0)
  params = _init(x_ND, **start)
  nearest_N = oracles.nearest(x_ND, x_ND[:20]).astype(np.int32)
  other_N = (nearest_N + 1) % 20
  plain_NM, same_NM, other_NM = (
    np.asarray(qinco.encode(params, x_ND, lists_N, rule=RULE))
    for lists_N in (None, nearest_N, other_N)
  )
  np.testing.assert_array_equal(same_NM, plain_NM)
  np.testing.assert_array_equal(other_NM[:, 0], other_N)
  loss = lambda lists_N: qinco_loss.loss(
    params, jax.random.key(0), jnp.asarray(x_ND), lists_N, rule=RULE
  )[0]
  assert loss(nearest_N) == loss(None)
  assert loss(other_N) > loss(None)
  # Words start as those of the residuals to the lists that are given.
  words = [
    _init(x_ND, **start, lists_N=jnp.asarray(lists_N)).codebooks_TKD
    for lists_N in (nearest_N, other_N)
  ]
  np.testing.assert_array_equal(words[0], params.codebooks_TKD)
  assert np.abs(words[1] - words[0]).max() > 0.1
  with pytest.raises(ValueError, match=r"lists must have shape \(200,\)"):
    qinco.encode(params, x_ND, nearest_N[:-1], rule=RULE)
  with pytest.raises(ValueError, match="has no lists"):
    qinco.encode(_init(x_ND), x_ND, nearest_N, rule=RULE)


def _stats_with_dead_words(params):
  """Word 2 of the last step and word 4 of the first were not used."""
  stats = qinco_loss.empty_stats(params)
  m, k = stats.used_MK.shape
  used_MK = np.full((m, k), 30, np.float32)
  used_MK[m - 1, 2] = used_MK[0, 4] = 0
  used_MK[1, 3] = 1  # Below a twentieth of the mean.
  return stats.replace(used_MK=jnp.asarray(used_MK))


def _changed(params, new):
  """Which words of the learned codebooks changed, `[M, K]`."""
  differ = lambda a, b: np.any(np.asarray(a != b), axis=-1)
  changed = differ(new.codebooks_TKD, params.codebooks_TKD)
  if params.preselect_TKD is not None:
    np.testing.assert_array_equal(
      changed, differ(new.preselect_TKD, params.preselect_TKD)
    )
  if params.is_ivf:
    np.testing.assert_array_equal(new.first_KD, params.first_KD)
    return changed
  return np.concatenate([differ(new.first_KD, params.first_KD)[None], changed])


@pytest.mark.parametrize("case", CASES)
def test_split_copies_used_words_over_idle_ones(case):
  params = make_params(**CASES[case])
  stats = _stats_with_dead_words(params)
  new, fresh, report = qinco_loss.end_epoch(
    params, jax.random.key(3), stats, redraw="split", noise=1e-4
  )
  assert int(report["dead_words"]) == 2
  assert not np.asarray(fresh.used_MK).any()
  used_MK = np.asarray(stats.used_MK)
  np.testing.assert_array_equal(_changed(params, new), used_MK < 30)
  old_KD, new_D = params.codebooks_TKD[-1], new.codebooks_TKD[-1, 2]
  gaps_K = np.abs(np.asarray(old_KD) - np.asarray(new_D)).max(axis=1)
  parent = gaps_K.argmin()
  assert parent != 2
  assert 0 < gaps_K[parent] < 1e-3
  if params.preselect_TKD is not None:  # The same parent.
    gap_D = params.preselect_TKD[-1, parent] - new.preselect_TKD[-1, 2]
    assert np.abs(gap_D).max() < 1e-3


def test_redraw_none_keeps_words_and_others_are_refused():
  params = make_params()
  stats = _stats_with_dead_words(params)
  new, fresh, _ = qinco_loss.end_epoch(
    params, jax.random.key(3), stats, redraw="none"
  )
  jax.tree.map(np.testing.assert_array_equal, new, params)
  assert not np.asarray(fresh.used_MK).any()
  with pytest.raises(ValueError, match="split, none; got 'reset'"):
    qinco_loss.end_epoch(params, jax.random.key(3), stats, redraw="reset")
  with pytest.raises(ValueError, match='"published" is gone: .* take "split"'):
    qinco_loss.end_epoch(params, jax.random.key(3), stats, redraw="published")


def test_merge_stats_counts_all():
  params = make_params()
  old = qinco_loss.empty_stats(params)
  one = jax.tree.map(jnp.ones_like, old)
  twice = qinco_loss.merge_stats(qinco_loss.merge_stats(old, one), one)
  assert float(twice.used_MK[0, 0]) == 2


def test_usage_reports_entropy_in_bits():
  params = make_params(num_codewords=8)
  stats = qinco_loss.empty_stats(params)
  used_MK = np.zeros(stats.used_MK.shape, np.float32)
  used_MK[:, :4] = 5
  report = qinco_loss.usage(stats.replace(used_MK=jnp.asarray(used_MK)))
  np.testing.assert_allclose(report["entropy_M"], 2, rtol=1e-6)
  np.testing.assert_allclose(report["usage_M"], 0.5)


@pytest.mark.parametrize(
  ("sizes", "message"),
  [
    (dict(num_steps=1), "num_steps must lie between 2 and 256, got 1"),
    (dict(codebook_size=1), "codebook_size must lie between 2"),
    (dict(codebook_size=201), "201.*200|200.*201"),
    (dict(network_dim=0), "network_dim must lie between 1"),
    (dict(hidden_dim=0), "hidden_dim must lie between 1"),
    (dict(num_blocks=0), "num_blocks must lie between 1"),
    (dict(low_rank=11), "low_rank must lie between 1 and 10, got 11"),
    (dict(is_qinco1=True), "network_dim must be None or 6, got 4"),
  ],
)
def test_senseless_models_are_refused(sizes, message):
  with pytest.raises(ValueError, match=message):
    _init(vectors(200), **sizes)
