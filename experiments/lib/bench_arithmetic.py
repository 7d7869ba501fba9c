"""Counts the multiply-adds of QINCo, from the shapes of its tables.

Of the matrix products that are left once `qinco.prepare` has made the tables,
per vector, with the letters of `vqjax.core` and L residual blocks:

  candidate   H E + (L - 1) 2 E H + E D       the last only if E differs
  hypothesis  D E + D H + K D                 K D only with pre-selection
  with ranker  H U of a candidate, 2 D U of a hypothesis
  first step  K D

Candidates are the network, with a ranker those that it keeps; the rest is
what surrounds it.
"""

from typing import NamedTuple

from vqjax.codecs import qinco, qinco_search
from vqjax.codecs.rule import SearchRule


class Work(NamedTuple):
  """Multiply-adds per vector."""

  network: int
  total: int


def encode_work(tables: qinco.QincoTables, rule: SearchRule) -> Work:
  """Returns the multiply-adds of `qinco.encode`."""
  num_networks, num_codewords, _ = tables.steps.base_TKE.shape
  per_candidate, per_state = _per_evaluation(tables)
  selection = num_codewords * qinco.dim(tables)
  each, joint = rule.num_candidates or num_codewords, rule.num_joint_candidates
  beam_size, num_ranked = rule.beam_size, rule.num_ranked
  # Hypotheses, candidates and ranked ones of each step.
  steps = [(beam_size, joint or beam_size * each, num_ranked)] * num_networks
  if joint:
    last = qinco_search.last_rule(rule)
    steps[-1] = beam_size, last.num_joint_candidates, last.num_ranked
  if tables.is_ivf:  # One hypothesis, with codewords for the whole beam.
    widest = min(joint or max(each, beam_size), num_codewords)
    steps[0] = 1, widest, num_ranked
  network, rest = 0, tables.first_KD.size
  for hypotheses, candidates, ranked in steps:
    takes_all = not joint and candidates == hypotheses * num_codewords
    rest += 0 if takes_all else hypotheses * selection
    rest += hypotheses * per_state
    if 0 < ranked < candidates:
      rest += _ranking_work(tables, hypotheses, candidates)
      candidates = ranked
    network += candidates * per_candidate
  return Work(network, network + rest)


def _ranking_work(tables, hypotheses: int, candidates: int) -> int:
  """Multiply-adds of a ranker in one step."""
  _, h, u = tables.steps.ranker.hidden_THU.shape
  return candidates * h * u + hypotheses * 2 * qinco.dim(tables) * u


def decode_work(tables: qinco.QincoTables) -> Work:
  """Returns the multiply-adds of `qinco.decode`."""
  num_networks = tables.steps.base_TKE.shape[0]
  per_candidate, per_state = _per_evaluation(tables)
  return Work(
    num_networks * per_candidate, num_networks * (per_candidate + per_state)
  )


def _per_evaluation(tables) -> tuple[int, int]:
  """Multiply-adds of a candidate, and of the state of a hypothesis."""
  _, h, e = tables.steps.first_down_THE.shape
  d, num_later_blocks = qinco.dim(tables), tables.steps.up_TJEH.shape[1]
  out = 0 if tables.steps.out_TED is None else e * d
  return h * e + num_later_blocks * 2 * e * h + out, d * e + d * h
