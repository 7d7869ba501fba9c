"""Codes and decoders that a command is given, compared with its codec."""

import hashlib

import numpy as np
from absl import logging

from vqjax.core import check_shape
from vqjax.data import codes, datasets, files, item_ids
from vqjax.interop import faiss_ivf, foreign_index, searchers, torch_pairwise
from vqjax.storage import decoder_file


def of_codec(
  config, codec, vectors=None, *, may_be_short: bool = False
) -> codes.Codes:
  """Opens --codes: of this codec, of all its positions, and of `vectors`.

  Codes that say nothing of themselves may be of any codec and vectors. They
  have fewer positions only if they `may_be_short`.
  """
  found = codes.open_codes(config.codes)
  if vectors is not None:
    _check_rows(config, found, vectors)
    check_data(config.codes, found.meta.get("data"), vectors)
  check_codec(config, codec, found.meta)
  num_codes = len(codec.codebook_sizes)
  is_short = found.shape[1] < num_codes
  if found.shape[1] > num_codes or (is_short and not may_be_short):
    raise ValueError(
      f"{config.codes} has {found.shape[1]} codes per vector, but the codec "
      f"has {num_codes}; encode with all steps."
    )
  return found


def item_ids_of(config, num: int):
  """Reads --ids of `num` vectors; None if there are none."""
  if config.ids is None:
    return None
  is_part = config.get("num_vectors") is not None
  return item_ids.read(config.ids, num, data=config.data, may_be_longer=is_part)


def describe_codes(config, found: codes.Codes) -> dict:
  """What tells --codes from others of the same codec."""
  checksum = found.meta.get("sha256")
  if not checksum:
    checksum = _checksum_of(found.paths)
  return {
    "data": found.meta.get("data"),
    "encode": found.meta.get("encode"),
    "codes_sha256": checksum,
  }


def _checksum_of(paths) -> str | None:
  """A checksum of one file, or of many in this order."""
  checksums = list(map(files.sha256, paths))
  if len(checksums) > 1:
    return hashlib.sha256("".join(checksums).encode()).hexdigest()
  return checksums[0] if checksums else None


def check_codec(config, codec, meta: dict) -> None:
  """Raises ValueError if --codes say that another codec made them."""
  if meta and meta["codec_fingerprint"] != codec.fingerprint:
    raise ValueError(
      f"{config.codes} was made by codec {meta['codec_fingerprint']}, but "
      f"{config.codec} is codec {codec.fingerprint}; give the codec that made "
      f"it. It was: {meta['command']}"
    )


def check_data(path, data: dict | None, vectors) -> None:
  """Raises ValueError if `data` says that codes are of other vectors.

  It is what `files.identify` found; None if unknown.
  """
  if data is None:
    return
  try:
    files.check_same(path, {"data": data}, {"data": files.identify(vectors)})
  except ValueError as error:
    raise ValueError(
      f"{error} Give the vectors that were encoded as --data."
    ) from error


def open_index(path, codec, *, mmap: bool = False) -> faiss_ivf.Loaded:
  """Opens an index file of this codec; says how that is known if it is not.

  The file may be without a description, as released ones are.
  """
  decode_fn = searchers.make_decode_fn(codec, "float32")
  found = foreign_index.open_index(path, codec, decode_fn, mmap=mmap)
  if found.said:
    logging.info("%s", found.said)
  return faiss_ivf.Loaded(found.index, found.info)


def of_index(config, info: dict):
  """Opens --data, the vectors of the --index of this description.

  For commands that keep more of the vectors next to the index. Raises
  ValueError if they are others.
  """
  metric = "cosine" if info.get("is_cosine") else "l2"
  dataset = datasets.resolve(base=config.data, metric=metric)
  num_rows = info.get("num_rows")
  vectors = datasets.open_split(dataset, "base", max_vectors=num_rows)
  check_shape("--data", vectors, (num_rows, info["dim"]))
  check_data(config.index, info.get("data"), vectors)
  return vectors


def check_ids(ids_N: np.ndarray, vectors) -> None:
  """Raises ValueError unless ids of an index are rows of the vectors."""
  if not len(ids_N) or ids_N.min() < 0 or ids_N.max() >= len(vectors):
    raise ValueError(
      f"The index has {len(ids_N)} vectors, of which the ids must be rows of "
      f"the {len(vectors)} of --data."
    )


def _check_rows(config, found: codes.Codes, vectors) -> None:
  if len(found) != len(vectors):
    raise ValueError(
      f"{config.codes} has {len(found)} rows, {config.data} has "
      f"{len(vectors)}: give the vectors that were encoded, or with "
      "--num_vectors only the first of them."
    )


def blocks(found: codes.Codes, sizes, block_size: int, rows=None):
  """Yields the first codes of consecutive rows, as many as there are `sizes`.

  Raises:
    ValueError: A code is not below the size of its codebook.
  """
  rows = range(len(found)) if rows is None else rows
  for start in rows[::block_size]:
    codes_NM = found[start : min(start + block_size, rows.stop)]
    codes_NM = codes_NM[:, : len(sizes)]
    codes.check_ids(codes_NM, sizes, start)
    yield codes_NM


def split(codec, codes_NM):
  """Returns lists `[N]`, zeros if the codec has none, and codes.

  The list number is not among the codes.
  """
  if codec.is_ivf:
    return codes_NM[:, 0], codes_NM[:, 1:]
  return np.zeros(len(codes_NM), np.int32), codes_NM


def decoders(config, codec) -> decoder_file.Decoders:
  """Loads --decoders: of this codec, for all codes but the list number."""
  if config.decoders.endswith(torch_pairwise.SUFFIX):
    raise ValueError(
      f"{config.decoders} is a pairwise decoder, which is for search; an index "
      "needs the additive one too: vqjax pairwise_decoder makes both."
    )
  found = decoder_file.load(config.decoders)
  decoder_file.check_codec(found, codec.fingerprint)
  m, k, d = found.additive.codebooks_MKD.shape
  sizes = list(codec.codebook_sizes[codec.is_ivf :])
  if ([k] * m, d) != (sizes, codec.dim):
    raise ValueError(
      f"{config.decoders} has {m} codebooks of {k} codewords in {d} "
      f"dimensions, but the codec has codebooks of {sizes} in {codec.dim}. Fit "
      "decoders to all codes of this codec."
    )
  return found


def refuse_search(config, names) -> None:
  """Raises ValueError if these options say how to encode what is encoded."""
  for name in names:
    if config[name] not in (None, "auto"):
      raise ValueError(
        f"--{name} says how to encode vectors, but --codes are encoded "
        "already: leave one of them out."
      )
