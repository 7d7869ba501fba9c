"""QINCo's codebook network, and the search of codes by a beam.

Codewords that may extend a hypothesis are pruned in up to three stages of
increasing cost and accuracy: pre-selection codewords for all of them
(`_select`), if wanted a ranker for the C best of these (`_rank`), and the
network for those that are left. `vqjax.codecs.rule` says what the sizes mean.

Weights are the slice of one step of `StepTables`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from vqjax.codecs import beam as beam_lib
from vqjax.codecs.distances import nearest, sq_distances, sq_norms
from vqjax.codecs.rule import SearchRule
from vqjax.core import Array


@struct.dataclass
class Ranker:
  """What a ranker makes of the first hidden layer; see `qinco_ranker`.

  Everything is within `basis_TDU`, the directions in which the codewords of a
  network differ most from those that pre-select them.
  """

  basis_TDU: Array  # Orthonormal columns.
  plain_TKU: Array  # The pre-selecting codewords.
  words_TKU: Array  # What is added to them: a share of the codeword alone,
  state_TDU: Array  # one of xhat,
  hidden_THU: Array  # and one of the first hidden layer.


@struct.dataclass
class StepTables:
  """Tables of the networks, stacked over the T steps; see `qinco.prepare`."""

  words_TKD: Array | None  # What the network's output is added to.
  preselect_TKD: Array | None
  base_TKE: Array  # e after the concatenation, for xhat = 0.
  base_up_TKH: Array  # The same through the first up-projection.
  state_TDE: Array  # Share of xhat in e.
  state_up_TDH: Array  # The same through the first up-projection.
  first_down_THE: Array
  up_TJEH: Array  # Blocks from the second on.
  down_TJHE: Array
  out_TED: Array | None
  ranker: Ranker | None = None  # See `qinco_ranker.fit`.


def matmul(x: Array, w: Array, dtype: str) -> Array:
  """Product with float32 sums; `dtype` is the type of the factors."""
  if dtype == "float32":
    return jnp.matmul(x, w, precision="highest")
  return jnp.matmul(
    x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32
  )


def network(weights, base_E: Array, hidden_H: Array, dtype: str) -> Array:
  """What follows the first up-projection; leading axes are batch axes.

  `base_E` is e after the concatenation and `hidden_H` its up-projection.
  Returns `e W_out`, with D at the end.
  """
  e = base_E + matmul(jax.nn.relu(hidden_H), weights.first_down_THE, dtype)
  for up_EH, down_HE in zip(weights.up_TJEH, weights.down_TJHE, strict=True):
    hidden = jax.nn.relu(matmul(e, up_EH, dtype))
    e = e + matmul(hidden, down_HE, dtype)
  out_ED = weights.out_TED
  return e if out_ED is None else matmul(e, out_ED, dtype)


def words_at(weights, ids_N: Array, xhat_ND: Array, dtype: str) -> Array:
  """Codewords f(c, xhat) of one id per vector: `[N, D]`."""
  base_NE = weights.base_TKE[ids_N] + matmul(xhat_ND, weights.state_TDE, dtype)
  hidden_NH = weights.base_up_TKH[ids_N] + matmul(
    xhat_ND, weights.state_up_TDH, dtype
  )
  words_ND = network(weights, base_NE, hidden_NH, dtype)
  if weights.words_TKD is None:
    return words_ND
  return words_ND + weights.words_TKD[ids_N]


def last_rule(rule: SearchRule) -> SearchRule:
  """Returns the rule of the last step, which keeps one hypothesis.

  It needs fewer joint candidates, as by then the networks change little: a
  quarter, at least 16, and an eighth of the ranked ones, at least 8
  (docs/performance.md).
  """
  joint, ranked = rule.num_joint_candidates, rule.num_ranked
  return rule.replace(
    num_joint_candidates=max(-(-joint // 4), min(joint, 16)),
    num_ranked=max(-(-ranked // 8), min(ranked, 8)),
  )


def _select(weights, residual_NFD, error_NF, rule):
  """Pairs of hypothesis and codeword worth a network: two int32 `[N, C]`.

  With the joint rule also what puts them in order, `[N, C]`, else None.
  """
  n, f, _ = residual_NFD.shape
  preselect_KD = weights.preselect_TKD
  num_codewords = weights.base_TKE.shape[0]
  num_joint, num_candidates = rule.num_joint_candidates, rule.num_candidates
  if not num_joint and num_candidates in (0, num_codewords):
    flat_C = jnp.arange(f * num_codewords, dtype=jnp.int32)
    parents_C, ids_C = jnp.divmod(flat_C, num_codewords)
    spread = lambda x_C: jnp.broadcast_to(x_C, (n, f * num_codewords))
    return spread(parents_C), spread(ids_C), None
  # Without |residual|^2, which is the same for all codewords of a hypothesis.
  score_NFK = sq_norms(preselect_KD)[None, None] - 2 * matmul(
    residual_NFD, preselect_KD.T, rule.dtype
  )
  if num_joint:
    num_joint = min(num_joint, f * num_codewords)  # One hypothesis has fewer.
    score_NC = (score_NFK + error_NF[..., None]).reshape(n, f * num_codewords)
    score_NC, flat_NC = beam_lib.top_k_smallest(score_NC, num_joint)
    return *jnp.divmod(flat_NC, num_codewords), score_NC
  _, ids_NFA = lax.top_k(-score_NFK, num_candidates)
  parents_NFA = jnp.broadcast_to(
    jnp.arange(f, dtype=jnp.int32)[:, None], ids_NFA.shape
  )
  flat = (n, f * num_candidates)
  return parents_NFA.reshape(flat), ids_NFA.reshape(flat), None


def first_hidden(weights, state_NFH, parents_NC, ids_NC):
  """First hidden layer `[N, C, H]`, before its relu, of pairs."""
  share_NCH = beam_lib.rows(state_NFH, parents_NC)
  return weights.base_up_TKH[ids_NC] + share_NCH


def _rank(weights, state_NFH, residual_NFD, beam, candidates, rule):
  """The `num_ranked` pairs of `_select` that the ranker likes best."""
  parents_NC, ids_NC, score_NC = candidates
  hidden_NCH = first_hidden(weights, state_NFH, parents_NC, ids_NC)
  ranker, dtype = weights.ranker, rule.dtype
  project = lambda x_NFD, w_DU: beam_lib.rows(
    matmul(x_NFD, w_DU, dtype), parents_NC
  )
  left_NCU = project(residual_NFD, ranker.basis_TDU) - ranker.plain_TKU[ids_NC]
  added_NCU = (
    ranker.words_TKU[ids_NC]
    + project(beam.xhat_NFD, ranker.state_TDU)
    + matmul(jax.nn.relu(hidden_NCH), ranker.hidden_THU, dtype)
  )
  # By how much pre-selection misjudges a pair, see `qinco_ranker`.
  score_NC = score_NC + jnp.sum(added_NCU * (added_NCU - 2 * left_NCU), axis=-1)
  _, slots_NC = lax.top_k(-score_NC, rule.num_ranked)
  pick = lambda x_NC: jnp.take_along_axis(x_NC, slots_NC, axis=1)
  return pick(parents_NC), pick(ids_NC)


def propose(weights, x_ND, beam, *, rule: SearchRule):
  """Candidates of a step with a network, see `beam.py`."""
  residual_NFD = x_ND[:, None] - beam.xhat_NFD
  candidates = _select(weights, residual_NFD, beam.error_NF, rule)
  parents_NC, ids_NC, words_NCD = _through_network(
    weights, beam, residual_NFD, candidates, rule
  )
  left_NCD = beam_lib.rows(residual_NFD, parents_NC) - words_NCD
  error_NC = jnp.sum(left_NCD**2, axis=-1)
  error_NC = jnp.where(
    jnp.isinf(jnp.take_along_axis(beam.error_NF, parents_NC, axis=1)),
    jnp.inf,
    error_NC,
  )
  words_fn = lambda slots_NF: beam_lib.rows(words_NCD, slots_NF)
  return beam_lib.Candidates(parents_NC, ids_NC, error_NC, words_fn)


def _through_network(weights, beam, residual_NFD, candidates, rule):
  """The pairs that reach the network, and the codewords they become."""
  of_state = lambda w_DE: matmul(beam.xhat_NFD, w_DE, rule.dtype)
  state_NFE = of_state(weights.state_TDE)
  state_NFH = of_state(weights.state_up_TDH)
  parents_NC, ids_NC, _ = candidates
  if 0 < rule.num_ranked < ids_NC.shape[1]:
    parents_NC, ids_NC = _rank(
      weights, state_NFH, residual_NFD, beam, candidates, rule
    )
  words_NCD = network(
    weights,
    weights.base_TKE[ids_NC] + beam_lib.rows(state_NFE, parents_NC),
    first_hidden(weights, state_NFH, parents_NC, ids_NC),
    rule.dtype,
  )
  if weights.words_TKD is not None:
    words_NCD = words_NCD + weights.words_TKD[ids_NC]
  return parents_NC, ids_NC, words_NCD


def propose_plain(words_KD, x_ND, beam):
  """Candidates of the first step: every codeword, for one hypothesis."""
  n, k = x_ND.shape[0], words_KD.shape[0]
  ids_NK = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (n, k))
  error_NK = sq_distances(x_ND, words_KD)
  words_fn = lambda slots_NF: words_KD[slots_NF]
  return beam_lib.Candidates(jnp.zeros_like(ids_NK), ids_NK, error_NK, words_fn)


def start(tables, z_ND, lists_N):
  """Returns the beam of one hypothesis: the centroid, or else the origin."""
  if not tables.is_ivf:
    return beam_lib.start(z_ND)
  xhat_N1D = tables.first_KD[lists_N][:, None]
  error_N1 = jnp.sum((z_ND[:, None] - xhat_N1D) ** 2, axis=-1)
  return beam_lib.Beam(xhat_N1D, error_N1)


def encode_normalised(tables, z_ND, lists_N=None, *, rule: SearchRule):
  """`encode` of normalised vectors, over all steps of `tables`."""
  if tables.is_ivf and lists_N is None:
    lists_N = nearest(z_ND, tables.first_KD)
  beam, codes_MNF = _begin(tables, z_ND, lists_N, rule)
  left = range(len(codes_MNF) - 1, tables.steps.base_TKE.shape[0])
  if left:
    codes_MNF = _search(tables.steps, left, z_ND, beam, codes_MNF, rule)
  return codes_MNF[..., 0].T.astype(jnp.int32)


def _begin(tables, z_ND, lists_N, rule):
  """The beam after the first codewords, and its codes `[M, N, F]`.

  Lists count as codewords. The first network of an IVF model has a step of its
  own, which starts from one hypothesis.
  """
  advance = partial(beam_lib.advance, beam_size=rule.beam_size)
  beam = start(tables, z_ND, lists_N)
  if not tables.is_ivf:
    beam, (_, ids_NF) = advance(propose_plain, tables.first_KD, z_ND, beam)
    return beam, ids_NF[None]
  # The one hypothesis must offer enough codewords for the whole beam.
  num = rule.num_candidates and max(rule.num_candidates, rule.beam_size)
  propose_fn = partial(propose, rule=rule.replace(num_candidates=num))
  first = beam_lib.at_step(tables.steps, 0)
  beam, (parents_NF, ids_NF) = advance(propose_fn, first, z_ND, beam)
  return beam, _extend(lists_N[None, :, None], parents_NF, ids_NF[None])


def _extend(codes_MNF, parents_NF, more_MNF):
  """Codes of hypotheses: their parents', and the codewords since."""
  before_MNF = jnp.take_along_axis(codes_MNF, parents_NF[None], axis=2)
  return jnp.concatenate([before_MNF, more_MNF])


def _search(steps, left, z_ND, beam, codes_MNF, rule):
  """Runs the beam over the `left` of the steps, the last to one hypothesis.

  Returns its codes `[M, N, 1]`, those so far in front.
  """
  beam, history = beam_lib.advance_all(
    partial(propose, rule=rule), steps, z_ND, beam, left[:-1]
  )
  _, (parents_N1, ids_N1) = beam_lib.advance(
    partial(propose, rule=last_rule(rule)),
    beam_lib.at_step(steps, left[-1]),
    z_ND,
    beam,
    beam_size=1,
  )
  ids_TN, slot_N = beam_lib.backtrack(*history, parents_N1[:, 0])
  more_MN1 = jnp.concatenate([ids_TN[..., None], ids_N1[None]])
  return _extend(codes_MNF, slot_N[:, None], more_MN1)
