"""The commands on the bundled sample, the way a user calls them."""

import json
import os
import pathlib
import re

import numpy as np
import pytest

from configs import qinco2_s
from experiments import decode, encode, evaluate, train
from experiments.lib import cli, codecs
from tests import commands
from vqjax import shipped
from vqjax.codecs import packing
from vqjax.data import formats
from vqjax.storage import codec_file

ROOT = pathlib.Path(__file__).parents[1]
SAMPLE = ROOT / "third_party" / "sample_sift"


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
      with pytest.raises(ValueError, match=r"--\w+ is needed"):
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


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("runs") / "smoke"
  train.run(qinco2_s.get_config("smoke"), folder)
  return str(folder)


@pytest.fixture
def base_file(tmp_path):
  path = str(tmp_path / "base.fvecs")
  x_ND = formats.open_vectors(SAMPLE / "base.bvecs")[:333]
  formats.write_vectors(path, x_ND, dtype=np.float32)
  return path


def test_evaluate_agrees_with_its_definition(run_dir, tmp_path):
  output = str(tmp_path / "out" / "figures.json")
  result = evaluate.run(
    _config(evaluate, codec=run_dir, baselines="RQ", output=output)
  )
  assert json.loads(pathlib.Path(output).read_text()) == result
  row, baseline = result["rows"]
  codec = codecs.open_codec(run_dir)
  x_ND = formats.open_vectors(SAMPLE / "base.bvecs")[:500].astype(np.float32)
  xq_QD = formats.open_vectors(SAMPLE / "query.bvecs")[:50].astype(np.float32)
  codes_NM = codec.encode(x_ND)
  xhat_ND = np.asarray(codec.spec.decode(codec.tables, codes_NM))
  mse = ((x_ND - xhat_ND) ** 2).sum(axis=1).mean()
  assert row["mse"] == pytest.approx(mse, rel=1e-5)
  sq = lambda a, b: ((a[:, None] - b[None]) ** 2).sum(axis=-1)
  true_Q = sq(xq_QD, x_ND).argmin(axis=1)
  order_QN = sq(xq_QD, xhat_ND).argsort(axis=1, kind="stable")
  for r in (1, 10, 100):
    hit = (order_QN[:, :r] == true_Q[:, None]).any(axis=1).mean()
    assert row[f"1-recall@{r}"] == pytest.approx(hit, abs=0.021)  # Ties.
  assert row["bytes"] == 3 * 4 / 8
  assert baseline["name"] == "faiss RQ"
  assert baseline["mse"] > 0


def test_evaluate_the_held_out_part(run_dir):
  result = evaluate.run(_config(evaluate, codec=run_dir, split="validation"))
  assert result["num_vectors"] == 200
  summary = json.loads((pathlib.Path(run_dir) / "summary.json").read_text())
  assert result["rows"][0]["mse"] == pytest.approx(
    summary["validation_mse"], rel=1e-4
  )
  assert "1-recall@1" not in result["rows"][0]


def test_search_sizes_change_the_code(run_dir):
  mse = lambda **knobs: evaluate.run(
    _config(evaluate, codec=run_dir, num_vectors=300, **knobs)
  )["rows"][0]["mse"]
  greedy = mse(beam_size=1, num_candidates=1)
  assert mse(beam_size=8, num_candidates=8) < greedy
  assert mse(beam_size=8, num_joint_candidates=16) < greedy
  assert mse(num_steps=1) > mse()


def test_encode_then_decode(run_dir, base_file, tmp_path):
  codes_file, raw_file = (
    str(tmp_path / "codes.npy"),
    str(tmp_path / "codes.bin"),
  )
  encode.run(_config(encode, codec=run_dir, data=base_file, output=codes_file))
  encode.run(
    _config(encode, codec=run_dir, data=base_file, output=raw_file, raw=True)
  )
  codes_NM = np.load(codes_file)
  assert codes_NM.shape == (333, 3)
  assert codes_NM.dtype == np.int32
  assert os.path.getsize(raw_file) == 333 * 2  # 3 codes of 4 bits.
  sizes = (16, 16, 16)
  packed = np.fromfile(raw_file, np.uint8).reshape(333, 2)
  np.testing.assert_array_equal(packing.unpack(packed, sizes), codes_NM)
  codec = codecs.open_codec(os.path.join(run_dir, "codec.safetensors"))
  want_ND = codec.spec.decode(codec.tables, codes_NM)
  for codes, name in ((codes_file, "a.npy"), (raw_file, "b.fvecs")):
    output = str(tmp_path / name)
    decode.run(_config(decode, codec=run_dir, codes=codes, output=output))
    np.testing.assert_allclose(
      formats.open_vectors(output), want_ND, rtol=1e-5, atol=1e-3
    )


