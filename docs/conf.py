"""Builds the site: `sphinx-build -W docs build/docs`, without network."""

import pathlib
import re
import shutil
import sys

_FOLDER = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(_FOLDER.parent))
# Pages of modules that have since been renamed would be warnings.
shutil.rmtree(_FOLDER / "reference" / "generated", ignore_errors=True)

# Notebooks lie with the commands; the site shows them as they were run.
_TUTORIALS = _FOLDER / "tutorials"
shutil.rmtree(_TUTORIALS, ignore_errors=True)
_TUTORIALS.mkdir()
for _path in (_FOLDER.parent / "experiments/notebooks").glob("*.ipynb"):
  shutil.copy(_path, _TUTORIALS)

import vqjax  # noqa: E402

for _name in vqjax.__all__:  # Loaded on demand; autodoc lists what is there.
  setattr(vqjax, _name, getattr(vqjax, _name))

project = "vqjax"
author = "The vqjax authors"
extensions = [
  "sphinx.ext.autodoc",
  "sphinx.ext.autosummary",
  "sphinx.ext.napoleon",
  "myst_nb",
]
exclude_patterns = ["_templates"]
templates_path = ["_templates"]

html_theme = "sphinx_book_theme"
html_title = "vqjax"
html_theme_options = {"show_navbar_depth": 2, "home_page_in_toc": True}
html_copy_source = False

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
# Notebooks are run by their own test; the site shows what they hold.
nb_execution_mode = "off"

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # Signatures stay short; docstrings have shapes.
autodoc_preserve_defaults = True

_LITERAL = re.compile(r"(`[^`]*`)")


def _to_rst(app, what, name, obj, options, lines):
  """Makes a docstring, which is plain text, safe to read as reST."""
  del app, what, name, obj, options
  text = "\n".join(lines)
  parts = _LITERAL.split(text)
  parts[1::2] = [f"`{part}`" for part in parts[1::2]]
  parts[::2] = [re.sub(r"([*|\\]|_(?!\w))", r"\\\1", p) for p in parts[::2]]
  lines[:] = _literal_blocks("".join(parts).split("\n"))


def _literal_blocks(lines: list[str]) -> list[str]:
  """Turns indented paragraphs (commands, tables) into literal blocks."""
  result, inside = [], False
  for i, line in enumerate(lines):
    starts = line.startswith("  ") and (i == 0 or not lines[i - 1].strip())
    if starts and not inside and not line.lstrip().startswith(":"):
      result += ["::", ""]
      inside = True
    elif line.strip() and not line.startswith("  "):
      inside = False
    result.append(_unescape(line) if inside else line)
  return result


def _unescape(line: str) -> str:
  return re.sub(r"\\([*|\\_])", r"\1", line).replace("``", "`")


def _skip(app, what, name, obj, skip, options):
  """Leaves out what flax and namedtuple add to every class."""
  del app, what, options
  is_field = (getattr(obj, "__doc__", "") or "").startswith("Alias for field")
  return skip or name == "replace" or is_field


def setup(app):
  app.connect("autodoc-skip-member", _skip)
  # After napoleon, which has turned "Args:" into fields.
  app.connect("autodoc-process-docstring", _to_rst, priority=900)
