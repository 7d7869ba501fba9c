"""Writes archives as `torch.save` does, and as it never would.

Pickles are put together by hand, so that they can name what is not installed.
"""

import struct
import zipfile
from typing import Any, NamedTuple


class Name(NamedTuple):
  module: str
  name: str


class Call(NamedTuple):  # Also of a class, with opcode b"\x81".
  fn: Any
  args: tuple
  opcode: bytes = b"R"


class Build(NamedTuple):
  instance: Any
  state: Any


class Pid(NamedTuple):
  parts: Any


class Items(NamedTuple):  # A dict of another class, and what is put into it.
  instance: Any
  items: dict


def emit(value) -> bytes:
  """Pickles plain values and the above, without importing what they name."""
  match value:
    case Name(module, name):
      return f"c{module}\n{name}\n".encode()
    case Call(fn, args, opcode):
      return emit(fn) + emit(args) + opcode
    case Build(instance, state):
      return emit(instance) + emit(state) + b"b"
    case Items(instance, items):
      pairs = [emit(part) for pair in items.items() for part in pair]
      return emit(instance) + b"(" + b"".join(pairs) + b"u"
    case Pid(parts):
      return emit(parts) + b"Q"
    case None | True | False:
      return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    case int():
      digits = value.to_bytes(9, "little", signed=True)
      return b"\x8a" + bytes([len(digits)]) + digits
    case float():
      return b"G" + struct.pack(">d", value)
    case str():
      text = value.encode()
      return b"X" + struct.pack("<i", len(text)) + text
    case tuple():
      return b"(" + b"".join(map(emit, value)) + b"t"
    case list():
      return b"](" + b"".join(map(emit, value)) + b"e"
    case dict():
      pairs = [emit(part) for pair in value.items() for part in pair]
      return b"}(" + b"".join(pairs) + b"u"
  raise TypeError(type(value))


REBUILD = Name("torch._utils", "_rebuild_tensor_v2")


def storage(kind="FloatStorage", key="0", size=6):
  return Pid(("storage", Name("torch", kind), key, "cpu", size))


def tensor(of=None, offset=0, shape=(2, 3), strides=(3, 1)):
  return Call(REBUILD, (of or storage(), offset, shape, strides, False, {}))


def write(path, root, records=None, compression=zipfile.ZIP_STORED):
  """Writes an archive; `root` is pickled unless it is bytes."""
  if not isinstance(root, bytes):
    root = b"\x80\x02" + emit(root) + b"."
  with zipfile.ZipFile(path, "w", compression) as file:
    file.writestr("a/data.pkl", root)
    for name, data in (records or {}).items():
      file.writestr(f"a/{name}", data)
  return path


def write_arrays(path, arrays: dict):
  """Writes an OrderedDict of contiguous arrays, as of a state dict."""
  kinds = {"float32": "FloatStorage", "int64": "LongStorage"}
  items = {}
  for key, (name, x) in enumerate(arrays.items()):
    steps = [step // x.itemsize for step in x.strides]
    of = storage(kinds[x.dtype.name], str(key), x.size)
    items[name] = tensor(of, 0, x.shape, tuple(steps))
  root = Items(Call(Name("collections", "OrderedDict"), ()), items)
  records = {f"data/{i}": x.tobytes() for i, x in enumerate(arrays.values())}
  return write(path, root, records)


def rewrite(path, source, change=(), drop=()):
  """Copies an archive with other or fewer records."""
  with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
    for entry in old.infolist():
      name = entry.filename.split("/", 1)[1]
      data = dict(change).get(name, old.read(entry))
      if name not in drop:
        new.writestr(entry.filename, data)
  return path


def pickle_of(source) -> bytes:
  with zipfile.ZipFile(source) as file:
    return file.read(f"{source.stem}/data.pkl")
