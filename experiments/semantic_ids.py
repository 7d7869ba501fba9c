r"""Gives items short discrete ids for a recommender, unique and reported.

  vqjax semantic_ids --codec=runs/rqvae --data=items.parquet#embedding \
      --ids=item_id --output=ids

The folder ids/ has index.json, {"ITEM": ["<a_12>", "<b_7>", "<c_201>"], ...},
which generative recommenders read, id_to_items.json, the way back, ids.npy and
ids.parquet with codes and numbers of tokens, report.json and report.png. Any
codec will do, and the .pth and .npz files of other programs.

Items with the same code are told apart by --resolve:

  nearest     another last codeword that is free, at the least error added
  backtrack   codewords before the last may change, too: less error is added
  sinkhorn    the loop of LC-Rec
  token       one more token that counts them
  none        they share an id

Ids for new items, none of the published ones moved (OLD is not changed):

  vqjax semantic_ids --codec=runs/rqvae --append=OLD --data=new.npy --output=NEW

Figures of ids that any program has made, with --data of their neighbours too:

  vqjax semantic_ids --report=index.json [--data=items.npy] [--output=report]
"""

import dataclasses
import pathlib
import shlex

import numpy as np
from absl import logging

from experiments.lib import cli, codecs
from vqjax import id_making, id_reports, semantic_ids
from vqjax.data import codes, datasets, files, item_ids, json_files
from vqjax.ids import mapping, pictures
from vqjax.ids import report as report_lib
from vqjax.ids.resolver import DUPLICATES, RESOLVERS, TOKEN_FOR, Resolver
from vqjax.storage import folders, id_folder

