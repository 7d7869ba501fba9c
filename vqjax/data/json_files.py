"""JSON files that may be damaged or hostile: errors are one sentence."""

import json
import pathlib

_MAX_BYTES, _MAX_DEPTH = 1 << 28, 64


def check_fields(path, found: dict, fields: dict) -> None:
  """Raises ValueError unless fields of a JSON object have these types.

  `fields` has the type or types of each; a list `[int]` is a list of those.
  """
  for name, kind in fields.items():
    value = found.get(name)
    if isinstance(kind, list):
      items = value if isinstance(value, list) else [None]
      good = all(_is_a(item, kind[0]) for item in items)
    else:
      good = _is_a(value, kind)
    if not good:
      text = repr(value)
      text = text if len(text) < 60 else f"{text[:57]}..."
      raise ValueError(
        f"{path} is damaged: its {name!r} is {text}; make it again, or bring "
        "back a copy."
      )


def _is_a(value, kind) -> bool:
  return isinstance(value, kind) and (
    not isinstance(value, bool) or kind is bool
  )


def read_json(path) -> dict:
  """Returns the JSON object in a file.

  Raises ValueError if there is none, or it is too large or too deep.
  """
  path = pathlib.Path(path)
  size = path.stat().st_size
  if size > _MAX_BYTES:
    raise ValueError(
      f"{path} is damaged, or no JSON file of vqjax: it has {size} bytes."
    )
  return parse_json(path.read_bytes(), path)


def parse_json(text: bytes | str, path) -> dict:
  """Returns the JSON object in a text; `path` is what messages call it."""
  try:
    if isinstance(text, bytes):
      text = text.decode("utf-8")
    found = json.loads(text)
    _check_depth(found)
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path} is damaged, or no JSON file: it is not text in UTF-8 at byte "
      f"{error.start}."
    ) from error
  except ValueError as error:
    raise ValueError(f"{path} is damaged, or no JSON file: {error}.") from error
  except RecursionError as error:
    raise ValueError(
      f"{path} is damaged, or no JSON file of vqjax: more than {_MAX_DEPTH} "
      "brackets in one another."
    ) from error
  if not isinstance(found, dict):
    raise ValueError(
      f"{path} is damaged, or no JSON file of vqjax: expected an object, got "
      f"{type(found).__name__}."
    )
  return found


def _check_depth(value) -> None:
  """Raises RecursionError if objects lie too deep in one another."""
  level = [value]
  for _ in range(_MAX_DEPTH):
    level = [
      x
      for items in level
      if isinstance(items, dict | list)
      for x in (items.values() if isinstance(items, dict) else items)
    ]
    if not level:
      return
  raise RecursionError
