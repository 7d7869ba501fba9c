"""Encoding into shards: the same codes, however many processes make them."""

import importlib
import json
import pathlib
import re
import shlex
import types

import jax
import numpy as np
import pytest

from experiments import decode, encode
from experiments.lib import cli, codecs
from tests import commands
from vqjax.codec import Codec
from vqjax.data import batches, codes, formats
from vqjax.storage import codec_file

ROOT = pathlib.Path(__file__).parents[1]
GOLDEN = ROOT / "third_party" / "golden"
CODEC = str(GOLDEN / "ivf_qinco2_tiny.pt")
NUM = 50


def _config(module=encode, **values):
  return cli.get_config(module.OPTIONS, **values)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
  path = tmp_path_factory.mktemp("data") / "x.npy"
  np.save(path, np.load(GOLDEN / "ivf_qinco2_tiny.npz")["x"][:NUM])
  return str(path)


@pytest.fixture(scope="module")
def other_codec(tmp_path_factory):
  """A codec of the same sizes."""
  loaded = codec_file.load_codec(CODEC)
  params = loaded.params.replace(mean_D=loaded.params.mean_D + 1)
  folder = tmp_path_factory.mktemp("other")
  codec_file.save_codec(folder, loaded.name, params, info=loaded.info)
  return str(folder)


@pytest.fixture
def given(data, tmp_path):
  return dict(codec=CODEC, data=data, output=str(tmp_path / "codes"))


def _want():
  return np.load(GOLDEN / "ivf_qinco2_tiny.npz")["codes"][:NUM]


_ENCODERS = {}  # Compiled once for all tests.


@pytest.fixture(autouse=True)
def num_blocks(monkeypatch):
  """Counts the blocks that go through encoders, of 7 vectors at most."""
  made, counts = Codec.encoder, {"blocks": 0}

  def encoder(codec, rule, *args, **options):
    key = repr((codec.fingerprint, rule, args))
    if key not in _ENCODERS:
      _ENCODERS[key], _ = made(codec, rule, *args, **options)

    def counted_fn(x_ND):
      counts["blocks"] += 1
      if counts["blocks"] == counts.get("stop_at"):
        raise KeyboardInterrupt
      return _ENCODERS[key](x_ND)

    return counted_fn, 7

  monkeypatch.setattr(Codec, "encoder", encoder)
  return counts


@pytest.mark.parametrize("num_shards", [1, 3, NUM])
def test_shards_hold_the_codes_of_one_file(num_shards, given):
  result = encode.run(_config(**given, shards=num_shards))
  assert result["shape"] == _want().shape
  found = codes.open_codes(given["output"])
  np.testing.assert_array_equal(found[:], _want())
  manifest = codes.load_manifest(given["output"])
  codec = codecs.open_codec(CODEC)
  assert manifest["num_shards"] == num_shards
  assert manifest["codec_fingerprint"] == codec.fingerprint
  sizes = codec.codebook_sizes
  assert found.codebook_sizes == tuple(sizes)
  # Defaults too: they might be others in another version.
  wanted = codec.info["encode"] | {"num_joint_candidates": 0}
  assert manifest["encode"].items() >= wanted.items()
  assert len(list(pathlib.Path(given["output"]).iterdir())) == (
    2 * num_shards + 1
  )


def test_processes_that_make_one_shard_each(given):
  folder = pathlib.Path(given["output"])
  for shard in (2, 0, 3):
    encode.run(_config(**given, shard=f"{shard}/4"))
  names = {path.name for path in folder.glob("*.npy")}
  assert names == {f"codes-0000{i}-of-00004.npy" for i in (0, 2, 3)}
  with pytest.raises(ValueError, match="lacks 1 of its 4 shards: codes-00001"):
    codes.open_codes(folder)
  manifest = (folder / "manifest.json").read_bytes()
  encode.run(_config(**given, shard="1/4"))
  assert (folder / "manifest.json").read_bytes() == manifest
  np.testing.assert_array_equal(codes.open_codes(folder)[:], _want())


