"""The pages: commands that exist, pictures that are shown, plain words."""

import importlib
import re
from pathlib import Path

import faiss
import numpy as np
import pytest

import vqjax
from vqjax import fitting

ROOT = Path(__file__).resolve().parents[1]
# All but the reference, which links to pages that the site's build makes.
PAGES = [ROOT / "README.md"] + sorted(
  page
  for page in (ROOT / "docs").rglob("*.md")
  if page.parent.name != "reference"
)
# What `vqjax NAME --flag` may be: words of the command and of what all share.
SHARED = ROOT / "experiments" / "lib" / "cli.py"
RIDDLES = (
  "by turns", "dearer", "truer", "so many", "as ever", "what the words leave",
  "scratch script", "a training and",
)  # fmt: skip


def _name(page) -> str:
  return str(page.relative_to(ROOT)).removeprefix("docs/")


def _commands():
  """Commands in the pages, as (page, command, arguments)."""
  for page in PAGES:
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, rest in re.findall(r"\bvqjax ([a-z]\w*)([^\n`|#&]*)", text):
      if "--" in rest:
        yield _name(page), name, rest.split()


@pytest.mark.parametrize(("page", "command", "arguments"), list(_commands()))
def test_commands_in_the_pages_exist(page, command, arguments):
  file = ROOT / "experiments" / f"{command}.py"
  assert file.exists(), f"{page} names the command {command}."
  options = getattr(
    importlib.import_module(f"experiments.{command}"), "OPTIONS", {}
  )
  known = SHARED.read_text() + ("" if options else file.read_text())
  config = None
  for argument in arguments:
    flag, _, value = argument.strip("[]").removeprefix("--").partition("=")
    if not argument.strip("[").startswith("--"):
      continue
    if flag == "config":
      for each in value.split(","):
        name, _, arg = each.partition(":")
        config = importlib.import_module(f"configs.{name}").get_config(arg)
    elif flag in {"help", *options}:
      pass
    elif flag.startswith("config."):
      node = config
      for part in flag.split(".")[1:]:
        assert part in node, f"{page}: no config has {flag}."
        node = node[part]
    else:
      assert re.search(rf'"{flag}"|\b{flag}=', known), f"{page}: --{flag}"


def _blocks(page) -> str:
  text = page.read_text(encoding="utf-8")
  return "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))


@pytest.fixture(name="x_ND", scope="module")
def _x():
  return np.random.default_rng(0).normal(size=(1100, 16)).astype("f4")


@pytest.fixture(name="codec", scope="module")
def _codec(x_ND):
  return vqjax.fit(x_ND, "qinco2_xs:smoke", num_epochs=1)


@pytest.fixture(name="values")
def _values(x_ND, codec, tmp_path, monkeypatch):
  """What the pages take as given, in the folder where a test runs."""
  monkeypatch.chdir(tmp_path)
  for name in ("learn.npy", "base.npy", "query.npy"):
    np.save(name, x_ND[:300])
  codec.save("runs/mine")
  index = faiss.index_factory(16, "PCA8,IVF4,PQ4x4np,RFlat")
  index.train(x_ND)
  index.add(x_ND)
  faiss.write_index(index, "runs/mine/index.faiss")

  def fit(x, name, **settings):  # In full it takes a minute.
    fitting.make_config(name, **settings)
    return codec

  monkeypatch.setattr(vqjax, "fit", fit, raising=False)
  return {"vqjax": vqjax, "x": x_ND, "queries": x_ND[:5], "codec": codec}


@pytest.mark.parametrize(
  "page", [page for page in PAGES if _blocks(page)], ids=_name
)
def test_python_of_the_pages_runs(page, values):
  given = set(values)
  exec(compile(_blocks(page), str(page), "exec"), values)
  assert set(values) - given - {"__builtins__"}  # It made something.


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_pages_are_short_and_plain(page):
  text = page.read_text(encoding="utf-8")
  limit = 120 if page.name == "README.md" else 150
  assert len(text.splitlines()) <= limit
  assert [riddle for riddle in RIDDLES if riddle in text] == []


def test_pictures_and_links_exist_and_all_pictures_are_shown():
  linked = set()
  for page in PAGES:
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
      if not link.startswith("http"):
        target = (page.parent / link).resolve()
        assert target.exists(), f"{_name(page)} links to {link}."
        linked.add(target)
  assert set((ROOT / "docs").rglob("*.png")) <= linked
