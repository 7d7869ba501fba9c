"""HAKES: a learned reduction and codewords for codes that do not change.

An index keeps lists and codes made by the base parameters: reduce, find the
list, cut into slices and take the nearest codeword of each. Queries go through
parameters of their own: another reduction, other centroids, and the codewords
that the codes now stand for. Both start equal; learning moves the parameters
of the queries until the neighbours of a query rank as they do in full. Nothing
is encoded again.

Scores are higher for nearer neighbours: inner products ("ip"), minus squared
L2 ("l2"), or plain L2 distances without the minus sign, which the released
program trains with ("l2_released"). Losses are in nats.

Reference: arXiv 2505.12524.
"""

import functools

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from vqjax.codecs import kmeans, pq
from vqjax.codecs.distances import (
  argmin_rows,
  centre_of,
  half_scores,
  scan_blocks,
  sq_norms,
)
from vqjax.core import Array, check_range, check_shape

METRICS = ("ip", "l2")
SCORES = (*METRICS, "l2_released")
SIDES = ("query", "base")
_BLOCK = 4096


@struct.dataclass
class HakesSide:
  """What turns a vector into a reduced one, a list and a code.

  `x_ND @ reduction_ED.T + bias_E` is the reduced vector, in data units. Its
  list has the best centroid; its code is of the vector itself, not of
  what the centroid leaves over.
  """

  reduction_ED: Array
  bias_E: Array
  codebooks_MKS: Array
  centroids_LE: Array


@struct.dataclass
class HakesParams:
  """`base` makes lists and codes, for ever; `query` searches them."""

  base: HakesSide
  query: HakesSide


@struct.dataclass
class Batch:
  """Queries, the vectors near each, and where the index keeps those.

  Lists and codes are made by the base side, and never change.
  """

  queries_QD: Array
  neighbours_QGD: Array
  codes_QGM: Array  # Of any integer type.
  lists_QG: Array


def check_side(side: HakesSide, name: str = "The parameters") -> None:
  """Raises ValueError unless the shapes of one side fit each other."""
  check_shape(f"{name}: reduction", side.reduction_ED, (None, None))
  check_shape(f"{name}: codebooks", side.codebooks_MKS, (None, None, None))
  e = side.reduction_ED.shape[0]
  check_shape(f"{name}: bias", side.bias_E, (e,))
  check_shape(f"{name}: centroids", side.centroids_LE, (None, e))
  m, _, s = side.codebooks_MKS.shape
  if m * s != e:
    raise ValueError(
      f"{name}: codebooks of {m} slices of {s} dimensions do not fit a "
      f"reduction to {e}."
    )


def reduce(side: HakesSide, x_ND: Array) -> Array:
  """Reduces `[N, D]` to `[N, E]`, both in data units."""
  check_shape("x", x_ND, (None, side.reduction_ED.shape[1]))
  product_NE = jnp.matmul(x_ND, side.reduction_ED.T, precision="highest")
  return product_NE + side.bias_E[None]


def encode(side: HakesSide, x_ND: Array) -> Array:
  """Codes `[N, M]` int32 of `[N, D]`; an index keeps codes by the base side."""
  codewords = pq.PQParams(side.codebooks_MKS)

  def body(_, x_ND):
    return None, pq.encode(codewords, reduce(side, x_ND))

  return scan_blocks(body, None, x_ND, block_size=_BLOCK)[1]


def list_scores(side: HakesSide, x_NE: Array, metric: str) -> Array:
  """Scores `[N, L]` of the centroids for reduced vectors, higher is better.

  For "l2" half of minus the squared distance, up to a constant of the vector.
  """
  check_metric(metric)
  if metric == "ip":
    none_L = jnp.zeros(len(side.centroids_LE), jnp.float32)
    return -half_scores(x_NE, side.centroids_LE, none_L)
  centre_1E = lax.stop_gradient(centre_of(side.centroids_LE))[None]
  near_LE = side.centroids_LE - centre_1E
  return -half_scores(x_NE - centre_1E, near_LE, sq_norms(near_LE) / 2)


