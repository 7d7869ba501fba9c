"""A cheap learned ranker that pre-selects candidates for QINCo's encoder.

Pre-selection codewords are cheap and rough, the network is exact and expensive.
The first hidden layer of a codeword and a hypothesis costs a lookup in tables.
A linear map of it, fitted to the whole network by least squares, predicts the
network's codeword well enough to drop most candidates:

  f_t(c_k, xhat)  ~  s_k + P (v_k + xhat Q + relu(h_t(k, xhat)) W)

with the codewords s_k of the pre-selection and, in the columns of P, the
directions in which the right side differs most from them (reduced-rank
regression). The error that a codeword would leave is then

  |r - s_k - P a|^2  =  |r - s_k|^2 + a . (a - 2 P' (r - s_k)),   P'P = 1

where r is the residual and a is what stands in brackets: pre-selection has the
first term, `qinco_search._rank` adds the second. `G` counts the features of a
codeword and a hypothesis: relu(h), xhat, and which codeword it is.

The deeper the network, the more it saves (docs/performance.md). Decoding does
not need it.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from vqjax.codecs import beam as beam_lib
from vqjax.codecs import qinco, qinco_search
from vqjax.codecs.distances import nearest
from vqjax.codecs.rule import SearchRule
from vqjax.core import check_range, check_shape

MAX_WORDS = 1024  # The normal equations have a row for each.
_RANK = 48
_RIDGE = 0.1  # In normalised units squared, against thousands of codewords.


def fit(
  tables: qinco.QincoTables,
  x_ND,
  lists_N=None,
  *,
  beam_size: int = 48,
  num_joint_candidates: int = 128,
  rank: int | None = None,
  dtype: str = "float32",
  block_size: int = 16,
  progress=None,
) -> qinco.QincoTables:
  """Returns tables with a ranker for vectors like these.

  Args:
    tables: From `qinco.prepare`, with pre-selection.
    x_ND: Vectors in data units; a few hundred will do.
    lists_N: Lists of the vectors, of an IVF model; None for the nearest.
    beam_size: B, of the search that is to be ranked.
    num_joint_candidates: C, codewords a step and vector; the ranker learns from
      those that such a search sends through the network.
    rank: Columns of P; None for 48, at most D.
    dtype: Type of the network's products, as for `qinco.encode`.
    block_size: Vectors at once.
    progress: Is told of the vectors done, and of all.

  Raises:
    ValueError: If a size breaks a rule of `qinco.check_rule`, the codec
      has no pre-selection or too many codewords.
  """
  check_shape("x", x_ND, (None, qinco.dim(tables)))
  check_range("number of vectors", len(x_ND), 1, 1 << 40)
  check_range("block_size", block_size, 1, 1 << 20)
  if rank is None:
    rank = min(_RANK, qinco.dim(tables))
  check_range("rank", rank, 1, qinco.dim(tables))
  qinco.check_lists(tables, x_ND, lists_N)
  rule = _make_rule(tables, beam_size, num_joint_candidates, dtype)
  if lists_N is None and tables.is_ivf:
    lists_N = nearest(qinco.normalise(tables, x_ND), tables.first_KD)
  sums_fn, totals = jax.jit(partial(_sums, rule=rule)), None
  for start in range(0, len(x_ND), block_size):
    part = slice(start, start + block_size)
    z_ND = qinco.normalise(tables, jnp.asarray(x_ND[part]))
    sums = sums_fn(tables, z_ND, None if lists_N is None else lists_N[part])
    sums = [np.array(x, np.float64) for x in sums]
    pairs = zip(totals or sums, sums, strict=True)
    totals = [np.add(a, b, out=a) if totals else b for a, b in pairs]
    if progress:
      progress(min(start + block_size, len(x_ND)), len(x_ND))
  fitted = [_solve(*step, rank) for step in zip(*totals, strict=True)]
  return tables.replace(
    steps=tables.steps.replace(ranker=_make_ranker(tables, fitted))
  )


def _make_rule(tables, beam_size, num_joint, dtype) -> SearchRule:
  """The search without a ranker; raises ValueError if it can have none."""
  check_range("networks", tables.steps.base_TKE.shape[0], 1, 1 << 20)
  num_codewords = tables.steps.base_TKE.shape[1]
  check_range("codebook_size", num_codewords, 2, MAX_WORDS, "of a ranker")
  check_range("num_joint_candidates", num_joint, 1, 1 << 20)
  rule = SearchRule(
    num_candidates=0,
    beam_size=beam_size,
    num_joint_candidates=num_joint,
    dtype=dtype,
  )
  qinco.check_rule(tables, rule)
  return rule


def _sums(tables, z_ND, lists_N, *, rule: SearchRule):
  """Normal equations of every step: `[T, G, G]` and `[T, G, D]`."""
  advance = partial(beam_lib.advance, beam_size=rule.beam_size)

  def step(beam, weights):
    found = qinco_search.propose(weights, z_ND, beam, rule=rule)
    next_beam, _ = advance(lambda *_: found, weights, z_ND, beam)
    return next_beam, _normal_equations(weights, beam, found, rule.dtype)

  steps = tables.steps
  beam = qinco_search.start(tables, z_ND, lists_N)
  if not tables.is_ivf:
    beam, _ = advance(qinco_search.propose_plain, tables.first_KD, z_ND, beam)
    return lax.scan(step, beam, steps)[1]
  # The one hypothesis at the centroid, then the beam.
  beam, first = step(beam, jax.tree.map(lambda leaf: leaf[0], steps))
  steps = jax.tree.map(lambda leaf: leaf[1:], steps)
  _, others = lax.scan(step, beam, steps)
  join = lambda x, x_T: jnp.concatenate([x[None], x_T])
  return jax.tree.map(join, first, others)


def _normal_equations(weights, beam, found, dtype):
  """Products of features and targets of the candidates of one step."""
  n, c = found.ids_NC.shape
  at = lambda x_NFD: beam_lib.rows(x_NFD, found.parents_NC)
  state_NFH = qinco_search.matmul(beam.xhat_NFD, weights.state_up_TDH, dtype)
  hidden_NCH = qinco_search.first_hidden(
    weights, state_NFH, found.parents_NC, found.ids_NC
  )
  known_NCG = jnp.concatenate(
    [
      jax.nn.relu(hidden_NCH),
      at(beam.xhat_NFD),
      jax.nn.one_hot(found.ids_NC, weights.base_TKE.shape[0]),
    ],
    axis=-1,
  )
  slots_NC = jnp.broadcast_to(jnp.arange(c), (n, c))
  words_NCD = found.words_fn(slots_NC)
  told_NCD = words_NCD - weights.preselect_TKD[found.ids_NC]
  product = partial(jnp.einsum, "nca,ncb->ab", precision="highest")
  return product(known_NCG, known_NCG), product(known_NCG, told_NCD)


def _solve(known_GG, told_GD, rank):
  """Reduced-rank regression: `[G, U]` and the basis `[D, U]`."""
  known_GG = known_GG + _RIDGE * np.eye(len(known_GG))
  map_GD = np.linalg.solve(known_GG, told_GD)
  spread_DD = map_GD.T @ known_GG @ map_GD
  basis_DU = np.linalg.eigh(spread_DD)[1][:, ::-1][:, :rank]
  return map_GD @ basis_DU, basis_DU


def _make_ranker(tables, fitted) -> qinco_search.Ranker:
  map_TGU, basis_TDU = (
    jnp.asarray(np.stack(leaves), jnp.float32)
    for leaves in zip(*fitted, strict=True)
  )
  steps, d = tables.steps, qinco.dim(tables)
  h = steps.base_up_TKH.shape[2]
  hidden_THU, state_TDU, words_TKU = jnp.split(map_TGU, [h, h + d], axis=1)
  plain_TKU = jnp.matmul(
    tables.steps.preselect_TKD, basis_TDU, precision="highest"
  )
  return qinco_search.Ranker(
    basis_TDU, plain_TKU, words_TKU, state_TDU, hidden_THU
  )
