"""Recognises a ground truth of other files, and says what it is instead.

Some queries are compared: none of the rows that the file names as nearest may
be farther than others that are at hand, which are the other rows that it names
and a sample of the base. A base of a billion rows is not read for that.
"""

from typing import Any, NamedTuple

import numpy as np

from vqjax.data import batches, unit
from vqjax.data.datasets import METRICS

_NUM_QUERIES = 64  # That are compared with
_NUM_SAMPLED = 20_000  # Rows of the base,
_NUM_CHECKED = 10  # and neighbours of each query.
_NOISE = 1e-5  # Of squared norms: how exact other programs have distances.
_BLANK = 0xFFFFFFFF  # -1 of 32 bits that was read as unsigned.


class Files(NamedTuple):
  """Open files that a recall is measured with; None if there is none."""

  queries: Any
  base: Any  # All of its rows.
  groundtruth: Any
  metric: str
  names: dict[str, str]  # Of these files, for messages.


class _Sample(NamedTuple):
  """Some queries, and rows of the base to compare with."""

  xq_QD: np.ndarray
  rows_N: np.ndarray
  x_ND: np.ndarray
  base: Any
  size: int


def read_ids(files: Files) -> np.ndarray:
  """The ids of the ground truth, int64 `[Q, G]`, -1 if there are no more.

  Raises:
    ValueError: They are no ids, or of another number of queries.
  """
  name, truth = files.names["groundtruth"], files.groundtruth
  num = len(files.queries)
  if truth.dtype.kind not in "iu":
    raise ValueError(
      f"{name} must hold integer ids, got {truth.dtype}; write the ids as "
      "integers, as np.save(path, ids.astype(np.int32))."
    )
  if len(truth) < num:
    what = f"got {len(truth)}"
    if truth.shape[1] == num:
      what = f"got shape {truth.shape}, which is transposed; write ids.T"
    raise ValueError(
      f"{name} must have a row for each of the {num} queries, {what}."
    )
  ids_QG = np.array(truth[:num]).astype(np.int64)
  if files.base is None or len(files.base) <= _BLANK:
    ids_QG[ids_QG == _BLANK] = -1
  _check_blanks(name, ids_QG)
  return ids_QG


def _check_blanks(name, ids_QG) -> None:
  """Raises ValueError if a row is no list of ids with -1 at its end."""
  if (ids_QG < -1).any():
    q, r = np.argwhere(ids_QG < -1)[0]
    raise ValueError(
      f"{name} has id {ids_QG[q, r]} for query {q}; ids are rows of the base, "
      "or -1 for missing neighbours."
    )
  is_late_QG = (ids_QG[:, :-1] < 0) & (ids_QG[:, 1:] >= 0)
  if is_late_QG.any():
    q = int(np.argwhere(is_late_QG)[0, 0])
    raise ValueError(
      f"{name} has -1, no neighbour, in front of a neighbour of query {q}; "
      "neighbours come first."
    )
  if (ids_QG[:, 0] < 0).all():
    raise ValueError(f"{name} has -1 alone: no query has a neighbour.")


def check(
  files: Files, ids_QG: np.ndarray, sizes, *, slack: float = 0.0
) -> int:
  """Compares ids with the base; returns of how many first rows they are.

  That is the least of `sizes`, numbers of rows that may have been searched,
  that they fit. A share `slack` of the queries may have others, as an
  approximate search finds.

  Raises:
    ValueError: They fit none of them. The message says what they fit instead.
  """
  at = np.flatnonzero(ids_QG[:, 0] >= 0)
  at = at[batches.evenly_spaced_rows(len(at), _NUM_QUERIES)]
  xq_QD = batches.read_rows(unit.raw(files.queries), at)
  largest, misfit, sample = int(ids_QG.max()), None, None
  for size in sorted(set(sizes)):
    sample = _read(files, xq_QD, size)
    if largest < size:
      found = _misfit(sample, ids_QG[at], files.metric, slack=slack)
      if found is None:
        _check_twice(files, ids_QG)
        return size
      misfit = misfit or found
  raise ValueError(_refusal(files, ids_QG, at, sample, misfit, slack))


