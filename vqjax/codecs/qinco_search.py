"""The search of QINCo for codes: a beam of which few words see the network.

Words that may extend a hypothesis pass three judges, each dearer and better
than the one before: plain words for all of them (`_select`), where wanted a
scout for the C best (`_judge`), and the network for those that are left.

`qinco.encode` says what the sizes mean.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from vqjax.codecs import beam as beam_lib
from vqjax.codecs import qinco_network
from vqjax.codecs.distances import nearest, sq_norms


def last_candidates(num_joint_candidates: int) -> int:
  """Returns how many joint candidates the last step looks at.

  It looks for one hypothesis, not for a beam, and by then the networks change
  little: a quarter, though at least 16, costs 0.02 % of MSE and saves a tenth
  of the time (docs/performance.md).
  """
  return max(-(-num_joint_candidates // 4), min(num_joint_candidates, 16))


def last_finalists(num_finalists: int) -> int:
  """Returns how many finalists the last step has, which keeps one hypothesis.

  An eighth, though at least 8 (docs/performance.md).
  """
  return max(-(-num_finalists // 8), min(num_finalists, 8))


def _select(weights, residual_NFD, error_NF, num_candidates, num_joint, dtype):
  """Pairs of hypothesis and word worth a network: two int32 `[N, C]`.

  With the joint rule also what puts them in order, `[N, C]`, else None.
  """
  n, f, _ = residual_NFD.shape
  preselect_KD = weights["preselect_TKD"]
  num_words = weights["base_TKE"].shape[0]
  if not num_joint and num_candidates in (0, num_words):
    flat_C = jnp.arange(f * num_words, dtype=jnp.int32)
    parents_C, ids_C = jnp.divmod(flat_C, num_words)
    spread = lambda x_C: jnp.broadcast_to(x_C, (n, f * num_words))
    return spread(parents_C), spread(ids_C), None
  # Without |residual|^2, which is the same for all words of a hypothesis.
  score_NFK = sq_norms(preselect_KD)[None, None] - 2 * qinco_network.matmul(
    residual_NFD, preselect_KD.T, dtype
  )
  if num_joint:
    num_joint = min(num_joint, f * num_words)  # One hypothesis has fewer.
    score_NFK = score_NFK + error_NF[..., None]
    negative_NC, flat_NC = lax.top_k(
      -score_NFK.reshape(n, f * num_words), num_joint
    )
    return *jnp.divmod(flat_NC, num_words), -negative_NC
  _, ids_NFA = lax.top_k(-score_NFK, num_candidates)
  parents_NFA = jnp.broadcast_to(
    jnp.arange(f, dtype=jnp.int32)[:, None], ids_NFA.shape
  )
  flat = (n, f * num_candidates)
  return parents_NFA.reshape(flat), ids_NFA.reshape(flat), None


def first_hidden(weights, state_NFH, parents_NC, ids_NC):
  """First hidden layer `[N, C, H]`, before its relu, of pairs."""
  share_NCH = beam_lib.rows(state_NFH, parents_NC)
  return weights["base_up_TKH"][ids_NC] + share_NCH


def _finalists(weights, state_NFH, residual_NFD, beam, candidates, num, dtype):
  """The `num` pairs of `_select` that the scout likes best: two `[N, num]`."""
  parents_NC, ids_NC, score_NC = candidates
  hidden_NCH = first_hidden(weights, state_NFH, parents_NC, ids_NC)
  score_NC = score_NC + _judge(
    weights["scout"],
    *(hidden_NCH, beam, residual_NFD, parents_NC, ids_NC, dtype),
  )
  _, slots_NC = lax.top_k(-score_NC, num)
  pick = lambda x_NC: jnp.take_along_axis(x_NC, slots_NC, axis=1)
  return pick(parents_NC), pick(ids_NC)


def _judge(scout, hidden_NCH, beam, residual_NFD, parents_NC, ids_NC, dtype):
  """By how much a scout expects pre-selection to be wrong: `[N, C]`.

  To be added to the squared distances by which words were pre-selected.
  """
  project = lambda x_NFD, w_DU: beam_lib.rows(
    qinco_network.matmul(x_NFD, w_DU, dtype), parents_NC
  )
  left_NCU = project(residual_NFD, scout.basis_TDU) - scout.plain_TKU[ids_NC]
  added_NCU = scout.words_TKU[ids_NC] + project(beam.xhat_NFD, scout.state_TDU)
  added_NCU = added_NCU + qinco_network.matmul(
    jax.nn.relu(hidden_NCH), scout.hidden_THU, dtype
  )
  return jnp.sum(added_NCU * (added_NCU - 2 * left_NCU), axis=-1)


def propose(
  weights,
  x_ND,
  beam,
  *,
  num_candidates,
  num_joint,
  num_finalists,
  dtype,
):
  """Candidates of a step with a network, see `beam.py`."""
  residual_NFD = x_ND[:, None] - beam.xhat_NFD
  candidates = _select(
    weights, residual_NFD, beam.error_NF, num_candidates, num_joint, dtype
  )
  parents_NC, ids_NC, words_NCD = _through_network(
    weights, beam, residual_NFD, candidates, num_finalists, dtype
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


def _through_network(
  weights, beam, residual_NFD, candidates, num_finalists, dtype
):
  """Those of the candidates that get so far, and the words they become."""
  of_state = lambda name: qinco_network.matmul(
    beam.xhat_NFD, weights[name], dtype
  )
  state_NFE, state_NFH = of_state("state_TDE"), of_state("state_up_TDH")
  parents_NC, ids_NC, _ = candidates
  if 0 < num_finalists < ids_NC.shape[1]:
    parents_NC, ids_NC = _finalists(
      weights,
      *(state_NFH, residual_NFD, beam, candidates, num_finalists, dtype),
    )
  words_NCD = qinco_network.network(
    weights,
    weights["base_TKE"][ids_NC] + beam_lib.rows(state_NFE, parents_NC),
    first_hidden(weights, state_NFH, parents_NC, ids_NC),
    dtype,
  )
  if weights["words_TKD"] is not None:
    words_NCD = words_NCD + weights["words_TKD"][ids_NC]
  return parents_NC, ids_NC, words_NCD


def propose_plain(words_KD, x_ND, beam):
  """Candidates of the first step: every word, for one hypothesis."""
  n, k = x_ND.shape[0], words_KD.shape[0]
  ids_NK = jnp.broadcast_to(jnp.arange(k, dtype=jnp.int32), (n, k))
  error_NK = (
    jnp.sum(x_ND**2, axis=-1, keepdims=True)
    - 2 * jnp.matmul(x_ND, words_KD.T, precision="highest")
    + sq_norms(words_KD)[None]
  )
  words_fn = lambda slots_NF: words_KD[slots_NF]
  return beam_lib.Candidates(jnp.zeros_like(ids_NK), ids_NK, error_NK, words_fn)


def start(tables, z_ND, lists_N):
  """Returns the beam of one hypothesis: the centroid, or else the origin."""
  if not tables.is_ivf:
    return beam_lib.start(z_ND)
  xhat_N1D = tables.first_KD[lists_N][:, None]
  error_N1 = jnp.sum((z_ND[:, None] - xhat_N1D) ** 2, axis=-1)
  return beam_lib.Beam(xhat_N1D, error_N1)


def encode_normalised(
  tables,
  z_ND,
  lists_N=None,
  *,
  num_candidates,
  beam_size,
  num_joint_candidates,
  dtype,
  num_finalists=0,
):
  """`encode` of normalised vectors, over all steps of `tables`."""
  propose_fn = partial(
    propose,
    num_candidates=num_candidates,
    num_joint=num_joint_candidates,
    num_finalists=num_finalists,
    dtype=dtype,
  )
  steps = qinco_network.per_step(tables)
  if tables.is_ivf and lists_N is None:
    lists_N = nearest(z_ND, tables.first_KD)
  beam, codes_MNF = _begin(
    tables, propose_fn, steps, z_ND, lists_N, beam_size=beam_size
  )
  left = range(len(codes_MNF) - 1, steps["base_TKE"].shape[0])
  if left:
    codes_MNF = _search(propose_fn, steps, left, z_ND, beam, codes_MNF)
  return codes_MNF[..., 0].T.astype(jnp.int32)


def _begin(tables, propose_fn, steps, z_ND, lists_N, *, beam_size):
  """The beam after the first words, and its codes `[M, N, F]`.

  Lists count as words. The first network of an IVF model has a step of its own,
  which starts from one hypothesis.
  """
  advance = partial(beam_lib.advance, beam_size=beam_size)
  beam = start(tables, z_ND, lists_N)
  if not tables.is_ivf:
    beam, (_, ids_NF) = advance(propose_plain, tables.first_KD, z_ND, beam)
    return beam, ids_NF[None]
  # The one hypothesis must offer enough words for the whole beam.
  num = propose_fn.keywords["num_candidates"]
  propose_fn = partial(propose_fn, num_candidates=num and max(num, beam_size))
  first = beam_lib.at_step(steps, 0)
  beam, (parents_NF, ids_NF) = advance(propose_fn, first, z_ND, beam)
  return beam, _extend(lists_N[None, :, None], parents_NF, ids_NF[None])


def _extend(codes_MNF, parents_NF, more_MNF):
  """Codes of hypotheses: those of their parents, and the words since."""
  before_MNF = jnp.take_along_axis(codes_MNF, parents_NF[None], axis=2)
  return jnp.concatenate([before_MNF, more_MNF])


def _search(propose_fn, steps, left, z_ND, beam, codes_MNF):
  """Runs the beam over the `left` of the steps, the last to one hypothesis.

  Returns its codes `[M, N, 1]`, those so far in front. The last step needs
  fewer joint candidates: see `last_candidates`.
  """
  beam, history = beam_lib.advance_all(propose_fn, steps, z_ND, beam, left[:-1])
  last = beam_lib.at_step(steps, left[-1])
  sizes = propose_fn.keywords
  propose_fn = partial(
    propose_fn,
    num_joint=last_candidates(sizes["num_joint"]),
    num_finalists=last_finalists(sizes["num_finalists"]),
  )
  _, (parents_N1, ids_N1) = beam_lib.advance(
    propose_fn, last, z_ND, beam, beam_size=1
  )
  ids_TN, slot_N = beam_lib.trace(*history, parents_N1[:, 0])
  more_MN1 = jnp.concatenate([ids_TN[..., None], ids_N1[None]])
  return _extend(codes_MNF, slot_N[:, None], more_MN1)
