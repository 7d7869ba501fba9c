"""Ground truths of data sets: opened, and checked before long work."""

import dataclasses

from vqjax import evaluation
from vqjax.data import datasets
from vqjax.search.truth_check import Files


def of_dataset(dataset) -> tuple[Files, list[int]]:
  """Opens its files, and numbers of rows that a ground truth may be of."""
  whole = dataclasses.replace(dataset, num_base=None)
  base = datasets.open_split(whole, "base") if dataset.base else None
  truth = None
  if dataset.groundtruth:
    truth = datasets.open_split(dataset, "groundtruth")
  files = Files(
    datasets.open_split(dataset, "queries"),
    *(base, truth, dataset.metric),
    {name: str(getattr(dataset, name)) for name in datasets.SPLITS},
  )
  sizes = [] if base is None else [len(base)]
  return files, [*sizes, *([dataset.num_base] if dataset.num_base else [])]


def check_dataset(dataset) -> None:
  """Raises ValueError if the ground truth is not of queries and base."""
  if dataset.groundtruth and dataset.queries and dataset.base:
    files, sizes = of_dataset(dataset)
    evaluation.read_ids(files, min(sizes), sizes)
