"""What comes with the library: commands, configurations and sample vectors.

They lie next to `vqjax/` in a clone and in `vqjax/_clone/` of an installed
wheel, under the same names: `experiments/`, `configs/`, `third_party/`. A
wheel has no other top-level name than `vqjax`, so it meets no user's own
`configs` or `experiments`.
"""

import difflib
import importlib.util
import os
import pathlib
import runpy
import sys
import types


def root() -> pathlib.Path:
  """Returns the folder of `experiments/`, `configs/` and `third_party/`."""
  here = pathlib.Path(__file__).resolve().parent
  copy = here / "_clone"
  return copy if copy.is_dir() else here.parent


def config_names() -> list[str]:
  """Returns the names that `find_config` knows: `pq`, `qinco2_s`, ..."""
  files = (root() / "configs").glob("*.py")
  return sorted({file.stem for file in files} - {"__init__", "base"})


def command_names() -> list[str]:
  """Returns the names of the commands: `train`, `evaluate`, ..."""
  files = (root() / "experiments").glob("*.py")
  return sorted({file.stem for file in files} - {"__init__"})


def find_config(value: str) -> tuple[pathlib.Path, str]:
  """Returns file and argument of `NAME[:ARGUMENT]` or `FILE.py[:ARGUMENT]`.

  A name is one of `config_names()`. A path is taken as it is; one in
  `configs/` that is not there is looked for among the shipped ones.

  Raises:
    ValueError: There is no such name.
    FileNotFoundError: There is no such file.
  """
  given, _, argument = str(value).partition(":")
  folder = root() / "configs"
  is_path = given.endswith(".py") or os.sep in given
  if not is_path:
    if given in config_names():
      return folder / f"{given}.py", argument
    near = did_you_mean(given, config_names())
    raise ValueError(
      f"There is no configuration {given!r}{near} Known are "
      f"{', '.join(config_names())}; for a file of your own give its path, as "
      "./mine.py."
    )
  path = pathlib.Path(os.path.expanduser(given))
  if path.is_file():
    return path, argument
  own = folder / path.name
  if path.parent == pathlib.Path("configs") and own.is_file():
    return own, argument
  raise FileNotFoundError(
    f"There is no configuration file {given}. By name there are "
    f"{', '.join(config_names())}."
  )


def read_config(value: str):
  """Returns the ConfigDict of `find_config(value)`, made by `get_config`.

  Raises:
    ValueError: There is no such name, or the file knows no such argument.
    FileNotFoundError: There is no such file.
  """
  path, argument = find_config(value)
  import_configs(path)
  return runpy.run_path(str(path))["get_config"](argument)


def import_configs(path: str | os.PathLike) -> None:
  """Makes `import configs` mean the folder of this file, then the shipped one.

  So `from configs import base` finds the base next to the file, and
  never the one in the folder in which a program happens to be started.
  """
  own = root() / "configs"
  beside = pathlib.Path(path).resolve().parent
  folders = [str(own)]
  if beside.name == "configs" and beside != own:
    folders.insert(0, str(beside))
  known = sys.modules.get("configs")
  if known is not None and list(known.__path__) == folders:
    return
  for name in [n for n in sys.modules if n.partition(".")[0] == "configs"]:
    del sys.modules[name]
  package = types.ModuleType("configs")
  package.__path__ = folders
  sys.modules["configs"] = package


def import_command(name: str) -> types.ModuleType:
  """Returns the module of a command, as `import experiments.NAME` in a clone.

  `shipped.import_command("train").run(config, workdir)` trains from a program.

  Raises:
    ValueError: There is no such command.
    ImportError: The program has imported a package `experiments` of its own.
  """
  if name not in command_names():
    raise ValueError(
      f"There is no command {name!r}{did_you_mean(name, command_names())} "
      f"Known are {', '.join(command_names())}."
    )
  import_experiments()
  return importlib.import_module(f"experiments.{name}")


def import_experiments() -> None:
  """Makes `experiments` the shipped package, wherever the program is started.

  Raises:
    ImportError: The program has imported another `experiments` before.
  """
  folder = root() / "experiments"
  known = sys.modules.get("experiments")
  if known is not None:
    if str(folder) in map(str, known.__path__):
      return
    raise ImportError(
      "This program has imported a package `experiments` of its own "
      f"({list(known.__path__)[0]}), so those in vqjax cannot be: run them in "
      "a process of their own."
    )
  spec = importlib.util.spec_from_file_location(
    "experiments",
    folder / "__init__.py",
    submodule_search_locations=[str(folder)],
  )
  package = importlib.util.module_from_spec(spec)
  sys.modules["experiments"] = package
  spec.loader.exec_module(package)


def did_you_mean(name: str, known) -> str:
  """Returns `: did you mean "train"?` for a near miss, else a full stop."""
  spelt = {each.lower(): each for each in known}
  near = difflib.get_close_matches(name.lower(), spelt, n=1)
  return f": did you mean {spelt[near[0]]!r}?" if near else "."
