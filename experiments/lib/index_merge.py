"""What indexes of parts of the rows become together."""

from vqjax.data import files
from vqjax.interop import faiss_ivf

_KEPT = (  # In a description, of the parts that are merged.
  *("codec", "codec_fingerprint", "decoders_fingerprint", "is_cosine"),
  *("data", "num_rows", "rows", "ids_checksum"),
)


def join_descriptions(paths) -> dict:
  """The description of what the parts become together.

  Raises:
    ValueError: They do not fit each other, or rows are in two of them.
  """
  infos = []
  for path in paths:
    found = faiss_ivf.load(path, mmap=True).info
    if not found.get("rows"):
      raise ValueError(
        f"{files.description_path(path)} does not say which rows {path} has, "
        "so it cannot be merged: make it with vqjax build_index --rows."
      )
    info = {name: found.get(name) for name in _KEPT}
    shared = [{**x, "rows": None} for x in (info, *infos[:1])]
    files.check_same(path, shared[0], shared[-1])
    infos.append(info)
  rows = _join([pair for info in infos for pair in info["rows"]])
  return {**infos[0], "rows": rows}


def _join(rows) -> list[list[int]]:
  """Joins pairs (first, stop) that touch; raises if they overlap."""
  joined = []
  for first, stop in sorted(rows):
    if joined and first < joined[-1][1]:
      raise ValueError(
        f"Rows {first}:{min(stop, joined[-1][1])} are in two of the parts; "
        "merge parts of different --rows."
      )
    if joined and first == joined[-1][1]:
      joined[-1][1] = stop
    else:
      joined.append([first, stop])
  return joined
