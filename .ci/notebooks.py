"""Runs the notebooks and writes them with what they show.

  python .ci/notebooks.py [NAME ...]

People edit experiments/notebooks/NAME.py. Colab and the site show NAME.ipynb,
which this script makes of it, without progress lines. Needs `.[test]`.
"""

import pathlib
import sys
import time

import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "experiments/notebooks"
KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


def read_text(path: pathlib.Path):
  """Returns the notebook of a text, not run."""
  notebook = jupytext.read(path, fmt="py:percent")
  notebook.metadata = {"kernelspec": KERNEL}
  for i, cell in enumerate(notebook.cells):
    cell.id = f"cell-{i}"
  return notebook


def run(path: pathlib.Path):
  """Returns the notebook of a text with its outputs."""
  notebook = read_text(path)
  about = {"metadata": {"path": str(path.parent)}}
  NotebookClient(notebook, timeout=600, resources=about).execute()
  for cell in notebook.cells:
    cell.metadata = {}
    if cell.cell_type == "code":
      cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
  return notebook


if __name__ == "__main__":
  names = sys.argv[1:] or sorted(p.stem for p in FOLDER.glob("*.py"))
  for name in names:
    began = time.monotonic()
    nbformat.write(run(FOLDER / f"{name}.py"), FOLDER / f"{name}.ipynb")
    sys.stderr.write(f"{name}: {time.monotonic() - began:.0f} s\n")
