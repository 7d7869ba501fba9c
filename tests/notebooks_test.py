"""The notebooks: each has its text, what it showed, and a badge that fits."""

import importlib.util
import pathlib
import tomllib

import jupytext
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDER = ROOT / "experiments" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


def _script():
  path = ROOT / ".ci" / "notebooks.py"
  spec = importlib.util.spec_from_file_location("notebooks_script", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def _cells(notebook):
  return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_is_one_for_each_system():
  assert {"quickstart", "qinco2", "ivf_search", "hakes"} <= set(NAMES)
  assert {"semantic_ids", "fast_ivf", "own_data"} <= set(NAMES)
  assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_text_and_notebook_are_the_same(name):
  text = _script().read_text(FOLDER / f"{name}.py")
  notebook = jupytext.read(FOLDER / f"{name}.ipynb")
  assert _cells(text) == _cells(notebook), (
    f"Run python .ci/notebooks.py {name} after a change of {name}.py."
  )


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_what_it_did(name):
  notebook = jupytext.read(FOLDER / f"{name}.ipynb")
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
  kinds = {o.output_type for o in outputs}
  assert "error" not in kinds
  assert any("image/png" in o.get("data", {}) for o in outputs)
  assert not any(o.get("name") == "stderr" for o in outputs)


@pytest.mark.parametrize("name", NAMES)
def test_badge_and_install_name_the_repository(name):
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
  address = project["urls"]["Repository"]
  owner = address.removeprefix("https://github.com/")
  text = (FOLDER / f"{name}.py").read_text()
  assert (
    f"colab.research.google.com/github/{owner}/blob/main/experiments/"
    f"notebooks/{name}.ipynb)" in text
  )
  assert f'pip install -q "git+{address}"' in text
