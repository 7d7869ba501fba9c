"""`vqjax export --to=lance`: a data set with an IVF-PQ index of ours."""

import functools
import pathlib
import shlex
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.lib import cli, codecs, inputs
from vqjax import __version__, index_build
from vqjax.codecs import distances, hakes, kmeans, pq
from vqjax.core import check_range
from vqjax.data import (
  batches,
  files,
  formats,
  item_ids,
  json_files,
  lance_rows,
  unit,
)
from vqjax.interop import hakes_files, lance_files
from vqjax.storage import folders

_BLOCK = 16_384
_FITTED = 100_000  # Vectors that codewords are learned from, at most.
_COMPARED = 32  # Vectors that Lance looks for, compared with ours.
_TOLERANCE = 1e-4  # Of the largest distance: sums in another order.


class _Subject(NamedTuple):
  """What becomes an index: its model, and how vectors get lists and codes."""

  model: lance_files.Model
  column: str
  encode_fn: Callable  # x_nD -> lists_n, codes_nM
  is_searched_otherwise: bool  # By other parameters than vectors are coded by.
  made_of: dict


def run(config) -> dict:
  """Writes the folder; returns its manifest."""
  cli.require(config, "data", "output")
  lance_rows.import_lance()
  if bool(config.codec) == bool(config.hakes):
    raise ValueError("Give --codec of PQ or OPQ, or --hakes, not both.")
  for name in ("decoders", "codes", "index"):
    if config[name]:
      raise ValueError(f"--to=lance encodes --data; leave --{name} out.")
  prepare = _prepare_hakes if config.hakes else _prepare_pq
  vectors, make_fn, made_of = prepare(config)
  ids_N = inputs.item_ids_of(config, len(vectors))
  made_of |= {
    "data": files.identify(vectors),
    "num_vectors": len(vectors),
    "keep_vectors": config.keep_vectors,
    **item_ids.describe(ids_N),
  }
  output = files.user_path(config.output)
  manifest = output / folders.MANIFEST
  read_fn = lambda path: files.parse_description(path, lance_files.KIND)
  made = files.find_made(
    manifest, {"made_of": made_of}, config.overwrite, read_fn=read_fn
  )
  if made:
    logging.info("%s is made already.", config.output)
    return made
  kind, version = lance_files.KIND
  folders.check_new(output, kind, overwrite=config.overwrite)
  num_bytes = len(vectors) * 4 * (1 + config.keep_vectors) * vectors.shape[1]
  files.check_folder(output.parent, num_bytes=num_bytes, name=output)
  subject = make_fn()
  lance_files.check_model(subject.model)
  with folders.new_folder(output, kind, overwrite=config.overwrite) as path:
    compared = _write(config, subject, vectors, ids_N, path)
    record = {
      "format": kind,
      "version": version,
      "made_of": made_of,
      "column": subject.column,
      "metric": subject.model.metric,
      "num_lists": len(subject.model.centroids_LE),
      "compared": compared,
      "vqjax_version": __version__,
    }
    files.write_json(path / folders.MANIFEST, record)
  _say(config, record, len(vectors))
  return record


