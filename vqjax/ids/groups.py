"""Items that share an id, or the first codewords of one.

Codes are integers `[N, L]`; -1 stands for a token that an id does not have.
"""

from collections.abc import Iterator

import numpy as np


def prefix_labels(codes_NL) -> Iterator[tuple[np.ndarray, int]]:
  """Yields labels `[N]` and their number for prefixes of 1, 2, ... L codes.

  Items have the same label if their first codes are the same.
  """
  label_N, num = np.zeros(len(codes_NL), np.int64), 1
  for code_N in np.asarray(codes_NL).T:
    code_N = code_N.astype(np.int64) + 1
    key_N = label_N * (int(code_N.max(initial=0)) + 1) + code_N
    values, label_N = np.unique(key_N, return_inverse=True)
    num = len(values)
    yield label_N, num


def labels(codes_NL, length: int | None = None) -> tuple[np.ndarray, int]:
  """Returns labels `[N]` and their number, by the first `length` codes."""
  codes_NL = np.asarray(codes_NL)[:, :length]
  if not codes_NL.shape[1]:
    return np.zeros(len(codes_NL), np.int64), 1
  *_, found = prefix_labels(codes_NL)
  return found


def counts_of(codes_NL) -> np.ndarray:
  """Returns how many items have the id of each item: `[N]`."""
  label_N, num = labels(codes_NL)
  return np.bincount(label_N, minlength=num)[label_N]


def ranks(label_N) -> np.ndarray:
  """Returns the number `[N]`, from 0, of each item in its group, by row."""
  order_N = np.argsort(label_N, kind="stable")
  sorted_N = label_N[order_N]
  is_first_N = np.r_[True, sorted_N[1:] != sorted_N[:-1]][: len(label_N)]
  at_N = np.arange(len(label_N))
  rank_N = np.empty(len(label_N), np.int64)
  rank_N[order_N] = at_N - np.maximum.accumulate(np.where(is_first_N, at_N, 0))
  return rank_N


def pieces(label_N, rows_n) -> list[np.ndarray]:
  """Returns the rows of each group, rising; groups by their first row."""
  order_n = np.argsort(label_N[rows_n], kind="stable")
  rows_n = rows_n[order_n]
  cuts = np.flatnonzero(np.diff(label_N[rows_n])) + 1
  groups = np.split(rows_n, cuts) if len(rows_n) else []
  return sorted(groups, key=lambda group_n: group_n[0])
