"""Made the bundled samples, from larger files that are not bundled.

  python third_party/make_samples.py --sift=FOLDER --text=FOLDER [--output=HERE]

`--sift` holds learn.bvecs, base.bvecs and query.bvecs; `--text` holds base.npy
and query.npy. Rows are in random order there (checked), so the first ones are
a fair sample. Needs numpy only, and gives the same bytes every time.
"""

import argparse
import pathlib

import numpy as np

NUM_NEIGHBOURS = 100


def check_shuffled(name, x_ND):
  """Raises unless the first and last tenths look like random samples."""
  x_ND = np.asarray(x_ND, np.float64)
  size = len(x_ND) // 10
  # Expected squared distance of a random tenth's mean to the mean of all.
  wanted = x_ND.var(axis=0).sum() / size * 0.9
  for part_ND in (x_ND[:size], x_ND[-size:]):
    got = ((part_ND.mean(0) - x_ND.mean(0)) ** 2).sum()
    if got > 2 * wanted:
      raise ValueError(f"{name} is not shuffled: {got} against {wanted}.")


def neighbours(score_fn, x_QD, base_ND):
  """Base rows of the lowest scores, ties to the lower row: `[Q, 100]`."""
  out_QG = np.empty((len(x_QD), NUM_NEIGHBOURS), np.int32)
  for i in range(0, len(x_QD), 100):
    score_QN = score_fn(x_QD[i : i + 100], base_ND)
    order_QN = np.argsort(score_QN, axis=1, kind="stable")
    out_QG[i : i + 100] = order_QN[:, :NUM_NEIGHBOURS]
  return out_QG


def sq_l2(x_QD, y_ND):
  """Squared L2; exact, since whole numbers below 2^53 are in float64."""
  x_QD, y_ND = x_QD.astype(np.float64), y_ND.astype(np.float64)
  y2_N = (y_ND**2).sum(1)
  return (x_QD**2).sum(1)[:, None] - 2 * x_QD @ y_ND.T + y2_N


def minus_dot(x_QD, y_ND):
  """Minus the inner product; exact: products of two float16 below 2 are
  multiples of 2^-48, so that float64 holds every partial sum."""
  return -(x_QD.astype(np.float64) @ y_ND.astype(np.float64).T)


def read_bvecs(path):
  dim = int(np.fromfile(path, "<i4", 1)[0])
  return np.fromfile(path, np.uint8).reshape(-1, dim + 4)[:, 4:]


def write_vecs(path, x_ND):
  """Writes .bvecs or .ivecs, after the type of the numbers."""
  path.parent.mkdir(parents=True, exist_ok=True)
  raw_NB = np.ascontiguousarray(x_ND).view(np.uint8)
  head_N4 = np.full((len(x_ND), 1), x_ND.shape[1], "<i4").view(np.uint8)
  np.hstack([head_N4, raw_NB]).tofile(path)


def make_sift(source, folder):
  learn, base, query = (
    read_bvecs(source / f"{part}.bvecs") for part in ("learn", "base", "query")
  )
  check_shuffled("learn", learn)
  check_shuffled("base", base)
  learn, base, query = learn[:60_000], base[:20_000], query[:1_000]
  write_vecs(folder / "learn.bvecs", learn)
  write_vecs(folder / "base.bvecs", base)
  write_vecs(folder / "query.bvecs", query)
  ids_QG = neighbours(sq_l2, query, base)
  write_vecs(folder / "groundtruth.ivecs", ids_QG)


def make_text(source, folder):
  base, query = np.load(source / "base.npy"), np.load(source / "query.npy")
  check_shuffled("base", base)
  base, query = base[:12_000], query[:500]
  folder.mkdir(parents=True, exist_ok=True)
  np.save(folder / "base.npy", base)
  np.save(folder / "query.npy", query)
  np.save(folder / "groundtruth.npy", neighbours(minus_dot, query, base))


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--sift", type=pathlib.Path, help="sift folder")
  parser.add_argument("--text", type=pathlib.Path, help="text folder")
  here = pathlib.Path(__file__).resolve().parent
  parser.add_argument("--output", type=pathlib.Path, default=here)
  args = parser.parse_args()
  if args.sift:
    make_sift(args.sift, args.output / "sample_sift")
  if args.text:
    make_text(args.text, args.output / "sample_text")


if __name__ == "__main__":
  main()