def test_a_prefix_is_a_code(run_dir, base_file, tmp_path):
  codes, output = str(tmp_path / "codes.npy"), str(tmp_path / "x.npy")
  paths = dict(codec=run_dir, data=pathlib.Path(base_file), output=codes)
  encode.run(paths, num_steps=2)  # As a program calls it.
  assert np.load(codes).shape == (333, 2)
  raw = str(tmp_path / "codes.bin")
  encode.run({**paths, "output": raw, "num_steps": 2, "raw": True})
  output_2 = str(tmp_path / "x_2.npy")  # Its description tells the steps.
  decode.run(codec=run_dir, codes=raw, output=output_2)
  decode.run(_config(decode, codec=run_dir, codes=codes, output=output))
  assert np.load(output).shape == (333, 128)
  np.testing.assert_array_equal(np.load(output), np.load(output_2))


def test_decoding_again_says_that_it_is_done(run_dir, base_file, tmp_path):
  codes, output = str(tmp_path / "codes.npy"), tmp_path / "x.npy"
  given = dict(codec=run_dir, codes=codes, output=str(output))
  encode.run(_config(encode, codec=run_dir, data=base_file, output=codes))
  decode.run(_config(decode, **given))
  when = output.stat().st_mtime_ns
  decode.run(_config(decode, **given))
  assert output.stat().st_mtime_ns == when
  with pytest.raises(FileExistsError, match="made with num_codes=3, now it is"):
    decode.run(_config(decode, **given, num_steps=2))


@pytest.mark.parametrize("name", ["codes.npy", "codes.bin"])
def test_codes_say_what_made_them(name, run_dir, base_file, tmp_path):
  output, raw = str(tmp_path / name), not name.endswith(".npy")
  given = dict(codec=run_dir, data=base_file, output=output, raw=raw)
  encode.run(_config(encode, **given))
  file = pathlib.Path(f"{output}.json")
  meta = json.loads(file.read_text())
  codec = codecs.open_codec(run_dir)
  assert meta["shape"] == [333, 3]
  assert meta["codec_fingerprint"] == codec.fingerprint
  assert meta["encode"].items() >= codec.info["encode"].items()
  assert f"--codec={run_dir}" in meta["command"]
  meta["codec_fingerprint"] = "0123456789abcdef"
  file.write_text(json.dumps(meta))
  config = _config(decode, codec=run_dir, codes=output)
  config.output = str(tmp_path / "x.fvecs")
  with pytest.raises(ValueError, match="by codec 0123456789abcdef, but"):
    decode.run(config)
  pathlib.Path(output).unlink()  # As a kill before the file leaves them.
  encode.run(_config(encode, **given))
  decode.run(config)
  pathlib.Path(config.output).unlink()
  meta["codec_fingerprint"], meta["shape"] = codec.fingerprint, [332, 3]
  file.write_text(json.dumps(meta))
  with pytest.raises(
    ValueError, match=r"of shape \[332, 3\], but .*\[333, 3\]"
  ):
    decode.run(config)
  file.unlink()  # Made elsewhere, for all that is known.
  decode.run(config)


def test_a_released_checkpoint_encodes(tmp_path):
  golden = ROOT / "third_party" / "golden"
  data = np.load(golden / "ivf_qinco2_tiny.npz")
  vectors, codes = str(tmp_path / "x.npy"), str(tmp_path / "codes.npy")
  formats.write_vectors(vectors, data["x"])
  encode.run(
    _config(
      encode,
      codec=str(golden / "ivf_qinco2_tiny.pt"),
      data=vectors,
      output=codes,
    )  # fmt: skip
  )
  np.testing.assert_array_equal(np.load(codes), data["codes"])


