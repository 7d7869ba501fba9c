"""Reads the archives of `torch.save` without torch and without running them.

Such a file is a zip archive: `data.pkl`, a pickle of everything but the
numbers, and one record `data/KEY` per storage of numbers. Unpickling runs what
the pickle names, so here it may name only what `_KNOWN` lists, the handful of
names in the checkpoints of QINCo and RQ-VAE, and gets an inert stand-in for
it. Numbers are read when a tensor is asked for, and only from its storage.
"""

import collections
import contextlib
import io
import math
import os
import pathlib
import pickle
import pickletools
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vqjax.data import files

_STORAGES = {
  "FloatStorage": "f4",
  "DoubleStorage": "f8",
  "HalfStorage": "f2",
  "BFloat16Storage": "bfloat16",
  "LongStorage": "i8",
  "IntStorage": "i4",
  "ShortStorage": "i2",
  "CharStorage": "i1",
  "ByteStorage": "u1",
  "BoolStorage": "b1",
}
_SCALARS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")


class Refused(ValueError):
  """What is wrong with a file; continues a sentence that names the file."""


class Storage(NamedTuple):
  """Numbers of a record `data/KEY`, not read yet."""

  dtype: str
  key: str
  size: int


class Tensor(NamedTuple):
  """A view of a storage; until `checked` its parts may be anything."""

  storage: Any
  offset: Any
  shape: Any
  strides: Any

  def checked(self, name: str) -> "Tensor":
    """Returns itself; refuses a view that leaves its storage."""
    lists = type(self.shape) is tuple and type(self.strides) is tuple
    numbers = [self.offset, *self.shape, *self.strides] if lists else [None]
    if (
      type(self.storage) is not Storage
      or any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers)
      or len(self.shape) != len(self.strides)
      or len(self.shape) > 8
    ):
      raise Refused(f"describes tensor {name!r} in no way that torch would.")
    size, count = self.storage.size, math.prod(self.shape)
    pairs = zip(self.shape, self.strides, strict=True)
    last = self.offset + sum((n - 1) * step for n, step in pairs)
    # The count alone tells of strides of zero, many numbers out of one.
    if count == 0 or last >= size or count > size:
      raise Refused(
        f"is damaged: tensor {name!r} of shape {self.shape} does not lie "
        f"within its storage of {size} numbers."
      )
    return self


class _Inert:
  """Stand-in for what a pickle names: can be made and given a state."""

  def __init__(self, *args):
    del args

  # As a method it also keeps a pickle from changing the class itself.
  def __setstate__(self, state):
    if type(state) is not dict:
      raise Refused(f"gives a {type(self).__name__} a state that is no dict.")
    self.__dict__.update(state)


class Module(_Inert):
  """Stand-in for the classes of torch modules; only the name differs."""


class _Dtype(_Inert):
  """Stand-in for `numpy.dtype`."""

  def __init__(self, name="", *args):
    self.name, self.order = name, "<"

  def __setstate__(self, state):
    self.order = state[1] if type(state) is tuple and len(state) > 1 else None


def _callable(fn) -> type:
  """A class that calls `fn`: a pickle can change a function, not this."""
  new = lambda cls, *args: fn(*args)
  return type(fn.__name__, (_Inert,), {"__new__": new})


def _tensor(storage, offset, shape, strides, *args) -> Tensor:
  return Tensor(storage, offset, shape, strides)


def _parameter(tensor, *args):
  return tensor


def _latin1(text, encoding) -> bytes:
  if type(text) is not str or encoding != "latin1":
    raise Refused("encodes something else than text as latin1.")
  return text.encode("latin1")


def _scalar(dtype, data):
  known = type(dtype) is _Dtype and dtype.name in _SCALARS
  if not known or dtype.order not in ("<", ">", "|") or type(data) is not bytes:
    raise Refused("holds a numpy scalar that is no plain number.")
  return np.frombuffer(data, np.dtype(dtype.order + dtype.name))[0].item()


def _known_names() -> dict:
  """Everything that a file may name, with its stand-in."""
  modules = {
    "model_qinco": ("QINCo", "QINCoLR", "IVFQINCo", "PQ_QINCo", "QINCoStep"),
    "torch.nn.modules.linear": ("Linear",),
    "torch.nn.modules.sparse": ("Embedding",),
    "torch.nn.modules.container": ("Sequential", "ModuleList"),
    "torch.nn.modules.activation": ("ReLU",),
  }
  known = {
    (module, name): type(name, (Module,), {})
    for module, names in modules.items()
    for name in names
  }
  known |= {("torch", name): name for name in _STORAGES}
  return known | {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("argparse", "Namespace"): type("Namespace", (_Inert,), {}),
    ("builtins", "set"): set,
    ("__builtin__", "set"): set,
    ("torch._utils", "_rebuild_tensor_v2"): _callable(_tensor),
    ("torch._utils", "_rebuild_parameter"): _callable(_parameter),
    ("numpy", "dtype"): _Dtype,
    ("numpy.core.multiarray", "scalar"): _callable(_scalar),
    ("numpy._core.multiarray", "scalar"): _callable(_scalar),
    ("_codecs", "encode"): _callable(_latin1),
  }


