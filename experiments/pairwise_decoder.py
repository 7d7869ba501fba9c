r"""Fits decoders that need no network: additive and pairwise.

  vqjax pairwise_decoder --codec=runs/ivf_qinco2_s \
      --data=train.bvecs --codes=train_codes --output=decoders.safetensors

A search ranks the vectors of its lists by the additive decoder (build_index
puts it into the index), the best of them by the pairwise decoder, and a few by
the network. This command fits both decoders to vectors and their codes from
encode; without --codes the vectors are encoded first.

They are fitted to at most 1,000,000 vectors, drawn from the whole file, and
measured on others. Memory is twice their size in float32, plus the tables.

A table of the pairwise decoder has K x K rows of D numbers in float16: 16 MiB
for 256 codewords and 128 dimensions, 48 MiB for 384. If --num_tables is unset,
tables are added as long as each lowers the squared error of held-out vectors by
half a percent or more, up to 2M tables and 8 rows in all for each training
vector. If not even one does, there is no pairwise decoder. --num_tables=0
leaves it out; any other number makes that many tables.
"""

import shlex
import time

import jax
import numpy as np
from absl import logging

from experiments.lib import cli, codecs, inputs
from vqjax.codecs import additive, decoders, pairwise, runner
from vqjax.core import check_range
from vqjax.data import batches, codes, datasets, files
from vqjax.storage import decoder_file

