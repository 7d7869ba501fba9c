"""`vqjax export --to=parquet`: codes, lists and codewords as plain tables.

docs/other_engines.md specifies the files.
"""

import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

import vqjax
from experiments.lib import cli, codecs, inputs
from experiments.lib.export_lance import open_hakes
from vqjax import __version__
from vqjax.codecs import hakes, pq
from vqjax.data import batches, codes, files, item_ids, parquet
from vqjax.interop import faiss_lists
from vqjax.storage import codec_file, folders

KIND = ("vqjax parquet export", 1)
_BLOCK = 16_384


class _Source(NamedTuple):
  """What is written; columns are arrays by name."""

  num: int
  blocks_fn: Callable  # () -> dicts of columns of consecutive rows.
  tables: dict[str, dict]  # Name of a file to its columns.
  description: dict | None  # Next to codes.parquet, for --codes=.
  made_of: dict
  decoding: str


def run(config) -> dict:
  """Writes the folder; returns its manifest."""
  cli.require(config, "output")
  parquet.import_parquet()
  given = [n for n in ("codec", "hakes", "index") if config[n]]
  if len(given) != 1:
    raise ValueError(
      "--to=parquet needs one of --codec, --hakes and --index; got "
      f"{', '.join(given) or 'none'}."
    )
  for name in ("decoders", "num_lists", "centroids", "metric"):
    if config[name]:
      raise ValueError(f"--{name} is not for --to=parquet; leave it out.")
  open_fn = {"codec": _of_codec, "hakes": _of_hakes, "index": _of_index}
  source = open_fn[given[0]](config)
  output = files.user_path(config.output)
  made = files.find_made(
    output / folders.MANIFEST,
    {"made_of": source.made_of},
    config.overwrite,
    read_fn=lambda path: files.parse_description(path, KIND),
  )
  if made:
    logging.info("%s is made already.", config.output)
    return made
  kind, version = KIND
  with folders.new_folder(output, kind, overwrite=config.overwrite) as path:
    described = {"description": source.description}
    with files.atomic_output(path / "codes.parquet", **described) as file:
      parquet.write_columns(file, _told(source))
    for name, columns in source.tables.items():
      parquet.write(path / name, columns)
    names = sorted(p.name for p in path.iterdir() if p.suffix == ".parquet")
    record = {
      "format": kind,
      "version": version,
      "made_of": source.made_of,
      "num_vectors": source.num,
      "decoding": source.decoding,
      "files": {name: files.sha256(path / name) for name in names},
      "vqjax_version": __version__,
    }
    files.write_json(path / folders.MANIFEST, record)
  logging.info(
    "%d vectors in %s: %s, and %s. %s\nNext, in Python:\n"
    "  pyarrow.parquet.read_table(%r)",
    *(source.num, shlex.quote(config.output), ", ".join(names)),
    *(folders.MANIFEST, source.decoding, f"{config.output}/codes.parquet"),
  )
  return record


def _told(source: _Source):
  """The blocks, while a progress line shows their rows."""
  row = 0
  with cli.progress(source.num, "write") as done:
    for columns in source.blocks_fn():
      yield columns
      row += len(columns["codes"])
      done(row, source.num)


def _of_codec(config) -> _Source:
  if bool(config.data) == bool(config.codes):
    raise ValueError("Give --data or --codes, what is to be written.")
  codec = codecs.open_codec(config.codec)
  if config.codes:
    found = inputs.of_codec(config, codec)
    num, made_of = len(found), inputs.describe_codes(config, found)
    code_blocks = lambda: inputs.blocks(found, codec.codebook_sizes, _BLOCK)
    description = found.meta or None
    ids_N = inputs.item_ids_of(config, num)
    if ids_N is None:
      ids_N = item_ids.load_beside(config.codes, found.meta, num)
  else:
    num, blocks_fn, made_of = codecs.encode_data(codec, config)
    code_blocks = blocks_fn
    ids_N = inputs.item_ids_of(config, num)
    description = codes.describe(
      codec.open_vectors(config.data),
      codec=codec.name,
      fingerprint=codec.fingerprint,
      codebook_sizes=codec.codebook_sizes,
      encode=made_of["encode"],
      command="vqjax export --to=parquet",
    )
  dtype = vqjax.codec.smallest_type(codec.codebook_sizes)
  tables, decoding = _tables_of(codec)
  about = {"codec": codec.name, "codec_fingerprint": codec.fingerprint}
  if description is not None:
    description = description | item_ids.describe(ids_N)

  def blocks():
    row = 0
    for codes_nM in code_blocks():
      rows = np.arange(row, row + len(codes_nM))
      row += len(codes_nM)
      yield {"id": _pick(ids_N, rows), "codes": np.asarray(codes_nM, dtype)}

  made_of = about | made_of | item_ids.describe(ids_N)
  return _Source(num, blocks, tables, description, made_of, decoding)


