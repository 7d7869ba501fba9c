"""Encoders of commands: the rule that was asked for, over a file of vectors."""

from collections.abc import Callable
from typing import Any, NamedTuple

from absl import logging

from experiments.lib import cli, codecs
from vqjax.codec import Codec
from vqjax.codecs import qinco_ranker
from vqjax.codecs.rule import SearchRule
from vqjax.data import batches, datasets, files

SAMPLE = 512  # Vectors that a ranker is fitted to.


class Encoder(NamedTuple):
  """Vectors in, codes out, in blocks."""

  encode_fn: Callable
  block_size: int
  vectors: Any
  rule: SearchRule
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
  """Returns an encoder of these vectors, by the options of the command."""
  rule = codecs.search_rule(codec, config)
  line = codecs.saving(codec, rule)
  if line and not any(config.get(n) for n in ("rule", "num_candidates")):
    logging.info("%s", line)
  assign = codecs.make_graph_fn(codec, config.get("assign") or "auto")
  codec = with_ranker(codec, rule, x_ND)
  encode_fn, num_rows = codecs.make_encode_fn(codec, rule, assign=assign)
  sizes = codec.codebook_sizes
  if rule.num_steps is not None:
    sizes = sizes[: rule.num_steps + codec.is_ivf]
  return Encoder(encode_fn, num_rows, x_ND, rule, sizes)


def of_data(codec: Codec, config) -> tuple[Encoder, dict]:
  """An encoder of --data, and what its codes are made of."""
  dataset = codecs.resolve_data(codec, config, base=config.data)
  x_ND = datasets.open_split(dataset, "base")
  encoder = make_encoder(codec, config, x_ND)
  assign = config.get("assign", "auto")
  return encoder, {
    "data": files.identify(x_ND),
    "encode": settings(codec, encoder.rule, assign),
  }


def with_ranker(codec: Codec, rule: SearchRule, x_ND) -> Codec:
  """Returns the codec with the ranker that a rule asks for, if it does.

  It is fitted to `SAMPLE` of the `[N, D]` vectors, spread over all of them;
  codes by a ranker say so in their description.
  """
  if not rule.num_ranked:
    return codec
  rows = batches.evenly_spaced_rows(len(x_ND), SAMPLE)
  with cli.progress(len(rows), "fit the ranker") as done:
    tables = qinco_ranker.fit(
      codec.tables,
      batches.read_rows(x_ND, rows),
      beam_size=rule.beam_size,
      num_joint_candidates=rule.num_joint_candidates,
      dtype=rule.dtype,
      progress=done,
    )
  return codec.with_tables(tables)


def settings(codec: Codec, rule: SearchRule, assign: str = "auto") -> dict:
  """Returns what codes depend on, for their description.

  The steps are in the shape of the codes.
  """
  found = rule.to_dict(codec.spec.knobs)
  found.pop("num_steps", None)
  if rule.num_ranked:
    found["ranker_rows"] = SAMPLE  # Spread over the vectors.
  return found | ({"assign": "hnsw"} if codec.takes_graph(assign) else {})