REQUIRED = ("codec", "data", "output")
OPTIONS = {
  "codec": cli.CODEC_OPTION,
  "data": cli.DATA_OPTIONS["data"],
  "codes": cli.Option(
    str, None, "Their codes: folder of shards, or .npy; made here if unset."
  ),
  "num_vectors": cli.Option(
    int, None, "Use only the first vectors, this many."
  ),
  "num_held_out": cli.Option(
    int,
    None,
    "Vectors to measure on, at most half of all; if unset a tenth, at most "
    "3,000, or a hundredth of more than 300,000, at most 10,000.",
  ),
  "num_tables": cli.Option(
    int,
    None,
    "Tables of the pairwise decoder, 0 for none; if unset those that pay on "
    "held-out vectors, 2M at most.",
  ),
  **{k: v for k, v in cli.SEARCH_OPTIONS.items() if k != "num_steps"},
  "assign": cli.ASSIGN_OPTION,
  "output": cli.Option(str, None, "File to write, *.safetensors."),
  "overwrite": cli.Option(bool, False, "Replace an existing output."),
}
_MOST = 1_000_000  # Vectors to fit to.
_BLOCK = 65_536  # Vectors or codes gone through at a time.


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Writes the decoders; returns their errors on held-out vectors."""
  cli.require(config, *REQUIRED)
  decoder_file.check_path(config.output)
  files.check_output(config.output, overwrite=True)
  codec = codecs.open_codec(config.codec)
  sizes = _check_sizes(codec, config)
  dataset = codecs.resolve_data(codec, config, base=config.data)
  vectors = datasets.open_split(dataset, "base", max_vectors=config.num_vectors)
  codes_fn = _codes_fn(config, codec, vectors)
  rows_N, num_train = _draw(len(vectors), config.num_held_out)
  made_of = _made_of(config, codec, vectors)
  made = files.find_made(
    *(config.output, made_of, config.overwrite), read_fn=decoder_file.describe
  )
  if made:
    logging.info("%s is made already.", config.output)
    return made["info"]
  num_tables = _plan(config, codec, sizes, num_train)
  sample = _read(codec, vectors, rows_N, codes_fn)
  train, held = sample.cut(slice(num_train)), sample.cut(slice(num_train, None))
  seconds = {}
  additive_params, pairwise_params = _fit(
    codec,
    sizes,
    train,
    None if config.num_tables else held,
    num_tables,
    seconds,
  )
  decode_fns = _decode_fns(codec, config, additive_params, pairwise_params)
  rows = {name: _measure(fn, held) for name, fn in decode_fns.items()}
  info = {
    "num_training_codes": num_train,
    "num_held_out": len(rows_N) - num_train,
    "held_out_mse": {name: mse for name, (mse, _) in rows.items()},
  }
  decoder_file.save(
    config.output,
    additive_params,
    pairwise_params,
    codec_fingerprint=codec.fingerprint,
    info=info,
    made_of=made_of,
    overwrite=config.overwrite,
  )
  num_made = 0 if pairwise_params is None else len(pairwise_params.pairs_R2)
  _report(config, info, rows, seconds, _say_tables(config, codec, num_made))
  return info


def _made_of(config, codec, vectors) -> dict:
  """What tells these decoders from others, for the same command run again."""
  if config.codes:
    made_by = inputs.describe_codes(config, codes.open_codes(config.codes))
  else:
    made_by = {name: config[name] for name in ("rule", *codecs.SIZES, "assign")}
  return {
    "codec_fingerprint": codec.fingerprint,
    "num_vectors": len(vectors),
    "vectors": files.identify(vectors),
    "codes": made_by,
    "num_held_out": config.num_held_out,
    "num_tables": config.num_tables,
  }


def _plan(config, codec, sizes, num_train: int) -> int:
  """Tables to make, at most; says what they take before they are made."""
  num = decoders.most_tables(
    sizes, _num_lists(codec), num_train, config.num_tables
  )
  table_mb = decoders.table_bytes(sizes, codec.dim) / 1e6
  if num:
    logging.info(
      "Pairwise decoder: %s%d tables of %.1f MB, %.1f MB in all.",
      "" if config.num_tables else "at most ",
      *(num, table_mb, num * table_mb),
    )
  elif config.num_tables is None:
    least = decoders.least_tables(sizes)
    logging.info(
      "No pairwise decoder: it needs %d tables of %d rows or more, too many "
      "for %d training vectors; --num_tables=%d makes one of %.1f MB all the "
      "same.",
      *(least, sizes[0] ** 2, num_train, least, least * table_mb),
    )
  # If their number is not known yet, as few as there can be.
  tables_mb = num * table_mb if config.num_tables else 0
  num_bytes = 4 * len(sizes) * sizes[0] * codec.dim + round(tables_mb * 1e6)
  files.check_output(config.output, overwrite=True, num_bytes=num_bytes)
  return num


def _num_lists(codec) -> int:
  return codec.codebook_sizes[0] if codec.is_ivf else 0


def _say_tables(config, codec, num: int) -> str:
  if config.num_tables is not None:
    return ""
  if not num:
    return "There is no pairwise decoder: it does not pay.\n"
  sizes = _code_sizes(codec)
  size = num * decoders.table_bytes(sizes, codec.dim) / 1e6
  return f"{num} tables pay: {size:.1f} MB.\n"


def _code_sizes(codec) -> tuple[int, ...]:
  """Codebook sizes, list number not among them."""
  return codec.codebook_sizes[codec.is_ivf :]


def _check_sizes(codec, config) -> tuple[int, ...]:
  """Codebook sizes; raises ValueError if decoders do not fit them."""
  sizes = _code_sizes(codec)
  decoders.check_sizes(sizes, codec.name)
  if config.num_tables:
    decoders.most_tables(sizes, _num_lists(codec), 1, config.num_tables)
  return sizes


def _codes_fn(config, codec, vectors):
  """Returns `(rows_N, x_ND) -> codes_NM`, read from a file or encoded."""
  if config.codes:
    inputs.refuse_search(config, ("rule", *codecs.SIZES, "assign"))
    found = inputs.of_codec(config, codec, vectors)
    return lambda rows_N, _: _read_codes(found, rows_N)
  return lambda _, x_ND: _encode(codec, config, x_ND)


def _draw(num_rows: int, num_held_out: int | None) -> tuple[np.ndarray, int]:
  """Rows in random order, and how many of them, the first, to fit to."""
  if num_held_out is not None:
    check_range("--num_held_out", num_held_out, 1, 10_000_000)
  num = min(num_rows, _MOST + (num_held_out or 10_000))
  num_train, _ = batches.split(num, num_held_out)
  rows_N = batches.permute(np.arange(num), num_rows, seed=0, round=0)
  return rows_N, num_train


def _read(codec, vectors, rows_N, codes_fn) -> decoders.Sample:
  """Reads these rows, in their order."""
  x_ND = batches.read_rows(vectors, rows_N)
  codes_NM = codes_fn(rows_N, x_ND)
  codes.check_ids(codes_NM, codec.codebook_sizes)
  if not codec.is_ivf:
    return decoders.Sample(x_ND, codes_NM, None)
  lists_N, codes_NM = inputs.split(codec, codes_NM)
  centroids_LD = codec.centroids
  for start in range(0, len(x_ND), _BLOCK):
    block = slice(start, start + _BLOCK)
    x_ND[block] -= centroids_LD[lists_N[block]]
  return decoders.Sample(x_ND, codes_NM, lists_N)


def _read_codes(found: codes.Codes, rows_N) -> np.ndarray:
  """Codes of these rows, in their order; reads in the order of the file."""
  codes_NM = np.empty((len(rows_N), found.shape[1]), np.int32)
  order_N = np.argsort(rows_N)
  starts = np.arange(0, len(found) + _BLOCK, _BLOCK)
  ends = np.searchsorted(rows_N[order_N], starts)
  with cli.progress(len(found), "read codes") as done:
    for i, start in enumerate(starts[:-1].tolist()):
      block_NM = found[start : start + _BLOCK]
      at_N = order_N[ends[i] : ends[i + 1]]
      codes_NM[at_N] = block_NM[rows_N[at_N] - start]
      done(start + len(block_NM), len(found))
  return codes_NM


def _encode(codec, config, x_ND) -> np.ndarray:
  """Codes of vectors, as `vqjax encode` makes them."""
  blocks_fn, _ = codecs.make_encoder(codec, config, x_ND)
  with cli.progress(len(x_ND), "encode") as done:
    return np.concatenate(list(blocks_fn(progress=done)))


def _fit(codec, sizes, train, held_out, num_tables: int, seconds):
  """The additive decoder, and the pairwise one or None."""
  with (
    cli.progress(len(train.target_ND), "additive") as done,
    cli.timed(seconds, "additive"),
  ):
    codewords = decoders.fit_additive(codec.tables, sizes, train, done)
  if not num_tables:
    return codewords, None
  with (
    cli.progress(num_tables, "pairwise", unit="table") as done,
    cli.timed(seconds, "pairwise"),
  ):
    tables = decoders.fit_pairwise(
      codewords,
      sizes,
      train,
      held_out,
      num_tables=num_tables,
      centroids_LD=codec.centroids,
      progress=done,
    )
  return codewords, tables


def _decode_fns(codec, config, additive_params, pairwise_params) -> dict:
  """Decoders `(codes_NM, lists_N) -> x_ND` by name, centroids subtracted."""
  centroids_LD = codec.centroids
  network_fn = codec.decoder(codecs.product_dtype(config.dtype))
  additive_fn = jax.jit(additive.decode)

  def network(codes_NM, lists_N):
    if lists_N is None:
      return network_fn(codes_NM)
    codes_NM = np.column_stack([lists_N, codes_NM])
    return np.asarray(network_fn(codes_NM)) - centroids_LD[lists_N]

  fns = {}
  if codec.is_ivf:
    fns["centroid of the list"] = lambda *_: np.zeros((1, 1), np.float32)
  fns["additive"] = lambda codes_NM, _: additive_fn(additive_params, codes_NM)
  if pairwise_params is not None:
    centre_D, _ = additive.split_centre(additive_params)
    fns["pairwise"] = lambda *rows: (
      pairwise.decode(pairwise_params, *rows) + centre_D[None]
    )
  return fns | {codec.name: network}


def _measure(decode_fn, held: decoders.Sample) -> tuple[float, float]:
  """Mean squared error, and microseconds for a vector."""
  size, total = 8 * runner.decode_block(), 0.0
  first = held.cut(slice(size))
  jax.block_until_ready(decode_fn(*first[1:]))  # Compiles.
  began = time.perf_counter()
  jax.block_until_ready(decode_fn(*first[1:]))
  seconds = time.perf_counter() - began
  for start in range(0, len(held.target_ND), size):
    target_ND, *codes_of = held.cut(slice(start, start + size))
    error_ND = target_ND - np.asarray(decode_fn(*codes_of))
    total += np.sum(error_ND**2, dtype=np.float64)
  return total / len(held.target_ND), seconds / len(first.target_ND) * 1e6


def _report(config, info, rows, seconds, about_tables: str) -> None:
  """Says how good the decoders are, and what to run next."""
  logging.info(
    "Fitted to %d vectors. On %d others, squared distances in data units:\n%s",
    info["num_training_codes"],
    info["num_held_out"],
    cli.table(
      ["decoder", "MSE", "us per vector", "s to fit"],
      [
        [name, f"{mse:.6g}", f"{each:.2f}"]
        + [f"{seconds[name]:.1f}" if name in seconds else ""]
        for name, (mse, each) in rows.items()
      ],
    ),
  )
  logging.info(
    "%sWritten: %s\nNext:\n  vqjax build_index --codec=%s "
    "--codes=CODES-OF-THE-BASE --decoders=%s --output=index.faiss",
    about_tables,
    *map(shlex.quote, (config.output, config.codec, config.output)),
  )


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
