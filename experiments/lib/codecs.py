"""Codecs from files at work: options of their search, encode, decode, data."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.lib import cli
from vqjax import cpu, devices
from vqjax.codecs import registry
from vqjax.codecs.distances import nearest
from vqjax.data import batches, datasets
from vqjax.interop import faiss_ivf
from vqjax.storage import codec_file

_BLOCK = 4096  # Vectors at once, for codecs without a network.
_CPU_BUDGET, _DEVICE_BUDGET = 16 << 20, 4 << 30  # Bytes, of one block.
_CPU_DECODE_BUDGET = 7 << 19  # The same, decoding: what the caches like.
_MANY_LISTS = 65536  # From here on a graph finds the list sooner, on CPUs.
ASSIGN = ("auto", "blocks", "hnsw")  # Ways from vectors to lists.
# A, B, C of the papers and of the joint rule, F of its scout.
RULE = ("num_candidates", "beam_size", "num_joint_candidates", "num_finalists")


class Codec(NamedTuple):
  """A codec from a file, ready to encode and decode."""

  name: str
  module: Any
  tables: Any
  info: dict
  fingerprint: str

  @property
  def dim(self) -> int:
    """Dimensions of the vectors."""
    return self.module.dim(self.tables)

  @property
  def is_ivf(self) -> bool:
    """Whether the first code is the number of a list."""
    return getattr(self.tables, "is_ivf", False)

  @property
  def codebook_sizes(self) -> tuple[int, ...]:
    """Words at each position of a code; lists first where there are any."""
    return self.module.codebook_sizes(self.tables)


def open_codec(path: str) -> Codec:
  """Loads a run folder, a codec.safetensors or a released .pt file."""
  cli.keep_compiled()
  loaded = codec_file.load_codec(path)
  module = registry.get(loaded.name)
  tables = jax.jit(module.prepare)(loaded.params)
  return Codec(loaded.name, module, tables, loaded.info, loaded.fingerprint)


def product_dtype(name: str) -> str:
  """Returns the type of a network's products for `float32|bfloat16|auto`."""
  if name not in ("auto", "float32", "bfloat16"):
    raise ValueError(f"dtype must be auto, float32 or bfloat16; got {name!r}.")
  if name != "auto":
    return name
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def ranking_dtype(name: str) -> str:
  """As `product_dtype`, for vectors that are decoded to be compared.

  There `auto` is bfloat16 on CPUs that have it too.
  """
  if name == "auto" and jax.default_backend() == "cpu":
    return "bfloat16" if cpu.has_bfloat16() else "float32"
  return product_dtype(name)


def search_knobs(codec: Codec, config) -> dict:
  """Returns the codec's encode options with those the user changed.

  Asking for candidates per hypothesis alone switches the joint rule off.
  """
  knobs = dict(codec.info.get("encode", {}))
  asked = {name: config[name] for name in RULE if config.get(name) is not None}
  if "num_candidates" in asked and "num_joint_candidates" not in asked:
    knobs.pop("num_joint_candidates", None)
  knobs.update(asked)
  unknown = [name for name in asked if not has_knob(codec, name)]
  if unknown:
    raise ValueError(
      f"--{unknown[0]} means nothing to a {codec.name} codec; leave it out."
    )
  if has_knob(codec, "dtype"):
    knobs["dtype"] = product_dtype(config.get("dtype", "auto"))
  return knobs


def make_encode_fn(
  codec: Codec,
  knobs: dict,
  num_steps: int | None = None,
  *,
  assign="auto",
):
  """Returns `x_ND -> codes_NM` and how many vectors to give it.

  It runs on all devices of this process. `assign` is how an IVF model finds
  lists: one of `ASSIGN`, or a function that makes of rows the vectors `[N, D]`
  and lists `[N]`, as `make_graph_fn` returns.
  """
  if isinstance(assign, str):
    assign = make_graph_fn(codec, assign)
  encode = functools.partial(codec.module.encode, num_steps=num_steps, **knobs)
  num_rows = block_rows(codec, knobs) * jax.local_device_count()
  tables = devices.local(codec.tables)
  if assign is None:
    return functools.partial(devices.data_parallel(encode), tables), num_rows
  encode_fn = devices.data_parallel(lambda tables, rows: encode(tables, *rows))
  return lambda rows: encode_fn(tables, assign(rows)), num_rows


def centroids_of(codec: Codec) -> np.ndarray:
  """Centroids of the lists, float32 `[L, D]` in data units.

  A codec without lists has one, whose centroid is zero.
  """
  if not codec.is_ivf:
    return np.zeros((1, codec.dim), np.float32)
  tables = codec.tables
  return np.asarray(tables.first_KD * tables.std + tables.mean_D[None])


def takes_graph(codec: Codec, assign: str) -> bool:
  """Whether the lists of vectors are found by a graph of the centroids."""
  return codec.is_ivf and _takes_graph(assign, codec.codebook_sizes[0])


def _takes_graph(how: str, num_lists: int) -> bool:
  if how not in ASSIGN:
    raise ValueError(f"assign must be one of {', '.join(ASSIGN)}; got {how!r}.")
  is_many = jax.default_backend() == "cpu" and num_lists >= _MANY_LISTS
  return how == "hnsw" or (how == "auto" and is_many)


def make_graph_fn(codec: Codec, assign: str = "auto"):
  """Returns `x_ND -> (x_ND, lists_N)`; None where encoding compares all.

  The lists are found by a graph. That of a million centroids takes minutes:
  make it once.
  """
  if not takes_graph(codec, assign):
    return None
  assign_fn, _ = make_assign_fn(centroids_of(codec), "hnsw")
  return lambda x_ND: (x_ND, assign_fn(x_ND))