@pytest.mark.parametrize(
  ("values", "error", "message"),
  [
    (dict(data="no.bvecs"), OSError, "no.bvecs"),
    (dict(data=str(ROOT)), ValueError, "is a folder; name a file"),
    (
      dict(output="codes.txt"),
      ValueError,
      r"must end in \.npy.* got codes.txt",
    ),
    (dict(raw=True), ValueError, "in anything else with --raw"),
    (dict(beam_size=99), ValueError, "beam_size .* between 1 and 16, got 99"),
    (dict(codec="nowhere"), OSError, "nowhere"),
    (dict(codec=None), ValueError, "--codec is needed"),
  ],
)
def test_encode_refuses(values, error, message, run_dir, base_file, tmp_path):
  output = str(tmp_path / "codes.npy")
  good = dict(codec=run_dir, data=base_file, output=output)
  with pytest.raises(error, match=message):
    encode.run(_config(encode, **{**good, **values}))
  assert not os.path.exists(output)


def test_encode_refuses_vectors_of_another_kind(run_dir, tmp_path):
  output, data = str(tmp_path / "codes.npy"), str(tmp_path / "x.npy")
  config = _config(encode, codec=run_dir, data=data, output=output)
  np.save(data, np.zeros((9, 64), np.float32))
  with pytest.raises(ValueError, match="vectors of 128 dimensions, got 64"):
    encode.run(config)
  bad_ND = np.zeros((9, 128), np.float32)
  bad_ND[5, 3] = np.nan
  np.save(data, bad_ND)
  with pytest.raises(
    ValueError, match=r"x.npy \(vectors to encode\) .* in row 5;"
  ):
    encode.run(config)
  pathlib.Path(data).write_bytes(pathlib.Path(data).read_bytes()[:-100])
  with pytest.raises(ValueError, match="bytes"):
    encode.run(config)
  assert not os.path.exists(output)
  np.save(data, np.zeros((9, 128), np.float32))
  made = encode.run(config)
  before = os.stat(output).st_mtime_ns
  assert encode.run(config) == made  # It is made already.
  assert os.stat(output).st_mtime_ns == before
  np.save(data, np.ones((9, 128), np.float32))
  with pytest.raises(FileExistsError, match="made with data.checksum_of_sam"):
    encode.run(config)


@pytest.mark.parametrize(
  ("codes_NM", "message"),
  [
    (
      np.full((4, 3), 16),
      "Code 16 in row 0, column 0 must lie between 0 and 15",
    ),
    (np.full((4, 3), -1), "Code -1 in row 0"),
    (np.zeros((4, 4), int), "4 codes per vector, .* at most 3"),
  ],
)
def test_decode_refuses_foreign_codes(codes_NM, message, run_dir, tmp_path):
  codes, output = str(tmp_path / "codes.npy"), str(tmp_path / "x.npy")
  np.save(codes, codes_NM)
  with pytest.raises(ValueError, match=message):
    decode.run(_config(decode, codec=run_dir, codes=codes, output=output))
  assert not os.path.exists(output)


def test_decode_cuts_codes_to_num_steps(run_dir, tmp_path):
  codes, output = str(tmp_path / "codes.npy"), str(tmp_path / "x.npy")
  codes_NM = np.random.default_rng(0).integers(16, size=(9, 3))
  np.save(codes, codes_NM.astype(np.uint8))
  decode.run(
    _config(decode, codec=run_dir, codes=codes, output=output, num_steps=2)
  )
  codec = codecs.open_codec(run_dir)
  want_ND = codec.spec.decode(codec.tables, codes_NM[:, :2].astype(np.int32))
  np.testing.assert_allclose(np.load(output), want_ND, rtol=1e-5, atol=1e-3)
  for num_steps in (0, 4):
    config = _config(decode, codec=run_dir, codes=codes, output=output)
    config.num_steps = num_steps
    with pytest.raises((ValueError, OSError), match="between 1 and 3|exists"):
      decode.run(config)


def test_a_large_code_does_not_wrap(run_dir, tmp_path):
  codes = str(tmp_path / "codes.npy")
  np.save(codes, np.full((4, 3), 2**32 + 3))
  with pytest.raises(ValueError, match="Code 4294967299 in row 0"):
    decode.run(
      _config(
        decode, codec=run_dir, codes=codes, output=str(tmp_path / "x.npy")
      )
    )


