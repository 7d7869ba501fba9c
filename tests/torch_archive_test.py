"""Archives that are malicious, damaged or unusual; made by hand."""

import os
import pathlib
import pickle
import struct
import time
import zipfile

import ml_dtypes
import numpy as np
import pytest

from tests.pickles import (
  Build,
  Call,
  Name,
  Pid,
  emit,
  storage,
  tensor,
  write,
)
from vqjax.interop import torch_archive, torch_qinco

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party" / "golden"
V2, V1 = GOLDEN / "qinco2_tiny.pt", GOLDEN / "v1_qinco.pt"


def read(path):
  """Reads the tensor that is the root of an archive."""
  with torch_archive.open_archive(path) as (archive, root):
    return archive.array("x", root)


@pytest.fixture
def pt(tmp_path):
  return tmp_path / "x.pt"


# Malicious files.


class Evil:
  """Pickles as a call of a function."""

  def __init__(self, fn, *args):
    self.call = fn, args

  def __reduce__(self):
    return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
  "nest",
  [
    lambda evil: evil,
    lambda evil: {"model": {"data_mean": evil}, "parameters": {}},
    lambda evil: [1, ({"a": [evil]},)],
  ],
)
def test_refuses_calls_and_runs_none(pt, tmp_path, protocol, nest):
  marker = tmp_path / "ran"
  for fn, args, said in (
    (os.system, (f"touch {marker}",), f"names {os.name}.system, which no"),
    (eval, (f"open({str(marker)!r}, 'w')",), "names .*builtin.*eval, which"),
    (exec, (f"open({str(marker)!r}, 'w')",), "names .*builtin.*exec, which"),
    (getattr, (os, "system"), "names .*builtin.*getattr, which no"),
    (open, (str(marker), "w"), "names .*open, which no"),
  ):
    if fn is getattr:
      args = ("text", "upper")
    write(pt, pickle.dumps(nest(Evil(fn, *args)), protocol=protocol))
    with pytest.raises(ValueError, match=said) as error:
      torch_qinco.load_checkpoint(pt)
    assert str(pt) in str(error.value)
    assert "refusing to load it." in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize(
  ("module", "name"),
  [
    ("os", "system"),
    ("subprocess", "Popen"),
    ("builtins", "getattr"),
    ("torch", "load"),
    ("torch.storage", "_load_from_bytes"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy", "load"),
    ("collections", "OrderedDict.__init__"),
    ("model_qinco", "QINCo.__class__"),
    ("model_qinco", "Other"),
    ("__main__", "QINCo"),
    ("vqjax.interop.torch_archive", "os.system"),
    ("_codecs", "decode"),
  ],
)
@pytest.mark.parametrize("form", ["GLOBAL", "STACK_GLOBAL", "INST", "OBJ"])
def test_refuses_every_other_name(pt, module, name, form):
  short = lambda text: b"\x8c" + bytes([len(text)]) + text.encode()
  pickled = {
    "GLOBAL": emit(Call(Name(module, name), ())),
    "STACK_GLOBAL": short(module) + short(name) + b"\x93",
    "INST": f"(i{module}\n{name}\n".encode(),
    "OBJ": b"(" + emit(Name(module, name)) + b"o",
  }[form]
  write(pt, b"\x80\x04" + pickled + b".")
  with pytest.raises(
    ValueError, match=f"names {module}.{name}, which no known checkpoint uses"
  ):
    torch_qinco.load_checkpoint(pt)


def test_stand_ins_stay_as_they_are(pt):
  new = {"__new__": 1, "__setstate__": 2, "nm": 3}
  for target in (
    Name("model_qinco", "QINCo"),
    Name("torch._utils", "_rebuild_tensor_v2"),
    Name("_codecs", "encode"),
    Name("numpy", "dtype"),
    Name("collections", "OrderedDict"),
    Name("torch", "FloatStorage"),
    storage(),
    tensor(),
  ):
    for state in (new, (None, new), (new, new), 5, [1]):
      write(pt, Build(target, state))
      with pytest.raises(ValueError, match=r"x\.pt "):
        torch_qinco.load_checkpoint(pt)
  assert torch_qinco.load_checkpoint(V1)[0] == "qinco"


@pytest.mark.parametrize(
  ("root", "said"),
  [
    (Call(Name("torch", "FloatStorage"), (4,)), "damaged: data.pkl"),
    (Call(Name("_codecs", "encode"), ("a", "rot13")), "than text as latin1"),
    (Call(Name("_codecs", "encode"), (3, "latin1")), "than text as latin1"),
    (
      Call(Name("numpy._core.multiarray", "scalar"), ("O", "x")),
      "no plain number",
    ),
    (
      Call(
        Name("numpy.core.multiarray", "scalar"),
        (Call(Name("numpy", "dtype"), ("O8", False, True)), "x"),
      ),
      "no plain number",
    ),
    (Build(Call(Name("model_qinco", "QINCo"), ()), (1, {})), "no dict"),
    (Pid("../../etc/passwd"), "than a storage of numbers"),
    (Pid(("storage", "FloatStorage", "0", 4)), "than a storage of numbers"),
    (
      Pid(("module", Name("torch", "FloatStorage"), "0", "cpu", 4)),
      "than a storage of numbers",
    ),
    (storage(size=-1), "than a storage of numbers"),
    (storage(size="6"), "than a storage of numbers"),
    (
      Pid(("storage", Name("model_qinco", "QINCo"), "0", "cpu", 4)),
      "than a storage of numbers",
    ),
  ],
)
def test_refuses_misuse_of_known_names(pt, root, said):
  write(pt, root)
  with pytest.raises(ValueError, match=said):
    torch_qinco.load_checkpoint(pt)


def test_refuses_memo_bombs_and_extensions(pt):
  for pickled, said in (
    (b"N" + b"r" + struct.pack("<I", 2**31 - 1), "uses LONG_BINPUT"),
    (b"Np2000000000\n", "uses PUT"),
    (b"\x82\x01", "uses EXT1"),
  ):
    write(pt, b"\x80\x02" + pickled + b".")
    start = time.monotonic()
    with pytest.raises(ValueError, match=said):
      torch_qinco.load_checkpoint(pt)
    assert time.monotonic() - start < 1


# Tensors.

NUMBERS = np.arange(6, dtype=np.float32)


@pytest.mark.parametrize(
  ("kind", "dtype"),
  [
    ("FloatStorage", "f4"),
    ("DoubleStorage", "f8"),
    ("HalfStorage", "f2"),
    ("BFloat16Storage", ml_dtypes.bfloat16),
    ("LongStorage", "i8"),
    ("IntStorage", "i4"),
    ("ShortStorage", "i2"),
    ("CharStorage", "i1"),
    ("ByteStorage", "u1"),
  ],
)
def test_reads_every_type_in_either_byte_order(pt, kind, dtype):
  data = NUMBERS.astype(dtype)
  for order, flip in ((b"little", False), (b"big", True)):
    raw = data.tobytes()
    if flip:
      bytes_NB = np.frombuffer(raw, np.uint8).reshape(6, -1)
      raw = np.ascontiguousarray(bytes_NB[:, ::-1]).tobytes()
    write(pt, tensor(storage(kind)), {"data/0": raw, "byteorder": order})
    np.testing.assert_array_equal(read(pt), NUMBERS.reshape(2, 3))
    assert read(pt).dtype == np.float32


def test_reads_bools(pt):
  write(pt, tensor(storage("BoolStorage")), {"data/0": b"\0\1\1\0\0\1"})
  np.testing.assert_array_equal(read(pt), [[0, 1, 1], [0, 0, 1]])


@pytest.mark.parametrize(
  ("offset", "shape", "strides"),
  [(0, (3, 2), (1, 3)), (1, (2, 2), (3, 1)), (5, (1,), (1,)), (2, (), ())],
)
def test_reads_views(pt, offset, shape, strides):
  write(pt, tensor(None, offset, shape, strides), {"data/0": NUMBERS.tobytes()})
  want = [
    offset + sum(i * s for i, s in zip(at, strides, strict=True))
    for at in np.ndindex(*shape)
  ]
  np.testing.assert_array_equal(read(pt), np.reshape(want, shape))


@pytest.mark.parametrize(
  ("view", "said"),
  [
    (dict(offset=1), "does not lie within its storage of 6 numbers"),
    (dict(shape=(2, 4)), "does not lie within"),
    (dict(strides=(4, 1)), "does not lie within"),
    (dict(shape=(7,), strides=(0,)), "does not lie within"),
    (dict(shape=(2**40, 2**40), strides=(0, 0)), "does not lie within"),
    (dict(shape=(0, 3)), "does not lie within"),
    (dict(offset=-1), "in no way that torch would"),
    (dict(shape=(-2, -3)), "in no way that torch would"),
    (dict(strides=(-3, 1)), "in no way that torch would"),
    (dict(strides=(3,)), "in no way that torch would"),
    (dict(offset=2**60), "in no way that torch would"),
    (dict(offset=0.0), "in no way that torch would"),
    (dict(shape=[2, 3]), "in no way that torch would"),
    (dict(shape=(1,) * 40, strides=(1,) * 40), "in no way that torch would"),
    (dict(of="text"), "in no way that torch would"),
    (dict(of=storage(size=7)), "needs a record of 28 bytes, got 24"),
    (dict(of=storage("DoubleStorage")), "of 48 bytes, got 24"),
    (dict(of=storage(key="1")), "has no record data/1"),
  ],
)
def test_refuses_views_beyond_their_storage(pt, view, said):
  write(pt, tensor(**view), {"data/0": NUMBERS.tobytes()})
  with pytest.raises(ValueError, match=said):
    read(pt)


def test_refuses_compressed_and_overlong_records(pt):
  write(pt, tensor(), {"data/0": NUMBERS.tobytes()}, zipfile.ZIP_DEFLATED)
  with pytest.raises(ValueError, match="has a compressed record data.pkl"):
    read(pt)
  write(pt, tensor(), {"data/0": NUMBERS.tobytes()})
  raw = bytearray(pt.read_bytes())
  at = raw.rindex(b"a/data/0") - 46 + 20  # Sizes in the central directory.
  raw[at : at + 8] = struct.pack("<II", 2**31, 2**31)
  pt.write_bytes(raw)
  with pytest.raises(ValueError, match="data/0 claims 2147483648 bytes, more"):
    read(pt)


def test_refuses_changed_numbers(pt):
  write(pt, tensor(), {"data/0": NUMBERS.tobytes()})
  raw = pt.read_bytes().replace(NUMBERS.tobytes(), NUMBERS[::-1].tobytes())
  pt.write_bytes(raw)
  with pytest.raises(ValueError, match="data/0 cannot be read .*CRC"):
    read(pt)
