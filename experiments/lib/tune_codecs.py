"""What tune tries: codecs of some bytes; and what on: a sample of a file."""

import time
from typing import NamedTuple

import numpy as np
from absl import logging

import vqjax
from experiments.lib import cli, fit_time
from vqjax import evaluation, fitting, quality
from vqjax.data import batches, unit

K = 10  # Results of a query.
MOST_QUERIES = 500
LEAST = 512  # Vectors; a codebook has 256 codewords.
_ROUND = (1 << 62) + 1  # No pass over the data has this number.


class Candidate(NamedTuple):
  """A codec to try."""

  name: str
  config: str  # As `vqjax.fit` names it.
  model: dict  # Settings of `config.model`.
  like: str | None = None  # Takes `times` as long as this one, at a guess;
  times: float = 0.0  # without one it is measured.

  @property
  def is_learned(self) -> bool:
    """Whether it has a network and is trained in epochs."""
    return self.config.startswith("qinco")


_EPOCHS = (
  20  # Of networks, while tuning; each of as many vectors as others fit.
)
_EARLY_STOP = 4
_SMALL_PRODUCTS = 1e9  # Of a fit that takes a second on any machine.
_MEASURING = 1.2  # With encoding of the sample.
_MOST_BYTES = 4e8  # Of the vectors that networks are drawn from.


def candidates(num_bytes: int) -> list[Candidate]:
  """Returns all codecs of these bytes, in the order that they are tried."""
  of = lambda codes, size: {"num_codes": codes, "codebook_size": size}
  byte, half = of(num_bytes, 256), of(2 * num_bytes, 16)
  steps = {"num_steps": num_bytes}
  return [
    Candidate("pq", "pq", byte),
    Candidate("rq", "rq", byte),
    Candidate("qinco2_xs", "qinco2_xs", steps, "rq", 2.5),
    Candidate("opq_4bit", "opq", half),
    Candidate("pq_4bit", "pq", half),
    Candidate("opq", "opq", byte),
    Candidate("qinco2_s", "qinco2_s", steps, "qinco2_xs", 3),
  ]


def misfit(candidate: Candidate, dim: int) -> str | None:
  """Says why vectors of `dim` dimensions have no such codec, None if so."""
  codes = candidate.model.get("num_codes", 1)
  if candidate.config not in ("pq", "opq") or dim % codes == 0:
    return None
  return f"{dim} dimensions cannot be cut into {codes} equal parts"


class Sample(NamedTuple):
  """Vectors of a file to fit and to search, by a seed."""

  xt_ND: np.ndarray  # `vqjax.fit` holds out the last tenth.
  many_ND: np.ndarray  # The same and more, of which a network sees each less.
  xb_ND: np.ndarray  # Searched.
  truth: evaluation.Truth  # Queries, and their neighbours among `xb_ND`.
  metric: str
  is_apart: bool  # Whether no codec learns from `xb_ND`.


