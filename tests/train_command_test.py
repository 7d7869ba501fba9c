"""train: refused before any work, resumed from the shell, other ways."""

import json
import pathlib
import re

import numpy as np
import pytest

from configs import qinco2_s
from experiments import train
from experiments.lib import cli
from tests import commands
from vqjax.storage import codec_file


def _config(module, **values):
  return cli.get_config(module.OPTIONS, **values)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(num_train=100), "A step takes 128 vectors"),
    (dict(train="missing.fvecs"), "missing.fvecs"),
    (dict(name="sift1B"), "Unknown data set 'sift1B'"),
    (dict(name="bigann1M"), "VQJAX_DATA"),
  ],
)
def test_train_refuses_data(change, message, tmp_path, monkeypatch):
  monkeypatch.delenv("VQJAX_DATA", raising=False)
  config = qinco2_s.get_config("smoke")
  config.data.update(change)
  with pytest.raises((ValueError, OSError), match=message):
    train.run(config, tmp_path / "run")


def test_train_refuses_more_words_than_vectors(tmp_path):
  config = qinco2_s.get_config("smoke")
  config.data.update(num_train=300, validation_size=100)
  config.model.codebook_size = 256
  with pytest.raises(ValueError, match="256.*200|200.*256"):
    train.run(config, tmp_path / "run")


@pytest.mark.parametrize(
  ("options", "message"),
  [
    (dict(batch_size=0), "train.batch_size must lie between 1"),
    (dict(log_every=0), "train.log_every must lie between 1"),
    (dict(redraw="reset"), "train.redraw must be one of split, .* 'reset'"),
    (dict(dtype="float8"), "train.dtype must be one of .* 'float8'"),
    (dict(schedule="triangle"), "train.schedule must be one of .* 'triangle'"),
  ],
)
def test_train_refuses_options(options, message, tmp_path):
  config = qinco2_s.get_config("smoke")
  config.train.update(options)
  with pytest.raises(ValueError, match=message):
    train.run(config, tmp_path / "run")


def test_a_typo_does_not_spoil_the_run_folder(tmp_path):
  config = qinco2_s.get_config("smoke")
  config.model.beam_size = 99
  with pytest.raises(ValueError, match="beam_size .* between 1 and 16, got 99"):
    train.run(config, tmp_path / "run")
  config.model.beam_size = 2
  assert train.run(config, tmp_path / "run")["validation_mse"] > 0


def test_other_ways_to_train(run_dir, tmp_path):
  config = qinco2_s.get_config("smoke")
  config.train.update(
    dtype="bfloat16", accumulate=2, batch_size=64, tracker="tensorboard"
  )
  config.model.low_rank = 4
  plain = json.loads((pathlib.Path(run_dir) / "summary.json").read_text())
  other = train.run(config, tmp_path / "other")
  assert other["validation_mse"] == pytest.approx(
    plain["validation_mse"], rel=0.05
  )
  assert list((tmp_path / "other" / "tensorboard").iterdir())


def test_train_refuses_nan(tmp_path):
  x_ND = np.random.default_rng(0).normal(size=(900, 8)).astype(np.float32)
  x_ND[400, 2] = np.nan
  np.save(tmp_path / "x.npy", x_ND)
  config = qinco2_s.get_config("smoke")
  config.data.update(train=str(tmp_path / "x.npy"))
  with pytest.raises(
    ValueError, match=r"x.npy \(training vectors\) .* in row 400;"
  ):
    train.run(config, tmp_path / "run")


@pytest.mark.slow
def test_killed_and_resumed_from_the_shell_equals_uninterrupted(tmp_path):
  whole, part = tmp_path / "whole", tmp_path / "part"
  # Every step is slow enough to be hit, and the epochs are long.
  config = [
    "--config=configs/qinco2_s.py:smoke", "--config.train.epoch_size=1000",
    "--config.train.batch_size=16", "--config.train.num_epochs=3",
    "--config.train.log_every=1",
  ]  # fmt: skip
  commands.run("train", *config, f"--workdir={whole}")
  message = commands.stop_once(
    lambda: commands.has_metrics(part, 70),
    *("train", *config, f"--workdir={part}"),
  )
  assert "Run the same command again to resume" in message
  stopped = int(re.search(r"Stopped at step (\d+) of 186", message)[1])
  assert stopped % 62, "stopped at the end of an epoch; nothing was tested"
  assert not (part / "codec.safetensors").exists()
  unfinished = codec_file.load_codec(part)  # Its best checkpoint.
  assert unfinished.params.codebooks_TKD.shape == (2, 16, 128)
  commands.run("train", *config, f"--workdir={part}")
  a, b = (codec_file.load_codec(folder) for folder in (whole, part))
  assert a.fingerprint == b.fingerprint
