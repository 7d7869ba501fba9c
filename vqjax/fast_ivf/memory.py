"""Bytes of the indexes of this family, counted as those of faiss are."""

from vqjax.data import files
from vqjax.fast_ivf.base import BaseIVF
from vqjax.interop import faiss_bytes
from vqjax.search import footprint
from vqjax.search.footprint import Footprint


def footprint_of(index: BaseIVF, folder) -> Footprint:
  """Returns the `Footprint` of a trained index that `save` wrote to a folder.

  Vectors have the slots that are free, too; centroids are kept twice. Short
  vectors of `CompressedFastIVF` count as codes.
  """
  in_all = round(index.bytes_per_vector["ram"] * len(index))  # Makes codes.
  lists = index._lists
  half_N = lists.half_N
  ram = {
    "vectors": lists.x_ND.nbytes,
    "norms": 0 if half_N is None else half_N.nbytes,
    "ids": lists.ids_N.nbytes,
    "centroids": 2 * index.centroids.nbytes,
    "tables": lists.starts.nbytes + lists.sizes_L.nbytes,
  }
  if (codes := getattr(index, "_codes", None)) is not None:
    for part, size in faiss_bytes.by_part(codes).items():
      ram[part] = ram.get(part, 0) + size
  if (short := getattr(index, "_short", None)) is not None:
    ram["codes"] = short.x_ND.nbytes
    ram["ids"] += short.ids_N.nbytes
  ram["tables"] += max(in_all - sum(ram.values()), 0)
  paths = (p for p in files.user_path(folder).rglob("*") if p.is_file())
  on_disk = {"index": footprint.file_bytes(*paths)}
  return Footprint(len(index), {k: v for k, v in ram.items() if v}, on_disk)
