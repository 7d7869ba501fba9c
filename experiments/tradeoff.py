r"""Measures error against time of encoding, to choose --beam_size and C.

  vqjax tradeoff --codec=runs/qinco2_s --output=tradeoff.png

Encodes the same vectors at growing beam sizes B by the published rule (A
codewords of each hypothesis go through the network) and by the joint rule (the
best C of all pairs), and draws both curves. For deep networks it also draws the
joint rule with a ranker, a cheap model of the network that keeps F of the C; it
is fitted to 512 other vectors. A JSON file next to the picture has the figures.
Without --data the codec's own base is encoded. The vectors are spread over the
file.

It recommends the rule that sends the fewest candidates through the network, of
those whose error is within --loss percent of the best. --write stores that rule
and its ranker with the codec: all commands and `codec.encode` use them then.
"""

import dataclasses
import json
import pathlib
import shlex
import time

import jax
import numpy as np
from absl import logging

import vqjax
from experiments.lib import cli, codecs
from vqjax.codecs import qinco_ranker
from vqjax.codecs.rule import SearchRule
from vqjax.core import check_range
from vqjax.data import batches, datasets, files
from vqjax.search import plots
from vqjax.storage import codec_file

REQUIRED = ("codec", "output")
_DEEP = 4  # Residual blocks from which on a ranker saves more than it costs.
_FITTED = 512  # Vectors that a ranker is fitted to.
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
  "loss": cli.Option(
    float, 0.2, "Percent above the least MSE that fewer candidates may cost."
  ),
  "write": cli.Option(bool, False, "Store the recommended rule in --codec."),
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
  check_range("--loss", config.loss, 0, 1000, "percent")
  folder = _folder(config.codec) if config.write else None
  for path in (picture, figures):
    files.check_output(path, overwrite=config.overwrite)
  codec = codecs.open_codec(config.codec)
  if getattr(codec.params, "preselect_TKD", None) is None:
    raise ValueError(
      "Only a QINCo2 has codewords pre-selected for its network: there is "
      f"nothing to trade in this {codec.name} codec."
    )
  dataset = codecs.resolve_data(codec, config, base=config.data)
  x_ND, others_ND = _read(config, dataset)
  rows, rankers = [], {}
  sizes = _sizes(config, codec)
  dtype = codecs.product_dtype(config.dtype)
  rules = [SearchRule(**sizes, dtype=dtype) for sizes in sizes]
  with cli.progress(len(sizes), "encode", unit="size") as done:
    for rule in rules:
      ready = _with_ranker(codec, rule, others_ND)
      rankers[rule.beam_size] = ready.ranker
      rows.append(_measure(ready, x_ND, rule, config, dataset.scale))
      done(len(rows), len(sizes))
  rows.sort(key=lambda row: (row["rule"], row["encode_us"]))
  logging.info("%s", _table(rows))
  chosen = recommend(rows, config.loss)
  logging.info(
    "Recommended: %s, the fewest candidates (%d a step) of all rules whose MSE "
    "is at most %g %% above the least.",
    *(_sizes_text(chosen), chosen["evaluations"], config.loss),
  )
  device = jax.devices()[0].device_kind
  result = {
    "device": f"{device} x {jax.local_device_count()}",
    "jax": jax.__version__,
    "num_vectors": len(x_ND),
    "fingerprint": codec.fingerprint,
    "before": codec.rule.to_dict(codec.spec.knobs),
    "recommended": chosen,
    "rows": rows,
  }
  with files.atomic_output(figures, config.overwrite) as path:
    pathlib.Path(path).write_text(json.dumps(result, indent=1))
  with files.atomic_output(picture, config.overwrite) as path:
    _draw(rows, dataset.scale, path, picture.suffix[1:])
  logging.info("Written: %s, %s", picture, figures)
  if folder is not None:
    ranker = rankers[chosen["B"]] if chosen["F"] else codec.ranker
    _store(folder, codec, chosen, ranker)
  return result


def _with_ranker(codec, rule: SearchRule, x_ND):
  """The codec with the ranker that a rule asks for, if it does."""
  if not rule.num_ranked:
    return codec
  return codec.with_ranker(x_ND, **rule.to_dict(codecs.SIZES), dtype=rule.dtype)


