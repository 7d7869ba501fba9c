"""Reports on semantic ids, with what their codec and vectors say of them."""

import numpy as np

from vqjax.codec import Codec
from vqjax.data import batches
from vqjax.ids import duplicates, groups
from vqjax.ids import report as report_lib
from vqjax.interop import faiss_io
from vqjax.search import drift

_QUERIES, _BLOCK = 1000, 65_536
# Append warns of new items unlike the published ones; of few it cannot tell.
_MOST_SHARED = 1.5


def neighbours(vectors, rows_N=None):
  """Returns rows `[Q]` and the 10 nearest other rows of each, `[Q, G]`.

  At most 1,000 rows, spread evenly, are compared with all; None for one row.

  Args:
    vectors: Of all items.
    rows_N: The rows to look at; None for all.
  """
  num = len(vectors) if rows_N is None else len(rows_N)
  if num < 2:
    return None
  count = min(report_lib.NEIGHBOURS, num - 1)
  rows_Q = batches.evenly_spaced_rows(num, _QUERIES)
  all_N = np.arange(num) if rows_N is None else rows_N
  blocks = (
    batches.read_rows(vectors, all_N[at : at + _BLOCK])
    for at in range(0, num, _BLOCK)
  )
  queries_QD = batches.read_rows(vectors, all_N[rows_Q])
  ids_QR = faiss_io.knn(queries_QD, blocks, count + 1)[1]
  is_other_QR = ids_QR != rows_Q[:, None]
  # Of more duplicates than results the row itself may be missing.
  is_other_QR[is_other_QR.all(axis=1), -1] = False
  return rows_Q, ids_QR[is_other_QR].reshape(len(rows_Q), count)


def of_all(made, vectors, items_N, codec: Codec) -> dict:
  """Returns the report on ids that were made at once.

  Args:
    made: `semantic_ids.Made`.
    vectors: Of the items.
    items_N: Their item ids.
    codec: What made the codes.
  """
  near = neighbours(vectors)
  sizes = codec.codebook_sizes[: made.raw_NL.shape[1]]
  before = report_lib.figures(made.raw_NL, sizes, near)
  after = report_lib.figures(made.codes_NL, made.sizes, near)
  for figures, error_N in (
    (before, made.raw_errors_N),
    (after, made.errors_N),
  ):
    figures["mse"] = float(error_N.mean())
    if made.variance > 0:
      figures["relative_error"] = figures["mse"] / made.variance
  numbers = [k for k, v in before.items() if isinstance(v, int | float)]
  found = dict(made.found)
  if before["mse"] > 0:
    found["added_error"] = after["mse"] / before["mse"] - 1
  return {
    "before": before,
    "after": after,
    "delta": {name: after[name] - before[name] for name in numbers},
    "resolver": found,
    "duplicates": duplicates.listing(items_N, made.checksums_N),
  }


def of_mapping(codes_NL, sizes=None, vectors=None, items_N=None, rows_N=None):
  """Returns the report on ids that others have made.

  Args:
    codes_NL: The ids, -1 for a token that one does not have.
    sizes: Codewords at each level; None for what the largest code says.
    vectors: For neighbours and duplicates, or None.
    items_N: Item ids.
    rows_N: Row of each item in the vectors.
  """
  if vectors is None:
    return {"after": report_lib.figures(codes_NL, sizes)}
  checksums = [
    duplicates.checksums(batches.read_rows(vectors, rows_N[at : at + 8192]))
    for at in range(0, len(rows_N), 8192)
  ]
  near = neighbours(vectors, rows_N)
  return {
    "after": report_lib.figures(codes_NL, sizes, near),
    "duplicates": duplicates.listing(items_N, np.concatenate(checksums)),
  }


def of_appended(made, items_N, published: dict) -> dict:
  """Returns the report on ids to which new ones were appended.

  `append` compares the new items with what the published ones were: their
  error, the codewords that they use, and how many codes were taken already.
  `warnings` says in sentences what is far off.

  Args:
    made: `semantic_ids.Made`.
    items_N: All item ids.
    published: Figures of the first ids: `mse` and `sharing_rate`.
  """
  num_levels = made.raw_NL.shape[1]
  old_FL = made.codes_NL[: made.num_published, :num_levels]
  counts_N = groups.counts_of(np.concatenate([old_FL, made.raw_NL]))
  num = len(made.raw_NL)
  found = {
    "items": num,
    "mse": float(made.raw_errors_N.mean()),
    "published_mse": published["mse"],
    "sharing_rate": float((counts_N[made.num_published :] > 1).mean()),
    "published_sharing_rate": published["sharing_rate"],
    "levels": drift.usage(old_FL, made.raw_NL, made.sizes[:num_levels]),
    "added_error": float(made.errors_N.mean() - made.raw_errors_N.mean()),
  }
  found["warnings"] = _warnings(found) if num >= drift.FEW else []
  return {
    "after": report_lib.figures(made.codes_NL, made.sizes),
    "append": found,
    "resolver": made.found,
    "duplicates": duplicates.listing(items_N, made.checksums_N),
  }


def _warnings(found: dict) -> list[str]:
  """What sets new items apart from those that were published."""
  said = []
  if found["mse"] > drift.MOST_ERROR * found["published_mse"]:
    said.append(
      f"The squared error of new items is {found['mse']:.4g}, that of the "
      f"published ones {found['published_mse']:.4g}: the codec was trained on "
      "other vectors."
    )
  for number, level in enumerate(found["levels"], 1):
    if drift.is_less_diverse(level):
      said.append(
        f"New items use {level['used']} codewords of level {number}, as many "
        f"published ones {level['expected']:.0f}: they are less diverse."
      )
  rate = found["published_sharing_rate"]
  noise = 3 * (rate * (1 - rate) / found["items"]) ** 0.5
  most = max(_MOST_SHARED * rate, rate + noise) + 0.02
  if found["sharing_rate"] > most:
    said.append(
      f"{found['sharing_rate']:.1%} of the new items have the code of another "
      f"item, {rate:.1%} of the published ones had: "
      "the codec tells new items apart less well."
    )
  return said
