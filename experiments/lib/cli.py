"""How commands start and talk to people: options, errors, progress, tables."""

import contextlib
import dis
import functools
import logging as std_logging
import os
import pathlib
import signal
import sys
import textwrap
import time
from typing import Any, NamedTuple

import jax
from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from experiments.lib import process
from vqjax import devices, shipped
from vqjax.progress import progress_bar

_ASK_FOR_HELP = ("-h", "-help", "--help", "--helpshort")
_CACHE_BYTES = 1 << 30  # Of compiled programs.
_CHATTY = {"orbax", "etils", "tensorstore", "matplotlib"}


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
  "rule": Option(
    str,
    None,
    "joint (C) or published (A, B); the rule stored with the codec if unset.",
  ),
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
  "num_ranked": Option(
    int,
    None,
    "F, joint candidates that a cheap ranker, fitted to 512 of the vectors, "
    "lets through the whole network; 0: all C.",
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


_MULTIHOST_OPTION = Option(
  bool,
  False,
  "Work with the other processes of this run, on one or many hosts: started by "
  "srun or mpirun, or found by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
  "JAX_PROCESS_ID.",
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
  required: tuple[str, ...] = (),
  how_to_go_on: str = "Run the same command again.",
  multihost: bool = False,
) -> None:
  """Runs a command from its flags; errors of the user end in one line.

  `required` are the options that --help names first; `run` checks them.
  """
  _define(options)

  def main_fn():
    with user_errors(how_to_go_on):
      run(get_config(options, **_given(options)))

  _start(main_fn, doc, options, required, multihost)


def run_config(
  run,
  options: dict[str, Option],
  config_help: str,
  *,
  how_to_go_on: str = "Run the same command again.",
  multihost: bool = False,
) -> None:
  """Runs `run(config, workdir, **options)` from --config=NAME[:ARGUMENT].

  Where it returns None it was interrupted, and the exit code is 130: a job
  scheduler must not take it for done.
  """
  config_flags.DEFINE_config_file("config", None, config_help)
  workdir_help = "Run folder; runs/NAME-OF-THE-CONFIG if unset."
  options = {"workdir": Option(str, None, workdir_help), **options}
  _define(options)

  def main_fn():
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    given = _given(options)
    workdir = given.pop("workdir") or default_workdir(file)
    with user_errors(how_to_go_on):
      _expand_config(flags.FLAGS.config)
      if run(flags.FLAGS.config, workdir, **given) is None:
        sys.exit(130)

  doc = sys.modules["__main__"].__doc__
  shown = {"config": Option(str, None, config_help), **options}
  _start(main_fn, doc, shown, ("config",), multihost)


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


def _start(main_fn, doc: str, options: dict, required, multihost: bool) -> None:
  """Hands over to absl, with messages made for people.

  Where a command shares its work (`multihost`), its flag --multihost joins the
  other processes before JAX is used.
  """
  process.prepare()
  if multihost:
    options = options | {"multihost": _MULTIHOST_OPTION}
    _define({"multihost": _MULTIHOST_OPTION})
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().python_handler.setStream(sys.stderr)
  for handler in std_logging.root.handlers:  # absl removes those of stderr.
    if isinstance(handler, std_logging.StreamHandler):
      handler.setStream(sys.stderr)
  logging.get_absl_handler().setFormatter(_PlainFormatter())
  logging.get_absl_handler().addFilter(_is_for_people)
  parse_fn = lambda argv: _parse_flags(argv, doc, options, required)
  work_fn = lambda _: _work(main_fn, multihost)
  try:
    app.run(work_fn, flags_parser=parse_fn)
  except KeyboardInterrupt:  # A second one, while the first was answered.
    os._exit(130)
  finally:
    process.end_at_once_on_ctrl_c()


def _work(main_fn, multihost: bool) -> None:
  """Prepares JAX as the flags say, and runs the command."""
  # Here, where JAX has not started: a program that calls `run` has its own.
  jax.config.update("jax_enable_x64", False)  # All types here are of 32 bits.
  with user_errors():
    if "threads" in flags.FLAGS and flags.FLAGS.threads is not None:
      devices.limit_cpus(flags.FLAGS.threads)
    if not (multihost and flags.FLAGS.multihost):
      devices.check_platforms()
      main_fn()
      return
    devices.start_processes()
    devices.check_platforms()
  if not devices.is_first():
    logging.set_verbosity(logging.WARNING)
  try:
    main_fn()
  except Exception:
    logging.exception("This is an error in the program.")
    _leave(1)


def _parse_flags(argv, doc: str, options: dict, required):
  """Returns what is left of `argv`; whoever asks for help gets it."""
  if any(arg in _ASK_FOR_HELP for arg in argv[1:]):
    sys.stdout.write(process.name_commands(help_text(doc, options, required)))
    sys.exit(0)
  is_config = "config" in required
  for arg in argv[1:]:
    if any("\ud800" <= c <= "\udfff" for c in arg):
      sys.exit(
        f"{arg!a} is not UTF-8, which libraries need of names: rename the file "
        "or the folder."
      )
  try:
    rest = flags.FLAGS(_find_configs(argv) if is_config else argv)
  except (flags.Error, FileNotFoundError) as error:
    text = str(error).replace(" ?", "?")  # absl's "Did you mean: config ?"
    sys.exit(f"{text}{'' if text[-1] in '.?' else '.'} See --help.")
  except OSError as error:
    sys.exit(f"The configuration cannot be read: {error}")
  except (AttributeError, KeyError, TypeError) as error:
    # ConfigDict's answer to --config.model.no_such_field=1, or to a wrong type.
    reason = error
    while isinstance(reason, Exception) and reason.args:
      reason = reason.args[0]  # str() of a KeyError would escape it.
    sys.exit(
      f"A --config option does not fit the configuration: {reason}. Its file "
      f"and {shipped.root() / 'configs/base.py'} list the fields and their "
      "types."
    )
  if len(rest) > 1:
    hint = " Flags begin with --." if rest[1].split("=")[0] in options else ""
    sys.exit(f"Unexpected argument {rest[1]!r}.{hint} See --help.")
  if is_config and flags.FLAGS["config"].value is None:
    sys.exit(
      "--config is needed: a file of your own, or one of "
      f"{', '.join(shipped.config_names())}; see --help."
    )
  return rest


def _find_configs(argv: list[str]) -> list[str]:
  """Returns `argv` with the file of the configuration that --config names."""
  found, is_value = [], False
  for arg in argv:
    flag, equals, value = arg.partition("=")
    if is_value or (equals and flag in ("-config", "--config")):
      given = arg if is_value else value
      try:
        path, argument = shipped.find_config(given)
      except ValueError as error:
        raise flags.Error(str(error)) from error
      shipped.import_configs(path)
      arg = f"--config={path}" + (f":{argument}" if argument else "")
      found, is_value = found[: len(found) - is_value], False
    else:
      is_value = arg in ("-config", "--config")
    found.append(arg)
  return found


def help_text(doc: str, options: dict[str, Option], required=()) -> str:
  """Returns what --help shows: how to use it, required flags, the others."""
  text = doc.strip()
  first = {name: options[name] for name in required}
  others = {name: o for name, o in options.items() if name not in required}
  for title, group in (("Required flags", first), ("Flags", others)):
    if group:
      text += f"\n\n{title}:\n"
      text += "\n".join(_describe(*item) for item in group.items())
  return (
    f"{text}\n\nOf every command: --verbosity=1 shows where an error comes "
    "from,\n--flagfile=FILE reads flags from a file.\n"
  )


def _describe(name: str, option: Option) -> str:
  flag = f"--[no]{name}" if option.kind is bool else f"--{name}"
  kind = {int: " (an integer)", float: " (a number)"}.get(option.kind, "")
  is_plain = option.default in (None, False, "")
  default = "" if is_plain else f" (default: {option.default})"
  return textwrap.fill(
    f"{flag}: {option.help}{kind}{default}",
    width=80,
    initial_indent="  ",
    subsequent_indent="    ",
    break_long_words=False,
    break_on_hyphens=False,
  )


class _PlainFormatter(std_logging.Formatter):
  """The message alone; its level where it is more than information."""

  def format(self, record):
    text = record.getMessage()
    if record.levelno >= std_logging.WARNING:
      text = f"{record.levelname}: {text}"
    if record.exc_info:
      text += "\n" + self.formatException(record.exc_info)
    return process.name_commands(text)


def _is_for_people(record) -> bool:
  """False for what libraries tell each other, such as orbax's progress.

  Their warnings are shown, but for those of the checkpoint libraries and of
  matplotlib, which are about their own defaults and folders.
  """
  if _is_ours(record.pathname) or logging.level_debug():
    return True
  is_chatty = _CHATTY.intersection(pathlib.Path(record.pathname).parts)
  needed = std_logging.ERROR if is_chatty else std_logging.WARNING
  return record.levelno >= needed


@functools.cache
def _is_ours(file: str) -> bool:
  """Whether this is a source file of the library, a command, a config."""
  rooms = [shipped.root() / name for name in ("experiments", "configs")]
  rooms.append(pathlib.Path(shipped.__file__).resolve().parent)
  path = pathlib.Path(file).resolve()
  return any(path.is_relative_to(room) for room in rooms)


def keep_compiled() -> None:
  """Keeps compiled programs between runs, in the user's cache folder.

  Where there is none or it cannot be written, programs are compiled again.
  The oldest go when the folder holds more than a gigabyte.
  """
  if jax.config.jax_compilation_cache_dir is not None:
    return
  folder = _cache_folder()
  if folder is None:
    return
  with contextlib.suppress(OSError):
    folder.mkdir(parents=True, exist_ok=True)
    if os.access(folder, os.W_OK | os.X_OK):
      trim(folder, _CACHE_BYTES)
      jax.config.update("jax_compilation_cache_dir", str(folder))
      jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _cache_folder() -> pathlib.Path | None:
  """The user's folder for compiled programs; None for one without a home."""
  cache = os.environ.get("XDG_CACHE_HOME", "")
  if not os.path.isabs(cache):  # So the standard has it.
    home = os.environ.get("HOME", os.path.expanduser("~"))
    cache = os.path.join(home, ".cache") if os.path.isabs(home) else ""
  return pathlib.Path(cache, "vqjax") if cache else None


def trim(folder: pathlib.Path, max_bytes: int) -> None:
  """Deletes the files that were used longest ago, down to `max_bytes`."""
  last_used = lambda stat: max(stat.st_atime, stat.st_mtime)
  found = []
  for entry in os.scandir(folder):
    with contextlib.suppress(FileNotFoundError):  # Another process trims too.
      if entry.is_file(follow_symlinks=False):
        stat = entry.stat()
        found.append((last_used(stat), stat.st_size, entry.path))
  excess = sum(size for _, size, _ in found) - max_bytes
  for _, size, path in sorted(found):
    if excess <= 0:
      return
    with contextlib.suppress(FileNotFoundError):
      os.unlink(path)
    excess -= size


@contextlib.contextmanager
def user_errors(how_to_go_on: str = "Run the same command again."):
  """Turns errors that tell a user what to do into one line, exit code 1.

  Such are errors of the system (OSError, MemoryError, ImportError), and those
  that a `raise` of vqjax, its commands or configurations raised: whoever wrote
  it wrote a message. Any other error, such as a KeyError or a ValueError of
  NumPy that nobody foresaw, is a fault of ours and keeps its traceback.

  SIGTERM acts like Ctrl-C: the program cleans up and says how to go on.
  """
  before = signal.signal(signal.SIGTERM, signal.default_int_handler)
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if not jax.distributed.is_initialized():
      raise
    reason = str(e).splitlines()[0][:300]
    logging.error(
      "Lost another process of the run: %s. %s", reason, how_to_go_on
    )
    _leave(1)
  except Exception as e:
    if logging.level_debug() or not is_for_user(e):
      raise
    text = str(e) or "There is not enough memory."  # Of a MemoryError.
    logging.error("%s\n(--verbosity=1 shows where this comes from.)", text)
    _leave(1)
  except KeyboardInterrupt:
    logging.warning("Stopped. %s", how_to_go_on)
    _leave(130)
  finally:
    signal.signal(signal.SIGTERM, before)


def is_for_user(error: Exception) -> bool:
  """Whether an error's message was written for users; see `user_errors`."""
  if isinstance(error, OSError | ImportError | MemoryError):
    return True
  kinds = (ValueError, TypeError, FloatingPointError)
  if not isinstance(error, kinds) or error.__traceback__ is None:
    return False
  last = error.__traceback__
  while last.tb_next:
    last = last.tb_next
  code = last.tb_frame.f_code
  is_raise = code.co_code[last.tb_lasti] == dis.opmap["RAISE_VARARGS"]
  return is_raise and _is_ours(code.co_filename)


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


def number(value: float) -> str:
  """Returns a figure with four decimals, a small one with four digits."""
  return f"{value:.4f}" if value == 0 or abs(value) >= 0.1 else f"{value:.4g}"


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
