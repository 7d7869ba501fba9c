r"""Measures a codec: error, recall of exact search in the decoded base, time.

  vqjax evaluate --codec=runs/qinco2_s
  vqjax evaluate --codec=runs/qinco2_s --num_candidates=16 \
      --beam_size=32 --baselines=PQ,OPQ,RQ,LSQ
  vqjax evaluate --codec=bigann_8x8_L2.pt --data=base.bvecs \
      --queries=query.bvecs --groundtruth=groundtruth.ivecs
  vqjax evaluate --codec=runs/qinco2_s --split=validation

MSE is the squared error per vector: the sum over dimensions, the mean over
vectors. 1-recall@R is the share of queries whose true nearest neighbour is
among the first R found. Bytes are of the code without a list number.
Without --data the codec's own data set is used. A codec is measured by the rule
stored with it unless --rule or a size is given. With --multihost every process
encodes, decodes and searches its part of the base.
"""

import json
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from experiments.lib import cli, codecs, truth
from vqjax import devices, evaluation, quality
from vqjax.data import batches, datasets, files
from vqjax.interop import faiss_bytes, faiss_io
from vqjax.search import footprint

_NAMES = [f"1-recall@{r}" for r in evaluation.RANKS]
_BASELINE_BLOCK = 16384

REQUIRED = ("codec",)
OPTIONS = {
  "codec": cli.CODEC_OPTION,
  **cli.DATA_OPTIONS,
  "queries": cli.Option(str, None, "Queries, for the recall."),
  "groundtruth": cli.Option(
    str,
    None,
    "Ids of their true neighbours in --data, nearest first; found "
    "by exact search if unset.",
  ),
  "split": cli.Option(
    str, "base", "'base', or 'validation': the held-out training vectors."
  ),
  "num_vectors": cli.Option(
    int, None, "Use only the first vectors of the base, this many."
  ),
  **cli.SEARCH_OPTIONS,
  "baselines": cli.Option(
    str,
    "",
    "Also train and measure these by faiss, at equal bytes on the "
    "same training vectors: any of PQ,OPQ,RQ,LSQ.",
  ),
  "output": cli.Option(str, None, "JSON file for the figures."),
}


