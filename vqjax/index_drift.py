"""Whether new vectors are like those that an index and its codec know.

found = index.drift(new)  # found["said"] says in words when training pays.
"""

import numpy as np

from vqjax.core import check_shape
from vqjax.data import batches
from vqjax.interop import faiss_lists
from vqjax.search import drift

_MEASURED = 10_000  # Vectors that are decoded.
_FAR, _CROWDED = 0.1, 1.3  # Beyond chance; times the work of a search.


def compare(
  index, x, codes=None, *, reference=None, progress: bool = False
) -> dict:
  """Compares new vectors with those of an index; adds nothing.

  Args:
    index: A `vqjax.Index` of at least one vector.
    x: New vectors `[n, D]`: an array, a memory map, or a path.
    codes: Their codes, if they are known.
    reference: Vectors whose error is compared with; None for the error of
      the validation that is stored with the codec.
    progress: Shows a progress line.

  Returns:
    `vectors`; `mse` of up to 10,000 of them and `known_mse`, None if the codec
    does not know it, with their `error_ratio`; `positions`, the usage of lists
    and codewords, see `vqjax.search.drift.usage`, lists first if there are
    several; `imbalance`, what a search has to look through compared with lists
    of equal size, `before` and `after`; `pays`, whether training should go on,
    None if it is not known; and `said`, sentences.

  Raises:
    ValueError: Vectors or codes do not fit the index, or it is empty.
  """
  vectors = index.open_vectors(x)
  if not len(index):
    raise ValueError("The index is empty: there is nothing to compare with.")
  if not len(vectors):
    raise ValueError("There are no new vectors: x has 0 rows.")
  codec = index.codec
  if codes is None:
    codes = codec.encode(vectors, progress=progress, **index.settings)
  check_shape("codes", codes, (len(vectors), len(codec.codebook_sizes)))
  lists_N, codes_NM = index.split(vectors, codes)
  old = faiss_lists.contents(index.faiss)
  sizes_L = np.diff(old.starts)
  old_F = np.repeat(np.arange(len(sizes_L)), sizes_L)
  sizes = list(codec.codebook_sizes[codec.is_ivf :])
  positions = drift.usage(old.codes_NM, codes_NM, sizes)
  if has_lists := len(sizes_L) > 1:
    both = old_F[:, None], lists_N[:, None]
    positions = drift.usage(*both, [len(sizes_L)]) + positions
  added_L = np.bincount(lists_N, minlength=len(sizes_L))
  for number, each in enumerate(positions, 1 - has_lists):
    each["name"] = f"codewords of position {number}" if number else "lists"
  found = {
    "vectors": len(vectors),
    **_errors(codec, vectors, reference),
    "positions": positions,
    "imbalance": {
      "before": _imbalance(sizes_L),
      "after": _imbalance(sizes_L + added_L),
    },
  }
  return found | _judge(found)


def _errors(codec, vectors, reference) -> dict:
  """Errors of both kinds of vectors, by the search stored with the codec."""
  own = mse(codec, vectors)
  known = codec.info.get("training", {}).get("validation_mse")
  if reference is not None:
    known = mse(codec, codec.open_vectors(reference, "reference"))
  ratio = own / known if known else None
  return {"mse": own, "known_mse": known, "error_ratio": ratio}


def mse(codec, vectors) -> float:
  """Returns the squared error of up to 10,000 of the vectors."""
  rows_n = batches.evenly_spaced_rows(len(vectors), _MEASURED)
  x_nD = batches.read_rows(vectors, rows_n)
  xhat_nD = codec.decode(codec.encode(x_nD))
  return float(((x_nD - xhat_nD) ** 2).sum(axis=1, dtype=np.float64).mean())


def _imbalance(sizes_L) -> float:
  sizes_L = sizes_L.astype(np.float64)
  return float(len(sizes_L) * (sizes_L**2).sum() / sizes_L.sum() ** 2)


def _judge(found: dict) -> dict:
  """Whether training pays, and why, in sentences."""
  if found["vectors"] < drift.FEW:
    few = f"Of {found['vectors']} vectors nothing can be told."
    return {"pays": None, "said": [few]}
  said, ratio = [], found["error_ratio"]
  if ratio is None:
    said.append(
      f"The squared error of new vectors is {found['mse']:.4g}; the codec does "
      "not know that of its training, so there is nothing to compare it with."
    )
  else:
    said.append(
      f"The squared error of new vectors is {found['mse']:.4g}, {ratio:.2f} "
      f"times that of known ones ({found['known_mse']:.4g})."
    )
  for each in found["positions"]:
    is_far = each["distance"] > each["chance"] + _FAR
    if drift.is_less_diverse(each) or (is_far and each["name"] == "lists"):
      said.append(
        f"They use {each['used']} {each['name']}, as many old ones "
        f"{each['expected']:.0f}; {each['distance']:.0%} of them are where old "
        f"ones are not, {each['chance']:.0%} by chance."
      )
  work = found["imbalance"]["after"] / found["imbalance"]["before"]
  if work > _CROWDED:
    said.append(
      f"The lists become uneven: a search looks through {work:.2f} times as "
      "many vectors as if these were spread as the old ones are."
    )
  if ratio is None:
    return {"pays": None, "said": said}
  pays = ratio > drift.MOST_ERROR
  said.append(
    "Training the codec on the new vectors too pays."
    if pays
    else "The codec fits them: training it again would gain little."
  )
  return {"pays": pays, "said": said}
