r"""Measures error against time of encoding, to choose --beam_size and C.

  vqjax tradeoff --codec=runs/qinco2_s --output=tradeoff.png

Encodes the same vectors at growing beam sizes B by the published rule (A
codewords of each hypothesis go through the network) and by the joint rule (the
best C of all pairs), and draws both curves. For deep networks it also draws the
joint rule with a ranker, which keeps F of the C. A JSON file next to the
picture has the figures. Without --data the codec's own base is encoded.
"""

import json
import pathlib
import time

import jax
import numpy as np
from absl import logging

from experiments.lib import cli, codecs, encoders
from vqjax.codecs import qinco_ranker
from vqjax.codecs.rule import SearchRule
from vqjax.core import check_range
from vqjax.data import batches, datasets, files
from vqjax.search import plots

REQUIRED = ("codec", "output")
_DEEP = 4  # Residual blocks from which on a ranker saves more than it costs.
OPTIONS = {
  "codec": cli.CODEC_OPTION,
  **cli.DATA_OPTIONS,
  "num_vectors": cli.Option(int, 2000, "Vectors to encode."),
  "beam_sizes": cli.Option(str, "4,8,16,32,48,64", "Values of B."),
  "num_candidates": cli.Option(
    str, "4,16", "Values of A, up to B, for the published rule."
  ),
  "joint_factors": cli.Option(
    str, "1,2,4", "Values of C / B, for the joint rule."
  ),
  "dtype": cli.SEARCH_OPTIONS["dtype"],
  "repeats": cli.Option(int, 3, "Timed runs; their median is reported."),
  "output": cli.Option(str, None, "Picture to write (.png, .svg, .pdf)."),
  "overwrite": cli.Option(bool, False, "Replace existing outputs."),
}


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Returns `{"rows": [...]}`, one row per pair of sizes."""
  cli.require(config, *REQUIRED)
  picture = pathlib.Path(config.output)
  figures = picture.with_suffix(".json")
  if picture.suffix not in (".png", ".svg", ".pdf"):
    raise ValueError(
      f"--output must end in .png, .svg or .pdf; got {config.output}."
    )
  check_range("--repeats", config.repeats, 1, 1000)
  check_range("--num_vectors", config.num_vectors, 1, 1 << 40)
  for path in (picture, figures):
    files.check_output(path, overwrite=config.overwrite)
  codec = codecs.open_codec(config.codec)
  if getattr(codec.tables, "preselect_TKD", None) is None:
    raise ValueError(
      "Only a QINCo2 has codewords pre-selected for its network: there is "
      f"nothing to trade in this {codec.name} codec."
    )
  dataset = codecs.resolve_data(codec, config, base=config.data)
  x_ND, others_ND = _read(config, dataset)
  rows = []
  sizes = _sizes(config, codec)
  dtype = codecs.product_dtype(config.dtype)
  rules = [SearchRule(**sizes, dtype=dtype) for sizes in sizes]
  ready = [encoders.with_ranker(codec, rule, others_ND) for rule in rules]
  with cli.progress(len(sizes), "encode", unit="size") as done:
    for codec, rule in zip(ready, rules, strict=True):
      rows.append(_measure(codec, x_ND, rule, config, dataset.scale))
      done(len(rows), len(sizes))
  rows.sort(key=lambda row: (row["rule"], row["encode_us"]))
  logging.info("%s", _table(rows))
  device = jax.devices()[0].device_kind
  result = {
    "device": f"{device} x {jax.local_device_count()}",
    "jax": jax.__version__,
    "num_vectors": len(x_ND),
    "fingerprint": codec.fingerprint,
    "rows": rows,
  }
  with files.atomic_output(figures, config.overwrite) as path:
    pathlib.Path(path).write_text(json.dumps(result, indent=1))
  with files.atomic_output(picture, config.overwrite) as path:
    _draw(rows, dataset.scale, path, picture.suffix[1:])
  logging.info("Written: %s, %s", picture, figures)
  return result


def _read(config, dataset) -> tuple[np.ndarray, np.ndarray]:
  """The vectors to encode, and others to fit rankers to, if there are any."""
  some_ND = datasets.open_split(
    dataset,
    "base",
    max_vectors=config.num_vectors + encoders.SAMPLE,
    role="vectors to encode",
  )
  some_ND = batches.read_rows(some_ND, range(len(some_ND)))
  x_ND, others_ND = np.split(some_ND, [config.num_vectors])
  return x_ND, others_ND if len(others_ND) == encoders.SAMPLE else x_ND


def _sizes(config, codec) -> list[dict]:
  """Returns the knobs to measure."""
  num_codewords = codec.codebook_sizes[-1]
  beams = [b for b in _numbers(config, "beam_sizes") if b <= num_codewords]
  if not beams:
    raise ValueError(
      f"--beam_sizes={config.beam_sizes}: the codec has {num_codewords} "
      "codewords, and no beam may be wider."
    )
  published = [
    dict(num_candidates=a, beam_size=b, num_joint_candidates=0)
    for b in beams
    for a in _numbers(config, "num_candidates")
    if a <= min(b, num_codewords)
  ]
  joint = [
    dict(num_candidates=1, beam_size=b, num_joint_candidates=b * factor)
    for b in beams
    for factor in _numbers(config, "joint_factors")
    if factor <= num_codewords
  ]
  ranked = [
    dict(
      num_candidates=1,
      beam_size=b,
      num_joint_candidates=min(16 * b // 3, b * num_codewords),
      num_ranked=b,
    )
    for b in beams
    if _is_deep(codec) and num_codewords <= qinco_ranker.MAX_WORDS
  ]
  return published + joint + ranked


def _is_deep(codec) -> bool:
  """Whether a ranker costs less than what it saves of the network."""
  tables = codec.tables
  is_one = codec.name == "qinco"  # And not one for each part.
  return is_one and 1 + tables.up_TJEH.shape[1] >= _DEEP


def _numbers(config, name: str) -> list[int]:
  """Positive numbers of an option, as 4,8,16."""
  parts = config[name].split(",")
  if not all(part.isdigit() and int(part) for part in parts):
    raise ValueError(
      f"--{name} must be numbers from 1 on, as 4,8,16; got {config[name]!r}."
    )
  return [int(part) for part in parts]


def _measure(codec, x_ND, rule, config, scale) -> dict:
  """Encodes all vectors by a rule, some times over."""
  encode_fn, num_rows = codecs.make_encode_fn(codec, rule)
  num_rows = min(num_rows, len(x_ND))
  jax.block_until_ready(encode_fn(x_ND[:num_rows]))  # Compiles.
  times = []
  for _ in range(config.repeats):
    began = time.perf_counter()
    blocks = batches.map_blocks(encode_fn, x_ND, block_size=num_rows)
    codes_NM = np.concatenate([codes_NM for _, codes_NM in blocks])
    times.append(time.perf_counter() - began)
  decode_fn = codecs.make_decode_fn(codec, rule.dtype)
  decoded_ND = np.asarray(decode_fn(codes_NM))
  error_N = np.sum((x_ND - decoded_ND) ** 2, axis=1, dtype=np.float64)
  a, b, c, f = (getattr(rule, name) for name in codecs.SIZES)
  return {
    "rule": "ranker" if f else "joint" if c else "published",
    "B": b,
    "A": None if c else a,
    "C": c or None,
    "F": f or None,
    "evaluations": rule.num_evaluated,
    "mse": float(error_N.mean()) * scale,
    "encode_us": float(np.median(times)) / len(x_ND) * 1e6,
  }


def _table(rows) -> str:
  return cli.table(
    ["rule", "B", "A", "C", "F", "evaluations", "MSE", "us per vector"],
    [
      [
        row["rule"],
        row["B"],
        row["A"] or "",
        row["C"] or "",
        row["F"] or "",
        row["evaluations"],
      ]
      + [cli.number(row["mse"]), f"{row['encode_us']:.0f}"]
      for row in rows
    ],
  )


def _draw(rows, scale, path, kind) -> None:
  """Draws each rule's sizes, and the line through those nothing beats."""
  figure, (axes,) = plots.make_figure()
  axes.set(
    xscale="log",
    xlabel="microseconds per vector (lower is better)",
    ylabel="MSE"
    + ("" if scale == 1 else f" x {scale:g}")
    + " (lower is better)",
  )
  wanted = []
  for i, rule in enumerate(dict.fromkeys(row["rule"] for row in rows)):
    mine = [row for row in rows if row["rule"] == rule]
    best = []
    for row in mine:  # In the order of time.
      if not best or row["mse"] < best[-1]["mse"]:
        best.append(row)
    wanted += plots.draw_series(
      axes,
      [(row["encode_us"], row["mse"]) for row in mine],
      [(row["encode_us"], row["mse"]) for row in best],
      [_sizes_text(row) for row in best],
      name=f"{rule} rule",
      color=f"C{i}",
    )
  plots.finish(figure, wanted)
  figure.savefig(path, format=kind, dpi=150)


def _sizes_text(row) -> str:
  return " ".join(f"{name}={row[name]}" for name in "BACF" if row[name])


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
