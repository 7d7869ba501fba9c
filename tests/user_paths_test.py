"""`~` and symbolic links in the paths that a user gives."""

import os

import numpy as np
import pytest
from absl import flags
from ml_collections import config_dict

from experiments.lib import cli
from vqjax.data import codes, files
from vqjax.interop import faiss_hakes, hakes_files, torch_qinco
from vqjax.storage import codec_file, decoder_file


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  return tmp_path


def test_outputs_begin_at_home(home):
  with files.atomic_output("~/new/a.json") as temporary:
    temporary.write_text("1")
  assert (home / "new" / "a.json").read_text() == "1"
  with pytest.raises(FileExistsError, match="exists already"):
    files.check_output("~/new/a.json")


def test_flags_begin_at_home(home, monkeypatch):
  values = flags.FlagValues()
  flags.DEFINE_string("data", "~/x.h5#part", "", flag_values=values)
  flags.DEFINE_integer("num", 3, "", flag_values=values)
  values.mark_as_parsed()
  monkeypatch.setattr(flags, "FLAGS", values)
  assert cli._given(dict.fromkeys(["data", "num"])) == {
    "data": f"{home}/x.h5#part",
    "num": 3,
  }


def test_configurations_begin_at_home(home):
  config = config_dict.ConfigDict(
    {
      "data": {"train": "~/x.npy", "scale": 1.0},
      "name": "a~b",
      "empty": config_dict.placeholder(str),
    }
  )
  cli._expand_config(config)
  assert config.data.train == f"{home}/x.npy"
  assert (config.name, config.empty) == ("a~b", None)


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_stays_and_its_target_is_replaced(tmp_path, is_there):
  (tmp_path / "far").mkdir()
  target, link = tmp_path / "far" / "b.npy", tmp_path / "a.npy"
  link.symlink_to(os.path.join("far", "b.npy"))
  if is_there:
    np.save(target, np.zeros(2))
    with pytest.raises(FileExistsError, match="a.npy exists already"):
      files.check_output(link)
  with files.atomic_output(link, overwrite=True) as temporary:
    assert temporary.parent == target.parent  # Renamed on one file system.
    np.save(temporary, np.ones(3))
  assert link.is_symlink()
  assert np.load(target).tolist() == [1, 1, 1]
  assert os.listdir(target.parent) == ["b.npy"]


@pytest.mark.parametrize(
  "load_fn",
  [
    codec_file.load_codec,
    decoder_file.load,
    hakes_files.load,
    faiss_hakes.load,
    codes.open_codes,
    torch_qinco.load_checkpoint,
  ],
)
def test_what_programs_load_begins_at_home(home, load_fn):
  suffix = {
    codec_file.load_codec: "",
    torch_qinco.load_checkpoint: ".pt",
  }.get(load_fn, ".safetensors")
  with pytest.raises((FileNotFoundError, ValueError)) as error:
    load_fn(f"~/missing{suffix}")
  assert f"{home}/missing" in str(error.value)
