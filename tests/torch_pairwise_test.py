"""Pairwise decoders as the released program writes them."""

import itertools
import pathlib

import numpy as np
import pytest

from tests import pickles
from vqjax.codecs import pairwise
from vqjax.interop import torch_pairwise

K, M, V, L, D, N, STD = 4, 3, 2, 6, 5, 300, 7.0
MEANINGS = list(itertools.product((False, True), repeat=4))


def _sample():
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
  books_MKD, lists_n = draw(M, K, D), rng.integers(0, L, N)
  codes_nM = rng.integers(0, K, (N, M))
  left_nD = sum(books_MKD[m][codes_nM[:, m]] for m in range(M)) * STD
  centroids_LD = 30 * draw(L, D)
  return torch_pairwise.Sample(
    lists_n,
    codes_nM.astype(np.uint8),
    centroids_LD[lists_n] + left_nD + 0.1 * draw(N, D),
    centroids_LD,
    40 + draw(D),
    STD,
  )


def _write(path, sample, meaning, pairs=((0, 1), (2, 3), (1, 3), (3, 4))):
  """Tables of means, one after the other, as the paper finds them.

  `pairs` are positions among the codes, followed by those of the list.
  Returns also what they decode to.
  """
  lists_first, is_swapped, is_whole, is_normalised = meaning
  list_codes_LV = np.stack([np.arange(L) % K, np.arange(L) // K], axis=1)
  all_nX = np.concatenate(
    [sample.codes_nM, list_codes_LV[sample.lists_n]], axis=1
  ).astype(int)
  added_nD = sample.centroids_LD[sample.lists_n]
  if is_whole:
    added_nD = (sample.mean_D if is_normalised else 0) + 0 * added_nD
  unit = STD if is_normalised else 1
  left_nD = (sample.decoded_nD - added_nD) / unit
  tables = np.zeros((len(pairs), K * K, D), np.float32)
  written = []
  for r, (a, b) in enumerate(pairs):
    cells = [
      row[b] * K + row[a] if is_swapped else row[a] * K + row[b]
      for row in all_nX
    ]
    for cell in set(cells):
      is_in = np.array(cells) == cell
      tables[r, cell] = left_nD[is_in].mean(axis=0)
      left_nD[is_in] -= tables[r, cell]
    to_file = lambda at: (at + V) % (M + V) if lists_first else at
    written.append((to_file(a), to_file(b)))
  pickles.write_arrays(
    path,
    {
      "ivf_code_map": list_codes_LV,
      "combine_mvals_m": np.ascontiguousarray(np.array(written).T),
      "codebook_MKD": tables,
    },
  )
  return sample.decoded_nD - unit * left_nD


@pytest.mark.parametrize("meaning", MEANINGS)
def test_tables_are_read_as_they_are_meant(meaning, tmp_path):
  sample = _sample()
  want_nD = _write(tmp_path / "pairwise.pt", sample, meaning)
  params, added_LD = torch_pairwise.load(tmp_path / "pairwise.pt", sample)
  found_nD = pairwise.decode(
    params, sample.codes_nM.astype(np.int32), sample.lists_n, added_LD
  )
  # The tables are float16.
  np.testing.assert_allclose(found_nD, want_nD, rtol=2e-3, atol=0.1)


def test_tables_of_other_codes_are_refused(tmp_path):
  path, sample = pathlib.Path(tmp_path / "pairwise.pt"), _sample()
  _write(path, sample, MEANINGS[0])
  other = sample._replace(codes_nM=sample.codes_nM[::-1])
  with pytest.raises(ValueError, match="is of other codes than the index"):
    torch_pairwise.load(path, other)
  few = sample._replace(centroids_LD=sample.centroids_LD[:4])
  with pytest.raises(ValueError, match="for 6 lists, but the index has 4"):
    torch_pairwise.load(path, few)
  wide = sample._replace(codes_nM=sample.codes_nM + 250)
  with pytest.raises(ValueError, match="codes go from 250 to 253"):
    torch_pairwise.load(path, wide)
  _write(path, sample, MEANINGS[0], pairs=((0, 1), (2, 4), (4, 4)))
  short = sample._replace(codes_nM=sample.codes_nM[:, :2])
  with pytest.raises(ValueError, match="positions of pairs go from 0 to 4"):
    torch_pairwise.load(path, short)
  with pytest.raises(FileNotFoundError, match="none.pt"):
    torch_pairwise.load(tmp_path / "none.pt", sample)


def test_a_codec_is_no_pairwise_decoder():
  golden = pathlib.Path(__file__).parents[1] / "third_party/golden"
  with pytest.raises(ValueError, match="is no pairwise decoder: expected"):
    torch_pairwise.load(golden / "ivf_qinco2_tiny.pt", _sample())