def _write(config, subject: _Subject, vectors, ids_N, path) -> dict:
  """Writes data set and index, and compares what is found in it."""
  lists, codes = [], []

  def columns():
    with cli.progress(len(vectors), "write") as done:
      for at in range(0, len(vectors), _BLOCK):
        rows_n = np.arange(at, min(at + _BLOCK, len(vectors)))
        x_nD = batches.read_rows(vectors, rows_n)
        lists_n, codes_nM = map(np.asarray, subject.encode_fn(x_nD))
        lists.append(lists_n)
        codes.append(codes_nM.astype(np.uint8))
        kept = {"id": rows_n if ids_N is None else ids_N[rows_n]}
        is_the_vector = subject.column == "vector"
        if config.keep_vectors and not is_the_vector:
          kept["vector"] = x_nD
        if subject.is_searched_otherwise:
          kept[subject.column] = subject.model.decode(lists_n, codes_nM)
        else:
          kept[subject.column] = subject.model.apply(x_nD)
        yield kept
        done(rows_n[-1] + 1, len(vectors))

  lists_fn = lambda: np.concatenate(lists)
  lance_files.write(
    path,
    subject.model,
    columns(),
    column=subject.column,
    lists_N=lists_fn if subject.is_searched_otherwise else None,
  )
  decoded_fn = lambda: map(subject.model.decode, lists, codes)
  rows_n = batches.evenly_spaced_rows(len(vectors), _COMPARED)
  queries_QD = batches.read_rows(vectors, rows_n)
  k = min(10, len(vectors))
  found = lance_files.compare(path, queries_QD, decoded_fn, k)
  most = _TOLERANCE * max(found["largest_distance"], 1e-30)
  if found["largest_difference"] > most:
    raise ValueError(
      f"Searched by Lance, {config.output} has distances that differ by up to "
      f"{found['largest_difference']:.3g} from ours of "
      f"{found['largest_distance']:.3g}: nothing was written. Is this version "
      "of pylance one that vqjax knows (14)?"
    )
  return found


def _prepare_pq(config):
  """Vectors of a PQ or OPQ codec, what makes its index, and what it is of."""
  codec = codecs.open_codec(config.codec)
  if codec.name != "pq":
    raise ValueError(
      f"Lance has product codes: a {codec.name} codec cannot be an index of "
      "it. --to=parquet writes its codes."
    )
  metric = config.metric or codec.metric
  is_cosine = codecs.check_cosine(codec, metric)
  vectors = codec.open_vectors(config.data)
  num_lists = config.num_lists
  if config.centroids:
    centroids_LD = np.asarray(formats.open_vectors(config.centroids), "f4")
    formats.check_vectors(centroids_LD, dim=codec.dim, name=config.centroids)
    if num_lists not in (None, len(centroids_LD)):
      raise ValueError(
        f"{config.centroids} has {len(centroids_LD)} centroids, but "
        f"--num_lists is {num_lists}; leave it out."
      )
    num_lists = len(centroids_LD)
  if num_lists is None:
    num_lists = index_build.default_lists(len(vectors))
  check_range("--num_lists", num_lists, 1, len(vectors), "vectors in --data")
  made_of = {
    "codec": codec.name,
    "codec_fingerprint": codec.fingerprint,
    "metric": metric,
    "num_lists": num_lists,
  }
  if config.centroids:
    made_of["centroids"] = files.identify(centroids_LD)

  def make() -> _Subject:
    params = jax.tree.map(np.asarray, codec.params)
    turn = params.rotation_DD
    # Rows of what is multiplied with a vector.
    reduction_ED = None if turn is None else np.ascontiguousarray(turn.T)
    model = lance_files.Model(
      "dot" if metric == "ip" else "L2",
      *(np.zeros((1, codec.dim), np.float32), params.codebooks_MKS),
      reduction_ED=reduction_ED,
      is_cosine=is_cosine,
    )
    num = min(max(_FITTED, 64 * num_lists), len(vectors))
    sample_NE = model.apply(batches.subsample(vectors, num, config.seed))
    if config.centroids:
      centroids_LE = model._replace(is_cosine=False).apply(centroids_LD)
    else:
      with cli.elapsed(f"find {num_lists} lists of {num:,} vectors"):
        key = jax.random.key(config.seed)
        centroids_LE = np.asarray(kmeans.fit(key, sample_NE, num_lists))
    model = model._replace(centroids_LE=centroids_LE)
    if model.metric == "L2":
      model = _fit_residuals(config, model, sample_NE[:_FITTED])
    column = "vector" if turn is None else "rotated"
    encode_fn = functools.partial(_encode, model)
    return _Subject(model, column, encode_fn, False, made_of)

  return vectors, make, made_of


