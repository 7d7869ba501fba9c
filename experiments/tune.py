r"""Recommends a codec and a search for a file of vectors, by trying some.

  vqjax tune --data=base.npy --queries=query.npy --bytes=16
  vqjax tune --data=base.npy --queries=query.npy --bytes=16 --recall=.6
  vqjax tune --data=base.npy --bytes=8 --memory=2GB --latency=1

A sample of --data is drawn by --seed. pq, opq (8 and 4 bits a code), rq,
qinco2_xs and qinco2_s of --bytes bytes are fitted to it, as far as --seconds
allow: pq always, another only if it would probably end in time, as a fit of
few vectors tells. Their error is that of vectors which were held out.

With --recall, --memory or --latency two of them, the best with and without a
network, are also searched in lists, with and without a rabitq refiner:

  --recall   knn_recall@10, the share of the true ten nearest neighbours among
             the first ten results; the search that reaches it in the fewest
             microseconds per query is recommended. Without it: the most recall.
  --memory   bytes in memory of codes, norms, refiner, centroids, tables and
             codec, for all vectors of --data: 500MB, 2GB, or a number of bytes.
  --latency  milliseconds of a query that is searched alone, the median.

Recall and times are those of the sample. In a larger file a search takes longer
and finds fewer: the last of the commands that are printed measures it there.

The folder --output gets config.py, for vqjax train, tune.json with all figures,
and tune.md with the tables, what was chosen from them and why. If interrupted,
run the same command again: what was tried is kept. Other limits, --codecs or
more --seconds try only what is missing and choose again from all that is there.
"""

import pathlib
import re
import time

from absl import logging

import vqjax
from experiments.lib import (
  cli,
  run_folder,
  tune_budget,
  tune_choice,
  tune_codecs,
  tune_search,
)
from vqjax import __version__
from vqjax.core import check_range
from vqjax.data import datasets, files

