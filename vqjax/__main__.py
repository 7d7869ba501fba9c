"""The command `vqjax`, the same as `python -m vqjax`."""

import importlib
import os
import signal
import sys

from vqjax import shipped


def main() -> None:
  """Runs `vqjax COMMAND [flags]` with the commands that came with vqjax."""
  # While modules are imported Ctrl-C ends at once: some swallow the
  # KeyboardInterrupt, others turn it into an ImportError.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
  shipped.import_experiments()
  importlib.import_module("experiments.lib.front").main(sys.argv[1:])


if __name__ == "__main__":
  main()
