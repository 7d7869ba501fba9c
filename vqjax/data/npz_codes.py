"""Codes as the program released with QINCo2 writes them.

`codes.npz` holds the numbers n_parts, K, M and D, `codes.part_0.npz` and so on
an array `codes` each, int64 `[n, M]`, or `[n, M + 1]` with the list in front.
A part is read whole; one is in memory at a time.
"""

import pathlib

import numpy as np

from vqjax.data import numpy_files, rows

MAX_ID = np.iinfo(np.int32).max
_NUMBERS = ("n_parts", "K", "M")


def is_head(path: pathlib.Path) -> bool:
  """Whether this file names parts."""
  return path.suffix.lower() == ".npz" and "n_parts" in (
    numpy_files.names_in_npz(path)
  )


def part_path(path: pathlib.Path, number: int) -> pathlib.Path:
  """Returns the file of a part, counted from 0."""
  return path.with_name(f"{path.stem}.part_{number}{path.suffix}")


def open_parts(path: pathlib.Path) -> tuple[list[rows.Rows], list, list]:
  """Opens all parts: rows `[n, M]`, codewords per position, and files.

  Of a list number it is not known how many there are.

  Raises:
    FileNotFoundError: A part is missing.
    ValueError: A part is damaged, or does not fit the others.
  """
  found = numpy_files.load_npz(path)
  for name in _NUMBERS:
    value = found.get(name)
    if value is None or value.size != 1 or value.dtype.kind not in "iu":
      raise ValueError(f"{path} must hold {name} as an integer.")
  num_parts, size, m = (int(found[name].item()) for name in _NUMBERS)
  if num_parts < 1 or m < 1 or not 1 <= size <= MAX_ID:
    raise ValueError(
      f"{path} must hold n_parts and codes, got n_parts={num_parts}, "
      f"K={size}, M={m}."
    )
  parts, paths, keep_fn = [], [path], numpy_files.keep_latest()
  for number in range(num_parts):
    part = part_path(path, number)
    if not part.is_file():
      raise FileNotFoundError(
        f"{path} names {num_parts} parts, but there is no {part.name} next "
        "to it; copy it there."
      )
    codes_NM = numpy_files.open_npz(part, "codes", keep_fn)
    if codes_NM.dtype.kind not in "iu":
      raise TypeError(f"{part} must hold integer codes, got {codes_NM.dtype}.")
    widths = (parts[0].shape[1],) if parts else (m, m + 1)
    if codes_NM.shape[1] not in widths:
      raise ValueError(
        f"{part} has {codes_NM.shape[1]} codes per vector, expected "
        f"{' or '.join(map(str, widths))}: it is of other codes."
      )
    parts.append(codes_NM)
    paths.append(part)
  is_ivf = parts[0].shape[1] > m
  return parts, [MAX_ID + 1] * is_ivf + [size] * m, paths
