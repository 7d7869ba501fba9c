"""encode: codes that decode, say what made them, and refuse what is foreign."""

import json
import os
import pathlib

import numpy as np
import pytest

from experiments import decode, encode
from experiments.lib import cli, codecs
from vqjax.codecs import packing
from vqjax.data import formats

ROOT = pathlib.Path(__file__).parents[1]


def _config(module, **values):
  return cli.get_config(module.OPTIONS, **values)


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
    (dict(data=str(ROOT)), FileNotFoundError, "this folder has no vectors"),
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
