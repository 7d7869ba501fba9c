"""Encoders of the commands: the rule of the search, tried out, and blocks."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from experiments.lib import cli, codecs
from experiments.lib.codecs import RULE, Codec
from vqjax.codecs import qinco_scout
from vqjax.data import batches

_LOSS = 0.002  # Of MSE, that a cheaper rule may cost.
SAMPLE = 512  # Vectors that a rule is tried on, and a scout is fitted to.
_DEEP = 4  # Residual blocks from which on a scout saves more than it costs.


class Encoder(NamedTuple):
  """Vectors in, codes out, in blocks."""

  encode_fn: Callable
  block_size: int
  vectors: Any
  knobs: dict  # Of the codec's `encode`.
  codebook_sizes: tuple[int, ...]  # Of the codes.

  def blocks(self, rows: range | None = None, done=None):
    """Yields the codes of `rows`, `[n, M]`; calls `done(rows, in all)`."""
    for _, codes_NM in batches.map_blocks(
      self.encode_fn,
      self.vectors,
      block_size=self.block_size,
      rows=rows,
      progress=done,
    ):
      yield codes_NM


def make_encoder(codec: Codec, config, x_ND) -> Encoder:
  """Returns an encoder of these vectors, by the options of the command.

  Where they name no candidates, `try_joint_rule` and `try_scout` have a say.
  """
  num_steps = config.get("num_steps")
  knobs = codecs.search_knobs(codec, config)
  sizes = _code_sizes(codec, knobs, num_steps)
  assign = codecs.make_graph_fn(codec, config.get("assign", "auto"))
  codec = with_scout(codec, knobs, x_ND, num_vectors=SAMPLE)
  is_given = {name: config.get(name) is not None for name in RULE}
  if not is_given["num_candidates"] and not is_given["num_joint_candidates"]:
    may_widen = not is_given["beam_size"]
    knobs = try_joint_rule(
      codec, knobs, x_ND, assign=assign, may_widen=may_widen
    )
    if not is_given["num_finalists"]:
      codec, knobs = try_scout(
        codec,
        knobs,
        x_ND,
        num_steps=num_steps,
        assign=assign,
        num_vectors=SAMPLE,
      )
  encode_fn, num_rows = codecs.make_encode_fn(
    codec, knobs, num_steps, assign=assign
  )
  return Encoder(encode_fn, num_rows, x_ND, knobs, sizes)


def try_joint_rule(
  codec: Codec,
  knobs: dict,
  x_ND,
  *,
  assign="auto",
  may_widen: bool = True,
  num_vectors: int = SAMPLE,
) -> dict:
  """Returns `knobs`, with the joint rule where it costs no quality.

  For codecs whose own options are the published rule (see
  `vqjax.codecs.qinco`). The first `num_vectors` are encoded by both; the joint
  rule is taken where its error is at most 0.2 % higher. There must be many
  more vectors than that, or trying would cost more than it saves. The beam
  stays as wide as it is unless `may_widen`.
  """
  if not codecs.has_knob(codec, "num_joint_candidates"):
    return knobs
  num_candidates, beam_size, joint = (knobs.get(name, 0) for name in RULE[:3])
  if joint or not num_candidates or len(x_ND) < 8 * num_vectors:
    return knobs
  num_words = codec.codebook_sizes[-1]
  mse = functools.partial(
    _mse, x_ND=batches.read_rows(x_ND, range(num_vectors)), assign=assign
  )
  rules = [
    {**knobs, "beam_size": beam, "num_joint_candidates": joint}
    for beam, joint in (
      (beam_size, 2 * beam_size),
      (min(3 * beam_size // 2, num_words), 4 * beam_size),
    )[: 2 if may_widen else 1]
    if joint < beam_size * num_candidates
  ]
  new, loss = _first_as_good(
    rules, functools.partial(mse, codec), mse(codec, knobs)
  )
  if not new:
    return knobs
  beam, joint = new["beam_size"], new["num_joint_candidates"]
  logging.info(
    "On the first %d vectors B=%d C=%d errs %+.2f %% against A=%d B=%d and "
    "asks the network %.1f times less: taken. (--num_candidates=%d for the "
    "published rule.)",
    *(num_vectors, beam, joint, 100 * loss, num_candidates, beam_size),
    *(beam_size * num_candidates / joint, num_candidates),
  )
  return new


def try_scout(
  codec: Codec,
  knobs: dict,
  x_ND,
  *,
  num_steps: int | None = None,
  assign="auto",
  num_vectors: int = SAMPLE,
) -> tuple[Codec, dict]:
  """Returns codec and `knobs`, with a scout where it costs no quality.

  It is fitted to `num_vectors` and taken where as many others, spread over the
  file as they are, have an error at most 0.2 % higher with it. There must be
  many more vectors, as for `try_joint_rule`.
  """
  rules = scout_rules(codec, knobs)
  if not rules or len(x_ND) < 128 * num_vectors:
    return codec, knobs
  if num_steps is not None and num_steps + codec.is_ivf < 2:
    return codec, knobs  # No network is left.
  _, others = sample_rows(len(x_ND), num_vectors)
  others_ND = batches.read_rows(x_ND, others)
  mse = functools.partial(
    _mse, x_ND=others_ND, num_steps=num_steps, assign=assign
  )
  scouted = with_scout(codec, rules[0], x_ND, num_vectors=num_vectors)
  new, loss = _first_as_good(
    rules, functools.partial(mse, scouted), mse(codec, knobs)
  )
  if not new:
    return codec, knobs
  logging.info(
    "On %d vectors a scout, which lets %d of %d words a step through the "
    "whole network, errs %+.2f %% against %d without one: taken. "
    "(--num_finalists=0 for none.)",
    *(num_vectors, new["num_finalists"], new["num_joint_candidates"]),
    *(100 * loss, knobs["num_joint_candidates"]),
  )
  return scouted, new


def scout_rules(codec: Codec, knobs: dict) -> list[dict]:
  """Returns searches with a scout that may take the place of `knobs`.

  The cheapest first; none where the search is not by the joint rule, or the
  network so short that there is little to save.
  """
  beam_size, joint = knobs.get("beam_size"), knobs.get("num_joint_candidates")
  num_words = codec.codebook_sizes[-1]
  if not joint or not hasattr(codec.tables, "scout"):
    return []
  num_blocks = 1 + codec.tables.up_TJEH.shape[1]
  if num_blocks < _DEEP or num_words > qinco_scout.MAX_WORDS:
    return []
  # An evaluation costs more than looking at many words.
  wide = min(2 * joint, beam_size * num_words)
  sizes = [(wide, beam_size), (wide, 7 * beam_size // 6)]
  names = "num_joint_candidates", "num_finalists"
  rules = [dict(zip(names, pair, strict=True)) for pair in sizes]
  return [knobs | rule for rule in rules if rule["num_finalists"] < joint]


def with_scout(
  codec: Codec, knobs: dict, x_ND, *, num_vectors: int = SAMPLE
) -> Codec:
  """Returns the codec with the scout that `knobs` ask for, if they do.

  It is fitted to those of the `[N, D]` vectors that `sample_rows` names.
  """
  rule = check_scout(codec, knobs)
  if not rule:
    return codec
  rows, _ = sample_rows(len(x_ND), num_vectors)
  with cli.progress(len(rows), "fit the scout") as done:
    tables = qinco_scout.fit(
      codec.tables,
      batches.read_rows(x_ND, rows),
      beam_size=rule["beam_size"],
      num_joint_candidates=rule["num_joint_candidates"],
      dtype=knobs.get("dtype", "float32"),
      progress=done,
    )
  return codec._replace(tables=tables)


def check_scout(codec: Codec, knobs: dict) -> dict:
  """Returns the sizes of a search with a scout, nothing where there is none.

  Raises ValueError where they do not fit the codec.
  """
  if not knobs.get("num_finalists"):
    return {}
  known = inspect.signature(codec.module.encode).parameters
  rule = {name: knobs.get(name, known[name].default) for name in RULE}
  codec.module.check_search(codec.tables, **rule)
  return rule


def sample_rows(
  num_rows: int, num_vectors: int
) -> tuple[np.ndarray, np.ndarray]:
  """Rows to fit a scout to, and others to try it on, spread over a file.

  Where there are too few for both, all that are needed are fitted to.
  """
  is_enough = num_rows >= 2 * num_vectors
  count = min((1 + is_enough) * num_vectors, num_rows)
  rows = np.linspace(0, num_rows - 1, count).astype(np.int64)
  return (rows[::2], rows[1::2]) if is_enough else (rows, rows[:0])


def _first_as_good(rules: list[dict], mse_fn, least: float):
  """The first rule that errs little more than `least`, and by what share.

  None and 0 where there is none.
  """
  for rule in rules:
    loss = mse_fn(rule) / least - 1
    if loss <= _LOSS:
      return rule, loss
  return None, 0.0


def _mse(codec: Codec, knobs: dict, *, x_ND, assign, num_steps=None) -> float:
  """Mean squared error of vectors `[N, D]`, each encoded and decoded."""
  encode_fn, num_rows = codecs.make_encode_fn(
    codec, knobs, num_steps, assign=assign
  )
  decode_fn = codecs.make_decode_fn(codec, knobs.get("dtype", "float32"))
  errors_fn = lambda x_ND: np.sum(
    (x_ND - np.asarray(decode_fn(np.asarray(encode_fn(x_ND))))) ** 2, axis=1
  )
  blocks = batches.map_blocks(errors_fn, x_ND, block_size=num_rows)
  return float(np.mean(np.concatenate([e for _, e in blocks]), dtype=float))


def _code_sizes(codec: Codec, knobs: dict, num_steps) -> tuple[int, ...]:
  """Codebook sizes of the codes; refuses search sizes that do not fit."""
  knobs = {k: v for k, v in knobs.items() if k != "num_finalists"}
  encode_fn = functools.partial(
    codec.module.encode, num_steps=num_steps, **knobs
  )
  x_ND = jax.ShapeDtypeStruct((1, codec.dim), np.float32)
  width = jax.eval_shape(encode_fn, codec.tables, x_ND).shape[1]
  return codec.codebook_sizes[:width]
