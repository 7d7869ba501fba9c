"""What the commands share: options, codecs from files, blocks, messages."""

import contextlib
import functools
import inspect
import logging as std_logging
import os
import pathlib
import signal
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from vqjax import devices
from vqjax.codecs import registry
from vqjax.codecs.distances import nearest
from vqjax.data import batches, datasets
from vqjax.interop import faiss_ivf, safetensors_io
from vqjax.progress import progress_bar

flags.disclaim_key_flags()  # They are the command's, so that --help shows them.

_BLOCK = 4096  # Vectors at once, for codecs without a network.
_CPU_BUDGET, _DEVICE_BUDGET = 24 << 20, 4 << 30  # Bytes, of one block.


class Option(NamedTuple):
  """One flag of a command; `default` None has the type of `kind`."""

  kind: type
  default: Any
  help: str


DATA_OPTIONS = {
  "data": Option(str, None, "Vectors (bvecs, fvecs, npy, u8bin, ...)."),
  "data_root": Option(
    str, None, "Folder of named data sets; else $VQJAX_DATA."
  ),
}
SEARCH_OPTIONS = {
  "beam_size": Option(
    int, None, "B, hypotheses kept; the codec's own if unset."
  ),
  "num_candidates": Option(
    int,
    None,
    "A, words of each hypothesis that go through the network; 0: all.",
  ),
  "num_joint_candidates": Option(
    int,
    None,
    "C, pairs of hypothesis and word that go through the network, "
    "instead of A for each hypothesis; 0: by A.",
  ),
  "num_steps": Option(
    int, None, "Code positions to use, list number not counted; all if unset."
  ),
  "dtype": Option(
    str,
    "auto",
    "Type of the network's products: float32, bfloat16, or auto: float32 on "
    "CPUs and bfloat16 on accelerators. Sums and distances are float32.",
  ),
}
_MANY_LISTS = 65536  # From here on a graph finds the list sooner, on CPUs.
ASSIGN = ("auto", "blocks", "hnsw")  # Ways from vectors to lists.
RULE = ("num_candidates", "beam_size", "num_joint_candidates")  # A, B, C.
ASSIGN_OPTION = Option(
  str,
  "auto",
  "How an IVF model finds the list of a vector: blocks, hnsw (a graph of the "
  "centroids, which may miss the nearest), or auto: the graph from 65,536 "
  "lists up on CPUs.",
)
CODEC_OPTION = Option(
  str, None, "Run folder, codec.safetensors, or released .pt checkpoint."
)


def get_config(options: dict[str, Option], **values) -> config_dict.ConfigDict:
  """Returns the options as a ConfigDict: these values, else their defaults."""
  config = config_dict.ConfigDict(
    {
      name: config_dict.placeholder(option.kind)
      if option.default is None
      else option.default
      for name, option in options.items()
    }
  ).lock()  # A misspelt name raises.
  config.update(values)
  return config


def main(
  run, options: dict[str, Option], doc: str, *, multihost: bool = False
) -> None:
  """Runs a command from its flags; errors of the user end in one line."""
  _define(options)
  sys.modules["__main__"].__doc__ = doc

  def main_fn():
    with user_errors():
      run(get_config(options, **_given(options)))

  _start(main_fn, multihost)


def run_config(
  run,
  options: dict[str, Option],
  config_help: str,
  *,
  how_to_go_on: str = "Run the same command again.",
  multihost: bool = False,
) -> None:
  """Runs `run(config, workdir, **options)` from --config=FILE[:ARGUMENT].

  Where it returns None it was interrupted, and the exit code is 130: a job
  scheduler must not take it for done.
  """
  config_flags.DEFINE_config_file("config", None, config_help)
  flags.mark_flag_as_required("config")
  workdir_help = "Run folder; runs/NAME-OF-THE-CONFIG if unset."
  _define({"workdir": Option(str, None, workdir_help), **options})

  def main_fn():
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = flags.FLAGS.workdir or default_workdir(file)
    with user_errors(how_to_go_on):
      if run(flags.FLAGS.config, workdir, **_given(options)) is None:
        sys.exit(130)

  _start(main_fn, multihost)


def default_workdir(config_file: str) -> str:
  """Returns `runs/qinco2_s-smoke` for `configs/qinco2_s.py:smoke`."""
  name, _, arg = config_file.partition(":")
  return f"runs/{pathlib.Path(name).stem}" + (f"-{arg}" if arg else "")


