r"""Exports codecs, codes and indexes to faiss, Lance and Parquet.

  vqjax export --codec=runs/rq --output=rq.faiss
  vqjax export --codec=runs/pq --output=pq.faiss --codes=codes.npy
  vqjax export --codec=runs/pq --output=pq.faiss --data=base.fvecs
  vqjax export --codec=runs/qinco2_s --output=additive.faiss \
      --decoders=decoders.safetensors --codes=codes.npy

A PQ codec becomes an IndexPQ (OPQ: behind its rotation in an
IndexPreTransform), an RQ codec an IndexResidualQuantizer. The additive decoder
that pairwise_decoder has fitted to any codec without lists becomes an
IndexResidualQuantizer too. The id of a vector is its row; --data encodes
vectors by this codec. faiss compares queries with decoded vectors.

The file counts as done when it has been read back, holds these codes and
decodes them to the same vectors. rq.faiss.json describes it. The index of a
cosine codec divides queries by their length. It is made in memory: the packed
codes twice.

  vqjax export --to=lance --codec=runs/opq --data=base.npy --output=my_lance
  vqjax export --to=lance --hakes=runs/hakes --data=base.npy --output=my_lance
  vqjax export --to=parquet --codec=runs/pq --data=base.npy --output=tables
  vqjax export --to=parquet --index=my_index --output=tables

--to=lance writes a Lance data set with an IVF-PQ index of our centroids and
codewords, and compares what Lance finds with our own search. --to=parquet
writes ids, codes, lists, centroids and codewords as tables.
docs/other_engines.md says what is in the files.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from experiments.lib import cli, codecs, export_lance, export_parquet, inputs
from vqjax import __version__
from vqjax.codecs import additive
from vqjax.data import datasets, files, item_ids
from vqjax.interop import faiss_io
from vqjax.storage import codec_file

REQUIRED = ("output",)
OPTIONS = {
  "to": cli.Option(str, "faiss", "faiss, lance or parquet."),
  "codec": cli.CODEC_OPTION,
  "hakes": cli.Option(
    str, None, "Folder of vqjax hakes instead, for lance and parquet."
  ),
  "index": cli.Option(str, None, "Folder of an index instead, for parquet."),
  "decoders": cli.Option(
    str, None, "decoders.safetensors: export the additive decoder in it."
  ),
  "codes": cli.Option(str, None, "Codes to put in: folder of shards, or .npy."),
  "data": cli.Option(str, None, "Vectors to put in, instead of --codes."),
  "ids": cli.Option(str, None, f"{item_ids.FLAG_HELP} For lance and parquet."),
  "num_lists": cli.Option(
    int, None, "Lists of --to=lance; by the number of vectors if unset."
  ),
  "centroids": cli.Option(
    str, None, "Centroids of these lists, as of ivf_centroids."
  ),
  "keep_vectors": cli.Option(
    bool, True, "lance: keep the vectors beside their rotated or coded ones."
  ),
  "seed": cli.Option(int, 0, "Of the k-means of --to=lance."),
  "metric": cli.Option(
    str, None, "l2, ip or cosine; the codec's own if unset."
  ),
  "output": cli.Option(str, None, "Index file to write, rq.faiss."),
  "overwrite": cli.Option(bool, False, "Replace an existing output."),
}
TO = {"faiss": None, "lance": export_lance, "parquet": export_parquet}
_BLOCK = 65536  # Codes read and added at a time.
_CHECKED = 10_000  # Vectors that are compared.
_TOLERANCE = 1e-5  # Of the largest number: sums of float32 in another order.


class _Subject(NamedTuple):
  """What is exported: an empty index, and its codes decoded by us."""

  kind: str
  index: Any
  decode_fn: Callable
  sizes: tuple[int, ...]
  made_of: dict  # What the description says in addition to the codec.


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Writes the index; returns what is written next to it."""
  cli.require(config, *REQUIRED)
  if config.to not in TO:
    raise ValueError(f"--to must be one of {', '.join(TO)}; got {config.to!r}.")
  if config.metric not in (None, *datasets.METRICS):
    raise ValueError(
      f"--metric must be one of {', '.join(datasets.METRICS)}, got "
      f"{config.metric!r}."
    )
  if config.to != "faiss":
    return TO[config.to].run(config)
  cli.require(config, "codec")
  for name in ("hakes", "index", "ids", "num_lists", "centroids"):
    if config[name]:
      raise ValueError(f"--{name} is not for --to=faiss; leave it out.")
  if config.codes and config.data:
    raise ValueError("Give --codes or --data, not both.")
  files.check_output(config.output, config.overwrite, described=True)
  codec = codecs.open_codec(config.codec)
  metric = config.metric or codec.info.get("metric", "l2")
  is_cosine = codecs.check_cosine(codec, metric)
  subject = _subject(config, codec, "ip" if metric == "cosine" else metric)
  if is_cosine:
    index = faiss_io.normalise_first(subject.index)
    subject = subject._replace(index=index)
  num, blocks, made_of = _blocks(config, codec, subject.sizes)
  record = {
    "format": "vqjax export",
    "kind": subject.kind,
    "index": type(subject.index).__name__,
    "num_vectors": num,
    "dim": subject.index.d,
    "metric": metric,
    "codebook_sizes": list(subject.sizes),
    "codec": codec.name,
    "codec_fingerprint": codec.fingerprint,
    **subject.made_of,
    **made_of,
    "vqjax_version": __version__,
  }
  made = files.find_made(config.output, record, config.overwrite)
  if made:
    logging.info("%s is made already.", config.output)
    return made
  first = _fill(subject.index, num, blocks)
  with faiss_io.write_index(
    subject.index,
    config.output,
    overwrite=config.overwrite,
    description=record,
  ) as temporary:
    index = faiss_io.read_index(temporary)
    compared = _compare(config, subject, num, first, index)
    record["compared"] = compared
  logging.info(
    "Read back: %d %s codes decode as ours, largest difference %.2g of %.4g.\n"
    "%s with %d vectors in %s, what is in it in %s.\nNext, in Python:\n  "
    "faiss.read_index(%r)",
    *(compared["num_vectors"], "stored" if num else "random"),
    *(compared["largest_difference"], compared["largest_number"]),
    *(record["index"], num, config.output),
    *(files.description_path(config.output), config.output),
  )
  return record


