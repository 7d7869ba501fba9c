"""Training runs that are begun again: what goes on, what is refused."""

import json
import os
import shutil

import numpy as np
import pytest

import vqjax
from configs import pq, qinco2_s, rq
from experiments import evaluate, train
from experiments.lib import cli, train_run
from vqjax.storage import codec_file
from vqjax.training import checkpoints, writers


def _vectors(seed):
  return np.random.default_rng(seed).normal(size=(900, 8)).astype(np.float32)


def _config(file, **values):
  config = qinco2_s.get_config("smoke")
  config.data.update(train=str(file), num_train=None)
  config.train.update(values)
  return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A file of vectors, and a finished run of two epochs of 4 steps on it."""
  folder = tmp_path_factory.mktemp("made")
  np.save(folder / "x.npy", _vectors(1))
  train.run(_config(folder / "x.npy"), folder / "run")
  return folder


@pytest.fixture
def folder(made, tmp_path):
  """The same, to be changed."""
  shutil.copytree(made, tmp_path / "copy")
  return tmp_path / "copy"


@pytest.fixture(autouse=True)
def _info(caplog):
  caplog.set_level("INFO", logger="absl")


def _stop_after_the_first_epoch(folder):
  for name in ("summary.json", "codec.safetensors", "codec.json"):
    (folder / "run" / name).unlink()
  shutil.rmtree(folder / "run" / "checkpoints" / "step_8")


def _train(folder, *, resume=False, finish=False, **values):
  config = _config(folder / "x.npy", **values)
  return train.run(config, folder / "run", resume=resume, finish=finish)


def _fingerprint(folder):
  return codec_file.load_codec(folder / "run").fingerprint


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("is_finished", [False, True])
def test_other_vectors_of_the_same_shape_are_refused(
  folder, is_finished, resume
):
  if not is_finished:
    _stop_after_the_first_epoch(folder)
  np.save(folder / "x.npy", _vectors(2))
  with pytest.raises(ValueError, match="checksum of .*--config.data.train was"):
    _train(folder, resume=resume)


def test_a_finished_pq_knows_its_vectors_too(tmp_path):
  config = pq.get_config("smoke")
  config.data.update(train=str(tmp_path / "x.npy"), num_train=None)
  np.save(tmp_path / "x.npy", _vectors(1))
  first = train.run(config, tmp_path / "run")
  assert train.run(config, tmp_path / "run") == first
  np.save(tmp_path / "x.npy", _vectors(2))
  with pytest.raises(ValueError, match="checksum of .*--config.data.train was"):
    train.run(config, tmp_path / "run")


def test_the_same_command_goes_on_from_a_moved_folder(made, folder, caplog):
  _stop_after_the_first_epoch(folder)
  summary = _train(folder)  # Both the file and the run have other paths.
  assert "Resuming from step 4 of 8" in caplog.text
  assert _fingerprint(folder) == _fingerprint(made)
  metrics = lambda at: [
    {**row, "seconds": 0}
    for row in writers.read_rows(at / "run" / "metrics.jsonl")
  ]
  assert metrics(folder) == metrics(made)
  assert summary["validation_mse"] > 0
  assert _train(folder) == summary
  assert "finished already: nothing to do" in caplog.text


def test_resume_starts_where_there_is_nothing(made, tmp_path):
  shutil.copy(made / "x.npy", tmp_path)
  _train(tmp_path, resume=True)
  assert _fingerprint(tmp_path) == _fingerprint(made)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(peak_lr=1e-5), "--config.train.peak_lr was 0.002, but is 1e-05"),
    (dict(batch_size=64), "--config.train.batch_size was 128, but is 64"),
    (dict(epoch_size=256), "--config.train.epoch_size was 512, but is 256"),
    (dict(num_epochs=1), "num_epochs .*--finish ends a run early. was 2, but"),
    (dict(dtype="bfloat16"), "--config.train.dtype was auto, but is bfloat16"),
  ],
)
def test_other_settings_are_refused_by_their_flag(folder, values, message):
  before = (folder / "run" / "config.json").read_text()
  with pytest.raises(ValueError, match=message) as error:
    _train(folder, **values)
  assert "derived" not in str(error.value)
  assert (folder / "run" / "config.json").read_text() == before


def test_a_batch_may_be_cut_otherwise(folder):
  _stop_after_the_first_epoch(folder)
  summary = _train(folder, batch_size=64, accumulate=2, log_every=1)
  assert summary["last_step"] == 8  # All of the two epochs.


def test_more_epochs_than_it_had(folder):
  mse = _train(folder)["validation_mse"]
  codec = vqjax.load(folder / "run")  # As `tradeoff --write` stores a rule.
  rule = codec.rule.replace(num_joint_candidates=30)
  codec.with_rule(num_joint_candidates=30).save(folder / "run", overwrite=True)
  summary = _train(folder, num_epochs=3)
  assert summary["last_step"] == 12
  assert vqjax.load(folder / "run").rule == rule  # It is kept.
  assert summary["validation_mse"] <= mse
  rows = writers.read_rows(folder / "run" / "metrics.jsonl")
  assert [row["epoch"] for row in rows if "epoch" in row] == [1, 2, 3]
  assert rows[-1]["lr"] > 0
  with pytest.raises(ValueError, match="num_epochs .* was 3, but is 2"):
    _train(folder)


def test_an_unfinished_run_is_a_codec(folder, caplog):
  _stop_after_the_first_epoch(folder)
  saved = checkpoints.Checkpoints(folder / "run" / "checkpoints")
  params = saved.restore_tree(4)["params"]
  saved.close()
  loaded = codec_file.load_codec(folder / "run")
  assert "not finished. Using its best checkpoint, of step 4" in (caplog.text)
  np.testing.assert_array_equal(
    loaded.params.codebooks_TKD, params["codebooks_TKD"]
  )
  options = {"codec": str(folder / "run"), "split": "validation"}
  result = evaluate.run(cli.get_config(evaluate.OPTIONS, **options))
  assert result["num_vectors"] == 200


def test_finish_ends_a_run_early_and_resume_takes_that_back(folder, caplog):
  whole = _fingerprint(folder)
  _stop_after_the_first_epoch(folder)
  best = codec_file.load_codec(folder / "run").fingerprint
  summary = _train(folder, finish=True)
  assert (summary["step"], summary["is_early"]) == (4, True)
  assert _fingerprint(folder) == best
  assert _train(folder) == summary
  assert "ended the run in" in caplog.text
  assert _train(folder, resume=True)["last_step"] == 8
  assert _fingerprint(folder) == whole
  with pytest.raises(ValueError, match="There is no run to finish in"):
    train.run(_config(folder / "x.npy"), folder / "other", finish=True)


@pytest.mark.parametrize(
  ("before", "wanted", "has_more"),
  [(2, 3, True), (2, 0, True), (3, 2, False), (0, 2, False), (None, 2, False)],
)
def test_a_later_early_stop_is_more_to_do(before, wanted, has_more):
  records = [{"train": {"early_stop": value}} for value in (before, wanted)]
  assert train_run._check_same("run", *records) is has_more


def test_early_stop_is_no_negative_number(made, tmp_path):
  with pytest.raises(ValueError, match="early_stop must lie between 0"):
    train.run(_config(made / "x.npy", early_stop=-1), tmp_path / "run")


def test_a_damaged_checkpoint_is_not_taken(made, folder, caplog):
  for name in ("summary.json", "codec.safetensors", "codec.json"):
    (folder / "run" / name).unlink()
  for file in (folder / "run" / "checkpoints" / "step_8").rglob("d/*"):
    file.write_bytes(file.read_bytes()[:-20])
  _train(folder)
  assert "step 8 in" in caplog.text
  assert "damaged" in caplog.text
  assert "Using the checkpoint of step 4 instead." in caplog.text
  assert _fingerprint(folder) == _fingerprint(made)
  again = checkpoints.Checkpoints(folder / "run" / "checkpoints")
  again.restore_tree(8)  # Made again.
  again.close()


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"[" * 3000, b"\xff"])
def test_damaged_records_are_told(folder, damage, caplog):
  (folder / "run" / "summary.json").write_bytes(damage)
  assert _train(folder)["last_step"] == 8  # Written again.
  assert caplog.text.count("summary.json is damaged") == 1
  json.loads((folder / "run" / "summary.json").read_text())
  (folder / "run" / "config.json").write_bytes(damage)
  with pytest.raises(ValueError, match="config.json is damaged.*Put back"):
    _train(folder)
  os.unlink(folder / "run" / "config.json")
  with pytest.raises(ValueError, match="has checkpoints, but no config.json"):
    _train(folder)


def test_a_damaged_validation_error_is_left_out(folder, caplog):
  _stop_after_the_first_epoch(folder)
  file = folder / "run" / "checkpoints" / "step_4" / "metrics" / "metrics"
  file.write_bytes(b"{")
  assert _train(folder)["last_step"] == 8
  assert "is damaged, and removed" in caplog.text


def test_an_old_run_keeps_the_half_that_it_held_out(folder):
  _stop_after_the_first_epoch(folder)
  path = folder / "run" / "config.json"
  record = json.loads(path.read_text())
  for name in ("held_out", "data", "codec"):  # As they were written.
    del record["derived"][name]
  path.write_text(json.dumps(record))
  config = _config(folder / "x.npy")
  config.data.validation_size = None
  assert train.run(config, folder / "run")["num_held_out"] == 200


def test_a_switch_that_an_old_run_did_not_have_was_off(tmp_path):
  config = rq.get_config("smoke")
  config.data.update(train=str(tmp_path / "x.npy"), num_train=None)
  np.save(tmp_path / "x.npy", _vectors(1))
  first = train.run(config, tmp_path / "run")
  path = tmp_path / "run" / "config.json"
  record = json.loads(path.read_text())
  del record["model"]["is_balanced"]
  path.write_text(json.dumps(record))
  assert train.run(config, tmp_path / "run") == first
  config.model.is_balanced = True
  with pytest.raises(ValueError, match="is_balanced"):
    train.run(config, tmp_path / "run")


def test_too_many_codewords_are_named_by_their_flag(made, tmp_path):
  config = _config(made / "x.npy")
  config.model.codebook_size = 1024
  said = "--config.model.codebook_size must lie between 2 and 700, got 1024"
  with pytest.raises(ValueError, match=said):
    train.run(config, tmp_path / "run")
