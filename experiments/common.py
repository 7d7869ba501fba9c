"""What the commands share: options, codecs from files, blocks, messages."""

import contextlib
import inspect
import logging as std_logging
import os
import pathlib
import signal
import sys
import time
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from ml_collections import config_dict

from vqjax.codecs import registry
from vqjax.data import datasets
from vqjax.interop import safetensors_io
from vqjax.progress import progress_bar

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
}
CODEC_OPTION = Option(
  str, None, "Run folder, codec.safetensors, or released .pt checkpoint."
)


def get_config(options: dict[str, Option]) -> config_dict.ConfigDict:
  """Returns the options as a ConfigDict with their defaults."""
  return config_dict.ConfigDict(
    {
      name: config_dict.placeholder(option.kind)
      if option.default is None
      else option.default
      for name, option in options.items()
    }
  )


def main(run, options: dict[str, Option], doc: str) -> None:
  """Runs a command from its flags; errors of the user end in one line."""
  define = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
  }
  # As flags of the main module, so that --help shows them.
  for name, option in options.items():
    define[option.kind](
      name, option.default, option.help, module_name=sys.argv[0]
    )
  sys.modules["__main__"].__doc__ = doc

  def absl_main(argv):
    if len(argv) > 1:
      raise app.UsageError(f"Unexpected argument {argv[1]!r}.")
    config = get_config(options)
    config.update({name: flags.FLAGS[name].value for name in options})
    with user_errors():
      run(config)

  start(absl_main)


def start(absl_main) -> None:
  """Hands over to absl, with messages made for people."""
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
    sys.exit(1)
  except KeyboardInterrupt:
    logging.warning("Stopped. %s", how_to_go_on)
    sys.exit(130)
  finally:
    signal.signal(signal.SIGTERM, before)


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


def search_knobs(codec: Codec, config) -> dict:
  """Returns the codec's encode options with those the user changed.

  Asking for candidates per hypothesis alone switches the joint rule off.
  """
  knobs = dict(codec.info.get("encode", {}))
  asked = {
    name: config[name]
    for name in ("beam_size", "num_candidates", "num_joint_candidates")
    if config.get(name) is not None
  }
  if "num_candidates" in asked and "num_joint_candidates" not in asked:
    knobs.pop("num_joint_candidates", None)
  knobs.update(asked)
  unknown = [name for name in asked if not _has_knob(codec, name)]
  if unknown:
    raise ValueError(
      f"--{unknown[0]} means nothing to a {codec.name} codec; leave it out."
    )
  return knobs


def make_encode_fn(codec: Codec, knobs: dict, num_steps: int | None = None):
  """Returns a jitted `x_ND -> codes_NM` and how many vectors to give it."""
  encode_fn = jax.jit(
    lambda tables, x_ND: codec.module.encode(
      tables, x_ND, num_steps=num_steps, **knobs
    )
  )
  return lambda x_ND: encode_fn(codec.tables, x_ND), block_rows(codec, knobs)


def make_decode_fn(codec: Codec):
  """Returns a jitted `codes_NM -> x_ND`."""
  decode_fn = jax.jit(codec.module.decode)
  return lambda codes_NM: decode_fn(codec.tables, codes_NM)


def block_rows(codec: Codec, knobs: dict) -> int:
  """Returns how many vectors go through the encoder at once."""
  if not hasattr(codec.module, "encode_block"):
    return _BLOCK
  is_cpu = jax.default_backend() == "cpu"
  budget = _CPU_BUDGET if is_cpu else _DEVICE_BUDGET
  rows = codec.module.encode_block(codec.tables, budget_bytes=budget, **knobs)
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