def assign(side: HakesSide, x_ND: Array, metric: str) -> Array:
  """List `[N]`, int32, of each vector `[N, D]`: the best centroid."""

  def body(_, x_ND):
    score_NL = list_scores(side, reduce(side, x_ND), metric)
    return None, argmin_rows(-score_NL)[0]

  return scan_blocks(body, None, x_ND, block_size=_BLOCK)[1]


def centroid_sums(
  params: HakesParams, x_ND: Array, metric: str, *, assign_by: str = "query"
) -> tuple[Array, Array]:
  """Sum `[L, E]` of the reduced vectors of each list, and their count `[L]`.

  Sums over blocks of vectors add up; `mean_centroids` finishes them.

  Args:
    params: Vectors are reduced by `query`; the centroids are of `base`.
    x_ND: Vectors of the index, or queries.
    metric: One of `METRICS`.
    assign_by: Whose reduction finds the list: "query" as in the released
      program, "base" as in the paper.
  """
  _check_known("assign_by", assign_by, SIDES)
  old_LE = params.base.centroids_LE
  finder = getattr(params, assign_by).replace(centroids_LE=old_LE)
  lists_N = assign(finder, x_ND, metric)
  ones_N = jnp.ones(len(x_ND), jnp.float32)
  x_NE = reduce(params.query, x_ND)
  return kmeans.sums_by_scatter(lists_N, x_NE, ones_N, len(old_LE))


def mean_centroids(
  old_LE: Array, sums_LE: Array, counts_L: Array, metric: str
) -> Array:
  """Centroids `[L, E]` for queries: the means of lists, of length 1 for "ip".

  An empty list keeps its old centroid.
  """
  check_metric(metric)
  check_shape("sums", sums_LE, old_LE.shape)
  check_shape("counts", counts_L, old_LE.shape[:1])
  length_L = counts_L
  if metric == "ip":
    length_L = jnp.sqrt(sq_norms(sums_LE))
  is_empty_L1 = ((counts_L == 0) | (length_L == 0))[:, None]
  safe_L1 = jnp.where(is_empty_L1, 1, length_L[:, None])
  return jnp.where(is_empty_L1, old_LE, sums_LE / safe_L1)


@functools.partial(
  jax.jit,
  static_argnames=(
    "score",
    "reduction_weight",
    "neighbour_side",
    "temperature",
    "list_temperature",
    "axis_name",
  ),
)
def loss(
  params: HakesParams,
  batch: Batch,
  *,
  score: str = "ip",
  reduction_weight: float = -1.0,
  neighbour_side: str = "query",
  temperature: float = 1.0,
  list_temperature: float = 0.0,
  axis_name: str | None = None,
) -> tuple[Array, dict]:
  """Returns how far the scores of reduced and coded neighbours are off.

  The mean over queries of `reduction_weight * KL(full, reduced) + KL(full,
  coded)`, each the divergence between two softmaxes over the neighbours.
  Gradients are for `params.query`.

  Args:
    params: Both sides.
    batch: Of one size, for one compiled program.
    score: One of `SCORES`.
    reduction_weight: lambda_vt; negative scales the first term to the size of
      the second in every batch.
    neighbour_side: Whose reduction the neighbours go through in the first
      term: "query" as in the released program, "base" as in the paper.
    temperature: Scores are divided by it; 1 in the publication.
    list_temperature: If positive, the centroids learn too, to score high
      for the lists of the neighbours: their mean cross entropy in a softmax
      over lists is added, which moves the centroids alone. In units of the
      spread of the scores over lists. 0 in the publication.
    axis_name: Mesh axis over which the batch is spread, if it is.

  Returns:
    The loss, and its parts `{"reduced_kl", "coded_kl", "list_loss"}`.
  """
  _check_loss(params, batch, score, neighbour_side, temperature)
  full_QG, reduced_QG, coded_QG = _scores(params, batch, score, neighbour_side)
  target_QG = jax.nn.log_softmax(full_QG / temperature)

  def divergence(scores_QG):
    log_QG = jax.nn.log_softmax(scores_QG / temperature)
    return jnp.sum(jnp.exp(target_QG) * (target_QG - log_QG), axis=1).mean()

  reduced, coded = divergence(reduced_QG), divergence(coded_QG)
  weight = reduction_weight
  if reduction_weight < 0:
    weight = _ratio(coded, reduced, axis_name)
  lists = jnp.float32(0)
  if list_temperature:
    lists = _list_loss(params.query, batch, score, list_temperature)
  parts = {"reduced_kl": reduced, "coded_kl": coded, "list_loss": lists}
  return weight * reduced + coded + lists, parts


