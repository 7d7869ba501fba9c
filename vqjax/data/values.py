"""Numbers whose squared distances float32 can hold, and tell apart.

Squares of numbers beyond 1e15 come near the largest float32, 3.4e38, when they
are summed over dimensions and vectors; squares of differences below 1e-15 near
the smallest, 1.2e-38. Such vectors are refused with what to do about it, before
they turn into NaN or into distances of zero.
"""

import numpy as np

LARGEST, SMALLEST = 1e15, 1e-15
_MOST_LOST = 1e-4  # Of the variance, by the cast to float32.


def check_size(x_ND, *, name="vectors", first_row: int = 0, rows=None) -> None:
  """Raises ValueError if a finite number is too large to be squared.

  Names and rows in the message are as in `formats.check_vectors`.
  """
  is_small_type = x_ND.dtype.kind in "iu" and x_ND.dtype.itemsize < 8
  if is_small_type or not x_ND.size:
    return
  if max(float(x_ND.max()), -float(x_ND.min())) <= LARGEST:
    return
  is_bad_ND = np.isfinite(x_ND) & (np.abs(x_ND) > LARGEST)
  if not is_bad_ND.any():
    return  # Inf, which is another fault.
  row, column = np.argwhere(is_bad_ND)[0]
  number = first_row + row if rows is None else np.asarray(rows)[row]
  raise ValueError(
    f"{name} has {x_ND[row, column]:.6g} in row {number}, column {column}; "
    f"numbers must lie within {LARGEST:g} of zero, as float32 holds no squared "
    "distances of larger ones. Divide all vectors by a constant."
  )


def check_spread(x_ND, *, name="vectors") -> None:
  """Raises ValueError unless some vectors differ by what float32 can square.

  `x_ND` is a sample as it was read: a cast to float32 may lose how they differ.
  """
  wide_ND = np.asarray(x_ND, np.float64)
  left_ND = wide_ND - wide_ND[:1]
  most, num = np.abs(left_ND).max(initial=0), len(wide_ND)
  if num < 2:
    return
  if most == 0:
    raise ValueError(
      f"{name} has nothing to learn: all of the {num} vectors looked at are "
      "equal. Check the file."
    )
  if most < SMALLEST:
    raise ValueError(
      f"{name} has vectors that differ by no more than {most:.3g}; float32 "
      f"holds no squared distances of differences below {SMALLEST:g}. Multiply "
      "all vectors by a constant."
    )
  lost_ND = wide_ND - wide_ND.astype(np.float32)
  spread = np.mean((left_ND - left_ND.mean(axis=0)) ** 2)
  if np.mean(lost_ND**2) > _MOST_LOST * spread:
    largest = np.abs(wide_ND).max()
    raise ValueError(
      f"{name} has numbers up to {largest:.6g} that differ by "
      f"{np.sqrt(spread):.3g} only, which float32 rounds away: it keeps steps "
      f"of {np.spacing(np.float32(largest)):.3g} there. Subtract the mean of "
      "the vectors before they are saved."
    )