def _fit_residuals(config, model, sample_NE):
  """The model with codewords of what the centroids leave."""
  m, k, _ = model.codebooks_MKS.shape
  lists_N = np.asarray(_lists(model, sample_NE))
  with cli.elapsed(f"fit {m} codebooks to residuals"):
    found = pq.fit(
      jax.random.key(config.seed),
      sample_NE - model.centroids_LE[lists_N],
      num_codes=m,
      codebook_size=k,
    )
  return model._replace(codebooks_MKS=np.asarray(found.codebooks_MKS))


def _lists(model, x_NE):
  """The list of each vector, as Lance finds it."""
  centroids_LE = jnp.asarray(model.centroids_LE)
  nearest_fn = distances.make_nearest_fn(
    centroids_LE, by_product=model.metric == "dot"
  )
  blocks = [nearest_fn(x_NE[i : i + 4096]) for i in range(0, len(x_NE), 4096)]
  return np.concatenate(blocks)


def _encode(model, x_nD):
  """Lists and codes of vectors."""
  x_nE = model.apply(x_nD)
  lists_n = _lists(model, x_nE)
  if model.metric == "L2":
    x_nE = x_nE - model.centroids_LE[lists_n]
  codewords = pq.PQParams(jnp.asarray(model.codebooks_MKS))
  return lists_n, pq.encode(codewords, jnp.asarray(x_nE))


def _prepare_hakes(config):
  """The same of a folder of `vqjax hakes`."""
  for name in ("num_lists", "centroids"):
    if config[name]:
      raise ValueError(f"--hakes has its own lists; leave --{name} out.")
  vectors, base, query, made_of = open_hakes(config)
  if base.metric != "ip":
    raise ValueError(
      f"{config.hakes} is for l2, of which Lance codes residuals, and HAKES "
      "whole vectors: train it for ip or cosine, or take --to=parquet."
    )

  def make() -> _Subject:
    model = lance_files.Model(
      "dot",
      *(query.side.centroids_LE, query.side.codebooks_MKS),
      *(query.side.reduction_ED, query.side.bias_E, made_of["is_cosine"]),
    )
    side = jax.tree.map(jnp.asarray, base.side)

    @jax.jit
    def encode(x_nD):
      return hakes.assign(side, x_nD, "ip"), hakes.encode(side, x_nD)

    return _Subject(model, "coded", encode, True, made_of)

  return vectors, make, made_of


def open_hakes(config):
  """Vectors of --hakes, both its files, and what their codes are of."""
  folder = files.user_path(config.hakes)
  base = hakes_files.load(folder / "findex.bin")
  query = hakes_files.load(folder / "uindex.bin")
  dim = base.side.reduction_ED.shape[1]
  is_cosine = (config.metric or _metric_of(folder)) == "cosine"
  vectors = hakes_files.open_rows(config.data, dim)
  if vectors.shape[1] != dim:
    raise ValueError(
      f"{config.hakes} is for vectors of {dim} dimensions, --data has "
      f"{vectors.shape[1]}."
    )
  names = ("findex.bin", "uindex.bin")
  made_of = {
    "hakes": [files.sha256(folder / name)[:16] for name in names],
    "is_cosine": is_cosine,
  }
  vectors = unit.UnitVectors(vectors) if is_cosine else vectors
  return vectors, base, query, made_of


def _metric_of(folder: pathlib.Path) -> str | None:
  """The metric that the run says, None if it says none."""
  try:
    found = json_files.read_json(folder / "config.json")
  except (OSError, ValueError):
    return None
  return found.get("data", {}).get("metric")


def _say(config, record: dict, num: int) -> None:
  found = record["compared"]
  logging.info(
    "%d vectors in %s, column %r with an IVF_PQ index of %s for %s. Of the "
    "results of %d queries in all lists %.1f %% are ours, distances differ by "
    "%.2g of %.4g.\nNext, in Python:\n"
    "  from vqjax.interop import lance_files\n"
    "  lance_files.open_index(%r).search(queries, k=10, nprobe=16)",
    *(num, config.output, record["column"]),
    *(cli.count(record["num_lists"], "list"), record["metric"]),
    *(found["queries"], 100 * found["same"]),
    *(found["largest_difference"], found["largest_distance"]),
    shlex.quote(config.output).strip("'"),
  )
