"""The command `vqjax`, the same as `python -m vqjax`."""

import importlib
import sys

from vqjax import shipped


def main() -> None:
  """Runs `vqjax COMMAND [flags]` with the commands that came with vqjax."""
  try:
    shipped.import_experiments()
    importlib.import_module("experiments.lib.front").main(sys.argv[1:])
  except KeyboardInterrupt:  # While modules are imported.
    sys.exit(130)


if __name__ == "__main__":
  main()
