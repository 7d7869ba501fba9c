r"""Puts a codec with its model card on the Hugging Face hub.

  vqjax publish --codec=runs/qinco2_s --to=me/sift-8-bytes \
      --data=base.npy --queries=query.npy --license=cc-by-4.0
  vqjax publish --codec=runs/qinco2_s --output=card

Writes codec.safetensors, codec.json and README.md, in one commit. The card has
data, dimension, metric, bytes, seed, versions and licence; with --data the MSE,
and with --queries the recall too. Paths of this machine are left out, file
names stay. --output writes the folder; without --to nothing is uploaded. Anyone
then opens the codec by --codec=hf://OWNER/NAME.

It needs `pip install 'vqjax[hub]'`, and a token: `hf auth login`, or HF_TOKEN.
"""

import dataclasses
import pathlib
import re
import tempfile

from absl import logging

from experiments.lib import cli, codecs, model_card
from vqjax.data import files, hub
from vqjax.storage import codec_file

REQUIRED = ("codec",)
NAMES = (codec_file.TENSORS_NAME, codec_file.HEADER_NAME, "README.md")
OPTIONS = {
  "codec": cli.CODEC_OPTION,
  "to": cli.Option(str, None, "OWNER/NAME on the hub; made if not there."),
  "output": cli.Option(str, None, "Folder to write; no upload without --to."),
  "private": cli.Option(bool, False, "Make a new repository private."),
  "data": cli.Option(str, None, "Vectors to measure the codec with."),
  "queries": cli.Option(str, None, "Queries, for the recall in --data."),
  "groundtruth": cli.Option(
    str, None, "Ids of their true neighbours in --data; found if unset."
  ),
  "license": cli.Option(
    str, "unknown", "Licence of the codec, as the hub names it: apache-2.0."
  ),
  "overwrite": cli.Option(
    bool, False, "Replace the files of a folder or repository."
  ),
}


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Writes and uploads; returns `{"folder", "address", "figures"}`."""
  cli.require(config, *REQUIRED)
  _check(config)
  codec = codecs.open_codec(config.codec)
  measured = _measure(config, codec)
  info = model_card.published_info(codec.info)
  codec = dataclasses.replace(codec, info=info)
  record = {}
  if not hub.is_address(config.codec):
    record = model_card.read_record(config.codec)
  name = config.to or pathlib.Path(config.output).name
  card = model_card.render(codec, name, config.license, record, measured)
  address = None
  with tempfile.TemporaryDirectory(prefix="vqjax-publish-") as temporary:
    folder = config.output or temporary
    _write(folder, codec, card, config.overwrite)
    if config.output:
      logging.info("Written to %s: %s", config.output, ", ".join(NAMES))
    if config.to:
      address = _upload(config, folder)
  if config.license == "unknown":
    logging.warning(
      "The card names no licence, so nobody knows what is allowed: "
      "--license=apache-2.0 --overwrite."
    )
  figures = measured.get("figures")
  return {"folder": config.output, "address": address, "figures": figures}


def _check(config) -> None:
  """Refuses what cannot work, before vectors are measured."""
  if not (config.to or config.output):
    raise ValueError("Give --to=OWNER/NAME, or --output=FOLDER, or both.")
  if not re.fullmatch(r"[\w.-]+", config.license, re.ASCII):
    raise ValueError(
      "--license must be a name of the hub, as apache-2.0 or cc-by-nc-4.0; "
      f"got {config.license!r}."
    )
  if not config.data and (config.queries or config.groundtruth):
    raise ValueError("--queries and --groundtruth need --data, their base.")
  if config.output:
    for name in NAMES:
      path = pathlib.Path(config.output, name)
      files.check_output(path, config.overwrite)
  if config.to:
    hub.check_upload(config.to, NAMES, overwrite=config.overwrite)


def _measure(config, codec) -> dict:
  """Figures of the codec, and what they are of; empty without --data."""
  if not config.data:
    return {}
  data = codec.open_vectors(config.data, "--data")
  queries = None
  if config.queries:
    queries = codec.open_vectors(config.queries, "--queries")
  figures = codec.evaluate(
    data,
    queries=queries,
    true_ids=config.groundtruth,
    progress=True,
  )
  told = {"figures": figures, "queries": None}
  told["data"] = model_card.identity(config.data, data)
  if config.queries:
    told["queries"] = model_card.identity(config.queries, queries)
  return told


def _write(folder, codec, card: str, overwrite: bool) -> None:
  """Writes the three files; the card appears last."""
  codec.save(folder, overwrite=overwrite)
  path = pathlib.Path(folder, NAMES[-1])
  with files.atomic_output(path, overwrite) as temporary:
    pathlib.Path(temporary).write_text(card, encoding="utf-8")


def _upload(config, folder) -> str:
  commit = hub.upload(
    folder,
    config.to,
    NAMES,
    private=config.private,
    message="Codec and card by vqjax publish",
  )
  address = f"hf://{config.to}"
  logging.info(
    "Published as %s, commit %s.\nNext:\n  vqjax encode --codec=%s "
    "--data=DATA --output=codes.npy",
    *(address, commit, address),
  )
  return address


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