@pytest.mark.parametrize("num_shards", [None, 2, 5])
def test_processes_of_one_run_share_out_the_shards(
  num_shards, given, monkeypatch
):
  monkeypatch.setattr(jax, "process_count", lambda: 3)
  made, folder = [], pathlib.Path(given["output"])
  for index in (1, 0, 2):
    monkeypatch.setattr(jax, "process_index", lambda index=index: index)
    encode.run(_config(**given, shards=num_shards))
    made.append(len(list(folder.glob("*.npy"))))
  assert made == {None: [1, 2, 3], 2: [1, 2, 2], 5: [2, 4, 5]}[num_shards]
  np.testing.assert_array_equal(codes.open_codes(folder)[:], _want())


def test_finished_shards_are_skipped_and_others_made_again(given, num_blocks):
  encode.run(_config(**given, shards=3))
  folder, times = pathlib.Path(given["output"]), {}
  for path in folder.iterdir():
    times[path.name] = path.stat().st_mtime_ns
  num_blocks["blocks"] = 0
  encode.run(_config(**given, shards=3))
  assert num_blocks["blocks"] == 0
  (folder / "codes-00001-of-00003.json").unlink()
  encode.run(_config(**given, shards=3))
  assert num_blocks["blocks"] == 3  # 17 rows in blocks of 7.
  changed = {
    path.name
    for path in folder.iterdir()
    if path.stat().st_mtime_ns != times[path.name]
  }
  assert changed == {f"codes-00001-of-00003.{end}" for end in ("npy", "json")}
  np.testing.assert_array_equal(codes.open_codes(folder)[:], _want())


def test_an_interrupted_run_keeps_its_finished_shards(given, num_blocks):
  num_blocks["stop_at"] = 5
  with pytest.raises(KeyboardInterrupt):
    encode.run(_config(**given, shards=3))
  names = sorted(path.name for path in pathlib.Path(given["output"]).iterdir())
  assert names == [
    "codes-00000-of-00003.json",
    "codes-00000-of-00003.npy",
    "manifest.json",
  ]
  encode.run(_config(**given, shards=3))
  np.testing.assert_array_equal(codes.open_codes(given["output"])[:], _want())


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(shard="4/4"), "between 0/4 and 3/4: shards are counted from 0; got"),
    (dict(shard="3"), "--shard must be i/n, .* got '3'"),
    (dict(shard="-1/4"), "--shard must be i/n, .* got '-1/4'"),
    (dict(shard="/4"), "--shard must be i/n, .* got '/4'"),  # Unset variable.
    (dict(shard="0/0"), "--shard must be i/n"),
    (dict(shard="0/4", shards=4), "leave --shards and --multihost out"),
    (dict(shards=0), "--shards must lie between 1 and .* got 0"),
    (dict(shards=NUM + 1), "between 1 and 50, got 51: none is empty"),
    (dict(shards=2, raw=True), "leave --raw and --overwrite out"),
    (dict(shards=2, overwrite=True), "leave --raw and --overwrite out"),
    (dict(shards=2, output="codes.npy"), "give --output=FOLDER"),
    (dict(shards=2, output=CODEC), "must be a folder for the shards"),
    (dict(output=str(ROOT)), "is a folder: give --shards=n or --shard=i/n"),
    (dict(shards=2, beam_size=0), "beam_size must lie between 1"),
  ],
)
def test_refusals_before_any_work(values, message, given):
  with pytest.raises(ValueError, match=message):
    encode.run(_config(**{**given, **values}))
  assert not pathlib.Path(given["output"]).exists()


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(num_vectors=NUM - 1), r"shape is \[50, .* now it is \[49"),
    (dict(shards=3), "num_shards is 2, now it is 3"),
    (dict(beam_size=2), "encode.beam_size is .* now it is 2"),
    (dict(num_steps=1), r"shape is \[50, 5\], now it is \[50, 2\]"),
    (dict(codec="other"), "their codec_fingerprint is"),
    (dict(data="other"), "data.checksum_of_sample is"),
  ],
)
def test_a_folder_of_another_run_is_refused(
  values, message, given, other_codec, tmp_path
):
  if values.get("codec") == "other":
    values = dict(codec=other_codec)
  if values.get("data") == "other":
    np.save(tmp_path / "y.npy", np.load(given["data"])[::-1])
    values = dict(data=str(tmp_path / "y.npy"))
  given["shards"] = 2
  encode.run(_config(**given))
  before = {p: p.read_bytes() for p in pathlib.Path(given["output"]).iterdir()}
  with pytest.raises(ValueError, match=message):
    encode.run(_config(**{**given, **values}))
  assert before == {p: p.read_bytes() for p in before}


