"""Imports against the layers of the design, read with `ast`, not run."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A module imports from its own layer or a lower one.
LAYERS = {
  "data": 1,
  "codecs": 2,
  "training": 3,
  "search": 3,
  "ids": 3,
  "storage": 4,
  "interop": 4,
  "codec": 5,
  "evaluation": 5,
  "ground_truth": 5,
  "quality": 5,
  "fitting": 5,
  "ivf_lists": 5,
  "recipes": 5,
  "recipe_qinco": 5,
  "recipe_rqvae": 5,
  "index": 5,
  "index_build": 5,
  "index_drift": 5,
  "fast_ivf": 5,
  "semantic_ids": 5,
  "id_making": 5,
  "id_reports": 5,
}
DOORS = {  # Module to the only place that may import it.
  "faiss": "vqjax/interop/faiss_",
  "optax": "vqjax/training/",
  "orbax": "vqjax/training/",
  "ray": "vqjax/interop/ray_",
}
TORCH_DOOR = "experiments/lib/torch_baseline.py"
CONFIG_IMPORTS = {"ml_collections", "configs"}
NEVER = {
  "experiments",
  "configs",
  "tests",
  "torch",
  "tensorflow",
  "clu",
  "hydra",
}


def _files(folder):
  files = sorted((ROOT / folder).rglob("*.py"))
  return [path for path in files if path.parent.name != "notebooks"]


def _name(path):
  return path.relative_to(ROOT).as_posix()


def imports_of(source: str, package: str = "") -> set[str]:
  """Dotted names of all that `source` imports, also inside of functions.

  `package` is where relative imports start.
  """
  found = set()
  for node in ast.walk(ast.parse(source)):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      base = node.module or ""
      if node.level:
        parts = package.split(".")
        head = parts[: len(parts) - node.level + 1]
        base = ".".join(head + ([base] if base else []))
      found |= {f"{base}.{alias.name}" for alias in node.names}
  return found


def _imports(path):
  package = ".".join(path.relative_to(ROOT).parent.parts)
  return imports_of(path.read_text(encoding="utf-8"), package)


def layer_of(module: str) -> int | None:
  """Layer of a dotted name in vqjax; None for other packages."""
  parts = module.split(".")
  if parts[0] != "vqjax":
    return None
  return LAYERS.get(parts[1], 0) if len(parts) > 1 else 0


def problems_of(name: str, imports: set[str]) -> list[str]:
  """What is wrong with the imports of the file `name`."""
  own = layer_of(name.removesuffix(".py").replace("/", "."))
  problems = []
  for module in sorted(imports):
    top = module.split(".")[0]
    layer = layer_of(module)
    if layer is not None and layer > own:
      problems.append(f"{name} (layer {own}) imports {module} ({layer})")
    if top in NEVER:
      problems.append(f"{name} imports {module}")
    if not name.startswith(DOORS.get(top, name)):
      problems.append(f"{name} imports {module}, not {DOORS[top]}")
  return problems


@pytest.mark.parametrize("path", _files("vqjax"), ids=_name)
def test_imports_follow_the_layers(path):
  assert not problems_of(_name(path), _imports(path))


@pytest.mark.parametrize("path", _files("configs"), ids=_name)
def test_configs_import_ml_collections_alone(path):
  tops = {module.split(".")[0] for module in _imports(path)}
  assert tops <= CONFIG_IMPORTS


@pytest.mark.parametrize("path", _files("experiments"), ids=_name)
def test_experiments_leave_faiss_to_its_door(path):
  tops = {module.split(".")[0] for module in _imports(path)}
  if _name(path) == TORCH_DOOR:
    tops.remove("torch")
  assert not tops & {"faiss", "optax", "orbax", "torch", "tensorflow"}


def test_commands_start_without_torch():
  """Whoever uses the baseline imports it inside of a function."""
  for path in _files("experiments"):
    module = ast.parse(path.read_text(encoding="utf-8"))
    at_the_top = [node for node in module.body if _is_import(node)]
    found = imports_of(ast.unparse(at_the_top))
    assert "experiments.lib.torch_baseline" not in found, _name(path)


def _is_import(node) -> bool:
  return isinstance(node, ast.Import | ast.ImportFrom)


@pytest.mark.parametrize(
  ("name", "source", "word"),
  [
    ("vqjax/codecs/a.py", "from vqjax.training import loop", "layer 2"),
    ("vqjax/core.py", "import vqjax.data.formats", "layer 0"),
    ("vqjax/data/a.py", "def f():\n  from vqjax import codecs", "layer 1"),
    ("vqjax/data/a.py", "from ..codecs import rq", "layer 1"),
    ("vqjax/search/a.py", "import faiss", "faiss_"),
    ("vqjax/interop/a.py", "from faiss.contrib import vecs_io", "faiss_"),
    ("vqjax/codecs/a.py", "import optax", "training"),
    ("vqjax/interop/a.py", "import orbax.checkpoint", "training"),
    ("vqjax/training/a.py", "from experiments import train", "experiments"),
    ("vqjax/interop/torch_qinco.py", "import torch", "torch"),
  ],
)
def test_a_wrong_import_is_seen(name, source, word):
  package = ".".join(name.split("/")[:-1])
  (problem,) = problems_of(name, imports_of(source, package))
  assert word in problem
