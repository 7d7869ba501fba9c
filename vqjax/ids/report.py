"""How good ids are: figures of codes, and of mappings that others have made.

All figures follow from the codes `[N, L]` alone, -1 for a token that an id does
not have; shares of neighbours need the neighbours too.

References: arXiv 2606.10375 (figures of a mapping alone).
"""

import numpy as np

from vqjax.ids import groups

NEIGHBOURS = 10


def figures(codes_NL, sizes, neighbours=None) -> dict:
  """Returns figures of ids, plain values.

  Args:
    codes_NL: Codes of the items.
    sizes: Codewords at each level; None for what the largest code says.
    neighbours: Rows `[Q]` and their nearest other rows `[Q, G]`, or None.

  Returns:
    `items`, `distinct`, `collision_rate` ((N - distinct) / N), `sharing_rate`
    (items whose id is not theirs alone), `largest_group`; in `prefixes`, for
    1, 2, ... codes, the same, `fan_out` and `largest_fan_out` (different next
    codes), `neighbour_share` and `chance_share` (pairs of neighbours, and of
    any two items, that have the prefix in common); in `levels` `size`, `used`,
    `dead`, `utilisation`, `entropy` in bits, `perplexity` and `gini`.
  """
  codes_NL = np.asarray(codes_NL)
  sizes = sizes or [int(code_N.max(initial=-1)) + 1 for code_N in codes_NL.T]
  prefixes, before_N = [], None
  for label_N, num in groups.prefix_labels(codes_NL):
    found = _sharing(label_N, num)
    if before_N is not None:
      pairs = np.unique(before_N * num + label_N)
      fan_out = np.bincount(pairs // num)
      prefixes[-1] |= {
        "fan_out": float(fan_out.mean()),
        "largest_fan_out": int(fan_out.max()),
      }
    if neighbours is not None:
      rows_Q, ids_QG = neighbours
      is_same_QG = label_N[rows_Q][:, None] == label_N[ids_QG]
      found["neighbour_share"] = float(is_same_QG.mean())
    prefixes.append(found)
    before_N = label_N
  whole = ("items", "distinct", "collision_rate", "sharing_rate")
  return {
    **{name: prefixes[-1][name] for name in (*whole, "largest_group")},
    "prefixes": prefixes,
    "levels": [
      level_figures(code_N, size)
      for code_N, size in zip(codes_NL.T, sizes, strict=True)
    ],
  }


def _sharing(label_N, num: int) -> dict:
  """Figures of groups with the same label."""
  count_G = np.bincount(label_N, minlength=num).astype(np.float64)
  n = len(label_N)
  pairs = float((count_G * (count_G - 1)).sum())
  return {
    "items": n,
    "distinct": num,
    "collision_rate": (n - num) / n,
    "sharing_rate": float(count_G[count_G > 1].sum() / n),
    "largest_group": int(count_G.max()),
    "chance_share": pairs / max(n * (n - 1), 1),
  }


def level_figures(code_N, size: int) -> dict:
  """Returns how codewords of a level are used; -1 counts for nothing."""
  used_N = np.asarray(code_N, np.int64)
  count_K = np.bincount(used_N[used_N >= 0], minlength=size)
  share_K = count_K / max(count_K.sum(), 1)
  num_used = int((count_K > 0).sum())
  known = share_K[share_K > 0]
  entropy = float(-(known * np.log2(known)).sum()) + 0.0
  k = len(share_K)
  # Half of the mean difference between two codewords, over their mean.
  weights_K = 2 * np.arange(1, k + 1) - k - 1
  gini = float((weights_K * np.sort(share_K)).sum() / k)
  return {
    "size": k,
    "used": num_used,
    "dead": k - num_used,
    "utilisation": num_used / max(k, 1),
    "entropy": entropy,
    "perplexity": 2.0**entropy,
    "gini": gini,
  }


_ROWS = (
  ("items", "items"),
  ("distinct ids", "distinct"),
  ("collision rate, (N - distinct) / N", "collision_rate"),
  ("share of items that share an id", "sharing_rate"),
  ("largest group", "largest_group"),
  ("squared error per item", "mse"),
  ("squared error / variance", "relative_error"),
)


def tables(report: dict) -> list[tuple[list[str], list[list[str]]]]:
  """Returns the report as tables for a terminal: headers and rows of text."""
  after, before = report["after"], report.get("before")
  known = [row for row in _ROWS if row[1] in after]
  head = ["", "before", "after", "change"] if before else ["", "ids"]
  overall = [
    [title, *_change(before and before.get(name), after[name])]
    for title, name in known
  ]
  by_prefix = [
    [
      str(i + 1),
      *(_text(p[name]) for name in _PREFIX_NAMES if name in p),
      *([] if "fan_out" in p else ["-"]),
    ]
    for i, p in enumerate(after["prefixes"])
  ]
  names = [n for n in _PREFIX_NAMES if n in after["prefixes"][0]]
  if "fan_out" not in names:  # Ids of one code.
    names.append("fan_out")
  by_level = [
    [str(i + 1), *(_text(level[name]) for name in _LEVEL_NAMES)]
    for i, level in enumerate(after["levels"])
  ]
  spaced = lambda names: [name.replace("_", " ") for name in names]
  return [
    (head, overall),
    (["prefix", *spaced(names)], by_prefix),
    (["level", *spaced(_LEVEL_NAMES)], by_level),
  ]


_PREFIX_NAMES = (
  "distinct",
  "collision_rate",
  "sharing_rate",
  "largest_group",
  "neighbour_share",
  "chance_share",
  "fan_out",
)
_LEVEL_NAMES = (
  *("size", "used", "dead", "utilisation", "entropy", "perplexity", "gini"),
)


def _change(before, after) -> list[str]:
  if before is None:
    return [_text(after)]
  return [_text(before), _text(after), _text(after - before, "+")]


def _text(value, sign: str = "") -> str:
  if isinstance(value, int):
    return f"{value:{sign},}"
  return f"{value:{sign}.4f}" if abs(value) < 10 else f"{value:{sign},.1f}"