REQUIRED = ("data", "bytes")
OPTIONS = {
  "data": cli.Option(
    str, None, "Vectors (.npy, .bvecs, items.parquet#embedding)."
  ),
  "queries": cli.Option(
    str, None, "Queries; some vectors of --data, taken out, if unset."
  ),
  "bytes": cli.Option(int, None, "Bytes of a code."),
  "recall": cli.Option(
    float, None, "knn_recall@10 that a search must reach, as .6."
  ),
  "memory": cli.Option(
    str, None, "Most bytes in memory, of all vectors: 500MB, 2GB, 1000000."
  ),
  "latency": cli.Option(
    float, None, "Most milliseconds of a query that is searched alone."
  ),
  "metric": cli.Option(str, "l2", "l2, ip or cosine."),
  "sample": cli.Option(
    int, 10_000, "Vectors to fit, and as many others to search, if there are."
  ),
  "seconds": cli.Option(
    float, 120.0, "Of fitting; pq apart, none is begun that would end later."
  ),
  "codecs": cli.Option(
    str, None, "Try only these, as pq,rq,qinco2_xs; all if unset."
  ),
  "seed": cli.Option(int, 0, "Of the sample and of all codecs."),
  "threads": cli.Option(
    int, None, "CPUs to use; all that the process may use if unset."
  ),
  "output": cli.Option(str, "tune", "Folder to write."),
}
_UNITS = {"": 1, "b": 1, "kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_RECORD, _TABLES, _CONFIG = "tune.json", "tune.md", "config.py"


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Returns what tune.json holds: figures, choice and commands."""
  cli.keep_compiled()
  cli.require(config, *REQUIRED)
  asked = _asked(config)
  tried = _candidates(config)
  vectors, queries = _open(config)
  reasons = [tune_codecs.misfit(c, vectors.shape[1]) for c in tried]
  if all(reasons):
    raise ValueError(
      f"There is nothing to try: {reasons[0]} (--bytes, --codecs)."
    )
  folder = files.user_path(config.output)
  with run_folder.locked(folder):
    record = _open_record(config, folder, vectors, queries)
    _check_own(folder, record)
    is_new = _try_all(config, asked, tried, folder, record, vectors, queries)
    tables = _tables(config, asked, tried, record, len(vectors))
    logging.info("\n%s", "\n\n".join(tables))
    _write_tables(folder, tables)  # Even if nothing can be chosen.
    _recommend(config, asked, folder, record, len(vectors))
    _write_tables(folder, [*tables, record["said"], *record["commands"]])
  logging.info(
    "%s\n%s %s\nNext:\n  %s",
    *(record["said"], "Written:" if is_new else _nothing_new(tried, record)),
    ", ".join(str(folder / name) for name in (_CONFIG, _TABLES, _RECORD)),
    "\n  ".join(record["commands"]),
  )
  return record


def _nothing_new(tried, record) -> str:
  """Says why no codec was tried."""
  if all(_is_tried(record, c.name) for c in tried):
    return "All was tried already:"
  return "Nothing new was tried; written:"


def _asked(config) -> tune_choice.Asked:
  """The limits, checked."""
  check_range("--bytes", config.bytes, 1, 64)
  check_range("--sample", config.sample, tune_codecs.LEAST, 10_000_000)
  check_range("--seconds", config.seconds, 0, 1e9)
  if config.recall is not None and not 0 < config.recall <= 1:
    raise ValueError(
      "--recall is a share of the ten nearest, above 0 and at most 1, as .6; "
      f"got {config.recall:g}."
    )
  if config.latency is not None and not config.latency > 0:
    raise ValueError(
      f"--latency is in milliseconds, above 0; got {config.latency:g}."
    )
  memory = None if config.memory is None else _bytes(config.memory)
  return tune_choice.Asked(config.recall, memory, config.latency)


def _bytes(text: str) -> float:
  """The number of bytes that --memory says."""
  found = re.fullmatch(r"([0-9.]+)\s*([a-z]*)", text.strip().lower())
  try:
    value = float(found[1]) * _UNITS[found[2]]
    if value > 0:
      return value
  except (TypeError, ValueError, KeyError):
    pass
  raise ValueError(
    f"--memory is a number of bytes, as 500MB, 2GB or 1000000; got {text!r}."
  )


def _candidates(config) -> list[tune_codecs.Candidate]:
  """The codecs of --codecs."""
  known = {c.name: c for c in tune_codecs.candidates(config.bytes)}
  names = config.codecs.split(",") if config.codecs else list(known)
  if unknown := [name for name in names if name not in known]:
    raise ValueError(
      f"--codecs must be some of {','.join(known)}; got {unknown[0]!r}."
    )
  return [known[name] for name in known if name in names]


def _open(config):
  """Vectors and queries, None for none."""
  dataset = datasets.resolve(
    base=config.data, queries=config.queries, metric=config.metric
  )
  vectors = datasets.open_split(dataset, "base")
  if len(vectors) < tune_codecs.LEAST:
    raise ValueError(
      f"{config.data} has {len(vectors)} vectors; tune needs at least "
      f"{tune_codecs.LEAST}, because a codebook has 256 codewords."
    )
  if not config.queries:
    return vectors, None
  return vectors, datasets.open_split(dataset, "queries")


def _open_record(config, folder, vectors, queries) -> dict:
  """What was tried before with the same sample; else a new record.

  Raises ValueError if the folder holds figures of something else.
  """
  header = {
    "data": {"num": len(vectors), **files.identify(vectors)},
    "queries": queries is not None and files.identify(queries),
    "bytes": config.bytes,
    "metric": config.metric,
    "sample": config.sample,
    "seed": config.seed,
  }
  path = folder / _RECORD
  if not path.exists():
    for name in (_CONFIG, _TABLES):
      files.check_output(folder / name)
    return {
      "header": header,
      "codecs": [],
      "searches": [],
      "vqjax": __version__,
    }
  record = run_folder.read_json(path, "Remove it, or choose another --output.")
  found = run_folder.differences(record.get("header", {}), header)
  for name, (was, now) in found.items():
    raise ValueError(
      f"{folder} holds figures of another {name}: it was {was}, now it is "
      f"{now}. Give the same, or choose another --output."
    )
  return record


def _check_own(folder, record) -> None:
  """Raises FileExistsError if config.py has been changed."""
  path = folder / _CONFIG
  if path.exists() and files.sha256(path) != record.get("config_sha256"):
    raise FileExistsError(
      f"{path} has been changed since tune wrote it; move it, so that it can "
      "be written anew."
    )


def _try_all(config, asked, tried, folder, record, vectors, queries) -> bool:
  """Tries the codecs and searches that the record lacks, if there are any."""
  waiting = [c for c in tried if not _is_tried(record, c.name)]
  budget = tune_budget.Budget(config.seconds, tried, record)
  reason_of = lambda c, sample=None: (
    tune_codecs.misfit(c, vectors.shape[1])
    or budget.too_long(c, sample, config.seed)
  )
  if all(map(reason_of, waiting)) and not _unsearched(asked, record):
    _leave_out(folder, record, waiting, reason_of)
    return False
  sample = tune_codecs.draw(
    vectors, queries, config.metric, config.sample, config.seed
  )
  record["sample"] = tune_codecs.describe(sample, len(vectors))
  logging.info("%s", record["sample"])
  for candidate in waiting:
    if reason := reason_of(candidate, sample):
      row = {"codec": candidate.name, "left_out": reason}
    else:
      about = budget.guess(candidate)
      row = _try_codec(config, candidate, sample, folder, about)
    _put(record, row)
    _save(folder, record)
    tune_codecs.say(row)
  # More is spent by now than when they were left out.
  late = [c for c in waiting if not _is_tried(record, c.name)]
  _leave_out(folder, record, late, reason_of)
  for name in _unsearched(asked, record):
    codec = vqjax.load(folder / "codecs" / name)
    is_single = asked.latency is not None
    found = tune_search.measure(name, codec, sample, config.seed, is_single)
    others = [s for s in record["searches"] if s["codec"] != name]
    record["searches"] = [*others, *found]
    _save(folder, record)
  return True


def _leave_out(folder, record, candidates, reason_of) -> None:
  """Puts into the record why these were not tried."""
  for candidate in candidates:
    _put(record, {"codec": candidate.name, "left_out": reason_of(candidate)})
  _save(folder, record)


def _put(record, row: dict) -> None:
  others = [r for r in record["codecs"] if r["codec"] != row["codec"]]
  record["codecs"] = [*others, row]


def _is_tried(record, name: str) -> bool:
  """Whether a codec was fitted; one that was left out may be by now."""
  return any(r["codec"] == name and "mse" in r for r in record["codecs"])


def _try_codec(config, candidate, sample, folder, about) -> dict:
  """Fits, measures and saves a codec; returns its row."""
  logging.info("Trying %s.", candidate.name)
  began = time.monotonic()
  codec = tune_codecs.fit(candidate, sample, config.seed, about)
  row = {"codec": candidate.name, **tune_codecs.measure(codec, sample)}
  codec.save(folder / "codecs" / candidate.name, overwrite=True)
  return {**row, "seconds": round(time.monotonic() - began, 1)}


def _unsearched(asked, record) -> list[str]:
  """Codecs worth searching that were not searched, or not query by query."""
  if not asked.is_search:
    return []
  rows = [r for r in record["codecs"] if "mse" in r]
  rows.sort(key=lambda row: -row[f"knn_recall@{tune_codecs.K}"])
  everything = tune_codecs.candidates(record["header"]["bytes"])
  learned = [c.name for c in everything if c.is_learned]
  wanted = [r["codec"] for r in rows if r["codec"] in learned][:1]
  wanted += [r["codec"] for r in rows if r["codec"] not in learned][:1]
  is_timed = lambda s: any("ms" in point for point in s["points"])
  searches = record["searches"]
  known = [s["codec"] for s in searches if asked.latency is None or is_timed(s)]
  return [name for name in wanted if name not in known]


def _save(folder: pathlib.Path, record: dict) -> None:
  files.write_json(folder / _RECORD, record, overwrite=True)


def _tables(config, asked, tried, record, num: int) -> list[str]:
  """The tables of all codecs that were tried, and of their searches."""
  names = [candidate.name for candidate in tried]
  rows = [r for r in record["codecs"] if "mse" in r or r["codec"] in names]
  tables = [record.get("sample", ""), tune_codecs.report(rows)]
  budget = tune_budget.Budget(config.seconds, tried, record)
  if passed := budget.passed():
    tables[1] += f"\n{passed}"
  if asked.is_search:
    tables.append(tune_search.report(record["searches"], num))
  return tables


def _recommend(config, asked, folder, record, num: int) -> None:
  """Chooses, writes config.py, and puts the choice into the record."""
  if not any("mse" in row for row in record["codecs"]):
    raise ValueError(
      "Nothing was tried, so there is nothing to choose from: "
      + "; ".join(f"{r['codec']}: {r['left_out']}" for r in record["codecs"])
      + "."
    )
  if asked.is_search:
    choice = tune_choice.of_searches(record["searches"], asked, num)
  else:
    choice = tune_choice.of_codecs(record["codecs"])
  everything = tune_codecs.candidates(config.bytes)
  (candidate,) = [c for c in everything if c.name == choice.codec]
  text = tune_choice.config_text(config, candidate, num)
  with files.atomic_output(folder / _CONFIG, overwrite=True) as temporary:
    temporary.write_text(text, encoding="utf-8")
  record["config_sha256"] = files.sha256(folder / _CONFIG)
  record["choice"] = {"codec": choice.codec, "why": choice.why}
  name = choice.codec
  if choice.point:
    record["choice"] |= {"refiner": choice.series["refiner"], **choice.point}
    at = [f"{k}={v}" for k, v in choice.point["setting"].items()]
    at[0] += f" of {cli.count(choice.series['num_lists'], 'list')}"
    name = ", ".join([tune_search.label(choice.series), *at])
  record["said"] = f"Recommended: {name}, because {choice.why}."
  record["commands"] = tune_choice.commands(config, choice, num)
  _save(folder, record)


def _write_tables(folder, parts: list[str]) -> None:
  text = "# vqjax tune\n\n```\n" + "\n\n".join(parts) + "\n```\n"
  with files.atomic_output(folder / _TABLES, overwrite=True) as temporary:
    temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
