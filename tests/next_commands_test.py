"""What a training names as next commands, which can be copied."""

import importlib
import pathlib
import shlex
import types

import pytest

from experiments import train

SAMPLE = pathlib.Path(__file__).parents[1] / "third_party" / "sample_sift"


@pytest.mark.parametrize(
  ("name", "names"),
  [
    ("rq", ["evaluate"]),
    pytest.param(
      "ivf_qinco2_xs",
      ["evaluate", "encode", "pairwise_decoder", "build_index"],
      marks=pytest.mark.slow,
    ),
  ],
)
def test_training_names_the_next_commands(name, names, tmp_path, monkeypatch):
  said, run_dir = [], str(tmp_path / "my run")
  monkeypatch.setattr(
    train.logging, "info", lambda *message: said.append(message)
  )
  train.run(
    importlib.import_module(f"configs.{name}").get_config("smoke"), run_dir
  )
  text, *args = said[-1]
  lines = (text % tuple(args)).partition("Next:\n")[2].splitlines()
  for name, line in zip(names, lines, strict=True):
    program, command, *flags = shlex.split(line)
    assert (program, command) == ("vqjax", name)
    flags = dict(flag.split("=") for flag in flags)
    known = importlib.import_module(f"experiments.{name}").OPTIONS
    assert {flag.removeprefix("--") for flag in flags} <= set(known)
    assert flags["--codec"] == run_dir
    assert pathlib.Path(flags.get("--data", SAMPLE)).exists()


@pytest.mark.parametrize(
  ("base", "num_held_out", "flags"),
  [
    ("base.npy", 0, ""),
    (None, 300, " --split=validation"),
    (None, 0, " --data=BASE-VECTORS"),  # Nothing is held out.
  ],
)
def test_what_there_is_to_measure(base, num_held_out, flags):
  dataset = types.SimpleNamespace(base=base)
  assert train._to_measure(dataset, num_held_out) == flags
