"""Runs the notebooks from their text and writes them with their outputs.

  python .ci/notebooks.py [NAME ...]

`experiments/notebooks/NAME.py` is the text that people edit, NAME.ipynb what
Colab and the site show. Progress lines and times are left out of the outputs.
"""

import pathlib
import sys

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "experiments/notebooks"


def build(path: pathlib.Path) -> None:
  notebook = jupytext.read(path)
  notebook.metadata.setdefault("kernelspec", {})
  notebook.metadata["kernelspec"] = {
    "name": "python3",
    "display_name": "Python 3",
    "language": "python",
  }
  NotebookClient(notebook, timeout=600, resources={
    "metadata": {"path": str(path.parent)}
  }).execute()
  for i, cell in enumerate(notebook.cells):
    cell.id = f"cell-{i}"
    timing = cell.metadata.pop("execution", None)
    if "-v" in sys.argv and timing: print(i, timing.get("iopub.status.busy"), cell.source[:40])
    if cell.cell_type == "code":
      cell.outputs = [
        output for output in cell.outputs if output.get("name") != "stderr"
      ]
  nbformat.write(notebook, path.with_suffix(".ipynb"))


if __name__ == "__main__":
  names = [a for a in sys.argv[1:] if a!="-v"] or sorted(p.stem for p in FOLDER.glob("*.py"))
  for name in names:
    build(FOLDER / f"{name}.py")
