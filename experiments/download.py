r"""Downloads data sets, released checkpoints, centroids and indexes by name.

  vqjax download --list
  vqjax download bigann1M
  vqjax download qinco2_L-bigann1M-8x8 bigann1M --data_root=/scratch/data

To resume a download that was stopped, run the same command again. Sizes and
checksums are checked, .gz and .tar.gz are unpacked while they come, and a file
appears when it is whole. Beside it NAME.download.json says where it is from; a
file that is fetched a second time must have the same checksum. Data sets lie in
the folders where --config=NAME:bigann1M and the like look for them, all else in
DATA_ROOT/models.

The authors' weights are under CC-BY-NC 4.0, and data sets have terms of their
own; both are said at the end.
"""

import os
import pathlib
import sys
import zipfile

from absl import logging

from experiments.lib import cli, downloading
from vqjax.data import datasets, downloads, fetching, files, transport

REQUIRED = ("names",)
OPTIONS = {
  "names": cli.Option(
    str, None, "What to download, also without the flag: NAME NAME ..."
  ),
  "small": cli.Option(
    bool,
    False,
    "Of bigann10M, bigann1B and deep1B the small files of bigann1M and deep1M: "
    "a million vectors, and ten million to train on.",
  ),
  "list": cli.Option(bool, False, "Print all names and what is here already."),
  "data_root": cli.Option(
    str, None, "Folder to write into; else $VQJAX_DATA, else data."
  ),
  "base_url": cli.Option(
    str,
    None,
    "Address of a mirror of " + downloads.BASE + "; else $VQJAX_DOWNLOAD_URL. "
    "Files of other servers lie in it below the name of their server.",
  ),
  "verify": cli.Option(
    bool, False, "Read what is here already, to compare its checksums."
  ),
  "overwrite": cli.Option(
    bool, False, "Fetch again, and replace, what is here already."
  ),
}


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Fetches what is named; returns `{"files", "names", "data_root"}`."""
  root = datasets.data_root(config.data_root)
  if config.list:
    sys.stdout.write(downloading.overview(root))
    return {"files": [], "names": [], "data_root": str(root)}
  if not config.names:
    raise ValueError(
      "Name what to download, as vqjax download bigann1M; vqjax download "
      "--list shows all names."
    )
  base = config.base_url or os.environ.get("VQJAX_DOWNLOAD_URL")
  if base:
    transport.check_url(base)
  found = [
    downloads.get(name, is_small=config.small)
    for name in config.names.replace(",", " ").split()
  ]
  remotes = dict.fromkeys(remote for each in found for remote in each.files)
  orders = {r: downloads.order(r, root, base) for r in remotes}
  todo = {r: o for r, o in orders.items() if not _is_here(config, o)}
  _check_room(root, todo.values())
  for order in todo.values():
    fetching.fetch(order, overwrite=config.overwrite)
  for remote, order in orders.items():
    if problem := _problem(remote, order.path):
      logging.warning("%s", problem)
  downloading.report(found, orders, root)
  return {
    "files": [str(order.path) for order in orders.values()],
    "names": [each.name for each in found],
    "data_root": str(root),
  }


def _is_here(config, order) -> bool:
  """Whether a file need not be fetched.

  One that is not of this command is left as it is if it has the size of that
  on the server.
  """
  if config.overwrite:
    return False
  if fetching.find(order, is_thorough=config.verify):
    logging.info("%s is here already.", order.path)
    return True
  if order.pack == "tar" or not order.path.exists():
    return False
  size = os.path.getsize(order.path)
  wanted = order.unpacked_bytes if order.pack else fetching.size_of(order)
  if wanted not in (None, 0, size):
    raise FileExistsError(
      f"{order.path} is here already, not by this command, and has {size} "
      f"bytes instead of {wanted}: is it cut, or of another data set? Remove "
      "it, choose another --data_root, or add --overwrite."
    )
  logging.info(
    "%s is here already, not by this command; it is left as it is.", order.path
  )
  return True


def _check_room(root: pathlib.Path, orders) -> None:
  """Asks servers for the sizes and the disk for room, before any download."""
  files.check_folder(root)
  come, needed, unknown = 0, 0, []
  for order in orders:
    size = fetching.size_of(order)
    if size is None:
      unknown.append(order.path.name)
    come += size or 0
    needed += max((size or 0) - fetching.num_here(order), 0)
    needed += order.unpacked_bytes
  if not orders:
    return
  logging.info(
    "%d %s, %s%s, into %s.",
    *(len(orders), "file" if len(orders) == 1 else "files"),
    downloading.size_text(come),
    f" and {', '.join(unknown)} of unknown size" if unknown else "",
    root,
  )
  files.check_folder(root, num_bytes=needed)


def _problem(remote, path: pathlib.Path) -> str | None:
  """What is wrong with the content of a file that is whole, None if nothing."""
  suffix = path.suffix
  if suffix == ".pt" and not zipfile.is_zipfile(path):
    return f"{path} is no checkpoint of torch.save: is the server right?"
  if remote.pack == "tar" or suffix in (".pt", ".faissindex"):
    return None
  try:
    shape = datasets.shape_of(path)
  except ValueError as error:
    return f"{error} Is the server right?"
  wanted = (remote.rows, remote.dim)
  if any(w not in (None, n) for w, n in zip(wanted, shape, strict=True)):
    asked = " x ".join("any" if w is None else f"{w:,}" for w in wanted)
    return (
      f"{path} has {shape[0]:,} x {shape[1]:,} numbers, and its name promises "
      f"{asked}: is the server right?"
    )
  return None


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED, positional="names")
