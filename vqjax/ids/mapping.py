"""Mappings of items to ids that other programs have made, as codes."""

import re

import numpy as np

_TOKEN = re.compile(r"<?([A-Za-z]+)_(\d{1,9})>?")


def parse(found: dict, name: str) -> tuple[np.ndarray, np.ndarray, int]:
  """Returns items `[N]`, codes `[N, L]` and the number of the first token.

  Ids are lists of tokens, `["<a_12>", "<b_7>"]`, or of numbers, or one text
  `"<a_12><b_7>"`; shorter ones end in -1. If no level has a 0, tokens are
  taken to count from 1, and codes are one less.

  Args:
    found: Ids by item, of a JSON file.
    name: What messages call it.

  Raises:
    ValueError: An id is none of these.
  """
  if not found:
    raise ValueError(f"{name} has no items.")
  rows = [_codes(item, value, name) for item, value in found.items()]
  width = max(map(len, rows))
  codes_NL = np.array([row + [-1] * (width - len(row)) for row in rows])
  first = int(codes_NL.max() > 0 and not (codes_NL == 0).any())
  return (
    np.array(list(found), object),
    np.where(codes_NL > 0, codes_NL - first, codes_NL),
    first,
  )


def _codes(item: str, value, name: str) -> list[int]:
  if isinstance(value, str):
    tokens = re.findall(r"<[^<>]*>", value) or value.split()
  else:
    tokens = value if isinstance(value, list) else [None]
  codes = [_code(token) for token in tokens]
  if not codes or None in codes:
    text = repr(value)
    text = text if len(text) < 60 else f"{text[:57]}..."
    raise ValueError(
      f'{name}: the id of item {item!r} must be tokens, ["<a_12>", "<b_7>"], '
      f"or whole numbers, got {text}."
    )
  return codes


def _code(token) -> int | None:
  if isinstance(token, int) and not isinstance(token, bool):
    return token if 0 <= token < 1 << 31 else None
  match = _TOKEN.fullmatch(token) if isinstance(token, str) else None
  return int(match[2]) if match else None


def rows_of(items_N, ids_R, num: int, name: str) -> np.ndarray:
  """Returns the row of each item in vectors with item ids `ids_R`.

  Without item ids (None) items are row numbers below `num`.

  Raises:
    ValueError: An item has no vector.
  """
  ids = range(num) if ids_R is None else ids_R.tolist()
  row_of = {str(item): row for row, item in enumerate(ids)}
  rows = [row_of.get(str(item)) for item in items_N.tolist()]
  if None in rows:
    item = items_N[rows.index(None)]
    raise ValueError(
      f"{name} has an id of item {item!r}, which has no vector in the data: "
      + (
        f"without --ids items are row numbers, 0 to {num - 1}."
        if ids_R is None
        else "give the data and the item ids of this mapping."
      )
    )
  return np.array(rows)
