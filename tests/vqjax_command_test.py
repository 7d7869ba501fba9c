"""The command `vqjax`, and what comes with the library."""

import os
import pathlib
import subprocess
import sys
import tomllib
import types

import pytest

import vqjax
from experiments.lib import front
from vqjax import __version__, shipped

ROOT = pathlib.Path(__file__).parents[1]


def _vqjax(*args, cwd=ROOT):
  return subprocess.run(
    [sys.executable, "-m", "vqjax", *args],
    cwd=cwd,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
  )


def test_every_command_is_in_a_group_with_its_line():
  text = front.overview()
  grouped = [name for group in front.GROUPS.values() for name in group]
  assert sorted(grouped) == shipped.command_names()
  for name in grouped:
    (line,) = [t for t in text.splitlines() if t.startswith(f"  {name} ")]
    assert line.endswith(".")
  assert "qinco2_xs" in text
  assert "base" not in shipped.config_names()


def test_the_wheel_holds_all_packages_and_configs():
  with (ROOT / "pyproject.toml").open("rb") as file:
    tool = tomllib.load(file)["tool"]["setuptools"]
  rooms = ["vqjax", "experiments", "configs"]
  files = [file for room in rooms for file in (ROOT / room).rglob("*.py")]
  folders = {file.parent.relative_to(ROOT).as_posix() for file in files}
  clone_of = {to: name for name, to in tool["package-dir"].items()}
  for folder in folders - {"experiments/notebooks"}:
    top = folder.split("/")[0]
    name = folder.replace(top, clone_of.get(top, top), 1).replace("/", ".")
    assert name in tool["packages"]
  assert {name.split(".")[0] for name in tool["packages"]} == {"vqjax"}


def test_the_list_the_version_and_a_misspelt_command():
  done = _vqjax()
  assert (done.returncode, done.stdout) == (0, front.overview())
  assert _vqjax("--version").stdout == f"vqjax {__version__}\n"
  wrong = _vqjax("trian", "--config=pq")
  assert wrong.returncode == 1
  assert "no command 'trian': did you mean 'train'?" in wrong.stderr
  assert "Traceback" not in wrong.stderr


def _folder_with_names_of_ours(folder):
  """As a user may have: packages that must not be taken for ours."""
  for package in ("configs", "experiments"):
    (folder / package).mkdir()
    for name in ("__init__", "base", "train", "pq"):
      wrong = "raise SystemExit('This is the file of the user.')"
      (folder / package / f"{name}.py").write_text(wrong)
  return folder


@pytest.mark.slow
def test_a_folder_with_configs_of_its_own_is_no_obstacle(tmp_path):
  folder = _folder_with_names_of_ours(tmp_path)
  done = _vqjax("train", "--config=pq:smoke", cwd=folder)
  assert done.returncode == 0, done.stderr
  assert "\n  vqjax evaluate --codec=runs/pq-smoke" in done.stderr
  assert (folder / "runs/pq-smoke/codec.safetensors").exists()
  given = _vqjax("train", "--config=configs/pq.py", cwd=folder)
  assert "the file of the user" in given.stderr
  text = _vqjax("train", "--help", cwd=folder).stdout
  assert "vqjax train --config=" in text
  assert "python -m" not in text


@pytest.mark.parametrize(
  ("value", "name", "argument"),
  [
    ("pq", "pq.py", ""),
    ("qinco2_s:bigann1M", "qinco2_s.py", "bigann1M"),
    ("configs/rq.py:smoke", "rq.py", "smoke"),
  ],
)
def test_shipped_configurations_are_found_everywhere(
  value, name, argument, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  want = (ROOT / "configs" / name, argument)
  assert shipped.find_config(value) == want


def test_a_path_is_the_users_own_file(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv("HOME", str(tmp_path))
  own = tmp_path / "pq.py"
  own.write_text("def get_config(arg):\n  return 'mine' + arg")
  assert shipped.find_config("pq")[0] == ROOT / "configs/pq.py"
  for value in ("./pq.py", "pq.py", str(own), "~/pq.py"):
    assert shipped.find_config(value)[0].resolve() == own
  assert shipped.read_config("./pq.py:7") == "mine7"


def test_a_base_beside_the_own_file_is_taken(tmp_path):
  folder = tmp_path / "configs"
  folder.mkdir()
  (folder / "base.py").write_text("SIZE = 3")
  text = "from configs import base\ndef get_config(arg):\n  return base.SIZE"
  (folder / "mine.py").write_text(text)
  assert shipped.read_config(str(folder / "mine.py")) == 3
  # And the shipped ones find their own again.
  assert shipped.read_config("pq:smoke").model.num_codes == 4
  assert shipped.read_config("qinco2_xs:smoke").codec == "qinco"


def test_unknown_names_list_what_there_is(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(ValueError, match=r"'qinco2_x': did you.*pq, qinco1"):
    shipped.find_config("qinco2_x")
  with pytest.raises(FileNotFoundError, match="no_such.py.*pq, qinco1"):
    shipped.find_config("some/no_such.py")
  with pytest.raises(ValueError, match="'trian': did you mean 'train'"):
    shipped.import_command("trian")


def test_a_package_of_the_program_is_not_replaced(monkeypatch):
  other = types.ModuleType("experiments")
  other.__path__ = ["/home/me/experiments"]
  monkeypatch.setitem(sys.modules, "experiments", other)
  with pytest.raises(ImportError, match="/home/me/experiments.*process"):
    shipped.import_command("decode")
  assert sys.modules["experiments"] is other


def test_a_copy_in_the_wheel_goes_before_the_folder_above(
  tmp_path, monkeypatch
):
  assert shipped.root() == ROOT
  (tmp_path / "vqjax/_clone").mkdir(parents=True)
  monkeypatch.setattr(shipped, "__file__", str(tmp_path / "vqjax/shipped.py"))
  assert shipped.root() == tmp_path / "vqjax/_clone"


def test_completion_sees_what_is_loaded_on_demand():
  assert set(vqjax.__all__) <= set(dir(vqjax))


def test_a_name_in_capitals_gets_a_suggestion():
  with pytest.raises(ValueError, match="'PQ': did you mean 'pq'"):
    shipped.find_config("PQ")


def test_ctrl_c_while_modules_are_imported_ends_at_once(tmp_path):
  """Whatever a library makes of a KeyboardInterrupt."""
  program = (
    "import os, signal, sys, vqjax.__main__ as main, experiments.lib.front\n"
    "def swallow(arguments):\n"
    "  try: os.kill(os.getpid(), signal.SIGINT)\n"
    "  except KeyboardInterrupt: pass\n"
    "experiments.lib.front.main = swallow\n"
    "main.main()\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True
  )
  assert (done.returncode, done.stderr) == (130, "")
