"""The command `vqjax`: lists the commands, or runs the one that is named."""

import ast
import runpy
import sys
import textwrap

from experiments.lib import process
from vqjax import __version__, shipped

GROUPS = {
  "Train and measure": (
    *("tune", "train", "evaluate", "tradeoff", "hakes", "pq_qinco"),
  ),
  "Encode and decode": ("encode", "decode", "semantic_ids"),
  "Index and search": (
    *("ivf_pipeline", "ivf_centroids", "pairwise_decoder", "build_index"),
    *("index_add", "refiner", "search", "serve", "fast_ivf", "ground_truth"),
  ),
  "Tools": ("download", "publish", "bench", "export"),
}
_HELP = ("-h", "-help", "--help", "help")


def main(arguments: list[str]) -> None:
  """Runs `vqjax *arguments`."""
  process.prepare()
  name, *rest = arguments or ["help"]
  if name == "help" and rest:
    name, rest = rest[0], ["--help"]
  if name in _HELP:
    sys.stdout.write(overview())
  elif name in ("--version", "version"):
    sys.stdout.write(f"vqjax {__version__}\n")
  elif (name := name.replace("-", "_")) in shipped.command_names():
    sys.argv[1:] = rest
    # The module's own name is __main__ then, as by `python -m`.
    runpy.run_module(f"experiments.{name}", run_name="__main__", alter_sys=True)
  else:
    near = shipped.did_you_mean(name, shipped.command_names())
    sys.exit(
      f"vqjax has no command {arguments[0]!r}{near} `vqjax` alone lists them."
    )


def overview() -> str:
  """Returns the list of the commands, one line each."""
  names = shipped.command_names()
  grouped = {name for group in GROUPS.values() for name in group}
  groups = {title: [n for n in g if n in names] for title, g in GROUPS.items()}
  groups["Tools"] += [name for name in names if name not in grouped]
  width = max(map(len, names))
  lines = ["vqjax COMMAND [flags]; vqjax COMMAND --help explains a command."]
  for title, group in groups.items():
    lines += ["", f"{title}:"]
    lines += [f"  {name:<{width}}  {_first_line(name)}" for name in group]
  configs = ", ".join(shipped.config_names())
  text = f"Configurations, as --config=NAME: {configs}."
  return "\n".join([*lines, "", textwrap.fill(text, 80), ""])


def _first_line(name: str) -> str:
  """What a command does, read from its file: importing it takes seconds."""
  file = shipped.root() / "experiments" / f"{name}.py"
  doc = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
  return (doc or "").partition("\n")[0]
