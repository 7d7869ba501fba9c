"""QINCo and QINCo2: residual quantisation with implicit neural codebooks.

The words of a step are computed from what has been decoded so far. With the
plain codebook `C_t` and the partial reconstruction xhat,

  xhat <- xhat + f_t(C_t[k], xhat)

  e = c W_in                       D -> E, identity when E = D
  e = e + [e ; xhat] W_cat + b     W_cat is `word` over `state`, through `mix`
  e = e + relu(e W_up) W_down      once per residual block
  f = c + e W_out                  QINCo1: f = e, with E = D

The first words are plain: either the codebook of step 1 or, for an IVF model,
the frozen centroids of the lists. `T` counts the steps with a network.

Encoding is a beam search (`beam.py`) in which only candidates that a second,
plain codebook finds promising go through the network. The published rule
takes the `A` best words of each hypothesis; the joint rule the `C` best of
all pairs of hypothesis and word.

What a network makes of a word alone, before the first relu, does not depend
on the vector. `prepare` computes it once for all words, so that a candidate
costs no more than what follows that relu.

References: arXiv 2401.14732 (QINCo), arXiv 2501.03078 (QINCo2).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from vqjax.codecs import beam as beam_lib
from vqjax.codecs.distances import nearest, sq_norms
from vqjax.core import Array, check_codes, check_range, check_shape


@struct.dataclass
class QincoParams:
  """Weights multiply from the right: `x_D @ in_DE`.

  Words are in normalised units, `(x - mean_D) / std`. `None` stands for an
  identity (`in_TDE`, `out_TED`, `mix_TUE`), for no bias, or for a codec
  without pre-selection.
  """

  mean_D: Array
  std: Array
  first_KD: Array  # Words of step 1, or `[L, D]` list centroids.
  codebooks_TKD: Array
  preselect_TKD: Array | None
  in_TDE: Array | None
  word_TEU: Array  # U = E unless the concatenation is low-rank.
  state_TDU: Array
  mix_TUE: Array | None
  bias_TE: Array | None
  up_TJEH: Array
  down_TJHE: Array
  out_TED: Array | None
  add_word: bool = struct.field(pytree_node=False, default=True)
  is_ivf: bool = struct.field(pytree_node=False, default=False)


@struct.dataclass
class QincoTables:
  """What encode and decode need of `QincoParams`; made by `prepare`."""

  mean_D: Array
  std: Array
  first_KD: Array
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
  is_ivf: bool = struct.field(pytree_node=False, default=False)


Params = QincoParams


def dim(params: QincoParams | QincoTables) -> int:
  """Returns the number of dimensions of the vectors."""
  return params.mean_D.shape[0]


def codebook_sizes(params: QincoParams | QincoTables) -> tuple[int, ...]:
  """Returns the number of words at each code position, lists included."""
  is_table = isinstance(params, QincoTables)
  words_TK = params.base_TKE if is_table else params.codebooks_TKD
  t, k = words_TK.shape[:2]
  return (params.first_KD.shape[0],) + (k,) * t


def prepare(params: QincoParams) -> QincoTables:
  """Moves what depends on the word alone into tables; differentiable.

  Reference: linearity of the concatenation and of the first up-projection.
  """
  mm = partial(jnp.matmul, precision="highest")
  word_TEE, state_TDE = params.word_TEU, params.state_TDU
  if params.mix_TUE is not None:
    word_TEE = mm(word_TEE, params.mix_TUE)
    state_TDE = mm(state_TDE, params.mix_TUE)
  e_TKE = params.codebooks_TKD
  if params.in_TDE is not None:
    e_TKE = mm(e_TKE, params.in_TDE)
  base_TKE = e_TKE + mm(e_TKE, word_TEE)
  if params.bias_TE is not None:
    base_TKE = base_TKE + params.bias_TE[:, None]
  first_up_TEH = params.up_TJEH[:, 0]
  return QincoTables(
    mean_D=params.mean_D,
    std=params.std,
    first_KD=params.first_KD,
    words_TKD=params.codebooks_TKD if params.add_word else None,
    preselect_TKD=params.preselect_TKD,
    base_TKE=base_TKE,
    base_up_TKH=mm(base_TKE, first_up_TEH),
    state_TDE=state_TDE,
    state_up_TDH=mm(state_TDE, first_up_TEH),
    first_down_THE=params.down_TJHE[:, 0],
    up_TJEH=params.up_TJEH[:, 1:],
    down_TJHE=params.down_TJHE[:, 1:],
    out_TED=params.out_TED,
    is_ivf=params.is_ivf,
  )


def encode(
  params: QincoParams | QincoTables,
  x_ND: Array,
  lists_N: Array | None = None,
  *,
  num_candidates: int = 16,
  beam_size: int = 32,
  num_joint_candidates: int = 0,
  num_steps: int | None = None,
  dtype: str = "float32",
) -> Array:
  """Finds codes of vectors `[N, D]` in data units: `[N, M]` int32.

  Args:
    params: Parameters, or their tables from `prepare`.
    x_ND: Vectors.
    lists_N: Lists of the vectors, of an IVF model; None for the nearest.
    num_candidates: A, words of each hypothesis that go through the network;
      0 for all of them.
    beam_size: B, hypotheses kept.
    num_joint_candidates: C, pairs of hypothesis and word that go through the
      network; 0 for the published rule with A.
    num_steps: Code positions to fill, the list number not counted; None for
      all. A prefix is the code of a lower rate.
    dtype: Type of the network's products; sums and distances are float32.

  Raises:
    ValueError: Where a size breaks a rule of `check_search`.
  """
  tables = prepare(params) if isinstance(params, QincoParams) else params
  check_shape("x", x_ND, (None, dim(tables)))
  check_lists(tables, x_ND, lists_N)
  check_search(
    tables, num_candidates, beam_size, num_joint_candidates, num_steps
  )
  return encode_normalised(
    _prefix(tables, num_steps),
    normalise(tables, x_ND),
    lists_N,
    num_candidates=num_candidates,
    beam_size=beam_size,
    num_joint_candidates=num_joint_candidates,
    dtype=dtype,
  )


def decode(
  params: QincoParams | QincoTables, codes_NM: Array, *, dtype: str = "float32"
) -> Array:
  """Vectors `[N, D]` in data units of codes `[N, <= M]`."""
  tables = prepare(params) if isinstance(params, QincoParams) else params
  check_codes(codes_NM, len(codebook_sizes(tables)))
  num_networks = codes_NM.shape[1] - 1
  cut = lambda leaf: leaf[:num_networks]
  stacked = jax.tree.map(cut, per_step(tables))

  def body(xhat_ND, step):
    weights, ids_N = step
    return xhat_ND + words_at(weights, ids_N, xhat_ND, dtype), None

  xhat_ND, _ = lax.scan(
    body, tables.first_KD[codes_NM[:, 0]], (stacked, codes_NM[:, 1:].T)
  )
  return xhat_ND * tables.std + tables.mean_D[None]


def normalise(params: QincoParams | QincoTables, x_ND: Array) -> Array:
  """Takes vectors `[N, D]` from data units to those of the words."""
  return (x_ND.astype(jnp.float32) - params.mean_D[None]) / params.std


def check_lists(params, x_ND: Array, lists_N: Array | None) -> None:
  """Raises ValueError unless the lists are one for each vector, or None."""
  if lists_N is None:
    return
  if not params.is_ivf:
    raise ValueError("This codec has no lists (it is no IVF model).")
  check_shape("lists", lists_N, x_ND.shape[:1])


def check_search(
  params: QincoParams | QincoTables,
  num_candidates: int,
  beam_size: int,
  num_joint_candidates: int = 0,
  num_steps: int | None = None,
) -> None:
  """Raises ValueError unless the sizes of a search make sense together."""
  num_words = codebook_sizes(params)[-1]
  num_codes = len(codebook_sizes(params)) - params.is_ivf
  check_range(
    "beam_size",
    beam_size,
    1,
    num_words,
    "the first step of the search offers no more hypotheses than it has words",
  )
  check_range(
    "num_candidates",
    num_candidates,
    0,
    num_words,
    "a step has no more words to offer; 0 takes them all",
  )
  if num_steps is not None:
    check_range("num_steps", num_steps, 1, num_codes, "code positions")
  if num_joint_candidates:
    check_range(
      "num_joint_candidates",
      num_joint_candidates,
      beam_size,
      beam_size * num_words,
      "beam_size hypotheses must be found among them, "
      "and there are beam_size * codebook_size pairs",
    )
  if params.preselect_TKD is None and (num_candidates or num_joint_candidates):
    raise ValueError(
      "This codec has no pre-selection codebooks (QINCo1): every word goes "
      "through the network; set num_candidates=0 and num_joint_candidates=0."
    )


def last_candidates(num_joint_candidates: int) -> int:
  """Returns how many joint candidates the last step looks at.

  It looks for one hypothesis, not for a beam, and by then the networks change
  little: a quarter, though at least 16, costs 0.02 % of MSE and saves a tenth
  of the time (docs/performance.md).
  """
  return max(-(-num_joint_candidates // 4), min(num_joint_candidates, 16))


def encode_block(
  tables: QincoTables,
  *,
  num_candidates: int = 16,
  beam_size: int = 32,
  num_joint_candidates: int = 0,
  budget_bytes: int,
) -> int:
  """Returns how many vectors `encode` can take at once within a budget.

  Counts the arrays of a step that live together; a multiple of 8, at least 8.
  """
  num_words, e = tables.base_TKE.shape[1:]
  per_hypothesis = num_candidates or num_words
  num_candidates = num_joint_candidates or beam_size * per_hypothesis
  h, d = tables.base_up_TKH.shape[2], dim(tables)
  floats = 2 * beam_size * (num_words + d) + num_candidates * (
    2 * e + 2 * h + d
  )
  return max(budget_bytes // (4 * floats) // 8, 1) * 8


def per_step(tables: QincoTables) -> dict[str, Array | None]:
  """The leaves that are stacked over the steps with a network."""
  return {
    name: getattr(tables, name)
    for name in (
      "words_TKD",
      "preselect_TKD",
      "base_TKE",
      "base_up_TKH",
      "state_TDE",
      "state_up_TDH",
      "first_down_THE",
      "up_TJEH",
      "down_TJHE",
      "out_TED",
    )
  }


def _prefix(tables: QincoTables, num_steps: int | None) -> QincoTables:
  """Tables of the codec that stops after `num_steps` code positions."""
  if num_steps is None:
    return tables
  num_networks = num_steps - 1 + tables.is_ivf
  cut = jax.tree.map(lambda leaf: leaf[:num_networks], per_step(tables))
  return tables.replace(**cut)


def _matmul(x: Array, w: Array, dtype: str) -> Array:
  """Product with float32 sums; `dtype` is the type of the factors."""
  if dtype == "float32":
    return jnp.matmul(x, w, precision="highest")
  return jnp.matmul(
    x.astype(dtype), w.astype(dtype), preferred_element_type=jnp.float32
  )


def _network(weights, base_E: Array, hidden_H: Array, dtype: str) -> Array:
  """What follows the first up-projection; leading axes are batch axes.

  `base_E` is e after the concatenation and `hidden_H` its up-projection.
  Returns `e W_out`, with D at the end.
  """
  e = base_E + _matmul(jax.nn.relu(hidden_H), weights["first_down_THE"], dtype)
  for up_EH, down_HE in zip(
    weights["up_TJEH"], weights["down_TJHE"], strict=True
  ):
    hidden = jax.nn.relu(_matmul(e, up_EH, dtype))
    e = e + _matmul(hidden, down_HE, dtype)
  out_ED = weights["out_TED"]
  return e if out_ED is None else _matmul(e, out_ED, dtype)


def words_at(weights, ids_N: Array, xhat_ND: Array, dtype: str) -> Array:
  """Words f(c, xhat) of one id per vector: `[N, D]`."""
  base_NE = weights["base_TKE"][ids_N] + _matmul(
    xhat_ND, weights["state_TDE"], dtype
  )
  hidden_NH = weights["base_up_TKH"][ids_N] + _matmul(
    xhat_ND, weights["state_up_TDH"], dtype
  )
  words_ND = _network(weights, base_NE, hidden_NH, dtype)
  if weights["words_TKD"] is None:
    return words_ND
  return words_ND + weights["words_TKD"][ids_N]


def _select(weights, residual_NFD, error_NF, num_candidates, num_joint):
  """Pairs of hypothesis and word worth a network: two int32 `[N, C]`."""
  n, f, _ = residual_NFD.shape
  preselect_KD = weights["preselect_TKD"]
  num_words = weights["base_TKE"].shape[0]
  if not num_joint and num_candidates in (0, num_words):
    flat_C = jnp.arange(f * num_words, dtype=jnp.int32)
    parents_C, ids_C = jnp.divmod(flat_C, num_words)
    spread = lambda x_C: jnp.broadcast_to(x_C, (n, f * num_words))
    return spread(parents_C), spread(ids_C)
  # Without |residual|^2, which is the same for all words of a hypothesis.
  score_NFK = sq_norms(preselect_KD)[None, None] - 2 * jnp.matmul(
    residual_NFD, preselect_KD.T, precision="highest"
  )
  if num_joint:
    score_NFK = score_NFK + error_NF[..., None]
    _, flat_NC = beam_lib.smallest(
      score_NFK.reshape(n, f * num_words), num_joint
    )
    return jnp.divmod(flat_NC, num_words)
  _, ids_NFA = lax.top_k(-score_NFK, num_candidates)
  parents_NFA = jnp.broadcast_to(
    jnp.arange(f, dtype=jnp.int32)[:, None], ids_NFA.shape
  )
  flat = (n, f * num_candidates)
  return parents_NFA.reshape(flat), ids_NFA.reshape(flat)


def _propose(weights, x_ND, beam, *, num_candidates, num_joint, dtype):
  """Candidates of a step with a network, see `beam.py`."""
  residual_NFD = x_ND[:, None] - beam.xhat_NFD
  parents_NC, ids_NC = _select(
    weights, residual_NFD, beam.error_NF, num_candidates, num_joint
  )
  at = lambda x_NFE: beam_lib.rows(x_NFE, parents_NC)
  state_NFE = _matmul(beam.xhat_NFD, weights["state_TDE"], dtype)
  state_NFH = _matmul(beam.xhat_NFD, weights["state_up_TDH"], dtype)
  words_NCD = _network(
    weights,
    weights["base_TKE"][ids_NC] + at(state_NFE),
    weights["base_up_TKH"][ids_NC] + at(state_NFH),
    dtype,
  )
  if weights["words_TKD"] is not None:
    words_NCD = words_NCD + weights["words_TKD"][ids_NC]
  error_NC = jnp.sum((at(residual_NFD) - words_NCD) ** 2, axis=-1)
  error_NC = jnp.where(
    jnp.isinf(jnp.take_along_axis(beam.error_NF, parents_NC, axis=1)),
    jnp.inf,
    error_NC,
  )
  words_fn = lambda slots_NF: beam_lib.rows(words_NCD, slots_NF)
  return beam_lib.Candidates(parents_NC, ids_NC, error_NC, words_fn)


def _propose_plain(words_KD, x_ND, beam):
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


def encode_normalised(
  tables,
  z_ND,
  lists_N=None,
  *,
  num_candidates,
  beam_size,
  num_joint_candidates,
  dtype,
):
  """`encode` of normalised vectors, over all steps of `tables`."""
  n = z_ND.shape[0]
  propose = partial(
    _propose,
    num_candidates=num_candidates,
    num_joint=num_joint_candidates,
    dtype=dtype,
  )
  steps = per_step(tables)
  if tables.is_ivf:
    if lists_N is None:
      lists_N = nearest(z_ND, tables.first_KD)
    xhat_N1D = tables.first_KD[lists_N][:, None]
    error_N1 = jnp.sum((z_ND[:, None] - xhat_N1D) ** 2, axis=-1)
    beam = beam_lib.Beam(xhat_N1D, error_N1)
    # The one hypothesis must offer enough words for the whole beam.
    wanted = num_joint_candidates or max(num_candidates, beam_size)
    num_words = codebook_sizes(tables)[-1]
    takes_all = not num_joint_candidates and not num_candidates
    widest = num_words if takes_all else min(wanted, num_words)
    first_fn = partial(propose, num_candidates=widest, num_joint=0)
    first = jax.tree.map(lambda leaf: leaf[0], steps)
    steps = jax.tree.map(lambda leaf: leaf[1:], steps)
  else:
    beam = beam_lib.start(z_ND)
    first_fn, first = _propose_plain, tables.first_KD
  beam, (_, first_NF) = beam_lib.advance(
    first_fn, first, z_ND, beam, beam_size=beam_size
  )
  ids_TN, slot_N = jnp.zeros((0, n), jnp.int32), jnp.zeros(n, jnp.int32)
  if steps["base_TKE"].shape[0]:
    ids_TN, slot_N = _search(propose, steps, z_ND, beam)
  first_N = jnp.take_along_axis(first_NF, slot_N[:, None], axis=1)[:, 0]
  head = [lists_N, first_N] if tables.is_ivf else [first_N]
  return jnp.concatenate([jnp.stack(head), ids_TN]).T.astype(jnp.int32)


def _search(propose, steps, z_ND, beam):
  """Runs the beam over `steps`: the words `[T, N]`, and the first slot `[N]`.

  The last step keeps one hypothesis, and needs fewer joint candidates for it:
  see `last_candidates`.
  """
  middle = jax.tree.map(lambda leaf: leaf[:-1], steps)
  last = jax.tree.map(lambda leaf: leaf[-1], steps)
  beam, history = beam_lib.advance_all(propose, middle, z_ND, beam)
  num_joint = last_candidates(propose.keywords["num_joint"])
  _, (parents_N1, ids_N1) = beam_lib.advance(
    partial(propose, num_joint=num_joint), last, z_ND, beam, beam_size=1
  )
  ids_TN, slot_N = beam_lib.trace(*history, parents_N1[:, 0])
  return jnp.concatenate([ids_TN, ids_N1.T]), slot_N
