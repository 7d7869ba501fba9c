"""Files of the released program: byte for byte, and refused when damaged."""

import pathlib
import struct

import numpy as np
import pytest

from vqjax.interop import hakes_files

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party" / "golden"
FILES = {
  f"hakes_{metric}_{name}.bin": (metric, side)
  for metric in ("ip", "l2")
  for name, side in (("findex", "base"), ("uindex", "learned"))
}


@pytest.mark.parametrize("name", FILES)
def test_reads_what_the_released_program_wrote(name):
  metric, side = FILES[name]
  want = np.load(GOLDEN / f"hakes_{metric}.npz")
  got = hakes_files.load(GOLDEN / name)
  assert got.metric == metric
  np.testing.assert_array_equal(got.side.reduction_ED, want[f"{side}_A"])
  np.testing.assert_array_equal(got.side.bias_E, want[f"{side}_b"])
  np.testing.assert_array_equal(
    got.side.codebooks_MKS, want[f"{side}_codebooks"]
  )
  np.testing.assert_array_equal(got.side.centroids_LE, want["centroids"])


@pytest.mark.parametrize("name", FILES)
def test_writes_the_same_bytes(name, tmp_path):
  hakes_files.save(hakes_files.load(GOLDEN / name), tmp_path / "out.bin")
  written = (tmp_path / "out.bin").read_bytes()
  assert written == (GOLDEN / name).read_bytes()


def test_counts_and_metric_come_back(tmp_path):
  file = hakes_files.load(GOLDEN / "hakes_ip_findex.bin")
  file = file.replace(metric="l2", num_vectors=3 << 40)
  hakes_files.save(file, tmp_path / "x.bin")
  again = hakes_files.load(tmp_path / "x.bin")
  assert (again.metric, again.num_vectors) == ("l2", 3 << 40)
  with pytest.raises(FileExistsError, match="exists already"):
    hakes_files.save(file, tmp_path / "x.bin")


@pytest.mark.parametrize("size", [0, 3, 11, 400, 2111, 2125, 3816])
def test_a_truncated_file_is_refused(size, tmp_path):
  whole = (GOLDEN / "hakes_ip_findex.bin").read_bytes()
  path = tmp_path / "cut.bin"
  path.write_bytes(whole[:size])
  with pytest.raises(ValueError, match=f"cut.bin .* the file has {size}"):
    hakes_files.load(path)


@pytest.mark.parametrize(
  ("at", "value", "message"),
  [
    (0, struct.pack("<i", 2), "expected 1 transform at its start, got 2"),
    (4, struct.pack("<i", -5), "reduced dimension of 1 to 16777216, got -5"),
    (12, struct.pack("<f", np.nan), "reduction must be finite, got NaN"),
    (2124, struct.pack("<i", 15), "centroids must be .* 16, got 15"),
    (2136, b"\x07", r"must be 0 \(l2\) or 1 \(ip\), got 7"),
  ],
)
def test_a_foreign_file_is_refused(at, value, message, tmp_path):
  bytes_ = bytearray((GOLDEN / "hakes_ip_findex.bin").read_bytes())
  bytes_[at : at + len(value)] = value
  (tmp_path / "x.bin").write_bytes(bytes_)
  with pytest.raises(ValueError, match=message):
    hakes_files.load(tmp_path / "x.bin")


def test_other_files_and_sizes_are_refused(tmp_path):
  good = (GOLDEN / "hakes_ip_findex.bin").read_bytes()
  (tmp_path / "long.bin").write_bytes(good + b"1234")
  with pytest.raises(ValueError, match="expected 3817 bytes, got 3821"):
    hakes_files.load(tmp_path / "long.bin")
  with pytest.raises(FileNotFoundError, match="no file .*nowhere"):
    hakes_files.load(tmp_path / "nowhere.bin")
  file = hakes_files.load(GOLDEN / "hakes_ip_findex.bin")
  words_MKS = file.side.codebooks_MKS[:, :15]
  odd = file.replace(side=file.side.replace(codebooks_MKS=words_MKS))
  with pytest.raises(ValueError, match="power of two, got 15"):
    hakes_files.save(odd, tmp_path / "odd.bin")
  assert not (tmp_path / "odd.bin").exists()


def test_rows_without_a_header(tmp_path):
  x_ND = np.random.default_rng(0).normal(size=(7, 3)).astype(np.float32)
  x_ND.tofile(tmp_path / "train.bin")
  np.testing.assert_array_equal(
    hakes_files.open_rows(tmp_path / "train.bin", 3), x_ND
  )
  ids_NG = np.arange(8, dtype="<i4").reshape(2, 4)
  ids_NG.tofile(tmp_path / "neighbors.bin")
  opened = hakes_files.open_rows(
    tmp_path / "neighbors.bin", 4, "<i4", max_vectors=1
  )
  np.testing.assert_array_equal(opened, ids_NG[:1])
  np.save(tmp_path / "x.npy", x_ND)
  np.testing.assert_array_equal(hakes_files.open_rows(tmp_path / "x.npy"), x_ND)
  with pytest.raises(ValueError, match="rows of 5 float32, 20 bytes .* got 84"):
    hakes_files.open_rows(tmp_path / "train.bin", 5)
  with pytest.raises(ValueError, match="no header; say how many"):
    hakes_files.open_rows(tmp_path / "train.bin")
