"""Mini-batch k-means: golden runs of FastIVF, loops, and devices."""

import itertools
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.codecs import minibatch_kmeans, minibatch_training, near_assign
from vqjax.codecs.minibatch_kmeans import Rule

GOLDEN = (
  pathlib.Path(__file__).parents[1] / "third_party" / "golden" / "fast_ivf"
)
METRICS = minibatch_kmeans.METRICS


def _golden(name):
  return np.load(GOLDEN / f"{name}.npz")


def _unit(x_ND):
  return x_ND / np.linalg.norm(x_ND, axis=1, keepdims=True)


def _drive(rule, x_ND, rows, num_centroids, most, stops=()):
  """Runs given batches; yields the run after each chunk, cut at `stops`."""
  num_first = -(-num_centroids // rows.shape[1])
  first_KD = x_ND[rows[:num_first].ravel()[:num_centroids]]
  run = minibatch_training.begin(rule, first_KD, rows.shape[1])
  yield run
  left = [x_ND[row] for row in rows[num_first:]][:most]
  while left and not run.is_done:
    ahead = [s - run.num_steps for s in stops if s > run.num_steps]
    num = min([minibatch_kmeans.CHUNK, *ahead])
    run = minibatch_training.advance(rule, run, left[:num], tol=5e-5)
    left = left[num:]
    yield run


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(("name", "k"), [("det", 12), ("detsplit", 24)])
def test_runs_are_those_of_fastivf(name, k, metric):
  golden, rule = _golden("kmeans"), Rule(metric)
  x_ND = _unit(golden["x"]) if metric == "cosine" else golden["x"]
  seen = {0, 1, 12, 50}
  runs = list(_drive(rule, x_ND, golden[f"{name}_batches"], k, 220, seen))
  for run in runs:
    if run.num_steps in seen:
      want = golden[f"{name}_{metric}_centroids_it{run.num_steps}"]
      np.testing.assert_allclose(run.words_KD, want, atol=1e-5)
      seen.remove(run.num_steps)
  assert not seen
  want = golden[f"{name}_{metric}_history"]
  np.testing.assert_allclose(run.history, want, atol=1e-12)
  want = golden[f"{name}_{metric}_centroids"]
  np.testing.assert_allclose(run.words_KD, want, atol=1e-5)
  labels_NM, _ = minibatch_kmeans.assign(rule, x_ND, run.words_MKS)
  want = golden[f"{name}_{metric}_labels"]
  np.testing.assert_array_equal(labels_NM[:, 0], want)
  assert run.splits == ()


@pytest.mark.parametrize("metric", METRICS)
def test_clusters_are_split_as_in_fastivf(metric):
  golden, rule = _golden("kmeans_split"), Rule(metric)
  x_ND = golden["x_unit" if metric == "cosine" else "x"]
  counts = golden[f"{metric}_counts_after_split_rule"]
  k, stops = int(golden["num_centroids"]), (1, 18, 26, 99)
  for run in _drive(rule, x_ND, golden["batches"], k, 160, stops):
    if run.num_steps:
      want = counts[run.num_steps - 1]
      np.testing.assert_array_equal(run.state.counts_MK[0], want)
  want = [(s, 0, *pair) for s, *pair in golden[f"{metric}_splits"].tolist()]
  assert list(run.splits) == want
  np.testing.assert_allclose(
    run.history, golden[f"{metric}_history"], atol=1e-12
  )
  want = golden[f"{metric}_centroids"]
  np.testing.assert_allclose(run.words_KD, want, atol=1e-5)


@pytest.mark.parametrize("metric", METRICS)
def test_sub_vectors_are_those_of_fastivf(metric):
  golden, rule = _golden("subkmeans"), Rule(metric, num_subvectors=4)
  x_ND = golden["x"]
  *_, run = _drive(rule, x_ND, golden["det_batches"], 16, 150)
  want = golden[f"det_{metric}_history"]
  np.testing.assert_allclose(run.history, want, atol=1e-12)
  want = golden[f"det_{metric}_centroids"]
  np.testing.assert_allclose(run.words_MKS, want, atol=1e-5)
  labels_NM, _ = minibatch_kmeans.assign(rule, x_ND, run.words_MKS)
  np.testing.assert_array_equal(labels_NM, golden[f"det_{metric}_labels"])
  scores_MNK = minibatch_kmeans.scores(rule, x_ND[:5], run.words_MKS)
  want = golden[f"det_{metric}_scores5"]
  np.testing.assert_allclose(scores_MNK, want, atol=1e-5)


def test_a_run_stops_before_the_step_that_has_converged():
  rng = np.random.default_rng(0)
  x_ND = np.repeat(10 * np.eye(4, dtype=np.float32), 8, axis=0)
  x_ND += rng.normal(size=x_ND.shape).astype(np.float32) / 9
  rule, tol, ends = Rule("l2", history_size=2), 0.3, []
  for chunk in (16, 5):
    run = minibatch_training.begin(rule, x_ND[::8], 32)
    batches = itertools.repeat(x_ND)
    while not run.is_done:
      part = list(itertools.islice(batches, chunk))
      run = minibatch_training.advance(rule, run, part, tol=tol)
    ends.append(run)
  # Nothing changes: .95^n falls below .3 at n = 24, two steps later.
  assert [run.num_steps for run in ends] == [26, 26]
  assert len(ends[0].history) == 25
  # 25 batches and the first vectors: the last step left nothing.
  np.testing.assert_allclose(ends[0].state.counts_MK, 25 * 8 + 1)
  np.testing.assert_array_equal(ends[0].words_KD, ends[1].words_KD)


def test_a_resumed_run_is_the_same_bit_for_bit():
  rng = np.random.default_rng(0)
  rule = Rule("l2", num_subvectors=2, history_size=3)
  batches = list(rng.normal(size=(9, 20, 4)).astype(np.float32))
  advance = lambda run, part: minibatch_training.advance(
    rule, run, part, tol=0.0
  )
  for stop in (2, 5):
    begun = minibatch_training.begin(rule, batches[0][:6], 20)
    stopped = advance(begun, batches[:stop])
    kept = minibatch_training.pack(stopped)
    # Of the stopped run nothing else is left.
    back = minibatch_training.unpack(
      rule, kept, batches[max(stop - 3, 0) : stop]
    )
    whole = advance(stopped, batches[stop:])
    again = advance(back, batches[stop:])
    np.testing.assert_array_equal(again.words_MKS, whole.words_MKS)
    assert again.history == whole.history
    assert again.num_steps == 9


def test_batches_may_have_any_size():
  rng = np.random.default_rng(0)
  batches = [rng.normal(size=(n, 4)).astype(np.float32) for n in (5, 9, 1, 7)]
  rule = Rule("l2", history_size=1)
  run = minibatch_training.begin(rule, batches[0], 5)
  run = minibatch_training.advance(rule, run, batches, tol=0.0)
  assert float(run.state.counts_MK.sum()) == 5 + 5 + 9 + 1 + 7
  want = np.concatenate([batches[0], *batches]).sum(axis=0)
  got = np.asarray(run.state.sums_MKS).sum(axis=(0, 1))
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_an_emptied_cluster_keeps_its_centroid():
  rule = Rule("l2")
  words_MKS = jnp.arange(6, dtype=jnp.float32).reshape(1, 3, 2)
  got = minibatch_kmeans._words(
    rule, 2 * words_MKS, jnp.array([[2.0, 0.0, -1.0]]), words_MKS
  )
  np.testing.assert_array_equal(got, words_MKS)


def _unit_words(metric, words_KS):
  if metric == "l2":
    return words_KS
  return words_KS / (np.linalg.norm(words_KS, axis=1, keepdims=True) + 1e-5)


def _loop_pass(metric, x_NS, words_KS):
  """Means of the vectors of each centroid, and which have any."""
  sq_NK = ((x_NS[:, None] - words_KS[None]) ** 2).sum(axis=2)
  near_NK = -x_NS @ words_KS.T if metric == "cosine" else sq_NK
  labels_N = near_NK.argmin(axis=1)
  left_N = sq_NK[np.arange(len(x_NS)), labels_N]
  far = iter(np.argsort(-left_N, kind="stable"))
  has_any_K = np.isin(np.arange(len(words_KS)), labels_N)
  means_KS = [
    x_NS[labels_N == k].mean(axis=0) if has_any else x_NS[next(far)]
    for k, has_any in enumerate(has_any_K)
  ]
  return _unit_words(metric, np.stack(means_KS)), has_any_K


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("num_passes", [1, 2])
def test_closing_passes_match_loops(num_passes, m, metric):
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(60, 4)).astype(np.float32)
  rule = Rule(metric, m)
  first_KD = np.concatenate([x_ND[:5], x_ND[:1]])  # Nobody chooses the last.
  words_MKS = minibatch_training.begin(rule, first_KD, 8).words_MKS
  got_MKS = minibatch_training.close(rule, x_ND, words_MKS, num_passes)
  for i, words_KS in enumerate(words_MKS):
    x_NS = np.split(x_ND, m, axis=1)[i]
    want_KS, has_any_K = _loop_pass(metric, x_NS, words_KS)
    assert not has_any_K[5]
    if num_passes == 2:
      further_KS = words_KS + 1.8 * (want_KS - words_KS)
      further_KS = _unit_words(metric, further_KS)
      begin_KS = np.where(has_any_K[:, None], further_KS, want_KS)
      want_KS, _ = _loop_pass(metric, x_NS, begin_KS)
    np.testing.assert_allclose(got_MKS[i], want_KS, atol=1e-5)


def test_near_passes_lower_the_error_nearly_as_full_ones(monkeypatch):
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(3000, 6)).astype(np.float32)
  rule, errors = Rule("l2"), []
  words_MKS = minibatch_training.begin(rule, x_ND[:256], 8).words_MKS
  for pays in (True, False):
    monkeypatch.setattr(near_assign, "pays", lambda k, pays=pays: pays)
    for num_passes in (1, 2, 4):
      words = minibatch_training.close(rule, x_ND, words_MKS, num_passes)
      _, error_NM = minibatch_kmeans.assign(rule, x_ND, words)
      errors.append(float(error_NM.mean()))
  assert errors[0] > errors[1] > errors[2]
  np.testing.assert_allclose(errors[:3], errors[3:], rtol=5e-3)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(metric="ip"), "metric must be one of cosine, l2, got 'ip'"),
    (dict(num_subvectors=0), "num_subvectors must lie between 1"),
    (dict(history_size=0), "history_size must lie between 1 .* got 0"),
  ],
)
def test_senseless_rules_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    Rule(**values)
  with pytest.raises(ValueError, match="5 dimensions cannot be cut into 2"):
    minibatch_kmeans.start(Rule("l2", 2), np.ones((3, 5), np.float32))
