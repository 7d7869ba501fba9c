"""Codes in the parts of the program released with QINCo2."""

import pathlib

import numpy as np
import pytest

from vqjax.data import codes, numpy_files

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party/golden/released_ivf"


def test_codes_of_the_released_program():
  """The first 300 of 20,000: list of 256, then 8 codes."""
  found = codes.open_codes(GOLDEN / "base_codes.npz")
  assert found.shape == (300, 9)
  assert found.codebook_sizes[1:] == (256,) * 8
  assert [path.name for path in found.paths] == [
    "base_codes.npz",
    "base_codes.part_0.npz",
    "base_codes.part_1.npz",
  ]
  parts = [np.load(path)["codes"] for path in found.paths[1:]]
  np.testing.assert_array_equal(found[150:250], np.concatenate(parts)[150:250])
  assert found[:1].dtype == np.int32
  np.testing.assert_array_equal(
    codes.open_codes(GOLDEN / "base_codes.part_1.npz")[:], parts[1]
  )


def _write(folder, parts, **head):
  path = folder / "a.npz"
  np.savez(path, **(dict(n_parts=len(parts), K=4, M=2, D=3) | head))
  for i, part in enumerate(parts):
    np.savez(folder / f"a.part_{i}.npz", codes=part)
  return path


def test_one_part_is_in_memory_at_a_time(tmp_path, monkeypatch):
  path = _write(tmp_path, [np.full((5, 2), i) for i in range(3)])
  found, reads = codes.open_codes(path), []
  read = np.lib.format.read_array
  monkeypatch.setattr(
    numpy_files.np.lib.format,
    "read_array",
    lambda *a, **b: reads.append(0) or read(*a, **b),
  )
  blocks = list(found.blocks(2))
  np.testing.assert_array_equal(
    np.concatenate(blocks)[:, 0], np.repeat(range(3), 5)
  )
  assert len(reads) == 3
  found[:1]
  assert len(reads) == 4  # It was not kept.


@pytest.mark.parametrize(
  ("head", "parts", "message"),
  [
    ({"n_parts": 2}, [np.zeros((5, 2), int)], "no a.part_1.npz next to it"),
    ({"M": 5}, [np.zeros((5, 2), int)], "2 codes per vector, expected 5 or 6"),
    ({"K": 2.5}, [np.zeros((5, 2), int)], "must hold K as an integer"),
    ({"n_parts": 0}, [], "got n_parts=0"),
    ({}, [np.zeros((5, 2))], "must hold integer codes, got float64"),
    (
      {},
      [np.zeros((5, 2), int), np.zeros((5, 3), int)],
      "a.part_1.npz has 3 codes per vector, expected 2",
    ),
  ],
)
def test_parts_that_do_not_fit_are_refused(head, parts, message, tmp_path):
  with pytest.raises((ValueError, TypeError, OSError), match=message):
    codes.open_codes(_write(tmp_path, parts, **head))


def test_a_code_above_k_is_refused_when_read(tmp_path):
  found = codes.open_codes(_write(tmp_path, [np.full((5, 3), 4)]))
  with pytest.raises(ValueError, match="Code 4 in row 0, column 1"):
    found[:]
