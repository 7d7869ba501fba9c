"""From a command line to flags: configurations by name, --help, mistakes."""

import functools
import re
import sys
import textwrap
from typing import Any

from absl import flags

from vqjax import shipped

_ASK_FOR_HELP = ("-h", "-help", "--help", "--helpshort")


def parse(argv, doc: str, options: dict, required, positional=None):
  """Returns `argv` without the flags; prints help if asked for.

  Words that are no flags become the value of the option `positional`.
  """
  if any(arg in _ASK_FOR_HELP for arg in argv[1:]):
    sys.stdout.write(help_text(doc, options, required))
    sys.exit(0)
  is_config = "config" in required
  for arg in argv[1:]:
    if any("\ud800" <= c <= "\udfff" for c in arg):
      sys.exit(
        f"{arg!a} is not UTF-8, which libraries need of names: rename the file "
        "or the folder."
      )
  try:
    if is_config:
      argv, unset = _take_unset(_find_configs(argv))
    rest = flags.FLAGS(argv)
    if is_config and flags.FLAGS["config"].value is not None:
      _unset(flags.FLAGS.config, unset)
  except (flags.Error, FileNotFoundError) as error:
    text = str(error).replace(" ?", "?")  # absl's "Did you mean: config ?"
    text += "" if text[-1] in ".?" else "."
    sys.exit(f"{text}{_field_hint(error)} See --help.")
  except OSError as error:
    sys.exit(f"The configuration cannot be read: {error}")
  except (AttributeError, KeyError, TypeError) as error:
    # ConfigDict's answer to --config.model.no_such_field=1, or to a wrong type.
    reason = error
    while isinstance(reason, Exception) and reason.args:
      reason = reason.args[0]  # str() of a KeyError would escape it.
    sys.exit(
      f"A --config option does not fit the configuration: {_one_line(reason)} "
      f"Its file and {shipped.root() / 'configs/base.py'} list the fields and "
      f"their types.{_fields_beside(argv, reason)}"
    )
  if positional and len(rest) > 1:
    given = [flags.FLAGS[positional].value or "", *rest[1:]]
    flags.FLAGS[positional].value = ",".join(filter(None, given))
    rest = rest[:1]
  if len(rest) > 1:
    hint = " Flags begin with --." if rest[1].split("=")[0] in options else ""
    sys.exit(f"Unexpected argument {rest[1]!r}.{hint} See --help.")
  if is_config and flags.FLAGS["config"].value is None:
    sys.exit(
      "--config is needed: a file of your own, or one of "
      f"{', '.join(shipped.config_names())}; see --help."
    )
  return rest


def _one_line(reason) -> str:
  """ConfigDict's message as a sentence."""
  text = ". ".join(str(reason).splitlines()).replace("?.", "?")
  return text + ("" if text[-1] in ".?" else ".")


def _fields_beside(argv, reason) -> str:
  """The fields of the group in which one was not found, as a sentence."""
  missing = str(reason).splitlines()[0].strip("'")
  for arg in argv:
    match = re.match(r"--?config\.(.+)=", arg)
    *path, last = match[1].split(".") if match else ("", "")
    if not match or last != missing:
      continue
    config = _read_config(argv)
    for name in path:
      config = config.get(name, None) if hasattr(config, "get") else None
    if hasattr(config, "keys"):
      group = ".".join(["config", *path])
      return f" {group} has {', '.join(sorted(config.keys()))}."
  return ""


def _read_config(argv):
  """The configuration of --config=FILE; absl has not kept what it refused."""
  given = [arg.partition("=")[2] for arg in argv if arg.startswith("--config=")]
  return shipped.read_config(given[-1]) if given else None


def _field_hint(error) -> str:
  """Names the fields of the configuration that a wrong flag may mean."""
  name = getattr(error, "flagname", None)
  config = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
  if name is None or config is None:
    return ""
  names = {"data": ("train", "base")}.get(name, (name,))
  found = [
    f"--config.{group}.{field}"
    for group, fields in config.items()
    if hasattr(fields, "keys")
    for field in names
    if field in fields
  ]
  return f" The configuration has {' and '.join(found)}." if found else ""


def _take_unset(argv: list[str]) -> tuple[list[str], list[str]]:
  """Takes arguments like --config.data.num_train=None out: which are unset."""
  unset = [re.fullmatch(r"--?config\.(.+)=(?i:none)", arg) for arg in argv]
  rest = [arg for arg, is_none in zip(argv, unset, strict=True) if not is_none]
  return rest, [match[1] for match in unset if match]


def _unset(config, names: list[str]) -> None:
  """Sets values to None if they may be: in `data`, or None by default."""
  for name in names:
    *path, last = name.split(".")
    group = functools.reduce(lambda group, part: group[part], path, config)
    if path[:1] != ["data"] and group[last] is not None:
      raise flags.Error(f"--config.{name} needs a value, got None.")
    group[last] = None


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


def help_text(doc: str, options: dict[str, Any], required=()) -> str:
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


def _describe(name: str, option) -> str:
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
