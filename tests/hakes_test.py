"""HAKES: its objective against the released program, and against loops."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax import devices
from vqjax.codecs import hakes
from vqjax.training import hakes_learner, loop

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party" / "golden"
RELEASED_SCORE = {"ip": "ip", "l2": "l2_released"}


@functools.cache
def _golden(metric):
  """Parameters, batch and expected values of one released batch."""
  want = dict(np.load(GOLDEN / f"hakes_{metric}.npz"))
  side = lambda name: hakes.HakesSide(
    *(jnp.asarray(want[f"{name}_{k}"]) for k in ("A", "b", "codebooks")),
    jnp.asarray(want["centroids"]),
  )
  params = hakes.HakesParams(side("base"), side("learned"))
  q, g, d = want["neighbors"].shape
  flat_ND = jnp.asarray(want["neighbors"]).reshape(-1, d)
  batch = hakes.Batch(
    jnp.asarray(want["query"]),
    jnp.asarray(want["neighbors"]),
    hakes.encode(params.base, flat_ND).reshape(q, g, -1),
    hakes.assign(params.base, flat_ND, metric).reshape(q, g),
  )
  return params, batch, want


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_losses_and_gradients_are_those_of_the_released_program(metric):
  params, batch, want = _golden(metric)
  score = RELEASED_SCORE[metric]

  def grads(weight, part=None):
    def loss_fn(params):
      loss, parts = hakes.loss(
        params, batch, score=score, reduction_weight=weight
      )
      return (loss if part is None else parts[part]), parts

    return jax.value_and_grad(loss_fn, has_aux=True)(params)

  (_, parts), got = grads(1.0)
  close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-7)
  close(parts["reduced_kl"], want["vt_loss"])
  close(parts["coded_kl"], want["pq_loss"])
  close(got.query.reduction_ED, want["grad_A"])
  close(got.query.bias_E, want["grad_b"])
  close(got.query.codebooks_MKS, want["grad_codebooks"])
  close(grads(1.0, "reduced_kl")[1].query.reduction_ED, want["grad_A_vt"])
  close(grads(1.0, "coded_kl")[1].query.reduction_ED, want["grad_A_pq"])
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(got.base))


def _random(seed=0, *, q=5, g=7, d=6, e=4, num_lists=5):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  side = lambda: hakes.HakesSide(
    normal(e, d) / 2, normal(e), normal(2, 4, e // 2), normal(num_lists, e)
  )
  params = hakes.HakesParams(side(), side())
  batch = hakes.Batch(
    normal(q, d),
    normal(q, g, d),
    jnp.asarray(rng.integers(0, 4, (q, g, 2)), jnp.int32),
    jnp.asarray(rng.integers(0, num_lists, (q, g)), jnp.int32),
  )
  return params, batch


def _score(x, y, name):
  if name == "ip":
    return float(x @ y)
  square = float(((x - y) ** 2).sum())
  return -square if name == "l2" else square**0.5


def _softmax(scores):
  p = np.exp(np.array(scores) - max(scores))
  return p / p.sum()


def _oracle(params, batch, score, neighbour_side, temperature, list_temp):
  """Parts of the loss, neighbour by neighbour in float64."""
  params, batch = jax.tree.map(
    lambda x: np.asarray(x, np.float64), (params, batch)
  )
  query, codes = params.query, batch.codes_QGM.astype(int)
  near = getattr(params, neighbour_side)
  reduced_kl, coded_kl, rows = [], [], []
  for x, v_GD, codes_GM in zip(
    batch.queries_QD, batch.neighbours_QGD, codes, strict=True
  ):
    r = query.reduction_ED @ x + query.bias_E
    words = [
      np.concatenate([query.codebooks_MKS[m, c] for m, c in enumerate(code)])
      for code in codes_GM
    ]
    full = [_score(x, v, score) / temperature for v in v_GD]
    reduced = [
      _score(r, near.reduction_ED @ v + near.bias_E, score) / temperature
      for v in v_GD
    ]
    coded = [_score(r, w, score) / temperature for w in words]
    p = _softmax(full)
    for kept, scores in ((reduced_kl, reduced), (coded_kl, coded)):
      kept.append(sum(p * (np.log(p) - np.log(_softmax(scores)))))
    half = 1 if score == "ip" else 0.5
    name = "ip" if score == "ip" else "l2"
    rows.append([half * _score(r, c, name) for c in query.centroids_LE])
  spread = np.mean([np.std(row) for row in rows])
  losses = [
    -np.log(_softmax(np.array(row) / (list_temp * spread))[int(number)])
    for row, lists_G in zip(rows, batch.lists_QG, strict=True)
    for number in lists_G
  ]
  return np.mean(reduced_kl), np.mean(coded_kl), np.mean(losses)


@pytest.mark.parametrize("score", hakes.SCORES)
@pytest.mark.parametrize("neighbour_side", hakes.SIDES)
def test_loss_is_its_definition(score, neighbour_side):
  params, batch = _random()
  knobs = dict(neighbour_side=neighbour_side, temperature=1.7)
  loss_fn = functools.partial(hakes.loss, score=score, **knobs)
  want = _oracle(params, batch, score, neighbour_side, 1.7, 0.6)
  loss, parts = loss_fn(
    params, batch, reduction_weight=0.3, list_temperature=0.6
  )
  got = [parts[k] for k in ("reduced_kl", "coded_kl", "list_loss")]
  np.testing.assert_allclose(got, want, rtol=1e-4)
  total = 0.3 * want[0] + want[1] + want[2]
  np.testing.assert_allclose(loss, total, rtol=1e-4)
  # Negative: both terms count the same.
  loss, parts = loss_fn(params, batch, reduction_weight=-1.0)
  np.testing.assert_allclose(loss, 2 * want[1], rtol=1e-4)
  assert parts["list_loss"] == 0


def test_no_gradient_goes_through_the_ratio_of_the_terms():
  params, batch = _random()
  grad_fn = lambda w: (
    jax.grad(lambda p: hakes.loss(p, batch, reduction_weight=w)[0])(
      params
    ).query.reduction_ED
  )
  _, parts = hakes.loss(params, batch)
  ratio = float(parts["coded_kl"] / parts["reduced_kl"])
  np.testing.assert_allclose(grad_fn(-1.0), grad_fn(ratio), rtol=1e-4)


@pytest.mark.parametrize(
  "parts", [("reduction", "codebooks"), ("reduction", "codebooks", "centroids")]
)
def test_a_step_moves_the_parts_that_learn_and_no_other(parts):
  params, batch = _random()
  knobs = dict(neighbour_side="base", list_temperature=0.5)
  learner = hakes_learner.make_learner(None, slice(0), knobs, parts)
  schedules = {name: lambda step: 0.1 for name in parts}
  tx = hakes_learner.make_optimiser(schedules, weight_decay=0.9)
  state = loop.make_state(
    params, tx, (), hakes_learner.METRICS, learner.frozen_fn
  )
  step_fn = loop.make_train_step(learner, tx, lambda step: 0.1, seed=0)
  wish = np.zeros(jax.device_count(), np.int32)
  state, _, _ = step_fn(state, *devices.shard((wish, batch)))
  params, _ = _random()  # The state was donated.
  moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), state.params, params)
  assert not any(jax.tree.leaves(moved.base))
  assert moved.query == hakes.HakesSide(True, True, True, "centroids" in parts)


def test_lists_move_the_centroids_and_nothing_else():
  params, batch = _random()
  grad_fn = lambda t: (
    jax.grad(lambda p: hakes.loss(p, batch, list_temperature=t)[0])(
      params
    ).query
  )
  without, with_lists = grad_fn(0.0), grad_fn(0.5)
  assert not np.any(without.centroids_LE)
  assert np.abs(with_lists.centroids_LE).max() > 1e-3
  np.testing.assert_array_equal(without.reduction_ED, with_lists.reduction_ED)
  np.testing.assert_array_equal(without.codebooks_MKS, with_lists.codebooks_MKS)


def test_a_constant_in_the_scores_does_not_matter():
  # For inner products the bias of the neighbours' side is such a constant.
  params, batch = _random()
  moved = params.replace(base=params.base.replace(bias_E=jnp.full(4, 3.0)))
  loss_fn = functools.partial(hakes.loss, neighbour_side="base")
  np.testing.assert_array_equal(
    loss_fn(params, batch)[0], loss_fn(moved, batch)[0]
  )


def test_shares_of_a_batch_agree_on_the_ratio():
  # Two shares under one axis are the whole batch, also in the gradient.
  params, batch = _random(q=8)
  halves = jax.tree.map(lambda x: x.reshape(2, 4, *x.shape[1:]), batch)
  grad_fn = jax.grad(
    lambda p, b, axis=None: hakes.loss(p, b, axis_name=axis)[0]
  )
  shares = jax.vmap(lambda b: grad_fn(params, b, "data"), axis_name="data")(
    halves
  )
  mean = jax.tree.map(lambda x: x.mean(axis=0), shares)
  whole = grad_fn(params, batch)
  np.testing.assert_allclose(
    mean.query.reduction_ED, whole.query.reduction_ED, rtol=1e-4, atol=1e-6
  )


@pytest.mark.parametrize("metric", hakes.METRICS)
def test_lists_and_codes_are_the_nearest(metric):
  params, batch = _random()
  side, x_ND = params.base, np.asarray(batch.queries_QD)
  lists_N, codes_NM = hakes.assign(side, x_ND, metric), hakes.encode(side, x_ND)
  for x, number, code in zip(x_ND, lists_N, codes_NM, strict=True):
    r = np.asarray(side.reduction_ED) @ x + np.asarray(side.bias_E)
    scores = [_score(r, c, metric) for c in np.asarray(side.centroids_LE)]
    assert number == np.argmax(scores)
    for m in range(2):
      part = np.asarray(r)[2 * m : 2 * m + 2]
      words_KS = np.asarray(side.codebooks_MKS[m])
      assert code[m] == np.argmin(((part - words_KS) ** 2).sum(axis=1))


@pytest.mark.parametrize("metric", hakes.METRICS)
@pytest.mark.parametrize("assign_by", hakes.SIDES)
def test_mean_centroids(metric, assign_by):
  params, batch = _random(q=9, num_lists=12)
  x_ND, old_LE = batch.queries_QD, params.base.centroids_LE
  finder = getattr(params, assign_by).replace(centroids_LE=old_LE)
  lists_N = np.asarray(hakes.assign(finder, x_ND, metric))
  x_NE = np.asarray(hakes.reduce(params.query, x_ND))
  sums = hakes.centroid_sums(params, x_ND, metric, assign_by=assign_by)
  new_LE = hakes.mean_centroids(old_LE, *sums, metric)
  for number in range(12):
    want = old_LE[number]
    if (lists_N == number).any():
      want = x_NE[lists_N == number].mean(axis=0)
      if metric == "ip":
        want = want / np.linalg.norm(want)
    np.testing.assert_allclose(new_LE[number], want, rtol=1e-4, atol=1e-5)
  assert len(set(lists_N)) < 12  # Some lists were empty.


@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_temperature_follows_the_scale_of_the_data(scale):
  _, batch = _random()
  v_QGD, x_QD = batch.neighbours_QGD * scale, batch.queries_QD * scale
  samples = hakes_learner.Samples(
    np.asarray(x_QD),
    np.arange(35).reshape(5, 7),
    np.asarray(v_QGD).reshape(35, -1),
    np.zeros((35, 2), np.uint8),
    np.zeros(35, np.int32),
  )
  spread = np.mean(
    [
      np.std([_score(x, v, "l2") for v in v_GD])
      for x, v_GD in zip(x_QD, v_QGD, strict=True)
    ]
  )
  got = hakes_learner.natural_temperature(samples, "l2")
  assert got == pytest.approx(max(spread, 1), rel=1e-4)
  assert (got > 1) == (scale > 1)


def test_misfits_are_refused():
  params, batch = _random()
  with pytest.raises(ValueError, match="score must be one of .*got 'cosine'"):
    hakes.loss(params, batch, score="cosine")
  with pytest.raises(ValueError, match="neighbour_side .* got 'learned'"):
    hakes.loss(params, batch, neighbour_side="learned")
  with pytest.raises(ValueError, match=r"codes .*\(5, 7, 2\), got \(5, 7, 1\)"):
    hakes.loss(params, batch.replace(codes_QGM=batch.codes_QGM[..., :1]))
  with pytest.raises(ValueError, match="metric .*got 'l1'"):
    hakes.assign(params.base, batch.queries_QD, "l1")
  with pytest.raises(ValueError, match="2 slices of 3 .* reduction to 4"):
    hakes.check_side(params.base.replace(codebooks_MKS=jnp.zeros((2, 4, 3))))