def test_nan_is_named_by_its_row_in_the_file(given, tmp_path):
  x_ND = np.tile(np.load(given["data"]), (12, 1))
  x_ND[301, 2] = np.nan  # Not in the sample that tells data apart.
  given["data"] = str(tmp_path / "nan.npy")
  np.save(given["data"], x_ND)
  with pytest.raises(
    ValueError,
    match=r"nan.npy \(vectors to encode\) .* 1 of 7 rows, first in row 301",
  ):
    encode.run(_config(**given, shard="1/2"))


def test_only_rows_of_the_shard_are_read():
  asked = []

  class Vectors:
    shape, nbytes, dtype = (100, 2), 800, np.dtype("f4")

    def __len__(self):
      return 100

    def __getitem__(self, rows):
      asked.append((rows.start, rows.stop))
      return np.zeros((rows.stop - rows.start, 2), np.float32)

  fn = lambda x_ND: x_ND
  blocks = batches.map_blocks(fn, Vectors(), block_size=8, rows=range(30, 50))
  blocks = [block for _, block in blocks]
  assert asked == [(30, 38), (38, 46), (46, 50)]
  assert [len(block) for block in blocks] == [8, 8, 4]


def _verify(given, **values):
  return encode.run(_config(verify=True, output=given["output"], **values))


def test_verify_says_what_is_wrong_and_its_command_mends_it(given):
  given |= dict(beam_size=2, num_vectors=40)
  encode.run(_config(**given, shards=4))
  assert _verify(given) == {"output": given["output"], "shape": (40, 5)}
  folder = pathlib.Path(given["output"])
  damaged = folder / "codes-00001-of-00004.npy"
  raw = damaged.read_bytes()
  damaged.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
  (folder / "codes-00003-of-00004.npy").unlink()
  with pytest.raises(ValueError, match="2 of the 4 shards") as info:
    _verify(given)
  text = str(info.value)
  assert re.search("00001-of-00004.npy is damaged: .* checksum", text)
  assert "00003-of-00004.npy is missing" in text
  assert "--shard=i/4 for i in 1,3" in text
  command = re.search(r"vqjax encode .*", text)[0]
  words = [word.lstrip("-").split("=") for word in shlex.split(command)[2:]]
  options = {name: encode.OPTIONS[name].kind(value) for name, value in words}
  encode.run(_config(**options))
  _verify(given)


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(codec=str(GOLDEN / "qinco2_tiny.pt")), "codec_fingerprint is"),
    (dict(shards=9), "num_shards is 2, now it is 9"),
    (dict(data=str(GOLDEN.parent / "sample_text" / "base.npy")), "data.dim is"),
  ],
)
def test_verify_compares_what_it_is_given(values, message, given):
  encode.run(_config(**given, shards=2))
  good = {name: given[name] for name in values if name in given}
  _verify(given, **good)
  with pytest.raises(ValueError, match=message):
    _verify(given, **values)


def test_verify_refuses_what_is_no_folder_of_codes(given):
  with pytest.raises(FileNotFoundError, match="no folder of codes"):
    _verify(given)
  with pytest.raises(ValueError, match="--output is needed"):
    encode.run(_config(verify=True))


