"""Encoding where an additive decoder has a say, by the command."""

import json

import numpy as np
import pytest

from experiments import encode, pairwise_decoder
from experiments.lib import cli, codecs
from tests import qinco_cases
from vqjax.codecs import additive, pq
from vqjax.storage import codec_file, decoder_file

NUM, LISTS = 300, 5


@pytest.fixture(name="given", scope="module")
def _given(tmp_path_factory):
  """A codec with lists, vectors, and decoders of codes made without them."""
  folder = tmp_path_factory.mktemp("given")
  np.save(folder / "x.npy", qinco_cases.vectors(NUM))
  codec_file.save_codec(
    folder / "codec",
    "qinco",
    qinco_cases.make_params(num_lists=LISTS, num_words=8),
    info={"encode": {"num_candidates": 3, "beam_size": 5}},
  )
  given = dict(codec=str(folder / "codec"), data=str(folder / "x.npy"))
  decoders = str(folder / "decoders.safetensors")
  config = cli.get_config(
    pairwise_decoder.OPTIONS, **given, output=decoders, num_tables=0
  )
  pairwise_decoder.run(config)
  return given | {"decoders": decoders, "additive_weight": 0.1}


def _encode(given, output, **values):
  values = {**given, "output": str(output), **values}
  encode.run(cli.get_config(encode.OPTIONS, **values))
  return np.load(output)


def _errors(given, codes_NM):
  """Of the network, and of the additive decoder; means."""
  codec = codecs.open_codec(given["codec"])
  x_ND = np.load(given["data"])
  words = decoder_file.load(given["decoders"]).additive
  left_ND = x_ND - codecs.centroids_of(codec)[codes_NM[:, 0]]
  left_ND = left_ND - additive.decode(words, codes_NM[:, 1:])
  off_ND = x_ND - np.asarray(codec.module.decode(codec.tables, codes_NM))
  return (off_ND**2).sum(1).mean(), (left_ND**2).sum(1).mean()


def test_the_additive_decoder_reads_the_codes_better(given, tmp_path):
  plain_NM = _encode(
    given, tmp_path / "a.npy", decoders=None, additive_weight=None
  )
  chosen_NM = _encode(given, tmp_path / "b.npy")
  more_NM = _encode(given, tmp_path / "c.npy", additive_weight=1.0)
  network, words = zip(
    *(_errors(given, x) for x in (plain_NM, chosen_NM, more_NM)), strict=True
  )
  assert network[0] <= network[1] <= network[2] < 1.5 * network[0]
  assert words[0] > words[1] > words[2]
  np.testing.assert_array_equal(chosen_NM[:, 0], plain_NM[:, 0])


def test_codes_say_which_decoders_and_weight(given, tmp_path):
  _encode(given, tmp_path / "a.npy")
  said = json.loads((tmp_path / "a.npy.json").read_text())
  words = decoder_file.load(given["decoders"]).additive
  assert said["encode"]["additive_weight"] == 0.1
  fingerprint = codec_file.fingerprint(words)
  assert said["encode"]["decoders_fingerprint"] == fingerprint
  assert f"--decoders={given['decoders']}" in said["command"]


def test_shards_of_another_weight_are_refused(given, tmp_path):
  shards = {**given, "output": str(tmp_path / "codes"), "shards": 2}
  run = lambda **values: encode.run(
    cli.get_config(encode.OPTIONS, **{**shards, **values})
  )
  run()
  run()
  with pytest.raises(ValueError, match=r"additive_weight.*0\.1"):
    run(additive_weight=0.2)
  with pytest.raises(ValueError, match="weight is 0.1, now it is None"):
    run(decoders=None, additive_weight=None)


def test_what_cannot_have_a_say_is_refused(given, tmp_path):
  output = tmp_path / "codes.npy"
  for missing in ("decoders", "additive_weight"):
    with pytest.raises(ValueError, match="belong together: .* both or none"):
      _encode(given, output, **{missing: None})
  with pytest.raises(ValueError, match="--additive_weight must .* got 0.0"):
    _encode(given, output, additive_weight=0.0)
  with pytest.raises(ValueError, match="whole codes; leave num_steps"):
    _encode(given, output, num_steps=2)
  other = str(tmp_path / "other.safetensors")
  decoder_file.save(
    other,
    decoder_file.load(given["decoders"]).additive,
    codec_fingerprint="other",
    info={},
  )
  with pytest.raises(ValueError, match="decodes codes of codec other"):
    _encode(given, output, decoders=other)
  words_MKD = np.random.default_rng(0).normal(size=(2, 4, 3))
  codec_file.save_codec(
    tmp_path / "pq", "pq", pq.PQParams(words_MKD.astype(np.float32)), info={}
  )
  with pytest.raises(ValueError, match="mean nothing to the encoder of a pq"):
    _encode(given, output, codec=str(tmp_path / "pq"))
  assert not output.exists()