class Search(NamedTuple):
  """A base, and queries with their true neighbours, or None."""

  xb_ND: Any  # Array or open file.
  truth: evaluation.Truth | None
  metric: str


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Returns `{"codec", "rows": [...]}`; logs the table."""
  if config.output:
    files.check_output(config.output, overwrite=True)
  cli.require(config, *REQUIRED)
  names = [name.strip().upper() for name in config.baselines.split(",") if name]
  unknown = set(names) - set(faiss_io.ADDITIVE)
  if unknown:
    raise ValueError(
      f"--baselines may name {', '.join(faiss_io.ADDITIVE)}; got "
      f"{', '.join(sorted(unknown))}."
    )
  if names and jax.process_count() > 1:
    raise ValueError("--baselines run on one host: leave --multihost out.")
  codec = codecs.open_codec(config.codec)
  num_codes = len(_baseline_sizes(codec, config.num_steps))
  for name in ("PQ", "OPQ"):
    if name in names and num_codes:
      faiss_io.check_parts(name, codec.dim, num_codes)
  dataset = codecs.resolve_data(
    codec,
    config,
    needs_base=config.split == "base",
    base=config.data,
    queries=config.queries,
    groundtruth=config.groundtruth,
  )
  xt_ND = _open_train(codec, config) if names else None
  rule = codecs.search_rule(codec, config)
  xb_ND = _open_base(codec, config, dataset)
  search = Search(xb_ND, _open_truth(config, dataset, xb_ND), dataset.metric)
  rows = [_measure(codec, rule, search)]
  for name in names:
    _log_row(rows[-1], dataset.scale)
    rows.append(_measure_baseline(name, codec, config.num_steps, xt_ND, search))
  result = {
    "codec": str(config.codec),
    "fingerprint": codec.fingerprint,
    "split": config.split,
    "data": dataset.base if config.split == "base" else dataset.train,
    "queries": None if search.truth is None else dataset.queries,
    "num_without_neighbour": search.truth and search.truth.num_without,
    "num_ties": search.truth and search.truth.num_ties(),
    "num_steps": config.num_steps,
    "num_vectors": len(xb_ND),
    "scale": dataset.scale,
    "device": jax.devices()[0].device_kind,
    "rows": rows,
  }
  _log_table(result)
  if search.truth is not None:
    search.truth.report_ties()
  elif config.split == "base":
    logging.info("For recall add --queries=FILE.")
  if config.output and devices.is_first():
    with files.atomic_output(config.output, overwrite=True) as file:
      pathlib.Path(file).write_text(json.dumps(result, indent=2) + "\n")
    logging.info("Written to %s", config.output)
  return result


def _open_base(codec, config, dataset):
  if config.split == "base":
    limit = {"max_vectors": config.num_vectors}
    return datasets.open_split(dataset, "base", **limit)
  if config.split != "validation":
    raise ValueError(
      f"--split must be 'base' or 'validation', got {config.split!r}."
    )
  if config.data or config.queries or config.groundtruth:
    raise ValueError(
      "--split=validation are training vectors that the codec knows of; leave "
      "--data, --queries and --groundtruth out."
    )
  xt_ND = datasets.open_split(dataset, "train")
  _, held_out = batches.split(len(xt_ND), _validation_size(codec))
  rows = np.arange(held_out.start, held_out.stop)[: config.num_vectors]
  return batches.read_rows(xt_ND, rows)


def _open_train(codec, config):
  """The vectors that the codec was trained on, for the baselines."""
  if not codec.info.get("data"):
    raise ValueError(
      "--baselines are trained on what the codec was trained on, which this "
      "codec does not say; leave --baselines out."
    )
  dataset = codecs.resolve_data(codec, config, needs_base=False)
  return datasets.open_split(dataset, "train")


def _validation_size(codec) -> int:
  return codec.info.get("data", {}).get("validation_size", 10_000)


def _open_truth(config, dataset, xb_ND) -> evaluation.Truth | None:
  """Queries and their true neighbours; None if recall is not measured."""
  if config.split != "base" or not dataset.queries:
    return None
  opened, sizes = truth.of_dataset(dataset)
  return evaluation.open_truth(opened, len(xb_ND), xb_ND, sizes, num=1)


def _measure(codec, rule, search) -> dict:
  """Figures of the codec itself; every process encodes its share."""
  seconds = {}
  xb_ND, mine = search.xb_ND, devices.process_rows(len(search.xb_ND))
  encode_fn, block_size = codec.encoder(rule)
  num = len(mine)
  if len(xb_ND) < jax.process_count():
    raise ValueError(
      f"{len(xb_ND)} vectors are too few for {jax.process_count()} processes."
    )
  first = batches.read_rows(xb_ND, mine[:block_size])
  jax.block_until_ready(encode_fn(first))  # Compiles.
  with cli.progress(num, "encode") as done, cli.timed(seconds, "encode"):
    codes_NM = np.concatenate(
      list(codec.encode_blocks(xb_ND, rule, rows=mine, progress=done))
    )
  knobs = rule.to_dict(codec.spec.knobs)
  is_joint = bool(knobs.get("num_joint_candidates"))
  sizes = codec.codebook_sizes[: codes_NM.shape[1]]
  return {
    "name": codec.title,
    # An index keeps lists, not ids.
    "bytes": _num_bits(sizes[codec.is_ivf :]) / 8,
    "codec_bytes": footprint.array_bytes(codec.params),
    **({**knobs, "num_candidates": None} if is_joint else knobs),
    **_quality(
      lambda: codec.decode_blocks(codes_NM, rule.dtype), search, seconds
    ),
  }


def _num_bits(sizes) -> int:
  return sum(int(size - 1).bit_length() for size in sizes)


def _baseline_sizes(codec, num_steps) -> tuple[int, ...]:
  """Codewords at each position of a baseline of as many bytes."""
  return codec.codebook_sizes[codec.is_ivf :][:num_steps]


def _measure_baseline(name, codec, num_steps, xt_ND, search) -> dict:
  """Figures of a faiss quantiser of as many bytes."""
  xb_ND, seconds = search.xb_ND, {}
  sizes = _baseline_sizes(codec, num_steps)
  num_bits = int(sizes[0] - 1).bit_length()
  num_rows, _ = batches.split(len(xt_ND), _validation_size(codec))
  with cli.elapsed(f"train faiss {name}"), cli.timed(seconds, "train"):
    xt_ND = batches.subsample(xt_ND, 1_000_000, 0, num_rows=num_rows)
    baseline = faiss_io.fit_additive(name, xt_ND, len(sizes), num_bits)
  parts = np.array_split(
    np.arange(len(xb_ND)), -(-len(xb_ND) // _BASELINE_BLOCK)
  )
  codes = []
  with (
    cli.progress(len(xb_ND), f"encode by {name}") as done,
    cli.timed(seconds, "encode"),
  ):
    for rows in parts:
      codes.append(baseline.encode(batches.read_rows(xb_ND, rows)))
      done(rows[-1] + 1, len(xb_ND))
  codes_NM = np.concatenate(codes)
  return {
    "name": f"faiss {name}",
    "bytes": len(sizes) * num_bits / 8,
    "codec_bytes": sum(faiss_bytes.by_part(baseline.index).values()),
    **_quality(
      lambda: map(baseline.decode, np.array_split(codes_NM, len(parts))),
      *(search, seconds),
    ),
  }


def _quality(blocks_fn, search, seconds) -> dict:
  """MSE, 1-recall and times of codes, decoded once in blocks.

  The codes are of this process's share of the base.
  """
  num_base = len(search.xb_ND)
  mine = devices.process_rows(num_base)
  decoded, found = quality.Decoded(blocks_fn, search.xb_ND, mine), {}
  if search.truth is None:
    decoded.measure()
  else:
    ids_QR = evaluation.find(
      *(search.truth.xq_QD, iter(decoded), max(evaluation.RANKS)),
      *(num_base, search.metric),
    )
    found = search.truth.recalls(ids_QR, _NAMES)
  slowest = lambda value: float(devices.gather(value).max())
  return {
    "mse": float(devices.gather(decoded.error).sum()) / num_base,
    **found,
    "encode_us": slowest(seconds["encode"]) / num_base * 1e6,
    "decode_us": slowest(decoded.seconds / len(mine))
    / jax.process_count()
    * 1e6,
    **({"train_s": seconds["train"]} if "train" in seconds else {}),
  }


def _log_row(row: dict, scale: float) -> None:
  """Says the figures of a row when they come; the table follows at the end."""
  recalls = "".join(f", {n} {row[n]:.3f}" for n in _NAMES if n in row)
  train = f", trained in {row['train_s']:.0f} s" if "train_s" in row else ""
  logging.info(
    "%s: MSE%s %s%s%s",
    *(row["name"], "" if scale == 1 else f" x{scale:g}"),
    *(cli.number(row["mse"] * scale), recalls, train),
  )


def _log_table(result) -> None:
  scale = result["scale"]
  unit = "" if scale == 1 else f" x{scale:g}"
  recalls = [name for name in _NAMES if name in result["rows"][0]]
  rows = []
  for row in result["rows"]:
    search = [
      f"{letter}={row[name]}"
      for letter, name in (
        ("A", "num_candidates"),
        ("B", "beam_size"),
        ("C", "num_joint_candidates"),
        ("F", "num_ranked"),
      )
      if row.get(name)
    ]
    rows.append(
      [
        " ".join([row["name"], *search]),
        f"{row['bytes']:g}",
        f"{row['codec_bytes'] / 1e6:.2f}",
        cli.number(row["mse"] * scale),
      ]
      + [f"{row[name]:.3f}" for name in recalls]
      + [f"{row['encode_us']:.1f}", f"{row['decode_us']:.2f}"]
    )
  header = ["codec", "code bytes", "codec MB", f"MSE{unit}", *recalls]
  header += ["encode us", "decode us"]
  logging.info(
    "%d vectors of %s\n%s",
    result["num_vectors"],
    result["data"],
    cli.table(header, rows),
  )


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED, multihost=True)
