"""The last stage of a HAKES run: recall and speed of base and learned side."""

import json
import pathlib

import jax
from absl import logging

from experiments.lib import cli, hakes_data, hakes_stages
from vqjax import evaluation
from vqjax.data import files
from vqjax.interop import faiss_bytes, faiss_hakes, hakes_files
from vqjax.search import footprint, operating_points, plots

_LEAST_SHOWN = 0.5  # Recall of a point in the picture.
_RECALLS = (0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.99)


def evaluate(config, data, workdir: pathlib.Path) -> bool:
  """Writes evaluation.json and operating_points.png."""
  knobs = config.evaluate
  found = _truth(data, workdir, knobs.k)
  if found is None:
    logging.warning(
      "Nothing to measure with: set data.queries (or data.train_queries, some "
      "of which are held out) and run --stage=evaluate."
    )
    return True
  xq_QD, name = found.xq_QD, f"knn_recall@{knobs.k}"
  num_threads = faiss_hakes.set_num_threads(knobs.num_threads)
  index = faiss_hakes.load(workdir / "index.faiss")
  sides = {
    "base": hakes_files.load(workdir / "findex.bin").side,
    "learned": hakes_files.load(workdir / "uindex.bin").side,
  }
  search_fns = {
    name: _search_fn(index, side, xq_QD, knobs.k)
    for name, side in sides.items()
  }
  if knobs.factory:
    other = _factory(data, workdir / f"{knobs.factory}.faiss", knobs.factory)
    search_fns[knobs.factory] = _search_fn(other, None, xq_QD, knobs.k)
  settings = _settings(knobs, len(sides["base"].centroids_LE))
  recall_fn = lambda ids_QR: found.recalls(ids_QR, [name])[name]
  with cli.progress(len(settings), "search", unit="settings") as done:
    count = iter(range(1, len(settings) + 1))
    series = operating_points.measure(
      search_fns,
      settings,
      recall_fn,
      len(xq_QD),
      num_rounds=knobs.num_rounds,
      progress=lambda: done(next(count), len(settings)),
    )
  found.report_ties()
  # Both sides search one index.
  memory = {"base, learned": faiss_bytes.footprint(index)}
  if knobs.factory:
    memory[knobs.factory] = faiss_bytes.footprint(other)
  _write(config, data, workdir, series, len(xq_QD), num_threads, memory)
  return True


def _truth(data, workdir, k: int) -> evaluation.Truth | None:
  """Queries and at least `k` true neighbours; None without any queries."""
  if data.queries is not None:
    return hakes_data.read_truth(data, k)
  if data.train_queries is None:
    return None
  samples = hakes_stages.read_samples(workdir)
  held_out = slice(-int(samples["num_held_out"]), None)
  xq_QD = samples["queries"][held_out]
  logging.info("Searching the true neighbours of %d queries.", len(xq_QD))
  ids_QG = hakes_data.neighbours(data, xq_QD, min(k + 1, len(data.base)))
  metric = "cosine" if data.is_cosine else data.metric
  return evaluation.Truth(xq_QD, ids_QG, data.base, metric, num=k)


def _factory(data, path: pathlib.Path, name: str):
  """An index of faiss's own training, kept for the next evaluation."""
  if not path.exists():
    with cli.elapsed(f"train faiss {name}"):
      x_ND = hakes_data.read_all(data.base)
      index = faiss_hakes.fit_factory(name, x_ND, data.metric)
    faiss_hakes.save(index, path)
  return faiss_hakes.load(path)


def _search_fn(index, side, xq_QD, k):
  def search_fn(setting):
    if side is not None:  # The two sides share one index.
      faiss_hakes.set_side(index, side)
    return faiss_hakes.search(index, xq_QD, k, **setting)

  return search_fn


def _settings(knobs, num_lists: int) -> list[dict]:
  probes = sorted({min(n, num_lists) for n in knobs.num_probes})
  return [
    {"num_probes": n, "refine_factor": factor}
    for n in probes
    for factor in knobs.refine_factors
  ]


def _write(config, data, workdir, series, num_queries, num_threads, memory):
  name = f"knn_recall@{config.evaluate.k}"
  reached = operating_points.compare(series, _RECALLS)
  result = {
    "base": data.name,
    "num_base": len(data.base),
    "num_queries": num_queries,
    "metric": "cosine" if data.is_cosine else data.metric,
    "recall": name,
    "num_threads": num_threads,
    "device": jax.devices()[0].device_kind,
    "store": config.index.store,
    "settings": config.evaluate.to_dict(),
    "memory": {key: found.to_json() for key, found in memory.items()},
    "points": operating_points.to_json(series),
    "qps_at_recall": {
      "recall": [row[0] for row in reached],
      **{
        key: [round(row[1 + i], 1) for row in reached]
        for i, key in enumerate(series)
      },
    },
  }
  with files.atomic_output(
    workdir / "operating_points.png", overwrite=True
  ) as temporary:
    shown = {
      key: [point for point in points if point.recall >= _LEAST_SHOWN]
      for key, points in series.items()
    }
    sizes = [f"{found.each:.4g}" for found in memory.values()]
    title = (
      f"{len(data.base):,} vectors, {' and '.join(sizes)} bytes each in "
      f"memory, {num_threads} threads"
    )
    plots.plot_panels(temporary, {name: shown}, title=title)
  with files.atomic_output(
    workdir / "evaluation.json", overwrite=True
  ) as temporary:
    pathlib.Path(temporary).write_text(json.dumps(result, indent=2) + "\n")
  logging.info(
    "%s of %d queries, then queries per second (%d threads)\n%s\n\nQueries per "
    "second at equal recall\n%s\n\n%s",
    name,
    num_queries,
    num_threads,
    cli.table(*_point_table(series)),
    cli.table(
      [name, *series],
      [
        [f"{row[0]:g}", *(f"{qps:,.0f}" if qps else "-" for qps in row[1:])]
        for row in reached
      ],
    ),
    cli.table(*footprint.table(memory)),
  )


def _point_table(series):
  header = ["lists", "k'/k", *series, *(f"{name} qps" for name in series)]
  rows = []
  for points in zip(*series.values(), strict=True):
    knobs = points[0].setting
    rows.append(
      [knobs["num_probes"], f"{knobs['refine_factor']:g}"]
      + [f"{point.recall:.4f}" for point in points]
      + [f"{point.qps:,.0f}" for point in points]
    )
  return header, rows
