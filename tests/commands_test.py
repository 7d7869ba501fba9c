"""All commands: their options, keywords, --help and errors."""

import os
import pathlib

import numpy as np
import pytest

from experiments import decode, evaluate
from experiments.lib import cli
from tests import commands
from vqjax import shipped


def _config(module, **values):
  return cli.get_config(module.OPTIONS, **values)


def test_options_are_those_there_are():
  config = cli.get_config(decode.OPTIONS, codes="c.npy", num_steps=3)
  assert (config.codes, config.num_steps, config.output) == ("c.npy", 3, None)
  with pytest.raises(ValueError, match="no option 'outptu': did you mean 'out"):
    cli.get_config(decode.OPTIONS, outptu="x.npy")


@pytest.mark.parametrize(
  ("values", "what"),
  [
    ({"num_steps": 2.5}, "num_steps must be an integer; got float"),
    ({"num_steps": True}, "num_steps must be an integer; got bool"),
    ({"codes": np.zeros(3)}, "codes must be text or a path; got ndarray"),
    ({"overwrite": "yes"}, "overwrite must be True or False; got str"),
  ],
)
def test_options_of_programs_have_their_type(values, what):
  with pytest.raises(ValueError, match=what):
    decode.run(**values)
  with pytest.raises(ValueError, match=what):
    decode.run(values)


def test_programs_give_paths_numbers_of_numpy_and_lists():
  config = cli.get_config(
    evaluate.OPTIONS,
    codec=pathlib.Path("~") / "a",
    beam_size=np.int64(8),
    baselines=["PQ", "RQ"],
    groundtruth=None,
  )
  assert config.codec == os.path.expanduser("~/a")
  assert (config.beam_size, config.baselines) == (8, "PQ,RQ")
  assert config.groundtruth is None


def test_each_command_takes_keywords():
  """A command without its options says which it needs, or what it knows."""
  for name in shipped.command_names():
    if hasattr(command := shipped.import_command(name), "REQUIRED"):
      with pytest.raises(ValueError, match=r"--\w+ is needed|Name what to"):
        command.run()
    if hasattr(command, "OPTIONS") and name != "ivf_pipeline":
      with pytest.raises(ValueError, match="no option 'overwrit'"):
        command.run({"overwrit": True})


@pytest.mark.parametrize(
  ("file", "folder"),
  [
    ("configs/qinco2_s.py", "runs/qinco2_s"),
    ("elsewhere/mine.py:smoke", "runs/mine-smoke"),
  ],
)
def test_runs_go_where_their_configuration_says(file, folder):
  assert cli.default_workdir(file) == folder


@pytest.mark.parametrize(
  ("name", "own"),
  [
    (
      "train",
      ("config", "workdir", "[no]resume", "[no]finish", "[no]multihost"),
    ),
    ("hakes", ("config", "workdir", "stage")),
    ("evaluate", ("codec", "beam_size", "[no]multihost")),
    ("encode", ("codec", "shards", "[no]multihost")),
    ("decode", ("codec", "codes")),
  ],
)
def test_help_says_how_to_use_it(name, own):
  text = commands.run(name, "--help", check=False).stdout
  assert f"vqjax {name}" in text
  for flag in own:
    assert f"\n  --{flag}:" in text


def test_an_error_is_one_line_for_the_user():
  done = commands.run("evaluate", "--codec=nowhere", check=False)
  assert done.returncode == 1
  assert "nowhere" in done.stderr
  assert "Traceback" not in done.stderr


def test_a_missing_configuration_is_named():
  done = commands.run(
    "train", "--config=configs/nowhere.py", "--config.seed=3", check=False
  )
  assert done.returncode == 1
  assert "configs/nowhere.py" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
  ("option", "field"), [("model.beam=3", "beam"), ("modl.beam_size=3", "modl")]
)
def test_a_misspelt_field_is_named(option, field, tmp_path):
  done = commands.run(
    "train", "--config=configs/qinco2_s.py:smoke", f"--config.{option}",
    f"--workdir={tmp_path}", check=False,
  )  # fmt: skip
  assert done.returncode == 1
  assert "does not fit the configuration" in done.stderr
  assert f"'{field}'" in done.stderr
  assert "Traceback" not in done.stderr
