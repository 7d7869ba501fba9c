"""Checkpoints that are damaged or of something else.

What good ones decode to is in golden_test.py.
"""

import pathlib
import struct
import zipfile

import numpy as np
import pytest

from tests.pickles import (
  Build,
  Call,
  Name,
  emit,
  pickle_of,
  rewrite,
  tensor,
  write,
)
from vqjax.interop import torch_qinco

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party" / "golden"
V2, V1 = GOLDEN / "qinco2_tiny.pt", GOLDEN / "v1_qinco.pt"


@pytest.fixture
def pt(tmp_path):
  return tmp_path / "x.pt"


# Files that are no checkpoint, or half of one.


def test_missing_file(pt):
  with pytest.raises(FileNotFoundError, match=r"no file .*x\.pt; expected a"):
    torch_qinco.load_checkpoint(pt)


@pytest.mark.parametrize("content", [b"", b"\x80\x02.", b"hello" * 100])
def test_refuses_what_is_no_zip(pt, content):
  pt.write_bytes(content)
  with pytest.raises(ValueError, match="truncated or no zip archive"):
    torch_qinco.load_checkpoint(pt)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_refuses_truncated_files(pt, share):
  raw = V2.read_bytes()
  pt.write_bytes(raw[: int(len(raw) * share)])
  with pytest.raises(ValueError, match="truncated or no zip archive"):
    torch_qinco.load_checkpoint(pt)


@pytest.mark.parametrize("source", [V2, V1, GOLDEN / "v1_pq_qinco_opq.pt"])
def test_random_damage_never_does_worse_than_refusing(pt, source):
  rng = np.random.default_rng(0)
  raw = np.frombuffer(pickle_of(source), np.uint8)
  for _ in range(40):
    damaged = raw.copy()
    at = rng.integers(0, len(raw), 3)
    damaged[at] = rng.integers(0, 256, 3)
    rewrite(pt, source, {"data.pkl": damaged.tobytes()})
    try:
      torch_qinco.load_checkpoint(pt)
    except ValueError as error:
      assert str(pt) in str(error)  # noqa: PT017


def test_refuses_archives_of_something_else(pt):
  with zipfile.ZipFile(pt, "w") as file:
    file.writestr("readme.txt", "hello")
  with pytest.raises(ValueError, match="NAME/data.pkl, found 0 of them in 1"):
    torch_qinco.load_checkpoint(pt)
  rewrite(pt, V2, {"byteorder": b"middle"})
  with pytest.raises(ValueError, match="has byte order b'middle', expected"):
    torch_qinco.load_checkpoint(pt)
  rewrite(pt, V2, {"data.pkl": pickle_of(V2)[:1000]})
  with pytest.raises(ValueError, match="is damaged: data.pkl is no pickle"):
    torch_qinco.load_checkpoint(pt)


@pytest.mark.parametrize(
  ("root", "said"),
  [
    ([1, 2], "holds neither a state dict nor a QINCo module"),
    ({"state_dict": {}}, "'model' and 'parameters', got 'state_dict'"),
    ({("a",) * 3: 1}, "got a tuple"),
    ({}, "got none"),
    ({"model": {}, "parameters": {}}, "must give data_dim as a positive"),
    (
      {"model": {}, "parameters": {"B": True}, "data_dim": 4},
      "must give B as a positive integer, got True",
    ),
    (
      {"model": {}, "parameters": {"B": 1, "A": -1}, "data_dim": 4},
      "must give A as an integer, got -1",
    ),
  ],
)
def test_refuses_other_dicts(pt, root, said):
  write(pt, root)
  with pytest.raises(ValueError, match=said):
    torch_qinco.load_checkpoint(pt)


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (dict(M=1), "has no step with a network"),
    (dict(K=None), "must give K as a positive integer, got None"),
    (dict(M=5), "no tensor 'steps.4.concat.mlp.weight', which its sizes"),
    (dict(de=12), r"'steps.1.concat.mlp.weight' of shape \(24, 40\), expected"),
    (dict(dh=2), r"blocks.0.up_proj.weight' of shape \(32, 24\), expected \(2"),
    (dict(L=3), "no tensor 'steps.1.residual_blocks.2.up_proj.weight'"),
    (dict(K=99), r"codebook.weight' of shape \(16, 16\), expected \(99, 16\)"),
    (dict(ivf_in_use=True, ivf_K=8), "no tensor 'steps.4.concat.mlp.weight'"),
  ],
)
def test_refuses_sizes_that_do_not_fit_the_tensors(pt, change, said):
  pickled = pickle_of(V2)
  given = dict(K=16, M=4, de=24, dh=32, L=2, A=4, B=8) | change
  # Only the dict of sizes is replaced; keys given twice count as the last.
  at = pickled.rindex(b"data_dim") - 5
  again = emit("parameters") + emit(given)
  rewrite(pt, V2, {"data.pkl": pickled[:at] + again + pickled[at:]})
  with pytest.raises(ValueError, match=said):
    torch_qinco.load_checkpoint(pt)


