"""How commands start and talk to people: options, errors, progress, tables."""

import contextlib
import functools
import logging as std_logging
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import app, flags, logging
from ml_collections import config_dict, config_flags

from experiments.lib import errors, parsing, process
from experiments.lib.compiled import keep_compiled  # noqa: F401 For commands.
from experiments.lib.errors import leave, user_errors
from vqjax import devices, shipped
from vqjax.progress import count as count
from vqjax.progress import elapsed as elapsed
from vqjax.progress import progress as progress

SAVE_SECONDS = 60.0  # Between checkpoints of long work, at least.


class Option(NamedTuple):
  """One flag of a command; `default` None has the type of `kind`."""

  kind: type
  default: Any
  help: str


_WORDS = {
  str: "text or a path",
  int: "an integer",
  float: "a number",
  bool: "True or False",
}
DATA_OPTIONS = {
  "data": Option(str, None, "Vectors (.npy, .bvecs, items.parquet#embedding)."),
  "data_root": Option(
    str, None, "Folder of named data sets; else $VQJAX_DATA, else data."
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
    "A, codewords of each hypothesis that go through the network; 0: all.",
  ),
  "num_joint_candidates": Option(
    int,
    None,
    "C, pairs of hypothesis and codeword that go through the network, "
    "instead of A for each hypothesis; 0: by A.",
  ),
  "num_ranked": Option(
    int,
    None,
    "F, joint candidates that the codec's ranker (tradeoff --write) lets "
    "through the network; 0: all C.",
  ),
  "num_steps": Option(
    int, None, "Code positions to use, list number not counted; all if unset."
  ),
  "dtype": Option(
    str,
    "auto",
    "Type of the products of the network and of those that pre-select its "
    "codewords: float32, bfloat16, or auto: float32 on CPUs and bfloat16 on "
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
  str,
  None,
  "Run folder, codec.safetensors, released .pt checkpoint, or "
  "hf://owner/name[@revision] on the Hugging Face hub.",
)
TRACKER_OPTION = Option(
  str,
  None,
  "Also report the training to tensorboard, wandb or trackio; metrics.jsonl is "
  "always written. The same as --config.train.tracker.",
)


_MULTIHOST_OPTION = Option(
  bool,
  False,
  "Work with the other processes of this run, on one or many hosts: started by "
  "srun or mpirun, or found by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
  "JAX_PROCESS_ID.",
)


def get_config(options: dict[str, Option], **values) -> config_dict.ConfigDict:
  """Returns the options as a ConfigDict: these values, else their defaults.

  Raises:
    ValueError: There is no such option, or the value is of another type.
  """
  config = config_dict.ConfigDict(
    {
      name: config_dict.placeholder(option.kind)
      if option.default is None
      else option.default
      for name, option in options.items()
    }
  ).lock()
  for name, value in values.items():
    if name not in options:
      near = shipped.did_you_mean(name, options)
      known = ", ".join(options)
      raise ValueError(f"There is no option {name!r}{near} Known are {known}.")
    if value is not None:
      config[name] = _of_kind(name, options[name].kind, value)
  return config


def _of_kind(name: str, kind: type, value):
  """The value as a flag has it: a path and a list as text."""
  if isinstance(value, list | tuple):
    value = ",".join(map(str, value))
  accepted = {
    str: str | os.PathLike | int | float,
    int: int | np.integer,
    float: int | float | np.number,
    bool: bool | np.bool_,
  }
  is_bool = isinstance(value, bool | np.bool_)
  if not isinstance(value, accepted[kind]) or is_bool != (kind is bool):
    raise ValueError(
      f"{name} must be {_WORDS[kind]}; got {type(value).__name__}."
    )
  return _expanded(kind(value))


def takes(options: dict[str, Option]) -> Callable:
  """Lets the `run(config)` of a command take a dict, or keywords, instead.

  Options that are not given have their defaults.
  """

  def decorate(run):
    @functools.wraps(run)
    def run_fn(config=None, /, **values):
      if values or not isinstance(config, config_dict.ConfigDict):
        config = get_config(options, **{**(config or {}), **values})
      return run(config)

    return run_fn

  return decorate


def config_of(config) -> config_dict.ConfigDict:
  """Returns a configuration, or reads it by name or file, as --config does."""
  if isinstance(config, str | os.PathLike):
    return shipped.read_config(os.fspath(config))
  return config


def main(
  run,
  options: dict[str, Option],
  doc: str,
  *,
  required: tuple[str, ...] = (),
  how_to_resume: str = "Run the same command again.",
  multihost: bool = False,
  positional: str | None = None,
) -> None:
  """Runs a command from its flags; errors of the user end in one line.

  `required` are the options that --help names first; `run` checks them.
  `positional` is the option of the words that are no flags, joined by commas;
  without it there may be none.
  """
  _define(options)

  def main_fn():
    with user_errors(how_to_resume):
      run(get_config(options, **_given(options)))

  _start(main_fn, doc, options, required, multihost, positional)


def run_config(
  run,
  options: dict[str, Option],
  config_help: str,
  *,
  how_to_resume: str = "Run the same command again.",
  multihost: bool = False,
) -> None:
  """Runs `run(config, workdir, **options)` from --config=NAME[:ARGUMENT].

  If it returns None, it was interrupted, and the exit code is 130: a job
  scheduler must not take it for done.
  """
  config_flags.DEFINE_config_file("config", None, config_help)
  workdir_help = "Run folder; runs/NAME-OF-THE-CONFIG if unset."
  print_help = "Only print the fields of --config, as set here."
  options = {
    "workdir": Option(str, None, workdir_help),
    **options,
    "tracker": TRACKER_OPTION,
    "print_config": Option(bool, False, print_help),
  }
  _define(options)

  def main_fn():
    file = config_flags.get_config_filename(flags.FLAGS["config"])
    given = _given(options)
    if given.pop("print_config"):
      base = shipped.root() / "configs" / "base.py"
      lines = [*_fields(flags.FLAGS.config), f"Explained in {base}", ""]
      sys.stdout.write("\n".join(lines))
      return
    workdir = given.pop("workdir") or default_workdir(file)
    tracker = given.pop("tracker")
    with user_errors(how_to_resume):
      _expand_config(flags.FLAGS.config)
      _set_tracker(flags.FLAGS.config, tracker)
      if run(flags.FLAGS.config, workdir, **given) is None:
        sys.exit(130)

  doc = sys.modules["__main__"].__doc__
  shown = {"config": Option(str, None, config_help), **options}
  _start(main_fn, doc, shown, ("config",), multihost)


def _set_tracker(config, tracker: str | None) -> None:
  """Sets where training reports to; raises ValueError if nothing is trained."""
  if tracker is None:
    return
  if "tracker" not in config.get("train", {}):
    raise ValueError(
      f"--tracker={tracker} needs a training with steps, but this codec is "
      "fitted in closed form; leave it out."
    )
  config.train.tracker = tracker


def _fields(config, prefix: str = "--config"):
  """Yields all fields of a configuration as flags."""
  for name, value in config.items():
    if isinstance(value, config_dict.ConfigDict):
      yield from _fields(value, f"{prefix}.{name}")
    else:
      yield f"{prefix}.{name}={value}"


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


def _start(
  main_fn, doc: str, options: dict, required, multihost: bool, positional=None
) -> None:
  """Hands over to absl, with messages made for people.

  If a command shares its work (`multihost`), its flag --multihost joins the
  other processes before JAX is used.
  """
  process.prepare()
  if multihost:
    options = options | {"multihost": _MULTIHOST_OPTION}
    _define({"multihost": _MULTIHOST_OPTION})
  logging.set_verbosity(logging.INFO)
  logging.get_absl_handler().python_handler.setStream(sys.stderr)
  for handler in std_logging.root.handlers:  # absl removes handlers of stderr.
    if isinstance(handler, std_logging.StreamHandler):
      handler.setStream(sys.stderr)
  logging.get_absl_handler().setFormatter(errors.PlainFormatter())
  logging.get_absl_handler().addFilter(errors.is_for_people)
  parse_fn = lambda argv: parsing.parse(
    argv, doc, options, required, positional
  )
  work_fn = lambda _: _work(main_fn, multihost)
  process.raise_on_ctrl_c()  # It ended at once while modules were imported.
  try:
    app.run(work_fn, flags_parser=parse_fn)
  except KeyboardInterrupt:  # A second one, while the first was answered.
    os._exit(130)
  finally:
    process.end_at_once_on_ctrl_c()


def _work(main_fn, multihost: bool) -> None:
  """Prepares JAX as the flags say, and runs the command."""
  # Here, as JAX has not started: a program that calls `run` has its own.
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
    leave(1)


def has_own_stdout() -> bool:
  """Whether standard output is no terminal, and not where progress is shown."""
  try:
    out, err = (os.fstat(s.fileno()) for s in (sys.stdout, sys.stderr))
    return not (sys.stdout.isatty() or os.path.samestat(out, err))
  except (OSError, ValueError, AttributeError):  # Of a notebook.
    return False


def require(config, *names: str) -> None:
  """Raises ValueError unless these options are set."""
  for name in names:
    if not config.get(name):
      raise ValueError(f"--{name} is needed; see --help.")


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