def test_decode_refuses_a_cut_raw_file(run_dir, tmp_path):
  codes = tmp_path / "codes.bin"
  codes.write_bytes(b"\0" * 7)
  with pytest.raises(ValueError, match="7 bytes, .* multiple of the 2 bytes"):
    decode.run(_config(decode, codec=run_dir, codes=str(codes), output="x.npy"))


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
    (dict(schedule="cosine"), "train.schedule must be one of .* 'cosine'"),
  ],
)
def test_train_refuses_options(options, message, tmp_path):
  config = qinco2_s.get_config("smoke")
  config.train.update(options)
  with pytest.raises(ValueError, match=message):
    train.run(config, tmp_path / "run")


def test_own_files_are_evaluated_from_any_folder(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(900, 8)).astype(np.float16)
  np.save(tmp_path / "x.npy", x_ND)
  monkeypatch.chdir(tmp_path)
  config = qinco2_s.get_config("smoke")
  config.data.train = "x.npy"
  config.data.num_train = None
  train.run(config, "run")
  codec = str(tmp_path / "run")
  monkeypatch.chdir("/")
  with pytest.raises(ValueError, match="without a base: give --data=FILE"):
    evaluate.run(_config(evaluate, codec=codec))
  with pytest.raises(ValueError, match="--queries and --groundtruth need"):
    evaluate.run(_config(evaluate, codec=codec, queries="q.npy"))
  with pytest.raises(ValueError, match="may name PQ, OPQ, RQ, LSQ; got XX"):
    evaluate.run(_config(evaluate, codec=codec, baselines="PQ,xx"))
  data = str(tmp_path / "x.npy")
  result = evaluate.run(
    _config(evaluate, codec=codec, data=data, baselines="RQ")
  )
  assert [row["name"] for row in result["rows"]] == ["qinco", "faiss RQ"]
  held_out = evaluate.run(_config(evaluate, codec=codec, split="validation"))
  assert held_out["num_vectors"] == 200


def test_a_typo_does_not_spoil_the_run_folder(tmp_path):
  config = qinco2_s.get_config("smoke")
  config.model.beam_size = 99
  with pytest.raises(ValueError, match="beam_size .* between 1 and 16, got 99"):
    train.run(config, tmp_path / "run")
  config.model.beam_size = 2
  assert train.run(config, tmp_path / "run")["validation_mse"] > 0


def test_other_ways_to_train(tmp_path):
  config = qinco2_s.get_config("smoke")
  config.train.update(
    dtype="bfloat16", accumulate=2, batch_size=64, tracker="tensorboard"
  )
  config.model.low_rank = 4
  plain = train.run(qinco2_s.get_config("smoke"), tmp_path / "plain")
  other = train.run(config, tmp_path / "other")
  assert other["validation_mse"] == pytest.approx(
    plain["validation_mse"], rel=0.05
  )
  assert list((tmp_path / "other" / "tensorboard").iterdir())


def test_inner_product_data_are_searched_by_it(tmp_path):
  rng = np.random.default_rng(0)
  files = {}
  for name, num in (("train", 900), ("base", 400), ("queries", 30)):
    scale = rng.uniform(0.2, 3, size=(num, 1))  # Norms matter.
    files[name] = str(tmp_path / f"{name}.npy")
    np.save(files[name], (scale * rng.normal(size=(num, 8))).astype("f4"))
  config = qinco2_s.get_config("smoke")
  config.data.update(files, num_train=None, num_base=None, num_queries=None)
  config.data.metric = "ip"
  train.run(config, tmp_path / "run")
  result = evaluate.run(_config(evaluate, codec=str(tmp_path / "run")))
  codec = codecs.open_codec(str(tmp_path / "run"))
  xb_ND, xq_QD = np.load(files["base"]), np.load(files["queries"])
  codes_NM = codec.encode(xb_ND)
  xhat_ND = np.asarray(codec.spec.decode(codec.tables, codes_NM))
  hit = (xq_QD @ xhat_ND.T).argmax(axis=1) == (xq_QD @ xb_ND.T).argmax(axis=1)
  assert result["rows"][0]["1-recall@1"] == pytest.approx(hit.mean(), abs=0.04)


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
