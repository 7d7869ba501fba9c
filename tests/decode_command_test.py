"""decode: what it makes of codes, and which it refuses."""

import os

import numpy as np
import pytest

from experiments import decode, encode
from experiments.lib import cli, codecs


def _config(module, **values):
  return cli.get_config(module.OPTIONS, **values)


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