def _read(files: Files, xq_QD, size: int) -> _Sample:
  base, rows_N = (
    unit.raw(files.base),
    batches.evenly_spaced_rows(size, _NUM_SAMPLED),
  )
  return _Sample(xq_QD, rows_N, batches.read_rows(base, rows_N), base, size)


def _check_twice(files: Files, ids_QG) -> None:
  """Raises ValueError if a row comes twice for a query."""
  sorted_QG = np.sort(ids_QG, axis=1)
  is_twice_QG = (np.diff(sorted_QG, axis=1) == 0) & (sorted_QG[:, 1:] >= 0)
  if is_twice_QG.any():
    q, r = np.argwhere(is_twice_QG)[0]
    raise ValueError(
      f"{files.names['groundtruth']} names row {sorted_QG[q, r]} twice for "
      f"query {q}; the neighbours of a query are different rows."
    )


def errors(xq_QD, x_QRD, metric: str) -> np.ndarray:
  """What is less for nearer rows, float64 `[Q, R]`.

  Squared distances, or minus inner products or cosines.
  """
  xq_Q1D, x_QRD = np.asarray(xq_QD, float)[:, None], np.asarray(x_QRD, float)
  if metric == "l2":
    return np.square(x_QRD - xq_Q1D).sum(axis=-1)
  error_QR = -(x_QRD * xq_Q1D).sum(axis=-1)
  if metric == "ip":
    return error_QR
  size_QR = np.linalg.norm(x_QRD, axis=-1) * np.linalg.norm(xq_Q1D, axis=-1)
  return np.where(size_QR > 0, error_QR / np.where(size_QR, size_QR, 1), np.inf)


def _near(sample: _Sample, metric: str, num: int, sign: int) -> np.ndarray:
  """Rows of the sample that are nearest, by `sign` -1 farthest, `[Q, num]`."""
  # Distances keep their digits when what the vectors share is taken away.
  mean_D = sample.x_ND.mean(axis=0) if metric == "l2" else 0
  xq_QD, x_ND = sample.xq_QD - mean_D, sample.x_ND - mean_D
  error_QN = -(xq_QD @ x_ND.T)
  size_N = np.linalg.norm(x_ND, axis=1)
  if metric == "l2":
    error_QN = 2 * error_QN + np.square(size_N)
  if metric == "cosine":
    error_QN /= np.where(size_N, size_N, 1)
  num = min(num, len(x_ND))
  near_QR = np.argpartition(sign * error_QN, num - 1, axis=1)[:, :num]
  return sample.rows_N[near_QR]


def _misfit(
  sample: _Sample, ids_QG, metric: str, sign: int = 1, slack: float = 0.0
):
  """A query, a row it has and one that is nearer; None if there is none."""
  ids_QG = ids_QG[:, :_NUM_CHECKED]
  num = ids_QG.shape[1]
  near_QC = _near(sample, metric, _NUM_CHECKED, sign)
  is_known_QC = (near_QC[:, :, None] == ids_QG[:, None]).any(axis=2)
  rows_QR = np.hstack([ids_QG, np.where(is_known_QC, -1, near_QC)])
  x_ND = batches.read_rows(sample.base, np.maximum(rows_QR, 0).ravel())
  x_QRD = x_ND.reshape(*rows_QR.shape, -1)
  error_QR = sign * errors(sample.xq_QD, x_QRD, metric)
  error_QR = np.where(rows_QR < 0, np.inf, error_QR)
  order_QG = np.argsort(error_QR, axis=1, kind="stable")[:, :num]
  best_QG = np.take_along_axis(error_QR, order_QG, axis=1)
  noise_Q = _noise(sample.xq_QD, x_QRD, metric)
  if metric == "l2":  # Far from the origin that would be more than distances.
    noise_Q = np.minimum(
      noise_Q, np.abs(best_QG[np.isfinite(best_QG)]).mean() / 4
    )
  with np.errstate(invalid="ignore"):  # inf - inf, of no neighbour.
    is_wrong_QG = error_QR[:, :num] > best_QG + noise_Q[:, None]
  is_wrong_QG &= ids_QG >= 0
  if is_wrong_QG.any(axis=1).mean() <= slack:
    return None
  q, r = np.argwhere(is_wrong_QG)[0]
  return int(q), int(ids_QG[q, r]), int(rows_QR[q, order_QG[q, r]])


