"""Measured points of a search: their file, table and picture."""

import json
import pathlib
import sys

from absl import logging

from experiments.lib import cli
from vqjax import devices
from vqjax.data import files, json_files
from vqjax.search import footprint, operating_points, pipeline, plots
from vqjax.search.operating_points import Point

_STAGES = pipeline.STAGES
_MAX_ROWS = 40
_JOINED = ("bytes", "baselines")  # Of the header, {} if there are none.


_NUMBER = (int, float)
_FIELDS = {"header": dict, "points": [dict], "latency": [dict]}
_POINT = {
  "series": str,
  "setting": dict,
  "recall": dict,
  "qps": _NUMBER,
  "stage_us": dict,
}
_LATENCY = {
  "series": str,
  "setting": dict,
  "p50_ms": _NUMBER,
  "p95_ms": _NUMBER,
}


class Record:
  """Points by series and setting, in a file that is whole after each of them.

  The file is one JSON object with a line for each point.
  """

  def __init__(
    self, path, header: dict, *, resume: bool, recall: str = "1-recall@1"
  ):
    """Opens an earlier record to resume, or begins one.

    `recall` is the kind by which the best settings are told.

    Raises:
      ValueError: The earlier record was measured with something else.
    """
    self.path, self.header = pathlib.Path(path), header
    self.points, self.latency, self.recall = [], [], recall
    if resume and self.path.exists():
      self.points, self.latency = _read(self.path, header)
      logging.info(
        "Resuming after the %d points in %s.", len(self.points), path
      )

  @property
  def picture(self) -> pathlib.Path:
    """Where the picture lies."""
    return _picture(self.path)

  def find(self, series: str, setting: dict) -> dict | None:
    """Returns the point of a series at a setting; None if it is missing."""
    known = lambda at: {k: v for k, v in at.items() if v is not None}
    same = lambda p: (
      p["series"] == series and known(p["setting"]) == known(setting)
    )
    return next(filter(same, self.points), None)

  def add(self, points: list[dict]) -> None:
    """Takes points, writes the file anew, and prints them as JSON lines.

    These go to a standard output of their own: a file, or another program.
    """
    self.points += points
    self.save()
    if cli.has_own_stdout():
      lines = [json.dumps(point) + "\n" for point in points]
      sys.stdout.write("".join(lines))
      sys.stdout.flush()

  def add_latency(self, row: dict) -> None:
    """Takes the times of a series, for earlier ones, and writes the file."""
    others = [r for r in self.latency if r["series"] != row["series"]]
    self.latency = [*others, row]
    self.save()

  def is_timed(self, series: str) -> bool:
    """Whether single queries were timed at the best setting of a series."""
    rows = [r["setting"] for r in self.latency if r["series"] == series]
    return rows == [self.best(series)]

  def save(self) -> None:
    """Writes the file, whole or not at all."""
    lines = ",\n".join(map(json.dumps, self.points))
    text = (
      f'{{"header": {json.dumps(self.header, indent=1)},\n'
      f'"latency": {json.dumps(self.latency, indent=1)},\n'
      f'"points": [\n{lines}\n]}}\n'
    )
    with files.atomic_output(self.path, overwrite=True) as temporary:
      temporary.write_text(text, encoding="utf-8")

  def series(self, recall: str) -> dict[str, list[Point]]:
    """Points of one kind of recall, by series, those that lack it left out."""
    found = {}
    for p in self.points:
      if recall in p["recall"]:
        point = Point(p["setting"], p["recall"][recall], p["qps"])
        found.setdefault(p["series"], []).append(point)
    return found

  def best(self, name: str, slack: float = 0.01) -> dict:
    """The fastest point of a series within `slack` of its best recall."""
    points = self.series(self.recall)[name]
    top = max(point.recall for point in points)
    return operating_points.fastest(points, (1 - slack) * top).setting

  def draw(self) -> None:
    """Draws the fronts, with the bytes of a vector behind the names."""
    label = lambda name: f"{name}, {self._size(name)}"
    panels = {}
    for recall in self.points[0]["recall"]:
      if recall in ("1-recall@1", "knn_recall@10"):
        series = self.series(recall).items()
        panels[recall] = {label(name): points for name, points in series}
    threads = self.header["threads"]
    lists = cli.count(self.header["num_lists"], "list")
    title = (
      f"{self.header['num_vectors']:,} vectors, {lists}; threads: "
      f"{threads['faiss']} faiss, {threads['jax']} JAX"
    )
    plots.plot_panels(self.picture, panels, title=title)

  def _size(self, name: str) -> str:
    """Bytes of a vector in memory, for the picture."""
    memory = self.header["memory"].get(name)
    if memory is None:  # Measured by an earlier version.
      return f"{self.header['bytes'][name]} bytes without ids"
    found = footprint.from_json(memory)
    each = f"{found.each:.3g}" if found.each < 1000 else f"{found.each:,.0f}"
    return f"{each} bytes + {found.shared / 1e6:.3g} MB in memory"

  def memory_table(self) -> str:
    """Bytes of each series in memory and on disk."""
    found = self.header["memory"].items()
    return cli.table(
      *footprint.table({k: footprint.from_json(v) for k, v in found})
    )

  def table(self) -> str:
    """The front of each series, and where its time goes."""
    names = list(self.points[0]["recall"])
    knobs = list(dict.fromkeys(k for p in self.points for k in p["setting"]))
    shown = [k for k in knobs if any(p["setting"].get(k) for p in self.points)]
    rows = []
    for series, points in self.series(self.recall).items():
      best = operating_points.front(points)
      for point in best[-_MAX_ROWS:]:
        rows.append(self._row(series, point.setting, names, shown))
    header = ["front of", *shown, *names, "qps"]
    if any(p["stage_us"] for p in self.points):
      header += [*(f"{stage} us" for stage in _STAGES), "decoded"]
    return cli.table(header, [row[: len(header)] for row in rows])

  def _row(self, series, setting, names, knobs) -> list[str]:
    point = self.find(series, setting)
    none = lambda value, text: text if value is not None else ""
    stages = [point["stage_us"].get(stage) for stage in _STAGES]
    decoded = point.get("decoded_per_query")
    return [
      series,
      *(none(setting.get(k), f"{setting.get(k)}") for k in knobs),
      *(f"{point['recall'][name]:.4f}" for name in names),
      f"{point['qps']:,.0f}",
      *("" if us is None else f"{us:.1f}" for us in stages),
      "" if decoded is None else f"{decoded:.1f}",
    ]

  def latency_table(self) -> str:
    """Times of single queries."""
    rows = []
    for row in self.latency:
      point = self.find(row["series"], row["setting"])
      at = " ".join(f"{k}={v}" for k, v in row["setting"].items() if v)
      recall = f"{point['recall'][self.recall]:.4f}"
      times = [f"{row[name]:.2f}" for name in ("p50_ms", "p95_ms")]
      rows.append([row["series"], at, recall, *times])
    header = ["single queries", "setting", self.recall, "p50 ms", "p95 ms"]
    return cli.table(header, rows)