def test_decode_reads_shards_and_refuses_another_codec(
  given, other_codec, tmp_path
):
  one, out = (
    str(tmp_path / "one.npy"),
    [str(tmp_path / f"{i}.npy") for i in "ab"],
  )
  encode.run(_config(**given, shards=3))
  encode.run(_config(**{**given, "output": one}))
  for source, output in zip((given["output"], one), out, strict=True):
    decode.run(_config(decode, codec=CODEC, codes=source, output=output))
  np.testing.assert_array_equal(np.load(out[0]), np.load(out[1]))
  assert np.load(out[0]).shape == formats.open_vectors(given["data"]).shape
  for source in (given["output"], one):
    config = _config(decode, codec=other_codec, codes=source)
    config.output = str(tmp_path / "c.npy")
    with pytest.raises(ValueError, match="was made by codec .* but"):
      decode.run(config)
  (pathlib.Path(given["output"]) / "codes-00002-of-00003.npy").unlink()
  config = _config(decode, codec=CODEC, codes=given["output"])
  config.output = str(tmp_path / "c.npy")
  with pytest.raises(ValueError, match="lacks 1 of its 3 shards: codes-00002"):
    decode.run(config)
  assert not pathlib.Path(config.output).exists()


@pytest.mark.parametrize(
  ("values", "names"),
  [
    (dict(shards=2), ["encode", "pairwise_decoder", "build_index"]),
    (dict(num_vectors=9), ["pairwise_decoder", "build_index"]),
    (dict(num_steps=2), ["decode"]),  # Too short to be searched.
    (dict(raw=True), ["decode"]),
  ],
)
def test_the_summary_names_the_next_commands(values, names, given, monkeypatch):
  said = []
  monkeypatch.setattr(
    encode.logging, "info", lambda text, *args: said.append(text % args)
  )
  if "shards" not in values:
    given["output"] += ".bin" if "raw" in values else ".npy"
  encode.run(_config(**given | values))
  lines = said[-1].partition("Next:\n")[2].splitlines()
  assert [shlex.split(line)[1] for line in lines] == list(names)
  for name, line in zip(names, lines, strict=True):
    flags = dict(
      flag.split("=") for flag in shlex.split(line)[2:] if "=" in flag
    )
    module = importlib.import_module(f"experiments.{name}")
    assert {flag.removeprefix("--") for flag in flags} <= set(module.OPTIONS)
    if name == "encode":
      continue
    wanted = {"--codec": CODEC, "--codes": given["output"]}
    if name == "pairwise_decoder":
      wanted |= {"--data": given["data"]}
      wanted |= {f"--{k}": str(v) for k, v in values.items() if k != "shards"}
    assert flags.items() >= wanted.items()


def test_a_codec_without_lists_decodes_next_or_gets_lists():
  config = _config(codec="run", data="x.npy", output="my codes.npy")
  codec = types.SimpleNamespace(is_ivf=False)
  assert encode._after(config, codec, 0, 50_000).splitlines() == [
    "vqjax decode --codec=run --codes='my codes.npy' --output=x.npy",
    "  vqjax build_index --codec=run --data=x.npy --num_lists=512 "
    "--output=my_index",
  ]
  assert "--num_lists=1 " in encode._after(config, codec, 0, 2_000)


@pytest.mark.slow
def test_stopped_from_the_shell_and_run_again(given, tmp_path):
  x_ND = np.tile(np.load(given["data"]), (4000, 1))
  np.save(tmp_path / "large.npy", x_ND)
  folder = pathlib.Path(given["output"])
  command = [
    "encode", f"--codec={CODEC}", f"--data={tmp_path / 'large.npy'}",
    f"--output={folder}", "--shards=50",
    "--num_candidates=4",  # Its own rule, as that of the expected codes.
  ]  # fmt: skip
  message = commands.stop_once(
    lambda: len(list(folder.glob("c*.json"))) >= 3, *command
  )
  assert "The finished shards stay in" in message
  assert "Run the same command again" in message
  records = list(folder.glob("codes-*.json"))
  assert 3 <= len(records) < 50
  assert len(list(folder.iterdir())) == 1 + 2 * len(records)
  done = commands.run(*command)
  assert f"{len(records)} of the 50 shards" in done.stderr
  assert codes.find_problems(folder) == {}
  blocks = codes.open_codes(folder).blocks(NUM)
  assert all((block_NM == _want()).all() for block_NM in blocks)
  assert (
    json.loads((folder / "manifest.json").read_text())["shape"][0] == 200_000
  )
