r"""Adds vectors to the folder of an index, and says when training again pays.

  vqjax index_add --index=my_index --data=new.npy [--ids=new_ids.txt]
  vqjax index_add --index=my_index --data=new.npy --report

The codes that are there stay, byte for byte. Without --ids the ids count on
from the largest. The report compares the new vectors with those that the codec
and the index know: their squared error, and how they use lists and codewords.
--report shows it and adds nothing.

  vqjax index_add --index=my_index --refresh --data=all.npy [--train=learn.npy]

--refresh trains the codec of the index further (PQ and RQ are fitted again),
encodes --data, all vectors that the index is to have, and builds it with as
many lists. Put the new vectors last: the last ones choose the best checkpoint.
The same command resumes after a stop.

The new index is written beside the old one, as FOLDER/generation-00002, and the
manifest is replaced at the end: a search finds the old index or the new one,
also after a kill. The same vectors are added once: run again, the command says
that they are there. The last two generations are kept (--keep).
"""

import shlex

from absl import logging

from experiments.lib import cli, inputs, refresh, run_folder
from vqjax.core import check_range
from vqjax.data import codes as codes_lib
from vqjax.data import files, item_ids
from vqjax.storage import index_folder

REQUIRED = ("index", "data")
OPTIONS = {
  "index": cli.Option(str, None, "Folder of an index."),
  "data": cli.DATA_OPTIONS["data"]._replace(help="Vectors to add."),
  "ids": cli.Option(str, None, f"{item_ids.FLAG_HELP} They count on if unset."),
  "codes": cli.Option(
    str, None, "Codes of --data, if encode has made them already."
  ),
  "report": cli.Option(bool, False, "Only compare; add nothing."),
  "reference": cli.Option(
    str,
    None,
    "Vectors whose error is compared with; if unset, the error of the "
    "validation that is stored with the codec.",
  ),
  "refresh": cli.Option(
    bool, False, "Train the codec further, and build the index of --data again."
  ),
  "train": cli.Option(
    str, None, "Vectors that --refresh trains on; --data if unset."
  ),
  "config": cli.Option(
    str,
    None,
    "Configuration of this training, if the codec does not know its own.",
  ),
  "epochs": cli.Option(
    int, None, "Epochs of this training; if unset, half of those before."
  ),
  "keep": cli.Option(int, 2, "Generations to keep; the first one stays."),
}


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Adds the vectors; returns the comparison."""
  cli.require(config, *REQUIRED)
  check_range("--keep", config.keep, 1, 1 << 20)
  only = ("codes", "report", "reference")
  only = only if config.refresh else ("train", "config", "epochs")
  for name in only:
    if config[name]:
      raise ValueError(
        f"--{name} is {'not ' if config.refresh else 'only '}for --refresh; "
        "leave it out."
      )
  folder = files.user_path(config.index)
  index_folder.read_manifest(folder)  # Else the lock would make the folder.
  with run_folder.locked(folder):
    cli.keep_compiled()
    if config.refresh:
      return refresh.run(config, folder)
    return _add(config, folder)


def _add(config, folder) -> dict:
  """`run`, with the folder locked."""
  info, index, vectors, ids_N, added = refresh.open_both(config, folder)
  if added in info.get("added", []) and not config.report:
    logging.info("%s has these vectors already.", config.index)
    return {"num_vectors": len(index), "is_there": True}
  index.check_new(len(vectors), ids_N)
  if config.reference:
    index.open_vectors(config.reference)  # Before hours of encoding.
  codes_NM = _codes(config, index, vectors)
  found = index.drift(vectors, codes_NM, reference=config.reference)
  _show(found)
  if config.report:
    return found
  index.add(vectors, ids_N, codes=codes_NM)
  generation = index_folder.next_generation(folder)
  index.save(generation, overwrite=True)
  info = {**info, "added": [*info.get("added", []), added]}
  index_folder.switch(folder, generation, info)
  removed = index_folder.remove_generations(folder, config.keep)
  logging.info(
    "Added %d vectors: %d are in %s.%s\nNext:\n"
    "  vqjax search --index=%s --queries=QUERIES --data=ALL-VECTORS "
    "--output=search.json",
    *(len(vectors), len(index), generation),
    f" Removed {', '.join(removed)}." if removed else "",
    shlex.quote(config.index),
  )
  return found | {"num_vectors": len(index), "generation": str(generation)}


def _codes(config, index, vectors):
  """Codes `[N, M]` of --data, made unless they are given."""
  if config.codes:
    found = inputs.of_codec(config, index.codec, vectors)
    codes_NM = found[0 : len(found)]
    codes_lib.check_ids(codes_NM, index.codec.codebook_sizes)
    return codes_NM
  return index.codec.encode(vectors, progress=True, **index.settings)


def _show(found: dict) -> None:
  """Shows the comparison as a table and in sentences."""
  rows = [
    [
      each["name"],
      *(each["used"], f"{each['expected']:.1f}"),
      *(f"{each['distance']:.3f}", f"{each['chance']:.3f}"),
    ]
    for each in found["positions"]
  ]
  head = ["new vectors use", "used", "of as many old", "distance", "by chance"]
  logging.info("%s", cli.table(head, rows))
  for text in found["said"]:
    logging.info("%s", text)


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