def _define(options: dict[str, Option]) -> None:
  define = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
  }
  for name, option in options.items():
    define[option.kind](name, option.default, option.help)


def _given(options: dict[str, Option]) -> dict:
  return {name: flags.FLAGS[name].value for name in options}


def _start(main_fn, multihost: bool) -> None:
  """Hands over to absl, with messages made for people.

  Where a command shares its work (`multihost`), its flag --multihost joins the
  other processes before JAX is used.
  """
  if multihost:
    flags.DEFINE_boolean(
      "multihost",
      False,
      "Work with the other processes of this run, on one or many hosts: "
      "started by srun or mpirun, or found by JAX_COORDINATOR_ADDRESS, "
      "JAX_NUM_PROCESSES and JAX_PROCESS_ID.",
    )

  def absl_main(argv):
    if len(argv) > 1:
      raise app.UsageError(f"Unexpected argument {argv[1]!r}.")
    if not (multihost and flags.FLAGS.multihost):
      main_fn()
      return
    with user_errors():
      devices.start_processes()
    if not devices.is_first():
      logging.set_verbosity(logging.WARNING)
    try:
      main_fn()
    except Exception:
      logging.exception("This is an error in the program.")
      _leave(1)

  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().setFormatter(_PlainFormatter())
  logging.get_absl_handler().addFilter(_is_for_people)
  app.run(absl_main, flags_parser=_parse_flags)


def _parse_flags(argv):
  try:
    return app.parse_flags_with_usage(argv)
  except (AttributeError, KeyError, TypeError) as error:
    # ConfigDict's answer to --config.model.no_such_field=1, or to a wrong type.
    reason = error
    while isinstance(reason, Exception) and reason.args:
      reason = reason.args[0]  # str() of a KeyError would escape it.
    sys.exit(
      f"A --config option does not fit the configuration: {reason}. Its file "
      "in configs/ and configs/base.py list the fields and their types."
    )


class _PlainFormatter(std_logging.Formatter):
  """The message alone; its level where it is more than information."""

  def format(self, record):
    text = record.getMessage()
    if record.levelno >= std_logging.WARNING:
      text = f"{record.levelname}: {text}"
    if record.exc_info:
      text += "\n" + self.formatException(record.exc_info)
    return text


def _is_for_people(record) -> bool:
  """False for what libraries tell each other, such as orbax's progress."""
  ours = ("experiments", "vqjax", "configs")
  parts = pathlib.Path(record.pathname).parts
  is_ours = any(part in ours for part in parts) and "site-packages" not in parts
  return is_ours or record.levelno >= std_logging.ERROR or logging.level_debug()


def keep_compiled() -> None:
  """Keeps compiled programs between runs, in the user's cache folder."""
  if jax.config.jax_compilation_cache_dir is None:
    cache = pathlib.Path(
      os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")
    )
    with contextlib.suppress(OSError):
      (cache / "vqjax").mkdir(parents=True, exist_ok=True)
      jax.config.update("jax_compilation_cache_dir", str(cache / "vqjax"))
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@contextlib.contextmanager
def user_errors(how_to_go_on: str = "Run the same command again."):
  """Turns errors that tell a user what to do into one line, exit code 1.

  SIGTERM acts like Ctrl-C: the program cleans up and says how to go on.
  """
  before = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as e:
    if logging.level_debug():
      raise
    logging.error("%s\n(--verbosity=1 shows where this comes from.)", e)
    _leave(1)
  except jax.errors.JaxRuntimeError as e:
    if not jax.distributed.is_initialized():
      raise
    reason = str(e).splitlines()[0][:300]
    logging.error(
      "Lost another process of the run: %s. %s", reason, how_to_go_on
    )
    _leave(1)
  except KeyboardInterrupt:
    logging.warning("Stopped. %s", how_to_go_on)
    _leave(130)
  finally:
    signal.signal(signal.SIGTERM, before)


def _leave(code: int) -> None:
  """Exits; as one process of many at once.

  An orderly end waits for the others, which may be waiting for this one.
  """
  if not jax.distributed.is_initialized():
    sys.exit(code)
  logging.flush()
  os._exit(code)


def require(config, *names: str) -> None:
  """Raises ValueError unless these options are set."""
  for name in names:
    if not config.get(name):
      raise ValueError(f"--{name} is needed; see --help.")


