"""Draws results_8_bytes.png from the first table of results.md.

python docs/draw_results.py
"""

import pathlib

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_FOLDER = pathlib.Path(__file__).resolve().parent
_OTHER, _OURS = "tab:gray", "tab:blue"


def main() -> None:
  names, errors, recalls = zip(*_read_rows(), strict=True)
  figure = Figure(figsize=(9, 2.8), layout="constrained")
  FigureCanvasAgg(figure)
  left, right = figure.subplots(1, 2, sharey=True)
  colors = [_OURS if "QINCo2" in name else _OTHER for name in names]
  for axes, values, title, digits in (
    (left, errors, "squared error x1e-4: lower is better", 3),
    (right, recalls, "1-recall@1: higher is better", 3),
  ):
    bars = axes.barh(names, values, color=colors)
    axes.bar_label(bars, fmt=f"%.{digits}f", padding=3)
    axes.set_title(title, fontsize=10)
    axes.set_xlim(0, 1.18 * max(values))
    axes.spines[["top", "right"]].set_visible(False)
  left.invert_yaxis()
  figure.suptitle("8 bytes of code per vector (ids apart), bundled SIFT sample")
  figure.savefig(_FOLDER / "results_8_bytes.png", dpi=110)


def _read_rows() -> list[tuple[str, float, float]]:
  """Name, error and 1-recall@1 of each row."""
  text = (_FOLDER / "results.md").read_text(encoding="utf-8")
  table = text.split("| codec | MSE", 1)[1].split("\n\n", 1)[0]
  rows = []
  for line in table.splitlines()[2:]:
    name, error, recall = line.replace("*", "").strip("| ").split("|")[:3]
    name = name.replace(" (default)", "").replace(", A=16 B=32 (p", " (p")
    rows.append((name.split(", B=")[0].strip(), float(error), float(recall)))
  return rows


if __name__ == "__main__":
  main()
