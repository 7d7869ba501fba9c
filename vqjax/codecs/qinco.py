"""QINCo and QINCo2: residual quantisation with implicit neural codebooks.

The codewords of a step are computed from what has been decoded so far. With the
plain codebook `C_t` and the partial reconstruction xhat,

  xhat <- xhat + f_t(C_t[k], xhat)

  e = c W_in                       D -> E, identity when E = D
  e = e + [e ; xhat] W_cat + b     W_cat is `word` over `state`, through `mix`
  e = e + relu(e W_up) W_down      once per residual block
  f = c + e W_out                  QINCo1: f = e, with E = D

The first codewords are plain: either the codebook of step 1 or, for an IVF
model, the frozen centroids of the lists. `T` counts the steps with a network.

Encoding is a beam search (`qinco_search.py`) in which only candidates that a
second, plain codebook finds promising go through the network. The published
rule takes the `A` best codewords of each hypothesis; the joint rule the `C`
best of all pairs of hypothesis and codeword.

What a network makes of a codeword alone, before the first relu, does not depend
on the vector. `prepare` computes it once for all codewords, so that a candidate
costs no more than what follows that relu.

References: arXiv 2401.14732 (QINCo), arXiv 2501.03078 (QINCo2).
"""

from functools import partial

import jax
import jax.numpy as jnp
from flax import struct
from jax import lax

from vqjax.codecs import beam as beam_lib
from vqjax.codecs import qinco_search
from vqjax.codecs import rule as rule_lib
from vqjax.codecs.codec import CodecSpec
from vqjax.codecs.qinco_search import StepTables
from vqjax.codecs.rule import PUBLISHED, SearchRule
from vqjax.core import Array, check_codes, check_shape


@struct.dataclass
class QincoParams:
  """Weights multiply from the right: `x_D @ in_DE`.

  Codewords are in normalised units, `(x - mean_D) / std`. `None` stands for an
  identity (`in_TDE`, `out_TED`, `mix_TUE`), for no bias, or for a codec
  without pre-selection.
  """

  mean_D: Array
  std: Array
  first_KD: Array  # Codewords of step 1, or `[L, D]` list centroids.
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
  steps: StepTables
  is_ivf: bool = struct.field(pytree_node=False, default=False)


def dim(params: QincoParams | QincoTables) -> int:
  """Returns the number of dimensions of the vectors."""
  return params.mean_D.shape[0]


def codebook_sizes(params: QincoParams | QincoTables) -> tuple[int, ...]:
  """Returns the number of codewords at each code position, lists included."""
  is_table = isinstance(params, QincoTables)
  words_TK = params.steps.base_TKE if is_table else params.codebooks_TKD
  t, k = words_TK.shape[:2]
  return (params.first_KD.shape[0],) + (k,) * t


def prepare(params: QincoParams) -> QincoTables:
  """Moves what depends on the codeword alone into tables; differentiable.

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
  steps = StepTables(
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
  )
  return QincoTables(
    *(params.mean_D, params.std, params.first_KD, steps), is_ivf=params.is_ivf
  )


def encode(
  params: QincoParams | QincoTables,
  x_ND: Array,
  lists_N: Array | None = None,
  rule: SearchRule = PUBLISHED,
) -> Array:
  """Finds codes of vectors `[N, D]` in data units: `[N, M]` int32.

  Args:
    params: Parameters, or their tables from `prepare`.
    x_ND: Vectors.
    lists_N: Lists of the vectors, of an IVF model; None for the nearest.
    rule: The search.

  Raises:
    ValueError: A size breaks a rule of `check_rule`, or `num_ranked` is set and
      the tables have no ranker.
  """
  tables = prepare(params) if isinstance(params, QincoParams) else params
  check_shape("x", x_ND, (None, dim(tables)))
  check_lists(tables, x_ND, lists_N)
  check_rule(tables, rule)
  if rule.num_ranked and tables.steps.ranker is None:
    raise ValueError(
      f"num_ranked={rule.num_ranked} needs a ranker that chooses them: give "
      "tables of `qinco_ranker.fit`."
    )
  return qinco_search.encode_normalised(
    _prefix(tables, rule.num_steps), normalise(tables, x_ND), lists_N, rule=rule
  )


def decode(
  params: QincoParams | QincoTables, codes_NM: Array, *, dtype: str = "float32"
) -> Array:
  """Vectors `[N, D]` in data units of codes `[N, <= M]`."""
  tables = prepare(params) if isinstance(params, QincoParams) else params
  check_codes(codes_NM, len(codebook_sizes(tables)))

  def body(xhat_ND, step):
    t, ids_N = step
    weights = beam_lib.at_step(tables.steps, t)
    words_ND = qinco_search.words_at(weights, ids_N, xhat_ND, dtype)
    return xhat_ND + words_ND, None

  start_ND = tables.first_KD[codes_NM[:, 0]]
  steps = jnp.arange(codes_NM.shape[1] - 1)
  xhat_ND, _ = lax.scan(body, start_ND, (steps, codes_NM[:, 1:].T))
  return xhat_ND * tables.std + tables.mean_D[None]


def normalise(params: QincoParams | QincoTables, x_ND: Array) -> Array:
  """Takes vectors `[N, D]` from data units to the units of the codewords."""
  return (x_ND.astype(jnp.float32) - params.mean_D[None]) / params.std


def check_lists(params, x_ND: Array, lists_N: Array | None) -> None:
  """Raises ValueError unless the lists are one for each vector, or None."""
  if lists_N is None:
    return
  if not params.is_ivf:
    raise ValueError("This codec has no lists (it is no IVF model).")
  check_shape("lists", lists_N, x_ND.shape[:1])


def check_rule(params: QincoParams | QincoTables, rule: SearchRule) -> None:
  """Raises ValueError unless the sizes of a search fit the codec."""
  sizes = codebook_sizes(params)
  plain = params.steps if isinstance(params, QincoTables) else params
  rule_lib.check(
    rule,
    num_codewords=sizes[-1],
    num_codes=len(sizes) - params.is_ivf,
    can_preselect=plain.preselect_TKD is not None,
  )


def centroids(params: QincoParams | QincoTables) -> Array:
  """Centroids of the lists of an IVF model: `[L, D]` in data units."""
  return params.first_KD * params.std + params.mean_D[None]


def _prefix(tables: QincoTables, num_steps: int | None) -> QincoTables:
  """Tables of the codec that stops after `num_steps` code positions."""
  if num_steps is None:
    return tables
  num_networks = num_steps - 1 + tables.is_ivf
  steps = jax.tree.map(lambda leaf: leaf[:num_networks], tables.steps)
  return tables.replace(steps=steps)


CODEC = CodecSpec(
  name="qinco",
  Params=QincoParams,
  prepare=prepare,
  dim=dim,
  codebook_sizes=codebook_sizes,
  encode=encode,
  decode=decode,
  knobs=tuple(vars(SearchRule())),
  check_rule=check_rule,
  is_ivf=lambda params: params.is_ivf,
  centroids=centroids,
  title=lambda params: "qinco2" if params.add_word else "qinco1",
)