def recommend(rows: list[dict], loss: float) -> dict:
  """The row of fewest evaluations whose error is within `loss` percent.

  Of equal ones the one of least error.
  """
  most = min(row["mse"] for row in rows) * (1 + loss / 100)
  fit = [row for row in rows if row["mse"] <= most]
  return min(fit, key=lambda row: (row["evaluations"], row["mse"], row["B"]))


def _folder(codec: str) -> pathlib.Path:
  """The folder of a codec that can be written; ValueError for another."""
  path = files.user_path(codec)
  folder = path.parent if path.name == codec_file.TENSORS_NAME else path
  if not (folder / codec_file.TENSORS_NAME).is_file():
    raise ValueError(
      f"--write stores the rule in a folder with {codec_file.TENSORS_NAME}, "
      f"which --codec={codec} is not. Make one in Python, "
      f"vqjax.load({codec!r}).save(FOLDER), and give --codec=FOLDER."
    )
  return folder


def _store(folder: pathlib.Path, measured, row: dict, ranker) -> None:
  """Stores a rule and its ranker with a codec, and says what it was before."""
  codec = vqjax.load(folder)  # It may have changed in the meantime.
  if codec.fingerprint != measured.fingerprint:
    raise ValueError(
      f"{folder} has another codec, {codec.fingerprint}, than the one that was "
      f"measured, {measured.fingerprint}: run the command again."
    )
  knobs, old = codec.spec.knobs, codec.rule
  sizes = {
    "num_candidates": row["A"] or old.num_candidates,
    "beam_size": row["B"],
    "num_joint_candidates": row["C"] or 0,
    "num_ranked": row["F"] or 0,
  }
  sizes = {name: size for name, size in sizes.items() if name in knobs}
  if old.replace(**sizes) == old:
    logging.info("%s has this rule already.", folder)
    return
  new = dataclasses.replace(codec, ranker=ranker).with_rule(**sizes)
  new.save(folder, overwrite=True)
  sizes = {name: getattr(old, name) for name in sizes}
  words = ", ".join(f"{name}={value}" for name, value in sizes.items())
  path = json.dumps(str(folder.resolve()))  # In quotes that a shell leaves.
  python = f"import vqjax; c = vqjax.load({path}); " + (
    f"c.with_rule({words}).save({path}, overwrite=True)"
  )
  logging.info(
    "%s is encoded by %s from now on; it was %s. To restore that:\n"
    "  python -c %s",
    *(folder, new.rule.describe(knobs), old.describe(knobs)),
    shlex.quote(python),
  )


def _read(config, dataset) -> tuple[np.ndarray, np.ndarray]:
  """The vectors to encode, and others to fit rankers to, if there are any."""
  vectors = datasets.open_split(dataset, "base", role="vectors to encode")
  num, most = len(vectors), config.num_vectors + _FITTED
  if num < most:  # All serve for both.
    rows = batches.evenly_spaced_rows(num, config.num_vectors)
    x_ND = batches.read_rows(vectors, rows)
    return x_ND, x_ND[batches.evenly_spaced_rows(len(x_ND), _FITTED)]
  some_ND = batches.read_rows(vectors, batches.evenly_spaced_rows(num, most))
  others = batches.evenly_spaced_rows(most, _FITTED)
  return np.delete(some_ND, others, axis=0), some_ND[others]


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
  is_one = codec.name == "qinco"  # And not one for each part.
  return is_one and codec.params.up_TJEH.shape[1] >= _DEEP


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
  encode_fn, num_rows = codec.encoder(rule)
  num_rows = min(num_rows, len(x_ND))
  jax.block_until_ready(encode_fn(x_ND[:num_rows]))  # Compiles.
  times = []
  for _ in range(config.repeats):
    began = time.perf_counter()
    blocks = batches.map_blocks(encode_fn, x_ND, block_size=num_rows)
    codes_NM = np.concatenate([codes_NM for _, codes_NM in blocks])
    times.append(time.perf_counter() - began)
  decode_fn = codec.decoder(rule.dtype)
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