def _noise(xq_QD, x_QRD, metric: str) -> np.ndarray:
  if metric == "cosine":
    return np.full(len(xq_QD), 2 * _NOISE)
  size_QR = np.square(x_QRD, dtype=float).sum(axis=-1)
  return _NOISE * (
    size_QR.max(axis=1) + np.square(xq_QD, dtype=float).sum(axis=1)
  )


def _refusal(files: Files, ids_QG, at, sample: _Sample, misfit, slack) -> str:
  """What is wrong, and what the ids are instead."""
  names, largest = files.names, int(ids_QG.max())
  if largest >= sample.size:
    what = (
      f"it names row {largest}, but the base has only {sample.size} (rows 0 to "
      f"{sample.size - 1})"
    )
  else:
    q, row, nearer = misfit
    what = (
      f"for query {at[q]} it has row {row}, which is farther than row {nearer}"
    )
  remedy = _explain(files, ids_QG, at, sample, slack)
  return (
    f"{names['groundtruth']} must name the vectors of {names['base']} nearest "
    f"({files.metric}) to each query of {names['queries']}, nearest first; "
    f"{what}. {remedy} Or leave the ground truth out: it is found by exact "
    "search."
  )


def _explain(files: Files, ids_QG, at, sample: _Sample, slack) -> str:
  """What the ids are instead, and what to do."""
  tables = [("", ids_QG[at])]
  if files.groundtruth.shape[1] == len(ids_QG):
    whole = np.array(files.groundtruth).astype(np.int64).T
    if len(whole) > at.max():
      tables.append(("The file is transposed: write ids.T.", whole[at]))
  for said, ids in tables:
    for shift in (0, 1):
      for order in ("", "last", "farthest"):
        for metric in (files.metric, *METRICS):
          found = np.where(ids < 0, ids, ids - shift)
          if order == "last":
            found = _reverse(found)
          is_in = found.max() < sample.size and found.min() >= -1
          sign = -1 if order == "farthest" else 1
          if is_in and _is_fit(sample, found, metric, sign, slack):
            what = _say(files.metric, metric, shift, order)
            return f"{said} {what}".strip()
  return (
    "They fit no metric in any order: the file is of other queries or of "
    "another base. Give the ground truth of these files."
  )


def _is_fit(sample: _Sample, ids_QG, metric: str, sign: int, slack) -> bool:
  """Whether the ids are these rows, and not just any would do.

  Far from the origin all cosines are as good as equal.
  """
  if _misfit(sample, ids_QG, metric, sign, slack) is not None:
    return False
  any_QG = np.random.default_rng(0).choice(sample.rows_N, ids_QG.shape)
  return _misfit(sample, any_QG, metric, sign, slack) is not None


def _say(wanted: str, metric: str, shift: int, order: str) -> str:
  parts = []
  if shift:
    parts.append("Its ids are counted from 1: subtract 1.")
  if order == "last":
    parts.append("It has the farthest of them first: reverse each row.")
  if order == "farthest":
    parts.append(
      "It has the farthest rows of the base instead of the nearest: sort the "
      "other way."
    )
  if metric != wanted:
    parts.append(
      f"It is right for the metric {metric}, but {wanted} is the metric here: "
      f"give the neighbours by {wanted}, or use {metric} from the training on."
    )
  return " ".join(parts)


def _reverse(ids_QG) -> np.ndarray:
  """Rows in reverse; -1 stays at the end."""
  reversed_QG = ids_QG[:, ::-1]
  order_QG = np.argsort(reversed_QG < 0, axis=1, kind="stable")
  return np.take_along_axis(reversed_QG, order_QG, axis=1)