def make_assign_fn(centroids_LD, how: str = "auto"):
  """Returns `x_ND -> lists_N`, int32, and how many vectors to give it.

  `blocks` compares each vector with all centroids `[L, D]`; `hnsw` walks a
  graph of them, which may miss the nearest. `auto` is the graph where there
  are many lists, on CPUs.
  """
  if _takes_graph(how, len(centroids_LD)):
    with cli.progress(len(centroids_LD), "graph", unit="list") as done:
      coarse = faiss_ivf.make_coarse(centroids_LD, "hnsw", progress=done)
    return functools.partial(faiss_ivf.assign_lists, coarse), _BLOCK
  assign_fn = devices.data_parallel(
    lambda centroids_LD, x_ND: nearest(x_ND, centroids_LD)
  )
  centroids_LD = devices.local(jnp.asarray(centroids_LD))
  num_rows = _BLOCK * jax.local_device_count()
  return functools.partial(assign_fn, centroids_LD), num_rows


def make_decode_fn(codec: Codec, dtype: str = "float32"):
  """Returns `codes_NM -> x_ND`, on all devices of this process.

  It takes any number of codes, best `decode_rows`. `dtype` is the type of a
  network's products; other codecs have none.
  """
  decode_fn = codec.module.decode
  if "dtype" in inspect.signature(decode_fn).parameters:
    decode_fn = functools.partial(decode_fn, dtype=dtype)
  decode_fn = devices.data_parallel(decode_fn)
  decode_fn = functools.partial(decode_fn, devices.local(codec.tables))
  return batches.in_blocks(decode_fn, _decode_block(codec))


def decode_rows() -> int:
  """Returns how many codes to decode in one call, which cuts them up."""
  is_cpu = jax.default_backend() == "cpu"
  return (16384 if is_cpu else 65536) * jax.local_device_count()


def _decode_block(codec: Codec) -> int:
  """Returns how many codes go through the decoder at once."""
  if jax.default_backend() != "cpu":
    return decode_rows()
  rows = _BLOCK
  if hasattr(codec.module, "decode_block"):
    rows = codec.module.decode_block(
      codec.tables, budget_bytes=_CPU_DECODE_BUDGET
    )
  return rows * jax.local_device_count()


def mean_of_rows(fn, vectors, block_size: int, progress=None) -> float:
  """Returns the mean of `fn`, `x_ND` to numbers `[N]`, over all rows.

  Every process computes its share, and all return the same; `progress` is
  told of the rows done and those in the share.
  """
  mine = devices.share(len(vectors))
  blocks = batches.map_blocks(
    fn, vectors, block_size=block_size, rows=mine, progress=progress
  )
  parts = [np.zeros(0, np.float32), *(value_N for _, value_N in blocks)]
  value_N = devices.gather_rows(np.concatenate(parts), len(vectors))
  return float(np.mean(value_N, dtype=float))


def block_rows(codec: Codec, knobs: dict) -> int:
  """Returns how many vectors go through the encoder at once."""
  if not hasattr(codec.module, "encode_block"):
    return _BLOCK
  is_cpu = jax.default_backend() == "cpu"
  budget = _CPU_BUDGET if is_cpu else _DEVICE_BUDGET
  sizes = {name: knobs[name] for name in RULE if name in knobs}
  rows = codec.module.encode_block(codec.tables, budget_bytes=budget, **sizes)
  return min(rows, 65536)


def resolve_data(
  codec: Codec, config, *, needs_base: bool = True, **paths
) -> datasets.Dataset:
  """Returns the data of the options, else those the codec was trained on."""
  trained_on = {k: v for k, v in codec.info.get("data", {}).items() if v}
  trained_on.pop("validation_size", None)
  if paths.get("base") is None and any(paths.values()):
    raise ValueError("--queries and --groundtruth need --data, their base.")
  if any(paths.values()):
    dataset = datasets.resolve(
      scale=codec.info.get("scale"), metric=codec.info.get("metric"), **paths
    )
  elif trained_on:
    root = config.get("data_root") or trained_on.pop("root", None)
    dataset = datasets.resolve(**{**trained_on, "root": root})
    if needs_base and not dataset.base:
      raise ValueError(
        "The codec was trained on a file without a base: give --data=FILE "
        "(and --queries=FILE), or measure the held-out vectors with "
        "--split=validation."
      )
  else:
    raise ValueError(
      "This codec does not say what it was trained on; give --data=FILE."
    )
  if dataset.dim != codec.dim:
    raise ValueError(
      f"The codec is for vectors of {codec.dim} dimensions, got "
      f"{dataset.dim} in {dataset.base or dataset.train or dataset.queries}."
    )
  return dataset


def check_cosine(codec: Codec, metric: str) -> bool:
  """Whether the codec is of vectors of length 1, which it was trained on.

  Raises ValueError where the metric asked for is cosine and it is not.
  """
  own = codec.info.get("metric") or "l2"
  if metric == "cosine" and own != "cosine":
    raise ValueError(
      f"--metric=cosine needs a codec of vectors of length 1, but this one was "
      f"trained for {own}; train with --config.data.metric=cosine."
    )
  return own == "cosine"


def has_knob(codec: Codec, name: str) -> bool:
  """Whether the codec's `encode` has an option of that name."""
  return name in inspect.signature(codec.module.encode).parameters
