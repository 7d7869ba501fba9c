"""Damaged files of every format: the right array, or one sentence.

Each case flips, overwrites, cuts off or inserts bytes of a small file with a
fixed seed. It may end in three ways: the right array; another finite one,
where nothing in the format could have told; or an error that names the file.
"""

import collections
import itertools

import numpy as np
import pytest

from vqjax.data import batches, formats

NUM_CASES = 2000
X_ND = np.random.default_rng(0).integers(0, 100, size=(12, 5)).astype("f4")
# Every byte of these has a checksum, or its header is compared with others.
CHECKED = ("stored.npz", "packed.npz", "packed.h5")


def _files(folder) -> dict:
  """Bytes by file name."""
  for suffix in (".bvecs", ".fvecs", ".ivecs", ".fbin", ".u8bin", ".i8bin"):
    formats.write_vectors(folder / f"x{suffix}", X_ND)
  formats.write_vectors(folder / "x.ibin", X_ND)
  head = np.array(X_ND.shape, "<u4").tobytes()
  (folder / "wide.ibin").write_bytes(head + X_ND.astype("<i8").tobytes())
  np.save(folder / "x.npy", X_ND)
  np.save(folder / "fortran.npy", np.asfortranarray(X_ND, np.float16))
  np.save(folder / "big.npy", X_ND.astype(">i8"))
  half = (X_ND.view("u4") >> 16).astype("u2").view("V2")
  np.save(folder / "bfloat16.npy", half)
  np.savez(folder / "stored.npz", x=X_ND)
  np.savez_compressed(folder / "packed.npz", x=X_ND)
  h5py = pytest.importorskip("h5py")
  with h5py.File(folder / "x.hdf5", "w") as file:
    file.create_dataset("group/train", data=X_ND)
  with h5py.File(folder / "packed.h5", "w", libver="latest") as file:
    file.create_dataset(
      "train", data=X_ND, chunks=(3, 5), compression="gzip", fletcher32=True
    )
  return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def _damage(raw: bytes, rng) -> bytes:
  kind, at = rng.integers(5), int(rng.integers(len(raw)))
  if kind == 0:
    return raw[:at]
  if kind == 1:
    return raw[:at] + rng.bytes(int(rng.integers(1, 9))) + raw[at:]
  out = bytearray(raw)
  if kind == 2:
    out[at] ^= 1 << int(rng.integers(8))
  elif kind == 3:
    fill = rng.choice([b"\x00", b"\xff", b"\x80"])
    part = out[at : at + int(rng.integers(1, 17))]
    out[at : at + len(part)] = fill * len(part)
  else:
    part = out[at : at + int(rng.integers(1, 9))]
    out[at : at + len(part)] = rng.bytes(len(part))
  return bytes(out)


def _read(path):
  vectors = formats.open_vectors(path)
  some = np.arange(min(len(vectors), 50))
  return batches.read_rows(vectors, some)


def _outcome(path, name) -> str:
  try:
    x_ND = _read(path)
  except (ValueError, OSError) as error:
    message = str(error)
  else:
    assert np.isfinite(x_ND).all()
    return "right" if np.array_equal(x_ND, X_ND) else "other"
  assert str(path) in message, (name, message)
  assert "\n" not in message
  return "refused"


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_refused_in_words(tmp_path):
  (tmp_path / "whole").mkdir()
  whole = _files(tmp_path / "whole")
  for name in whole:
    assert _outcome(tmp_path / "whole" / name, name) == "right"
  rng, counts = np.random.default_rng(20), collections.Counter()
  for _, name in zip(range(NUM_CASES), itertools.cycle(whole), strict=False):
    path = tmp_path / name
    path.write_bytes(_damage(whole[name], rng))
    counts[name, _outcome(path, name)] += 1
  assert all(counts[name, "refused"] for name in whole)
  assert not any(counts[name, "other"] for name in CHECKED)


def test_short_files_are_refused_at_every_length(tmp_path):
  (tmp_path / "whole").mkdir()
  for name, raw in _files(tmp_path / "whole").items():
    path = tmp_path / name
    for size in [*range(0, min(len(raw), 130), 3), len(raw) - 1]:
      path.write_bytes(raw[:size])
      outcome = _outcome(path, name)
      # What a whole number of rows leaves is a whole file of that format.
      assert outcome == "refused" or name.endswith("vecs"), (name, size)