def _of_index(config) -> _Source:
  """Ids, lists and codes of an index, list after list."""
  if config.data or config.codes or config.ids:
    raise ValueError(
      "--index has codes and ids itself; leave --data, --codes and --ids out."
    )
  index = vqjax.load_index(config.index)
  found = faiss_lists.contents(index.faiss)
  rows_N = np.arange(len(found.ids_N))
  lists_N = faiss_lists.lists_of(found, rows_N).astype(np.int32)
  ids_N = index.items_of(found.ids_N)
  is_ivf = index.codec.is_ivf
  tables, decoding = _tables_of(index.codec)
  tables["centroids.parquet"] = _vectors(
    "list", faiss_lists.centroids_of(index.faiss)
  )

  def blocks():
    for at in range(0, len(rows_N), _BLOCK):
      here = slice(at, at + _BLOCK)
      codes_nM, lists_n = found.codes_NM[here], lists_N[here]
      if is_ivf:
        codes_nM = np.column_stack([lists_n, codes_nM]).astype(np.int32)
      yield {"id": ids_N[here], "list": lists_n, "codes": codes_nM}

  made_of = {
    "codec_fingerprint": index.codec.fingerprint,
    "index": item_ids.checksum(ids_N),
    "num_vectors": len(index),
  }
  return _Source(len(index), blocks, tables, None, made_of, decoding)


def _of_hakes(config) -> _Source:
  """Lists, codes and reduced vectors by the base side, and both sides."""
  cli.require(config, "data")
  vectors, base, query, made_of = open_hakes(config)
  ids_N = inputs.item_ids_of(config, len(vectors))
  side = jax.tree.map(jnp.asarray, base.side)

  @jax.jit
  def encode(x_nD):
    lists_n = hakes.assign(side, x_nD, base.metric)
    return lists_n, hakes.encode(side, x_nD), hakes.reduce(side, x_nD)

  def blocks():
    for at in range(0, len(vectors), _BLOCK):
      rows = np.arange(at, min(at + _BLOCK, len(vectors)))
      made = map(np.asarray, encode(batches.read_rows(vectors, rows)))
      lists_n, codes_nM, reduced_nE = made
      yield {
        "id": _pick(ids_N, rows),
        "list": lists_n,
        "codes": codes_nM.astype(np.uint8),
        "reduced": reduced_nE,
      }

  tables = {}
  for before, each in (("", base.side), ("query_", query.side)):
    codebooks = _codebooks(each.codebooks_MKS)
    tables[f"{before}codebooks.parquet"] = codebooks
    tables[f"{before}centroids.parquet"] = _vectors("list", each.centroids_LE)
    tables[f"{before}transform.parquet"] = {
      **_vectors("row", each.reduction_ED),
      "bias": np.asarray(each.bias_E),
    }
  made_of |= {"data": files.identify(vectors), **item_ids.describe(ids_N)}
  decoding = (
    "A code stands for its codewords side by side; queries are reduced, find "
    "lists and are compared by the files query_*."
  )
  return _Source(len(vectors), blocks, tables, None, made_of, decoding)


def _pick(ids_N, rows) -> Any:
  return rows if ids_N is None else ids_N[rows]


def _tables_of(codec) -> tuple[dict, str]:
  """Codewords, centroids and rotation of a codec, and how a code is decoded."""
  tables = {}
  if codec.is_ivf:
    tables["centroids.parquet"] = _vectors("list", codec.centroids)
  params = jax.tree.map(np.asarray, codec.params)
  if isinstance(params, pq.PQParams):
    tables["codebooks.parquet"] = _codebooks(params.codebooks_MKS)
    if params.rotation_DD is None:
      return tables, "A code stands for its codewords side by side."
    # Rows of the matrix that decodes: x = matrix @ codewords.
    tables["transform.parquet"] = {
      **_vectors("row", params.rotation_DD.T),
      "bias": np.zeros(codec.dim, np.float32),
    }
    return tables, (
      "A code stands for its codewords side by side, turned back by the "
      "transposed matrix of transform.parquet."
    )
  if codec.name == "rq":
    tables["codebooks.parquet"] = _codebooks(params.codebooks_MKD)
    return tables, "A code stands for the sum of its codewords."
  return tables, (
    f"A code of {codec.name} is decoded by its network: vqjax decode, with the "
    f"codec of fingerprint {codec_file.fingerprint(codec.params)}."
  )


def _codebooks(codebooks_MKX) -> dict:
  m, k, x = codebooks_MKX.shape
  return {
    "position": np.repeat(np.arange(m, dtype=np.int32), k),
    "codeword": np.tile(np.arange(k, dtype=np.int32), m),
    "vector": np.asarray(codebooks_MKX, np.float32).reshape(m * k, x),
  }


def _vectors(name: str, x_NX) -> dict:
  return {
    name: np.arange(len(x_NX), dtype=np.int32),
    "vector": np.asarray(x_NX, np.float32),
  }
