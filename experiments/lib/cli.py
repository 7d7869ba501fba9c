"""How commands start and talk to people: options, errors, progress, tables."""

import contextlib
import logging as std_logging
import os
import pathlib
import signal
import sys
import time
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from vqjax import devices
from vqjax.progress import progress_bar

flags.disclaim_key_flags()  # They are the command's, so that --help shows them.


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
  "num_finalists": Option(
    int,
    None,
    "F, of the C joint candidates those that a scout, fitted to 512 of the "
    "vectors, lets through the whole network; 0: all. Where it, A and C are "
    "unset, encoding 65,536 vectors or more by a deep network tries one and "
    "takes it where it costs at most 0.2 % of MSE.",
  ),
  "num_steps": Option(
    int, None, "Code positions to use, list number not counted; all if unset."
  ),
  "dtype": Option(
    str,
    "auto",
    "Type of the products of the network and of those that pre-select its "
    "words: float32, bfloat16, or auto: float32 on CPUs and bfloat16 on "
    "accelerators. Sums and errors are float32.",
  ),
}
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
  run,
  options: dict[str, Option],
  doc: str,
  *,
  how_to_go_on: str = "Run the same command again.",
  multihost: bool = False,
) -> None:
  """Runs a command from its flags; errors of the user end in one line."""
  _define(options)
  sys.modules["__main__"].__doc__ = doc

  def main_fn():
    with user_errors(how_to_go_on):
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
    workdir = _expanded(flags.FLAGS.workdir) or default_workdir(file)
    with user_errors(how_to_go_on):
      _expand_config(flags.FLAGS.config)
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
  return {name: _expanded(flags.FLAGS[name].value) for name in options}


def _expanded(value):
  """The value; a path that starts with `~` begins at the home folder.

  Shells leave `--data=~/x.npy` as it is.
  """
  return os.path.expanduser(value) if isinstance(value, str) else value


def _expand_config(config) -> None:
  """Does so with all values of a configuration, in place."""
  for name, value in config.items():
    if isinstance(value, config_dict.ConfigDict):
      _expand_config(value)
    elif isinstance(value, str):
      config[name] = _expanded(value)


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
    # Here, where JAX has not started: a program that calls `run` has its own.
    if "threads" in flags.FLAGS and flags.FLAGS.threads is not None:
      with user_errors():
        devices.limit_cpus(flags.FLAGS.threads)
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
  except BrokenPipeError:
    raise  # The reader of --help has seen enough.
  except OSError as error:
    sys.exit(f"The configuration cannot be read: {error}")
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