def check_output(path, *, resume: bool) -> None:
  """Raises unless a record may be written at `path`; nothing is written."""
  path = pathlib.Path(path)
  if path.suffix != ".json":
    raise ValueError(f"--output must end in .json; got {path}.")
  if resume and _picture(path).exists() and not path.exists():
    files.check_output(_picture(path))  # Of something else: refused.
  for file in (path, _picture(path)):
    files.check_output(file, overwrite=True)


def _picture(path: pathlib.Path) -> pathlib.Path:
  return path.with_suffix(".png")


def threads(num_faiss: int) -> dict[str, int]:
  """Threads of faiss; of JAX and the scan."""
  return {"faiss": num_faiss, "jax": devices.num_cpus()}


def _read(path, header: dict) -> tuple[list[dict], list[dict]]:
  """Points and latencies of an earlier record of the same search."""
  try:
    found = json_files.read_json(path)
    json_files.check_fields(path, found, _FIELDS)
    for point in found["points"]:
      json_files.check_fields(path, point, _POINT)
    for row in found["latency"]:
      json_files.check_fields(path, row, _LATENCY)
  except ValueError as error:
    raise ValueError(
      f"{path} is no record of a search: {error} Choose another --output, "
      "begin anew by --overwrite, or remove it."
    ) from error
  before, measured = found["header"], (found["points"], found["latency"])
  # Follows from the files, and is no part of what is measured.
  header["memory"] = {**before.pop("memory", {}), **header.pop("memory", {})}
  for name, value in header.items():
    if name == "memory":
      continue
    was = before.get(name)
    if name in _JOINED:  # Baselines of before stay in tables and pictures.
      was, value = {**value, **(was or {})}, {**(was or {}), **value}
      header[name] = value
    if was != value:
      raise ValueError(
        f"{path} was measured with {name} {was}, now it is {value}; choose "
        "another --output, or begin anew by --overwrite."
      )
  return measured