def draw(vectors, queries, metric: str, num: int, seed: int) -> Sample:
  """Draws the sample of an open file.

  Vectors to fit and to search are different ones if the file has enough for
  both. Without `queries` vectors of the file are taken out to be such.
  """
  size, dim = vectors.shape
  num_mine = 0 if queries is not None else min(MOST_QUERIES, size // 10)
  is_apart = size >= num_mine + 2 * num
  most = num
  if is_apart:  # As many steps of training with more vectors take no longer.
    most = num + max(num, min(_EPOCHS * num, int(_MOST_BYTES // (4 * dim))))
  rows_N = np.arange(min(size, num_mine + most))
  rows_N = batches.permute(rows_N, size, seed, _ROUND)
  read_fn = lambda rows_n: batches.read_rows(vectors, rows_n)
  mine_N, rows_N = rows_N[:num_mine], rows_N[num_mine:]
  first_ND = read_fn(rows_N[:num])
  many_ND = read_fn(rows_N[num:]) if is_apart else first_ND
  if queries is None:
    xq_QD = read_fn(mine_N)
  else:
    xq_QD = batches.subsample(queries, MOST_QUERIES, seed)
  ids_QG = evaluation.exact(xq_QD, first_ND, K + 1, metric, is_shown=False)
  truth = evaluation.Truth(xq_QD, ids_QG, first_ND, metric)
  return Sample(many_ND[:num], many_ND, first_ND, truth, metric, is_apart)


def describe(sample: Sample, num_vectors: int) -> str:
  """Says what the sample is, and what its recall is of."""
  searched = f"{len(sample.xb_ND):,} others are searched"
  if not sample.is_apart:
    searched = (
      "the same are searched, so that recall is higher than of vectors that "
      "are added later"
    )
  num, most = len(sample.xt_ND), len(sample.many_ND)
  return (
    f"Of {num_vectors:,} vectors {num:,} are fitted (by networks {most:,}), "
    f"{searched}, by {len(sample.truth.xq_QD)} queries."
    f"{_lower(sample, num_vectors)}"
  )


def _lower(sample: Sample, num_vectors: int) -> str:
  num = len(sample.xb_ND)
  if num >= num_vectors:
    return ""
  return (
    f" Recall is that of a search in {num:,}: in all {num_vectors:,} it is "
    "lower, because more vectors lie near."
  )


def _values(candidate: Candidate, sample: Sample) -> dict:
  return {"data": {"metric": sample.metric}, "model": candidate.model}


def seconds_of(candidate: Candidate, sample: Sample, seed: int) -> float:
  """Estimates the seconds of `fit` and `measure` without a network."""
  x_ND = sample.xt_ND
  config = fitting.make_config(
    candidate.config, seed=seed, **_values(candidate, sample)
  )
  num_rows, _ = batches.split(len(x_ND), config.data.validation_size)
  words, times = config.model.codebook_size, 2 * config.init.num_iterations
  if candidate.config == "rq":
    times *= config.model.num_codes * config.model.beam_size
  products = num_rows * x_ND.shape[1] * words * times
  if products <= _SMALL_PRODUCTS:
    return products / _SMALL_PRODUCTS
  found = fit_time.estimate(config, x_ND, num_rows)
  return _MEASURING * found.seconds


def fit(
  candidate: Candidate, sample: Sample, seed: int, about: float | None = None
) -> vqjax.Codec:
  """Fits a candidate; networks by a short schedule, and with a small beam.

  The progress line says how many seconds it takes, `about`.
  """
  values = _values(candidate, sample)
  if not candidate.is_learned:
    size = f" (about {about:.0f} s)" if about and about > 5 else ""
    with cli.elapsed(f"fit {candidate.name}{size}"):
      return vqjax.fit(sample.xt_ND, candidate.config, seed=seed, **values)
  num = len(sample.xt_ND)
  if sample.is_apart:  # Their error is that of the others.
    values["data"]["validation_size"] = num // 10
  return vqjax.fit(  # It shows a progress line of its own.
    sample.many_ND,
    candidate.config,
    seed=seed,
    **values,
    init={"max_vectors": num},
    train={
      "num_epochs": _EPOCHS,
      "epoch_size": num,
      "early_stop": _EARLY_STOP,
    },
    encode={"beam_size": 8, "num_joint_candidates": 16},
  )


def measure(codec: vqjax.Codec, sample: Sample) -> dict:
  """Returns the figures of a fitted codec: error, recalls, times.

  `mse` is of vectors that it has not learned from: those that are searched, or
  those that were held out in training. Recalls are those of an exact search in
  the decoded vectors.
  """
  base = sample.xb_ND
  if sample.metric == "cosine":
    base = unit.UnitVectors(base)
  _, first = codec.encoder(codec.rule)
  codec.encode(base[:first])  # Compiles.
  began = time.perf_counter()
  codes_NM = codec.encode(base, progress=True)
  encode_us = 1e6 * (time.perf_counter() - began) / len(base)
  blocks_fn = lambda: codec.decode_blocks(codes_NM, codec.rule.dtype)
  decoded = quality.Decoded(blocks_fn, base)
  ids_QR = evaluation.nearest(
    *(sample.truth.xq_QD, iter(decoded), K, sample.metric)
  )[1]
  mse = codec.info["training"]["validation_mse"]
  if sample.is_apart:
    mse = decoded.error / len(base)
  return {
    "bytes": codec.num_bytes,
    "mse": mse,
    **sample.truth.recalls(ids_QR, ("1-recall@1", f"knn_recall@{K}")),
    "encode_us": round(encode_us, 2),
    "decode_us": round(1e6 * decoded.seconds / len(base), 3),
  }


def report(rows: list[dict]) -> str:
  """Returns the table of the codecs, those that were left out below it."""
  tried = [row for row in rows if "mse" in row]
  names = ("1-recall@1", f"knn_recall@{K}")
  header = ["codec", "code bytes", "MSE", *names, "encode us", "decode us", "s"]
  cells = [
    [
      row["codec"],
      f"{row['bytes']:g}",
      cli.number(row["mse"]),
      *(f"{row[name]:.3f}" for name in names),
      f"{row['encode_us']:.1f}",
      f"{row['decode_us']:.2f}",
      f"{row['seconds']:.0f}",
    ]
    for row in sorted(tried, key=lambda row: row["mse"])
  ]
  left_out = [
    f"{row['codec']} was not tried: {row['left_out']}."
    for row in rows
    if "left_out" in row
  ]
  return "\n".join([cli.table(header, cells), *left_out])


def say(row: dict) -> None:
  """Logs one row as it comes."""
  if "left_out" in row:
    logging.info("%s is left out: %s.", row["codec"], row["left_out"])
    return
  logging.info(
    "%s: MSE %s, knn_recall@%d %.3f, encode %.1f us, in %.0f s.",
    *(row["codec"], cli.number(row["mse"]), K, row[f"knn_recall@{K}"]),
    *(row["encode_us"], row["seconds"]),
  )