_KNOWN = _known_names()


class _Unpickler(pickle.Unpickler):
  """Unpickles to stand-ins; refuses every name it does not know."""

  def find_class(self, module, name):
    if (module, name) not in _KNOWN:
      raise Refused(
        f"names {module}.{name}, which no known checkpoint uses; "
        "refusing to load it."
      )
    return _KNOWN[module, name]

  def persistent_load(self, pid):
    if type(pid) is tuple and len(pid) == 5 and pid[0] == "storage":
      _, kind, key, _, size = pid
      types = [type(part) for part in (kind, key, size)]
      if types == [str, str, int] and kind in _STORAGES and size >= 0:
        return Storage(_STORAGES[kind], key, size)
    raise Refused("refers to something else than a storage of numbers.")


class Archive(NamedTuple):
  """An open checkpoint; record names start with `prefix`."""

  path: pathlib.Path
  file: zipfile.ZipFile
  prefix: str
  order: str  # Of bytes, as numpy writes it.

  def record(self, name: str) -> bytes:
    """Returns a record; never reads more than the file holds."""
    try:
      entry = self.file.getinfo(self.prefix + name)
    except KeyError:
      raise Refused(f"has no record {name}.") from None
    if entry.compress_type != zipfile.ZIP_STORED:
      raise Refused(f"has a compressed record {name}; torch writes none.")
    if entry.file_size > os.path.getsize(self.path):
      raise Refused(
        f"is truncated or damaged: record {name} claims {entry.file_size} "
        "bytes, more than the whole file has."
      )
    try:
      return self.file.read(entry)
    except Exception as error:
      raise Refused(
        f"is truncated or damaged: record {name} cannot be read ({error})."
      ) from error

  def array(self, name: str, tensor: Tensor) -> np.ndarray:
    """Reads a tensor as float32; `name` is for messages."""
    storage, offset, shape, strides = tensor.checked(name)
    data = self.record(f"data/{storage.key}")
    is_bfloat16 = storage.dtype == "bfloat16"
    dtype = np.dtype("u2" if is_bfloat16 else storage.dtype)
    if len(data) < storage.size * dtype.itemsize:
      raise Refused(
        f"is truncated or damaged: tensor {name!r} needs a record of "
        f"{storage.size * dtype.itemsize} bytes, got {len(data)}."
      )
    flat = np.frombuffer(data, dtype.newbyteorder(self.order), storage.size)
    steps = [step * dtype.itemsize for step in strides]
    view = np.lib.stride_tricks.as_strided(flat[offset:], shape, steps)
    if is_bfloat16:
      view = view.astype(np.uint16).view(jnp.bfloat16)
    out = np.array(view, np.float32)
    if not np.isfinite(out).all():
      raise Refused(f"has NaN or Inf in tensor {name!r}.")
    return out


def _open(path: pathlib.Path, file: zipfile.ZipFile) -> Archive:
  names = file.namelist()
  found = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
  if len(found) != 1:
    raise Refused(
      "is no checkpoint: expected a zip archive of torch.save with one record "
      f"NAME/data.pkl, found {len(found)} of them in {len(names)} records."
    )
  archive = Archive(path, file, found[0].removesuffix("data.pkl"), "<")
  if archive.prefix + "byteorder" not in names:
    return archive
  order = archive.record("byteorder")
  if order not in (b"little", b"big"):
    raise Refused(f"has byte order {order[:20]!r}, expected little or big.")
  return archive._replace(order="<" if order == b"little" else ">")


def _unpickle(pickled: bytes):
  """Returns what a pickle describes, in stand-ins."""
  try:
    for op, arg, _ in pickletools.genops(pickled):
      # A large memo index alone makes the unpickler allocate gigabytes.
      too_large = op.name in ("PUT", "LONG_BINPUT") and arg > len(pickled)
      if too_large or op.name.startswith("EXT"):
        raise Refused(f"uses {op.name} in a way that torch.save does not.")
    return _Unpickler(io.BytesIO(pickled)).load()
  except Refused:
    raise
  except Exception as error:
    raise Refused(f"is damaged: data.pkl is no pickle ({error}).") from error


@contextlib.contextmanager
def open_archive(path):
  """Yields the archive and what its `data.pkl` describes, in stand-ins.

  `Refused` inside the block leaves it as a ValueError that names the file.
  """
  path = files.user_path(path)
  if not path.is_file():
    raise FileNotFoundError(
      f"There is no file {path}; expected a checkpoint of torch.save, .pt."
    )
  with contextlib.ExitStack() as stack:
    try:
      file = stack.enter_context(zipfile.ZipFile(path))
    except Exception as error:
      raise ValueError(
        f"{path} is truncated or no zip archive of torch.save ({error})."
      ) from error
    try:
      archive = _open(path, file)
      yield archive, _unpickle(archive.record("data.pkl"))
    except Refused as error:
      raise ValueError(f"{path} {error}") from error.__cause__