def full_scores(batch: Batch, score: str) -> Array:
  """Scores `[Q, G]` of the full neighbours, which the others are to follow."""
  _check_known("score", score, SCORES)
  return _pair_scores(batch.queries_QD, batch.neighbours_QGD, score)


def check_metric(metric: str) -> None:
  """Raises ValueError unless `metric` is one of `METRICS`."""
  _check_known("metric", metric, METRICS)


def _check_known(name, value, known):
  if value not in known:
    raise ValueError(f"{name} must be one of {known}, got {value!r}.")


def _check_loss(params, batch, score, neighbour_side, temperature):
  d = params.query.reduction_ED.shape[1]
  check_shape("neighbours", batch.neighbours_QGD, (None, None, d))
  q, g, _ = batch.neighbours_QGD.shape
  check_shape("queries", batch.queries_QD, (q, d))
  check_shape("codes", batch.codes_QGM, (q, g, len(params.query.codebooks_MKS)))
  check_shape("lists", batch.lists_QG, (q, g))
  _check_known("score", score, SCORES)
  _check_known("neighbour_side", neighbour_side, SIDES)
  check_range("temperature", temperature, 1e-9, 1e9)


def _ratio(coded, reduced, axis_name):
  """Size of the second term over the first, over the whole batch."""
  if axis_name is not None:
    coded, reduced = lax.pmean((coded, reduced), axis_name)
  tiny = jnp.finfo(jnp.float32).tiny
  return lax.stop_gradient(coded / jnp.maximum(reduced, tiny))


def _list_loss(query, batch, score, temperature):
  """Mean cross entropy of the lists of neighbours under the query's scores."""
  x_QE = lax.stop_gradient(reduce(query, batch.queries_QD))
  score_QL = list_scores(query, x_QE, "ip" if score == "ip" else "l2")
  spread = lax.stop_gradient(jnp.std(score_QL, axis=1).mean())
  log_QL = jax.nn.log_softmax(score_QL / (temperature * spread))
  return -jnp.take_along_axis(log_QL, batch.lists_QG, axis=1).mean()


def _scores(params, batch, score, neighbour_side):
  """Scores `[Q, G]` of full, reduced and coded neighbours, up to a constant.

  A term that is the same for all neighbours of a query falls out of the
  softmax.
  """
  side = getattr(params, neighbour_side)
  x_QD, v_QGD = batch.queries_QD, batch.neighbours_QGD
  q, g, m = batch.codes_QGM.shape
  x_QE = reduce(params.query, x_QD)
  codewords = pq.PQParams(params.query.codebooks_MKS)
  coded_QGE = pq.decode(codewords, batch.codes_QGM.reshape(-1, m)).reshape(
    q, g, -1
  )
  if score == "ip":
    # <R(x), A v + b> is <A' R(x), v> and a constant: the query goes back to
    # full size instead of every neighbour to the reduced one.
    back_QD = jnp.matmul(x_QE, side.reduction_ED, precision="highest")
    reduced_QG = _pair_scores(back_QD, v_QGD, score)
  else:
    v_QGE = reduce(side, v_QGD.reshape(q * g, -1)).reshape(q, g, -1)
    reduced_QG = _pair_scores(x_QE, v_QGE, score)
  full_QG = full_scores(batch, score)
  return full_QG, reduced_QG, _pair_scores(x_QE, coded_QGE, score)


def _pair_scores(x_QD, v_QGD, score):
  """Scores `[Q, G]` between each query and its own neighbours."""
  if score == "ip":
    return jnp.einsum("qd,qgd->qg", x_QD, v_QGD, precision="highest")
  sq_QG = sq_norms(x_QD[:, None] - v_QGD)
  if score == "l2":
    return -sq_QG
  # The root has no slope at 0, which a query that is its own neighbour has.
  return jnp.sqrt(jnp.where(sq_QG > 0, sq_QG, 1)) * (sq_QG > 0)
