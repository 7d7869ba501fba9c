"""One picture of a report of ids: groups, neighbours, use of codewords."""

import pathlib

import numpy as np

from vqjax.data.files import atomic_output
from vqjax.ids import groups
from vqjax.search import plots

_BEFORE, _AFTER, _CHANCE = "C1", "C0", "0.6"


def draw(path, codes_NL, report: dict, *, before_NL=None) -> pathlib.Path:
  """Draws how ids are shared, what they say of neighbours, and their codewords.

  Args:
    path: A .png; an earlier one is replaced.
    codes_NL: The ids.
    report: Of `vqjax.ids.report`, its `after` and if there is one `before`.
    before_NL: The codes before they were made unique, or None.
  """
  figure, (left, middle, right) = plots.make_figure(3)
  _draw_groups(left, codes_NL, before_NL, report)
  _draw_prefixes(middle, report)
  _draw_codewords(right, codes_NL, report["after"]["levels"])
  for axes in (left, middle, right):
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    plots.label_plainly(axes)
    axes.legend(fontsize=9)
  with atomic_output(path, overwrite=True) as temporary:
    figure.savefig(temporary, dpi=90, format="png")
  return pathlib.Path(path)


def _draw_groups(axes, codes_NL, before_NL, report) -> None:
  """Items by the size of the group they share an id with."""
  series = [("ids", codes_NL, _AFTER, report["after"])]
  if before_NL is not None:
    before = report["before"]
    series.insert(0, ("codes of the codec", before_NL, _BEFORE, before))
  bins = [1, 2, 3, 4, 5, 9, 17, 65, 257, 2**40]
  names = ["1", "2", "3", "4", "5-8", "9-16", "17-64", "65-256", "more"]
  counts = [
    np.histogram(groups.counts_of(codes), bins)[0] / len(codes)
    for _, codes, _, _ in series
  ]
  last = max(np.flatnonzero(count)[-1] for count in counts) + 1
  for i, (name, _, color, found) in enumerate(series):
    name += f": collision rate {found['collision_rate']:.4f}"
    at = np.arange(last) + 0.4 * (i - (len(series) - 1) / 2)
    bars = axes.bar(at, 100 * counts[i][:last], 0.4, color=color, label=name)
    axes.bar_label(bars, fmt=_percent, fontsize=8)
  axes.set_xticks(range(last), names[:last])
  axes.set_ylim(0, 115)
  axes.set(
    title="How many items have the same id",
    xlabel="items with this id",
    ylabel="% of the items",
  )


def _percent(value: float) -> str:
  return f"{value:.3g}" if value else ""


def _draw_prefixes(axes, report) -> None:
  """Share of neighbours with the same prefix, or distinct prefixes."""
  after = report["after"]["prefixes"]
  length = np.arange(1, len(after) + 1)
  share = lambda found, name: [100 * p[name] for p in found]
  if "neighbour_share" in after[0]:
    before = report.get("before", {}).get("prefixes", [])
    if before:
      axes.plot(
        length[: len(before)],
        share(before, "neighbour_share"),
        "s--",
        color=_BEFORE,
        label="codes of the codec",
      )
    axes.plot(
      length, share(after, "neighbour_share"), "o-", color=_AFTER, label="ids"
    )
    axes.plot(
      length,
      share(after, "chance_share"),
      "x:",
      color=_CHANCE,
      label="any two items",
    )
    above = dict(zip(length, share(before, "neighbour_share"), strict=False))
    for x, y in zip(length, share(after, "neighbour_share"), strict=True):
      axes.annotate(
        f"{y:.3g} %",
        (x, y),
        (5, -13 if above.get(x, y) > y else 6),  # On the free side.
        textcoords="offset points",
        fontsize=8,
        color=_AFTER,
      )
    title = "Do neighbours begin alike?"
    ylabel = "% of the 10 nearest with the same prefix"
  else:
    bars = axes.bar(
      length, [p["distinct"] for p in after], 0.6, color=_AFTER, label="ids"
    )
    axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.set_yscale("log")
    title, ylabel = "Prefixes in use", "different prefixes"
  axes.set_xticks(length)
  axes.margins(x=0.12, y=0.12)
  axes.set(title=title, xlabel="codes in the prefix", ylabel=ylabel)


def _draw_codewords(axes, codes_NL, levels) -> None:
  """Share of the items that each codeword has, the most used first."""
  # Thinner on top of wider: lines in the same place are all seen.
  most = 1.5 + min(2 * (len(levels) - 1), 5)
  widths = np.linspace(most, 1.5, len(levels))
  for i, (code_N, level) in enumerate(zip(codes_NL.T, levels, strict=True)):
    count_K = np.bincount(
      code_N[code_N >= 0].astype(np.int64), minlength=level["size"]
    )
    share_K = np.sort(count_K / max(count_K.sum(), 1))[::-1] * level["size"]
    at = (np.arange(len(share_K)) + 0.5) / len(share_K)
    is_used = share_K > 0
    axes.plot(
      100 * at[is_used],
      share_K[is_used],
      color=f"C{i + 2}",
      linewidth=widths[i],
      label=f"level {i + 1}: {level['used']:,} of {level['size']:,} used, "
      f"perplexity {level['perplexity']:,.0f}",
    )
  axes.axhline(1, color=_CHANCE, linestyle=":", label="all alike")
  axes.set(
    title="How evenly codewords are used",
    xlabel="% of the codewords of a level, the most used first",
    ylabel="items per codeword / their mean",
    yscale="log",
    xlim=(0, 100),
  )
