"""RQ-VAE by the command and by `vqjax.fit`: runs, resumes, says what is bad."""

import json
import os
import shutil
import signal

import numpy as np
import pytest

import vqjax
from configs import rqvae
from experiments import evaluate, train
from experiments.lib import cli
from vqjax import fitting, recipes
from vqjax.data import batches
from vqjax.training import checkpoints, writers

SMALL = dict(
  model=dict(codebook_sizes=(8, 8, 4), layers=(12,), e_dim=4, batch_norm=True),
  loss=dict(dropout=0.1),
  train=dict(num_epochs=6, eval_epochs=2, batch_size=40, ramp_epochs=1),
  init=dict(num_iterations=3),
)


def _config(file, **values):
  config = rqvae.get_config()
  config.data.update(train=str(file), name="own")
  for name, group in {**SMALL, **values}.items():
    config[name].update(SMALL.get(name, {}))
    config[name].update(group)
  return config


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A file of 100 items, and a finished run of 6 epochs of 3 steps on it."""
  folder = tmp_path_factory.mktemp("made")
  x_ND = np.random.default_rng(0).normal(size=(100, 10)).astype(np.float32)
  np.save(folder / "x.npy", x_ND)
  train.run(_config(folder / "x.npy"), folder / "run")
  return folder


def _rows(folder):
  rows = writers.read_rows(folder / "metrics.jsonl")
  return [{**row, "seconds": 0} for row in rows]


def test_a_run_learns_from_all_items_and_reports_on_them(made):
  summary = json.loads((made / "run" / "summary.json").read_text())
  assert (summary["num_held_out"], summary["last_step"]) == (0, 18)
  codec, x_ND = vqjax.load(made / "run"), np.load(made / "x.npy")
  codes_NM = codec.encode(x_ND)
  error_ND = codec.decode(codes_NM) - x_ND
  mse = np.mean(np.sum(error_ND**2, axis=1))
  (row,) = [
    row for row in _rows(made / "run") if row["step"] == summary["step"]
  ]
  assert mse == pytest.approx(row["validation_mse"], rel=1e-5)
  spread = np.sum((x_ND - x_ND.mean(axis=0)) ** 2, axis=1).mean()
  assert row["validation_relative_error"] == pytest.approx(
    mse / spread, rel=1e-4
  )
  num_ids = len(set(map(tuple, codes_NM.tolist())))
  assert row["validation_collision_rate"] == pytest.approx(1 - num_ids / 100)
  used = [len(set(column)) for column in codes_NM.T.tolist()]
  assert row["validation_utilisation_M"] == pytest.approx(
    np.divide(used, (8, 8, 4))
  )
  assert (made / "run" / "curves.png").exists()
  # Batch norm has learned what to expect.
  assert np.all(np.asarray(codec.params.encoder.norms[0].mean_H) != 0)


def test_an_epoch_takes_every_item_in_equal_steps(made):
  config = _config(made / "x.npy")
  plan = fitting.make_plan(config, 100, 1.0)
  assert (plan.steps_per_epoch, plan.batch_size) == (3, 34)
  assert fitting.make_plan(config, 7, 1.0).batch_size == 7


def test_checkpoints_of_the_best_figures_are_kept(made):
  rows = {row["step"]: row for row in _rows(made / "run") if "epoch" in row}
  seen = [step for step, row in rows.items() if "validation_mse" in row]
  assert seen == [6, 12, 18]
  saved = checkpoints.Checkpoints(made / "run" / "checkpoints", read_only=True)
  best = {12, 18}  # The latest two, and
  for name, sign in (
    ("validation_mse", 1),
    ("validation_collision_rate", 1),
    ("train_loss", 1),
    ("validation_utilisation", -1),
  ):
    best.add(min(seen[::-1], key=lambda step: sign * rows[step][name]))
  assert saved.steps() == sorted(best)
  saved.close()


def test_killed_and_resumed_it_is_the_same_bit_for_bit(
  made, tmp_path, monkeypatch
):
  read = batches.BatchReader.__call__

  def stopping(reader, step):
    if step == 8:  # Between two validations.
      os.kill(os.getpid(), signal.SIGTERM)
    return read(reader, step)

  config = _config(made / "x.npy")
  with monkeypatch.context() as patch:
    patch.setattr(batches.BatchReader, "__call__", stopping)
    assert train.run(config, tmp_path) is None
  assert vqjax.load(tmp_path).num_codes == 3  # Its best checkpoint so far.
  train.run(config, tmp_path)
  assert _rows(tmp_path) == _rows(made / "run")
  assert (
    vqjax.load(tmp_path).fingerprint == vqjax.load(made / "run").fingerprint
  )


def test_another_figure_chooses_another_checkpoint(made, tmp_path):
  shutil.copytree(made / "run", tmp_path / "run")
  rows = [row for row in _rows(made / "run") if "validation_mse" in row]
  best = min(rows[::-1], key=lambda row: row["validation_collision_rate"])
  config = _config(made / "x.npy", train=dict(best="collision_rate"))
  summary = train.run(config, tmp_path / "run")
  assert summary["step"] == best["step"]
  record = json.loads((tmp_path / "run" / "config.json").read_text())
  assert record["train"]["best"] == "collision_rate"
  assert train.run(config, tmp_path / "run") == summary


def test_fit_gives_the_codec_of_the_command(made):
  x_ND = np.load(made / "x.npy")
  codec = vqjax.fit(x_ND, "rqvae", **SMALL)
  assert codec.fingerprint == vqjax.load(made / "run").fingerprint
  config = fitting.make_config("rqvae", num_codes=2, codebook_sizes=[8, 6])
  assert config.model.codebook_sizes == (8, 6)
  config = fitting.make_config("rqvae", num_codes=4)
  assert config.model.codebook_sizes == (256,) * 4


def test_evaluate_measures_the_items(made):
  options = {"codec": str(made / "run"), "split": "validation"}
  result = evaluate.run(cli.get_config(evaluate.OPTIONS, **options))
  assert result["num_vectors"] == 100
  # By a beam as well.
  options = {"codec": str(made / "run"), "data": str(made / "x.npy")}
  beam = evaluate.run(cli.get_config(evaluate.OPTIONS, **options, beam_size=4))
  assert beam["num_vectors"] == 100


@pytest.mark.parametrize(
  ("values", "said"),
  [
    (
      dict(loss=dict(sk_epsilons=(0.0, 0.1))),
      "one number per level, 3, .*got 2",
    ),
    (dict(loss=dict(loss_type="huber")), "loss_type must be one of mse, l1;"),
    (dict(train=dict(schedule="triangle")), "train.schedule must .*'triangle'"),
    (dict(train=dict(optimiser="lion")), "train.optimiser must be .*'lion'"),
    (dict(train=dict(tracker="tb")), "train.tracker. must be one of .*'tb'"),
    (dict(train=dict(redraw="yes")), "train.redraw must be one of .*'yes'"),
    (dict(train=dict(best="loss")), "train.best must be one of mse.*'loss'"),
    (dict(init=dict(kmeans="big")), "init.kmeans must be one of .*'big'"),
    (dict(init=dict(networks="rq")), "init.networks must be one of .*'rq'"),
    (dict(model=dict(codebook_sizes=(4,) * 27)), "levels .* 26, got 27"),
    (dict(model=dict(codebook_sizes=(101, 4))), "100 training vectors cannot"),
    (
      dict(
        init=dict(kmeans="small"),
        model=dict(codebook_sizes=(35, 4)),
      ),
      "kmeans=small starts the 35 .* first batch, of 34 vectors: raise",
    ),
    (
      dict(init=dict(max_vectors=7)),
      "kmeans=large starts the 8 .* sample of 7 vectors: raise .*max_vectors",
    ),
  ],
)
def test_what_makes_no_sense_is_refused_before_work(
  made, values, said, tmp_path
):
  with pytest.raises(ValueError, match=said):
    train.run(_config(made / "x.npy", **values), tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()


def test_starts_differ(made):
  x_ND = np.load(made / "x.npy")
  starts = {}
  for kind in ("none", "small", "large"):
    config = _config(made / "x.npy", init=dict(kmeans=kind))
    plan = fitting.make_plan(config, 100, 1.0)
    job = fitting.prepare(config, None, x_ND, 100, slice(0, 100), plan)
    words_KE = job.start_fn().params.codebooks[0]
    assert words_KE.shape == job.abstract.params.codebooks[0].shape
    starts[kind] = np.asarray(words_KE)
  assert np.abs(starts["none"]).max() <= 1 / 8
  assert not np.array_equal(starts["small"], starts["large"])


def test_every_recipe_is_of_a_codec():
  assert recipes.get("pq") is None
  for name in ("qinco", "rqvae"):
    assert recipes.get(name).plan_fn
