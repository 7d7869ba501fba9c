"""How codes of new vectors differ from those that are there, in figures.

Semantic ids and indexes use it, to say when a codec is to be trained again.
"""

import numpy as np
from scipy import stats

MOST_ERROR = 1.2  # Times the error that is known: above it training pays.
_LEAST_USED = 0.8  # Of the codewords that as many old vectors would use.
FEW = 20  # Vectors of which nothing can be told.


def usage(old_FL, new_NL, sizes) -> list[dict]:
  """Compares how often codewords are used, for each position of codes.

  Args:
    old_FL: Codes that are there.
    new_NL: Codes of new vectors.
    sizes: Codewords at each position.

  Returns:
    `used`, different codewords among the new; `expected`, how many as many
    vectors would use if they were drawn from the old usage, and `spread`, a
    bound of its standard deviation; `distance`, half the sum of what the shares
    of codewords differ by, and `chance`, its mean for such a draw.
  """
  found = []
  for old_F, new_N, size in zip(old_FL.T, new_NL.T, sizes, strict=True):
    shares = [_shares(codes, size) for codes in (old_F, new_N)]
    num_old, num_new = max(len(old_F), 1), max(len(new_N), 1)
    used_K = 1 - (1 - shares[0]) ** num_new
    found.append(
      {
        "used": len(np.unique(new_N)),
        "expected": float(used_K.sum()),
        "spread": float(np.sqrt((used_K * (1 - used_K)).sum())),
        "distance": float(np.abs(shares[1] - shares[0]).sum() / 2),
        "chance": _chance(shares[0], num_new, num_old),
      }
    )
  return found


def _shares(code_N, size: int) -> np.ndarray:
  count_K = np.bincount(np.asarray(code_N, np.int64), minlength=size)
  return count_K / max(count_K.sum(), 1)


def _chance(share_K, num_new: int, num_old: int) -> float:
  """Mean distance of a sample's shares from these, of a sample themselves.

  The mean deviation of a binomial number is known (de Moivre).
  """
  share_K = share_K[share_K > 0]
  above_K = np.floor(num_new * share_K) + 1
  weight_K = stats.binom.pmf(above_K, num_new, share_K)
  mean_K = 2 * above_K * (1 - share_K) * weight_K / num_new
  return float(mean_K.sum() / 2 * np.sqrt(1 + num_new / num_old))


def is_less_diverse(position: dict) -> bool:
  """Whether far fewer codewords are used than as many old vectors would."""
  least = _LEAST_USED * position["expected"]
  return position["used"] < min(
    least, position["expected"] - 3 * position["spread"]
  )
