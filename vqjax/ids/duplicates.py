"""Items whose vectors are the same: no codec can tell them apart."""

import hashlib

import numpy as np

from vqjax.ids import groups


def checksums(x_ND) -> np.ndarray:
  """Returns 64 bits of each float32 vector; 0 and -0 are the same number."""
  raw = (x_ND + np.float32(0)).tobytes()
  size = len(raw) // len(x_ND)
  digests = [
    hashlib.blake2b(raw[at : at + size], digest_size=8).digest()
    for at in range(0, len(raw), size)
  ]
  return np.frombuffer(b"".join(digests), "<u8")


def units(checksums_N, codes_FL=None) -> tuple[np.ndarray, np.ndarray]:
  """Returns one row of each set of equal vectors, and the set of each row.

  Rows `[U]` rise. The first `F` items have ids already, `codes_FL`: of these
  equal vectors are one set only if their ids are equal too, and a new item
  belongs to the first of them.
  """
  _, label_N = np.unique(checksums_N, return_inverse=True)
  num_fixed = 0 if codes_FL is None else len(codes_FL)
  key_N = label_N.copy()
  if num_fixed:
    # Published sets by vector and id; a new item takes the key of the first.
    code_F, num = groups.labels(codes_FL)
    key_N *= num
    key_N[:num_fixed] += code_F
    seen, row_S = np.unique(label_N[:num_fixed], return_index=True)
    at_n = np.searchsorted(seen, label_N[num_fixed:]).clip(max=len(seen) - 1)
    is_seen_n = seen[at_n] == label_N[num_fixed:]
    key_N[num_fixed:][is_seen_n] = key_N[row_S[at_n[is_seen_n]]]
  _, rows_U, unit_N = np.unique(key_N, return_index=True, return_inverse=True)
  order_U = np.argsort(rows_U)
  rank_U = np.empty_like(order_U)
  rank_U[order_U] = np.arange(len(order_U))
  return rows_U[order_U], rank_U[unit_N]


def listing(items_N, checksums_N) -> dict:
  """Returns how many items are duplicates, and which, as plain values.

  `floor` is the least collision rate, (N - distinct vectors) / N, without a
  token or an id that says nothing of the vector.
  """
  _, label_N = np.unique(checksums_N, return_inverse=True)
  count_G = np.bincount(label_N)
  rows_n = np.flatnonzero(count_G[label_N] > 1)
  return {
    "items": len(rows_n),
    "distinct_vectors": len(count_G),
    "floor": (len(items_N) - len(count_G)) / len(items_N),
    "groups": [
      items_N[group_n].tolist() for group_n in groups.pieces(label_N, rows_n)
    ],
  }
