"""`--tracker`, the one switch of all commands that train."""

import importlib

import pytest

from experiments.lib import cli
from tests import commands
from vqjax import shipped


def test_it_is_the_field_of_the_configuration():
  for name in shipped.config_names():
    config = importlib.import_module(f"configs.{name}").get_config("")
    if name in ("pq", "opq", "rq"):
      with pytest.raises(
        ValueError, match="tensorboard needs a training with steps"
      ):
        cli._set_tracker(config, "tensorboard")
    else:
      cli._set_tracker(config, "tensorboard")
      assert config.train.tracker == "tensorboard", name
    cli._set_tracker(config, None)


@pytest.mark.parametrize("name", ["train", "ivf_pipeline", "hakes"])
def test_an_unknown_one_is_refused_before_any_work(name, tmp_path):
  config = {"train": "qinco2_xs", "ivf_pipeline": "ivf_qinco2_xs"}
  done = commands.run(
    name,
    f"--config={config.get(name, name)}:smoke",
    "--tracker=mlflow",
    f"--workdir={tmp_path / 'run'}",
    check=False,
  )
  assert done.returncode == 1
  assert "--tracker (train.tracker) must be one of none, t" in done.stderr
  assert not list(tmp_path.glob("run/c*"))