def _fill(index, num: int, blocks) -> list:
  """Adds blocks of codes; returns those that are to be compared."""
  first = []
  if num:
    with cli.progress(num, "add") as done:
      for codes_NM in blocks:
        first += [codes_NM] if index.ntotal < _CHECKED else []
        faiss_io.add_codes(index, codes_NM)
        done(index.ntotal, num)
  return first


def _subject(config, codec, metric: str) -> _Subject:
  """Makes the empty index of a codec or of its additive decoder."""
  if config.decoders:
    return _additive(config, codec, metric)
  to_faiss = {"pq": faiss_io.pq_to_faiss, "rq": faiss_io.rq_to_faiss}
  if codec.name not in to_faiss:
    raise ValueError(
      f"faiss cannot decode a {codec.name} codec, which needs its network: "
      "vqjax build_index makes an index that is searched by "
      "additive codewords; --decoders=decoders.safetensors exports these alone."
    )
  return _Subject(
    codec.name,
    to_faiss[codec.name](codec.tables, metric=metric),
    codec.decoder(),
    codec.codebook_sizes,
    {},
  )


def _additive(config, codec, metric: str) -> _Subject:
  if codec.is_ivf:
    raise ValueError(
      f"{config.codec} has lists, and its additive decoder stands for what "
      "their centroids leave: vqjax build_index makes an index "
      "with both."
    )
  if config.data:
    raise ValueError(
      "Vectors must be encoded by the codec, not by its additive decoder: run "
      "vqjax encode and give --codes instead of --data."
    )
  params = inputs.decoders(config, codec).additive
  return _Subject(
    "additive",
    faiss_io.rq_to_faiss(params, metric=metric),
    functools.partial(jax.jit(additive.decode), params),
    codec.codebook_sizes,
    {"decoders_fingerprint": codec_file.fingerprint(params)},
  )


def _blocks(config, codec, sizes):
  """Number of vectors to put in, their codes in blocks, and what these are."""
  if config.codes:
    found = inputs.of_codec(config, codec)
    blocks = inputs.blocks(found, sizes, _BLOCK)
    return len(found), blocks, inputs.describe_codes(config, found)
  if not config.data:
    return 0, (), {}
  num, blocks_fn, made_of = codecs.encode_data(codec, config)
  return num, blocks_fn(), made_of


def _compare(config, subject: _Subject, num: int, first, index) -> dict:
  """Raises ValueError unless the index read back is the one meant.

  `first` are blocks of the `num` codes that were put in; random ones are
  compared if there are none.
  """
  if index.ntotal != num:
    raise ValueError(
      f"Read back, {config.output} has {index.ntotal} vectors, expected {num}: "
      "nothing was written."
    )
  if first:
    codes_NM = np.concatenate(first)[:_CHECKED]
    theirs_ND = index.reconstruct_n(0, len(codes_NM))
  else:
    m, k = len(subject.sizes), subject.sizes[0]
    rng = np.random.default_rng(0)
    codes_NM = rng.integers(k, size=(1000, m), dtype=np.int32)
    codec = faiss_io.to_codec(index, m, k.bit_length() - 1)
    theirs_ND = codec.decode(codes_NM)
  ours_ND = np.asarray(subject.decode_fn(codes_NM))
  difference = float(np.abs(ours_ND - theirs_ND).max())
  largest = float(np.abs(ours_ND).max())
  if not difference <= _TOLERANCE * largest:
    raise ValueError(
      f"Read back, {config.output} decodes with differences up to "
      f"{difference:.3g} of {largest:.3g}: nothing was written."
    )
  return {
    "num_vectors": len(codes_NM),
    "largest_difference": difference,
    "largest_number": largest,
  }


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
