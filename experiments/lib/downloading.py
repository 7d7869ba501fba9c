"""What `vqjax download` says: the names, and what to do with what has come."""

import shlex
from collections.abc import Iterator

from absl import logging

from experiments.lib import cli
from vqjax.data import datasets, downloads

_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def size_text(num_bytes: float) -> str:
  """Returns a number of bytes in a unit that people read."""
  for size, unit in _UNITS:
    if num_bytes >= size:
      return f"{num_bytes / size:.1f} {unit}"
  return f"{num_bytes:.0f} bytes"


def overview(root) -> str:
  """Returns all names, what they are, and which are below `root` already."""
  lines = ["vqjax download NAME NAME ..."]
  group = None
  width = max(map(len, downloads.ALL))
  for each in downloads.ALL.values():
    if each.group != group:
      group = each.group
      lines += ["", f"{group}:"]
    here = f"  [here, in {root}]" if _is_here(each, root) else ""
    num_bytes = sum(file.num_bytes for file in each.files)
    size = f", {size_text(num_bytes)}" if num_bytes else ""
    lines.append(f"  {each.name:<{width}}  {each.what}{size}{here}")
  licences = dict.fromkeys(each.licence for each in downloads.ALL.values())
  return "\n".join([*lines, "", "Licences:", *map("  {}".format, licences), ""])


def report(found, orders, root) -> None:
  """Says which files there are, their licences, and the next commands."""
  rows = [
    [str(order.path), size_text(_num_bytes(order.path))]
    for order in orders.values()
  ]
  licences = dict.fromkeys(each.licence for each in found)
  commands = dict.fromkeys(
    c for each in found for c in next_commands(each, root)
  )
  logging.info(
    "\n%s\n\nLicence:\n%s\nNext:\n%s",
    cli.table(["file", "size"], rows),
    "\n".join(f"  {licence}" for licence in licences),
    "\n".join(f"  {command}" for command in commands),
  )


def _num_bytes(path) -> int:
  if path.is_dir():
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
  return path.stat().st_size


def next_commands(each: downloads.Download, root) -> Iterator[str]:
  """The commands that use what was fetched."""
  quoted = lambda path: shlex.quote(str(path))
  path, of_root = quoted(root / each.files[0].path), quoted(root)
  at_root = f"--config.data.root={of_root}"
  if each.group == downloads.DATA_SETS:
    yield f"vqjax train --config=qinco2_s:{each.name} {at_root}"
    return
  if each.what == downloads.CENTROIDS:
    config = f"--config=ivf_qinco2_s:{each.dataset}"
    yield f"vqjax train {config} {at_root} --config.ivf.centroids={path}"
    return
  needed = [downloads.ALL[each.dataset]]
  if each.group == downloads.INDEXES:
    needed += filter(None, [downloads.codec_of(each)])
  missing = [n.name for n in needed if not _is_here(n, root)]
  if missing:
    yield f"vqjax download {' '.join(missing)} --data_root={of_root}"
  data = datasets.get_dataset(each.dataset, root)
  base, queries, truth = map(
    quoted, (data.base, data.queries, data.groundtruth)
  )
  of_queries = f"--queries={queries} --groundtruth={truth}"
  if each.group == downloads.INDEXES:
    codec = needed[1:] and quoted(root / needed[1].files[0].path)
    flags = f"--codec={codec or 'CODEC'} --index={path} {of_queries}"
    yield f"vqjax search {flags} --output=search.json"
  elif each.dataset.endswith("1B"):
    flags = f"--codec={path} --data={base} --output=codes --shards=64"
    yield f"vqjax encode {flags}"
  else:
    yield f"vqjax evaluate --codec={path} --data={base} {of_queries}"


def _is_here(each: downloads.Download, root) -> bool:
  return all((root / file.path).exists() for file in each.files)