REQUIRED = ("codec", "data", "output")
OPTIONS = {
  "codec": cli.CODEC_OPTION._replace(
    help=f"{cli.CODEC_OPTION.help} Not with --report."
  ),
  "data": cli.DATA_OPTIONS["data"]._replace(
    help="Vectors of the items; --report runs without them."
  ),
  "ids": cli.Option(str, None, f"{item_ids.FLAG_HELP} Row numbers if unset."),
  "output": cli.Option(
    str, None, "Folder to write; --report runs without one."
  ),
  "resolve": cli.Option(
    str, "nearest", f"How ids are made unique: {', '.join(RESOLVERS)}."
  ),
  "capacity": cli.Option(int, 1, "Items that may share an id."),
  "token_for": cli.Option(
    str, "collided", f"Who gets the token of token: {' or '.join(TOKEN_FOR)}."
  ),
  "separate_duplicates": cli.Option(
    str,
    "share",
    "What becomes of items whose vectors are the same: they share an id, get "
    f"one more token, or other codewords; {', '.join(DUPLICATES)}.",
  ),
  "sk_epsilon": cli.Option(
    float, None, "Blur of sinkhorn; the codec's if unset, else 0.003."
  ),
  "sk_iters": cli.Option(
    int, None, "Iterations of sinkhorn; the codec's if unset, else 50."
  ),
  "max_rounds": cli.Option(int, 20, "Rounds of sinkhorn."),
  "balanced": cli.Option(
    bool,
    None,
    "Give each codeword of a level equally many items; if unset, as the codec "
    "was fitted (--config.model.is_balanced).",
  ),
  "beam_size": cli.SEARCH_OPTIONS["beam_size"],
  "append": cli.Option(
    str, None, "Folder of ids that stay as they are; --data are new items."
  ),
  "report": cli.Option(
    str, None, "Report on this index.json, codes (.npy) or folder of ids."
  ),
  "codebook_sizes": cli.Option(
    str, None, "Of --report, as 256,256,256; by the largest codes if unset."
  ),
  "overwrite": cli.Option(bool, False, "Replace an existing folder of ids."),
}
_REPORT_KIND = ("vqjax report of ids", 1)


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Makes ids, appends some, or reports; returns the report."""
  if config.report:
    return _report(config)
  cli.require(config, *REQUIRED)
  fields = [field.name for field in dataclasses.fields(Resolver)]
  asked = {name: config[name] for name in fields}
  resolver = Resolver(**asked)
  old = None
  if config.append:
    old = semantic_ids.load_ids(config.append)
    _check_append(config, fields)
  codec = codecs.open_codec(config.codec)
  semantic_ids.check_levels(codec, resolver)
  dataset = codecs.resolve_data(codec, config, base=config.data)
  x_ND = datasets.open_split(dataset, "base", role="items")
  vectors = semantic_ids.open_vectors(codec, x_ND)
  ids_N = None
  if config.ids:
    ids_N = item_ids.read(config.ids, len(vectors), data=config.data)
  settings = {} if config.beam_size is None else {"beam_size": config.beam_size}
  asked["is_balanced"] = config.balanced
  encode = id_making.settings_of(codec, config.balanced, settings)
  wanted = _wanted(codec, vectors, ids_N, resolver, encode, old)
  made = _find_made(config, wanted)
  if made:
    return made
  if old is not None:
    ids = old.append(vectors, ids_N, codec=codec, progress=True)
  else:
    ids = semantic_ids.make_ids(
      codec, vectors, ids_N, progress=True, **asked, **settings
    )
  if not id_folder.has_parquet():
    logging.info("ids.parquet is left out: pip install 'vqjax[parquet]'.")
  ids.save(config.output, overwrite=config.overwrite)
  _log(ids.report)
  logging.info(
    "Written to %s: %s\nNext, for new items:\n"
    "  vqjax semantic_ids --codec=%s --append=%s --data=NEW --output=FOLDER",
    config.output,
    ", ".join(sorted(p.name for p in files.user_path(config.output).iterdir())),
    *map(shlex.quote, (config.codec, config.output)),
  )
  return ids.report


def _check_append(config, fields) -> None:
  """Raises ValueError if options would be lost, or the old ids."""
  given = [name for name in fields if config[name] != OPTIONS[name].default]
  encode = ("beam_size", "balanced")
  given += [name for name in encode if config[name] is not None]
  if given:
    raise ValueError(
      f"--append tells new items apart as the published ones were: leave "
      f"--{given[0]} out."
    )
  paths = (files.user_path(p).resolve() for p in (config.append, config.output))
  if len(set(paths)) == 1:
    raise ValueError(
      "--output must be another folder than --append, whose ids stay."
    )


def _wanted(codec, vectors, ids_N, resolver, settings, old) -> dict:
  """What the manifest says of ids that this command makes."""
  published = None if old is None else old.items
  items_N = item_ids.check_items(ids_N, len(vectors), published)
  if old is None:
    return semantic_ids.describe(
      codec, vectors, items_N, resolver.of(codec.info), settings
    )
  return old.appended_info(codec, vectors, items_N)


def _find_made(config, wanted: dict) -> dict | None:
  """The report of ids that are made already; raises if others are there."""
  path = pathlib.Path(config.output) / folders.MANIFEST
  read_fn = lambda path: id_folder.describe(path.parent)
  if files.find_made(path, wanted, config.overwrite, read_fn=read_fn):
    logging.info("%s is made already.", config.output)
    return semantic_ids.load_ids(config.output).report
  folders.check_new(
    config.output, id_folder.KIND[0], overwrite=config.overwrite
  )
  files.check_folder(pathlib.Path(config.output).absolute().parent)
  return None


def _log(report: dict) -> None:
  """Shows a report as tables, and what a reader must know besides."""
  for head, rows in report_lib.tables(report):
    logging.info("%s\n", cli.table(head, rows))
  found = report.get("resolver", {})
  if "moved" in found:
    logging.info(
      "%d items moved to another id, %d of them to another prefix.",
      *(found["moved"], found.get("moved_before_last", 0)),
    )
  if found.get("added_error"):
    logging.info("Squared error added: %.3g %%.", 100 * found["added_error"])
  if found.get("left"):
    logging.warning(
      "%d items share an id with more than may: all ids are taken. Use more "
      "levels or codewords, --capacity, or --resolve=token.",
      found["left"],
    )
  same = report.get("duplicates", {})
  if same.get("items"):
    logging.info(
      "%d items have the same vector as another one, so that the collision "
      "rate is at least %.4f without a token or another codeword for them "
      "(--separate_duplicates).",
      *(same["items"], same["floor"]),
    )
  appended = report.get("append")
  if appended:
    logging.info(
      "%d new items: squared error %.4g, of the published ones %.4g; %.1f %% "
      "have a code that is taken or there twice, of the published ones "
      "%.1f %%.",
      *(appended["items"], appended["mse"], appended["published_mse"]),
      100 * appended["sharing_rate"],
      100 * appended["published_sharing_rate"],
    )
  for text in (appended or {}).get("warnings", []):
    logging.warning("%s", text)


def _report(config) -> dict:
  """Reports on ids that are there."""
  given = ("codec", "append")
  for name in given:
    if config[name]:
      raise ValueError(f"--report reads ids alone: leave --{name} out.")
  items_N, codes_NL, sizes = _open_mapping(config)
  vectors = rows_N = None
  if config.data:
    dataset = datasets.resolve(base=config.data)
    vectors = datasets.open_split(dataset, "base", role="items")
    ids_R = None
    if config.ids:
      ids_R = item_ids.read(config.ids, len(vectors), data=config.data)
    rows_N = mapping.rows_of(items_N, ids_R, len(vectors), config.report)
  output = config.output and files.user_path(config.output)
  if output:
    folders.check_new(output, _REPORT_KIND[0], overwrite=config.overwrite)
  report = id_reports.of_mapping(codes_NL, sizes, vectors, items_N, rows_N)
  _log(report)
  if output:
    name, version = _REPORT_KIND
    with folders.new_folder(output, name, overwrite=config.overwrite) as path:
      files.write_json(path / "report.json", report)
      pictures.draw(path / "report.png", codes_NL, report)
      about = {"format": name, "version": version, "of": config.report}
      files.write_json(path / folders.MANIFEST, about)
    logging.info("Report: %s", output)
  return report


def _open_mapping(config):
  """Items, codes and sizes of --report."""
  path, first = files.user_path(config.report), 0
  sizes = None
  if path.is_dir():
    ids = semantic_ids.load_ids(path)
    items_N, codes_NL, sizes = ids.items, ids.codes, list(ids.sizes)
  elif path.suffix == ".npy":
    found = codes.open_codes(path)
    codes_NL = np.asarray(found[0 : len(found)], np.int64)
    items_N = np.arange(len(codes_NL))
  elif path.is_file():
    found = json_files.parse_json(path.read_bytes(), path)
    items_N, codes_NL, first = mapping.parse(found, str(path))
  else:
    raise FileNotFoundError(f"There is no file or folder {path} to report on.")
  if first:
    logging.info("No token is 0: they are taken to count from 1.")
  if config.codebook_sizes:
    sizes = _sizes(config.codebook_sizes, codes_NL)
  if sizes is None:
    logging.info(
      "Codebook sizes are taken from the largest codes; give --codebook_sizes "
      "to count codewords that no item uses."
    )
  return items_N, codes_NL, sizes


def _sizes(text: str, codes_NL) -> list[int]:
  """The sizes of --codebook_sizes; those of further tokens by their codes."""
  words = text.split(",")
  if not all(word.strip().isdecimal() for word in words):
    raise ValueError(
      f"--codebook_sizes must be whole numbers, as 256,256,256; got {text!r}."
    )
  most_L = codes_NL.max(axis=0) + 1
  sizes = [int(word) for word in words] + most_L[len(words) :].tolist()
  if len(sizes) > len(most_L) or (np.array(sizes) < most_L).any():
    raise ValueError(
      f"--codebook_sizes={text} does not fit ids that need at least "
      f"{','.join(map(str, most_L.tolist()))}."
    )
  return sizes


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