def test_reads_only_the_tensors_of_the_codec(pt):
  unused = ["data/2", "data/3", "data/5", "data/6"]  # Moments of targets.
  rewrite(pt, V2, drop=unused)
  torch_qinco.load_checkpoint(pt)
  rewrite(pt, V2, drop=["data/7"])
  with pytest.raises(ValueError, match="has no record data/7"):
    torch_qinco.load_checkpoint(pt)


@pytest.mark.parametrize(
  ("record", "values", "said"),
  [
    ("data/1", [0.0], "must have a scale above 0, got 0.0"),
    ("data/1", [np.nan], "has NaN or Inf in tensor 'data_std'"),
    ("data/0", [np.inf] * 16, "has NaN or Inf in tensor 'data_mean'"),
    ("data/0", [0.0] * 15, "'data_mean' needs a record of 64 bytes, got 60"),
  ],
)
def test_refuses_bad_numbers(pt, record, values, said):
  rewrite(pt, V2, {record: np.asarray(values, np.float32).tobytes()})
  with pytest.raises(ValueError, match=said):
    torch_qinco.load_checkpoint(pt)


def module(kind, state):
  made = Call(Name("model_qinco", kind), (), b"\x81")
  return Build(made, state)


SIZES = dict(d=4, K=8, L=1, M=2, h=3, _parameters={}, _modules={})


@pytest.mark.parametrize(
  ("root", "said"),
  [
    (module("QINCoStep", SIZES), "holds a QINCoStep, expected a QINCo model"),
    (module("QINCo", SIZES), "has no tensor 'step1.MLPconcat.weight'"),
    (module("QINCoLR", SIZES), "has no tensor 'step1.MLPconcat.0.weight'"),
    (module("QINCo", SIZES | {"M": 1}), "has no step with a network"),
    (module("QINCo", SIZES | {"d": 4.0}), "must give d as a positive integer"),
    (module("QINCo", SIZES | {"_modules": 3}), "whose _modules are no dict"),
    (module("IVFQINCo", SIZES), "must give K_IVF as a positive integer"),
    (module("PQ_QINCo", SIZES), "has no modules sub_quantizer_0"),
    (module("PQ_QINCo", SIZES | {"db_scale": 2}), "has a db_scale in addition"),
    (
      module("PQ_QINCo", {"_modules": {"sub_quantizer_1": tensor()}}),
      "has no modules sub_quantizer_0",
    ),
  ],
)
def test_refuses_modules_that_are_no_codec(pt, root, said):
  write(pt, root)
  with pytest.raises(ValueError, match=said):
    torch_qinco.load_checkpoint(pt)


def test_refuses_modules_that_contain_themselves(pt):
  made = emit(Call(Name("model_qinco", "QINCo"), (), b"\x81")) + b"q\x01"
  state = emit(SIZES)[:-1] + emit("_modules") + b"}(" + emit("a") + b"h\x01"
  state += emit("b") + b"h\x01uu"
  write(pt, b"\x80\x02" + made + state + b"b.")
  with pytest.raises(ValueError, match="more than 100000 modules"):
    torch_qinco.load_checkpoint(pt)


@pytest.mark.parametrize(
  ("scale", "said"),
  [(0.0, "scale above 0"), (-2.0, "scale above 0"), (float("inf"), "a number")],
)
def test_refuses_bad_scales_of_modules(pt, scale, said):
  pickled = pickle_of(V1)
  good = b"G" + struct.pack(">d", 2.5)
  assert pickled.count(good) == 1
  bad = pickled.replace(good, b"G" + struct.pack(">d", scale))
  rewrite(pt, V1, {"data.pkl": bad})
  with pytest.raises(ValueError, match=said):
    torch_qinco.load_checkpoint(pt)