class Codec(NamedTuple):
  """A codec from a file, ready to encode and decode."""

  name: str
  module: Any
  tables: Any
  info: dict
  fingerprint: str


def open_codec(path: str) -> Codec:
  """Loads a run folder, a codec.safetensors or a released .pt file."""
  keep_compiled()
  loaded = safetensors_io.load_codec(path)
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


def search_knobs(codec: Codec, config) -> dict:
  """Returns the codec's encode options with those the user changed.

  Asking for candidates per hypothesis alone switches the joint rule off.
  """
  knobs = dict(codec.info.get("encode", {}))
  asked = {name: config[name] for name in RULE if config.get(name) is not None}
  if "num_candidates" in asked and "num_joint_candidates" not in asked:
    knobs.pop("num_joint_candidates", None)
  knobs.update(asked)
  unknown = [name for name in asked if not _has_knob(codec, name)]
  if unknown:
    raise ValueError(
      f"--{unknown[0]} means nothing to a {codec.name} codec; leave it out."
    )
  if _has_knob(codec, "dtype"):
    knobs["dtype"] = product_dtype(config.get("dtype", "auto"))
  return knobs


def try_joint_rule(
  codec: Codec, knobs: dict, x_ND, *, may_widen=True, num_vectors=512
) -> dict:
  """Returns `knobs`, with the joint rule where it costs no quality.

  For codecs whose own options are the published rule (see
  `vqjax.codecs.qinco`). The first `num_vectors` are encoded by both; the joint
  rule is taken where its error is at most 0.2 % higher. There must be many
  more vectors than that, or trying would cost more than it saves. The beam
  stays as wide as it is unless `may_widen`.
  """
  if not _has_knob(codec, "num_joint_candidates"):
    return knobs
  num_candidates, beam_size, joint = (knobs.get(name, 0) for name in RULE)
  if joint or not num_candidates or len(x_ND) < 8 * num_vectors:
    return knobs
  num_words = codec.module.codebook_sizes(codec.tables)[-1]
  first_ND = batches.read_rows(x_ND, range(num_vectors))
  decode_fn = make_decode_fn(codec, knobs.get("dtype", "float32"))

  def mse(knobs):
    encode_fn, num_rows = make_encode_fn(codec, knobs)
    errors_fn = lambda x_ND: np.sum(
      (x_ND - np.asarray(decode_fn(np.asarray(encode_fn(x_ND))))) ** 2, axis=1
    )
    blocks = batches.map_blocks(errors_fn, first_ND, block_size=num_rows)
    return float(np.mean(np.concatenate([e for _, e in blocks]), dtype=float))

  published = mse(knobs)
  for beam, joint in (
    (beam_size, 2 * beam_size),
    (min(3 * beam_size // 2, num_words), 4 * beam_size),
  )[: 2 if may_widen else 1]:
    if joint >= beam_size * num_candidates:
      continue
    new = {**knobs, "beam_size": beam, "num_joint_candidates": joint}
    loss = mse(new) / published - 1
    if loss <= 0.002:
      logging.info(
        "On the first %d vectors B=%d C=%d errs %+.2f %% against A=%d B=%d and "
        "asks the network %.1f times less: taken. (--num_candidates=%d for the "
        "published rule.)",
        *(num_vectors, beam, joint, 100 * loss, num_candidates, beam_size),
        *(beam_size * num_candidates / joint, num_candidates),
      )
      return new
  return knobs


def make_encode_fn(
  codec: Codec,
  knobs: dict,
  num_steps: int | None = None,
  *,
  assign: str = "auto",
):
  """Returns `x_ND -> codes_NM` and how many vectors to give it.

  It runs on all devices of this process. `assign` is how an IVF model finds
  lists, see `make_assign_fn`.
  """
  encode = functools.partial(codec.module.encode, num_steps=num_steps, **knobs)
  num_rows = block_rows(codec, knobs) * jax.local_device_count()
  tables = devices.local(codec.tables)
  if not takes_graph(codec, assign):
    return functools.partial(devices.data_parallel(encode), tables), num_rows
  assign_fn, _ = make_assign_fn(centroids_of(codec), "hnsw")
  encode_fn = devices.data_parallel(lambda tables, rows: encode(tables, *rows))
  return lambda x_ND: encode_fn(tables, (x_ND, assign_fn(x_ND))), num_rows


def centroids_of(codec: Codec) -> np.ndarray:
  """Centroids of the lists, float32 `[L, D]` in data units.

  A codec without lists has one, whose centroid is zero.
  """
  tables = codec.tables
  if not getattr(tables, "is_ivf", False):
    return np.zeros((1, codec.module.dim(tables)), np.float32)
  return np.asarray(tables.first_KD * tables.std + tables.mean_D[None])


def takes_graph(codec: Codec, assign: str) -> bool:
  """Whether the lists of vectors are found by a graph of the centroids."""
  if not getattr(codec.tables, "is_ivf", False):
    return False
  return _takes_graph(assign, codec.tables.first_KD.shape[0])


def _takes_graph(how: str, num_lists: int) -> bool:
  if how not in ASSIGN:
    raise ValueError(f"assign must be one of {', '.join(ASSIGN)}; got {how!r}.")
  is_many = jax.default_backend() == "cpu" and num_lists >= _MANY_LISTS
  return how == "hnsw" or (how == "auto" and is_many)


def make_assign_fn(centroids_LD, how: str = "auto"):
  """Returns `x_ND -> lists_N`, int32, and how many vectors to give it.

  `blocks` compares each vector with all centroids `[L, D]`; `hnsw` walks a
  graph of them, which may miss the nearest. `auto` is the graph where there
  are many lists, on CPUs.
  """
  if _takes_graph(how, len(centroids_LD)):
    coarse = faiss_ivf.make_coarse(centroids_LD, "hnsw")
    return functools.partial(faiss_ivf.assign_lists, coarse), _BLOCK
  assign_fn = devices.data_parallel(
    lambda centroids_LD, x_ND: nearest(x_ND, centroids_LD)
  )
  centroids_LD = devices.local(jnp.asarray(centroids_LD))
  num_rows = _BLOCK * jax.local_device_count()
  return functools.partial(assign_fn, centroids_LD), num_rows


def make_decode_fn(codec: Codec, dtype: str = "float32"):
  """Returns `codes_NM -> x_ND`, on all devices of this process.

  `dtype` is the type of a network's products; other codecs have none.
  """
  decode_fn = codec.module.decode
  if "dtype" in inspect.signature(decode_fn).parameters:
    decode_fn = functools.partial(decode_fn, dtype=dtype)
  decode_fn = devices.data_parallel(decode_fn)
  return functools.partial(decode_fn, devices.local(codec.tables))


def decode_rows() -> int:
  """Returns how many codes to decode at once: what the caches like."""
  is_cpu = jax.default_backend() == "cpu"
  return (4096 if is_cpu else 65536) * jax.local_device_count()


def mean_of_rows(fn, vectors, block_size: int) -> float:
  """Returns the mean of `fn`, `x_ND` to numbers `[N]`, over all rows.

  Every process computes its share, and all return the same.
  """
  mine = devices.share(len(vectors))
  blocks = batches.map_blocks(fn, vectors, block_size=block_size, rows=mine)
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
  want = codec.module.dim(codec.tables)
  if dataset.dim != want:
    raise ValueError(
      f"The codec is for vectors of {want} dimensions, got {dataset.dim} in "
      f"{dataset.base or dataset.train or dataset.queries}."
    )
  return dataset


@contextlib.contextmanager
def progress(total: int, what: str, *, unit: str = "vec"):
  """Yields a `(done, total)` callback behind a progress line."""
  with progress_bar(total, what, unit=unit) as bar:
    yield lambda done, _: bar.update(done - bar.n)


@contextlib.contextmanager
def timed(seconds: dict, name: str):
  """Stores the seconds of the block in `seconds[name]`."""
  began = time.perf_counter()
  yield
  seconds[name] = time.perf_counter() - began


def table(header: list[str], rows: list[list]) -> str:
  """Returns columns aligned for a terminal; numbers to the right."""
  text = [[str(cell) for cell in row] for row in (header, *rows)]
  widths = [max(map(len, column)) for column in zip(*text, strict=True)]
  line = lambda row: "  ".join(
    [row[0].ljust(widths[0])]
    + [cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)]
  )
  return "\n".join(
    [line(text[0]), "  ".join("-" * w for w in widths), *map(line, text[1:])]
  )


def _has_knob(codec: Codec, name: str) -> bool:
  return name in inspect.signature(codec.module.encode).parameters
