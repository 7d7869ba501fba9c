"""How an RQ-VAE starts, learns and revives codewords."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import oracles
from vqjax.codecs import rqvae, rqvae_loss, rqvae_start
from vqjax.codecs.rqvae import Mlp

KEY = jax.random.key(0)
SIZES = dict(layers=(7,), e_dim=4, codebook_sizes=(5, 3))


def _params(**changes):
  return rqvae_start.init(KEY, 6, **SIZES | changes)


def _vectors(n=40, seed=0):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=(n, 6)), jnp.float32)


def test_init_is_xavier_normal():
  params = rqvae_start.init(
    KEY, 100, layers=(300,), e_dim=50, codebook_sizes=(8, 400)
  )
  for mlp, sizes in (
    (params.encoder, ((100, 300), (300, 50))),
    (params.decoder, ((50, 300), (300, 100))),
  ):
    for weight_HH, (n, m) in zip(mlp.weights, sizes, strict=True):
      assert weight_HH.shape == (n, m)
      np.testing.assert_allclose(
        np.std(weight_HH), (2 / (n + m)) ** 0.5, rtol=0.02
      )
    assert not any(np.any(bias_H) for bias_H in mlp.biases)
  assert 0.0024 < np.abs(params.codebooks[1]).max() <= 1 / 400
  assert rqvae.codebook_sizes(params) == (8, 400)


def test_codebooks_start_as_kmeans_of_the_residuals():
  x_ND = _vectors()
  params = rqvae_start.start_codebooks(
    KEY, _params(batch_norm=True), x_ND, num_iterations=30
  )
  # Batch norm by the batch: running statistics are none yet.
  residual = np.asarray(rqvae_loss.run_training(params.encoder, x_ND)[0])
  for words_KE in map(np.asarray, params.codebooks):
    ids = oracles.nearest(residual, words_KE)
    for k in range(len(words_KE)):
      np.testing.assert_allclose(
        words_KE[k], residual[ids == k].mean(axis=0), atol=1e-5
      )
    residual = residual - words_KE[ids]


@pytest.mark.parametrize("e_dim", [4, 9])
def test_networks_start_as_principal_components(e_dim):
  x_ND = _vectors()
  params = rqvae_start.start_networks(_params(e_dim=e_dim), x_ND)
  z_NE = rqvae.latent(params, x_ND)
  centred = np.asarray(x_ND, np.float64)
  centred = centred - centred.mean(axis=0)
  _, _, rows = np.linalg.svd(centred)
  top = rows[:e_dim]  # All 6 of 9.
  np.testing.assert_allclose(
    np.abs(z_NE[:, : len(top)]), np.abs(centred @ top.T), atol=1e-4
  )
  np.testing.assert_allclose(
    rqvae.run(params.decoder, z_NE),
    np.asarray(x_ND) - centred + centred @ top.T @ top,
    atol=1e-4,
  )


def test_separation_looks_into_the_cells_of_others():
  params, x_ND = _params(), _vectors(8)
  loss_fn = lambda weight: rqvae_loss.loss(
    params, KEY, x_ND, separation=weight
  )[0]
  z_NE = np.asarray(rqvae.latent(params, x_ND), np.float64)
  codes_NM = np.asarray(rqvae.encode(params, x_ND))
  sums = sum(
    np.asarray(words)[ids]
    for words, ids in zip(params.codebooks, codes_NM.T, strict=True)
  )
  radius = np.mean(np.sum((z_NE - sums) ** 2, axis=1))
  want = 0.0
  for a in range(8):
    for b in range(8):
      squared = np.sum((z_NE[a] - z_NE[b]) ** 2)
      want += (a != b) * max(0, 1 - squared / radius) / 8
  assert want > 0
  assert loss_fn(2.0) - loss_fn(0.0) == pytest.approx(2 * want, rel=1e-4)


def test_a_skip_path_is_added():
  rng = np.random.default_rng(0)
  skip_DE, x_ND = rng.normal(size=(6, 4)), _vectors()
  mlp = _params().encoder
  plain = rqvae.run(mlp, x_ND)
  both = rqvae.run(mlp.replace(skip_DE=jnp.float32(skip_DE)), x_ND)
  np.testing.assert_allclose(both - plain, x_ND @ skip_DE, atol=1e-5)
  only = rqvae.run(Mlp((), (), skip_DE=jnp.float32(skip_DE)), x_ND)
  np.testing.assert_allclose(only, x_ND @ skip_DE, atol=1e-5)


def test_dropout_keeps_the_mean():
  mlp = Mlp((jnp.ones((6, 1)),), (jnp.zeros(1),))
  x_ND = jnp.ones((4000, 6))
  y_N1, _ = rqvae_loss.run_training(mlp, x_ND, KEY, 0.5)
  assert set(np.unique(y_N1)) == set(range(0, 13, 2))
  np.testing.assert_allclose(np.mean(y_N1), 6, rtol=0.02)


def test_dead_codewords_become_copies_of_used_ones():
  params, key = _params(), jax.random.key(1)
  used = (jnp.int32([9, 0, 30, 0, 1]), jnp.int32([2, 2, 2]))
  stats = rqvae_loss.empty_stats(params).replace(used=used)
  same, fresh, report = rqvae_loss.end_epoch(params, key, stats)
  assert all(jax.tree.leaves(jax.tree.map(np.array_equal, same, params)))
  assert not any(np.any(used_K) for used_K in fresh.used)
  new, _, _ = rqvae_loss.end_epoch(
    params, key, stats, revive="split", noise=1e-3
  )
  old_KE, new_KE = params.codebooks[0], new.codebooks[0]
  np.testing.assert_array_equal(new.codebooks[1], params.codebooks[1])
  np.testing.assert_array_equal(new_KE[jnp.array([0, 2, 4])], old_KE[::2])
  spread = np.std(old_KE)
  for k in (1, 3):
    distances = np.abs(np.asarray(new_KE[k : k + 1] - old_KE[::2])).max(axis=1)
    assert 0 < distances.min() < 0.01 * spread
  np.testing.assert_allclose(report["usage_M"], [3 / 5, 1])
  assert report["dead_words"] == 2
  share = np.array([9, 30, 1]) / 40
  np.testing.assert_allclose(
    report["perplexity_M"], [np.exp(-(share * np.log(share)).sum()), 3], 1e-5
  )


def test_stats_of_batches_and_parts_add_up():
  params, x_ND = _params(batch_norm=True), _vectors()
  loss_fn = jax.jit(rqvae_loss.loss)
  stats = [
    loss_fn(params, KEY, part)[1]["stats"] for part in (x_ND[:20], x_ND[20:])
  ]
  both = rqvae_loss.merge_stats(*stats)
  assert [int(used_K.sum()) for used_K in both.used] == [40, 40]
  np.testing.assert_array_equal(both.moments[0][0], stats[1].moments[0][0])
  shapes = lambda tree: jax.tree.map(jnp.shape, tree)
  assert shapes(rqvae_loss.empty_stats(params)) == shapes(both)
  stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *stats)
  joined = jax.vmap(
    lambda part: rqvae_loss.join_stats(part, "parts"), axis_name="parts"
  )(stacked)
  np.testing.assert_array_equal(joined.used[0][0], both.used[0])
  mean = (stats[0].moments[1][0] + stats[1].moments[1][0]) / 2
  np.testing.assert_allclose(joined.moments[1][0][1], mean, rtol=1e-6)


def test_a_gradient_step_lowers_the_loss():
  params, x_ND = _params(), _vectors()
  grad_fn = jax.jit(jax.value_and_grad(rqvae_loss.loss, has_aux=True))
  (before, _), grads = grad_fn(params, KEY, x_ND)
  moved = jax.tree.map(lambda x, g: x - 0.05 * g, params, grads)
  (after, _), _ = grad_fn(moved, KEY, x_ND)
  assert after < before


@pytest.mark.parametrize(
  ("knobs", "said"),
  [
    ({"loss_type": "l2"}, "must be one of mse, l1; got 'l2'"),
    ({"sk_epsilons": (0.1,)}, "one number per level, 2, or none; got 1"),
    ({"sk_epsilons": (0.1, -1)}, "sk_epsilons must lie between 0 .* got -1"),
    ({"dropout": 1.0}, "dropout must lie .* got 1.0"),
    ({"separation": -1.0}, "separation must lie .* got -1.0"),
  ],
)
def test_knobs_that_make_no_sense_are_refused(knobs, said):
  with pytest.raises(ValueError, match=said):
    rqvae_loss.loss(_params(), KEY, _vectors(), **knobs)


@pytest.mark.parametrize(
  ("sizes", "said"),
  [
    ({"codebook_sizes": (4,) * 27}, "levels .* between 1 and 26, got 27"),
    ({"codebook_sizes": ()}, "levels .* got 0"),
    ({"codebook_sizes": (4, 1)}, "codebook_sizes must lie .* got 1"),
    ({"layers": (8, 0)}, "widths of layers and e_dim .* got 0"),
  ],
)
def test_sizes_that_make_no_sense_are_refused(sizes, said):
  with pytest.raises(ValueError, match=said):
    _params(**sizes)


def test_fewer_vectors_than_codewords_are_refused():
  with pytest.raises(ValueError, match="one for each codeword.*|got 4"):
    rqvae_start.start_codebooks(KEY, _params(), _vectors(4))
  with pytest.raises(ValueError, match="must be one of split, none; got 'no'"):
    rqvae_loss.check_revive("no")
