"""faiss's own inverted lists on the centroids of ours."""

import pathlib

import faiss
import numpy as np
import pytest

from tests import fits
from vqjax.data import formats
from vqjax.interop import faiss_baselines, faiss_io

pytestmark = pytest.mark.usefixtures("one_thread")


def _data(n=600, d=16, seed=0):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)).astype(np.float32)


def _like(coarse="flat", d=16, m=4, k=16, num_lists=8):
  rng = np.random.default_rng(1)
  return fits.make_index(
    _data(num_lists, d, seed=2),
    rng.normal(size=(m, k, d)).astype(np.float32),
    norm_range=(0.0, 9.0),
    coarse=coarse,
  )


def _nearest_centroid(x_ND, centroids_LD):
  sq_NL = ((x_ND[:, None] - centroids_LD[None]) ** 2).sum(axis=-1)
  return sq_NL.argmin(axis=1)


@pytest.mark.parametrize("coarse", ["flat", "hnsw"])
@pytest.mark.parametrize("name", faiss_baselines.NAMES)
def test_lists_are_those_of_ours(name, coarse):
  like, x_ND = _like(coarse), _data()
  index = faiss_baselines.fit(name, like, x_ND)
  assert index.ntotal == 0
  like.reset()
  faiss_baselines.add(index, [x_ND[:400], x_ND[400:]])
  assert index.ntotal == len(x_ND)
  lists = faiss_baselines.lists_of(index)
  centroids_LD = _data(8, 16, seed=2)
  sizes = np.bincount(_nearest_centroid(x_ND, centroids_LD), minlength=8)
  assert [lists.get_list_size(i) for i in range(8)] == sizes.tolist()
  # The lists that a search looks into are the nearest ones.
  xq_QD = _data(5, seed=3)
  found_QR = faiss_baselines.search(
    index, xq_QD, 300, nprobe=1, ef_search=8, query_bits=4
  )
  for x_D, found_R in zip(xq_QD, found_QR, strict=True):
    near = _nearest_centroid(x_D[None], centroids_LD)[0]
    assert (found_R >= 0).sum() == sizes[near]
    at = _nearest_centroid(x_ND[found_R[found_R >= 0]], centroids_LD)
    assert (at == near).all()


@pytest.mark.parametrize(
  ("name", "num_bytes"), [("IVF-PQ", 2), ("IVF-RQ", 3), ("IVF-RaBitQ", 10)]
)
def test_bytes_and_recall(name, num_bytes):
  like, x_ND = _like(), _data()
  index = faiss_baselines.fit(name, like, x_ND)
  faiss_baselines.add(index, [x_ND])
  # 4 positions of 4 bits; RaBitQ: 16 bits and two floats.
  assert faiss_baselines.lists_of(index).code_size == num_bytes
  _, true_QG = faiss_io.knn(x_ND[:100] + 0.01, x_ND, 1)
  found_QR = faiss_baselines.search(index, x_ND[:100] + 0.01, 10, nprobe=8)
  is_found = (found_QR == true_QG).any(axis=1).mean()
  assert is_found > 0.4  # 10 of 600 at random would be 0.02.


def test_rabitq_searches_rotated_vectors():
  sample = pathlib.Path(__file__).parents[1] / "third_party" / "sample_sift"
  x_ND = formats.open_vectors(sample / "base.bvecs")[:3000].astype(np.float32)
  xq_QD = formats.open_vectors(sample / "query.bvecs")[:200].astype(np.float32)
  like = _like(d=128)
  faiss.downcast_index(like.quantizer).reset()
  like.quantizer.add(x_ND[:8])
  index = faiss_baselines.fit("IVF-RaBitQ", like, x_ND)
  faiss_baselines.add(index, [x_ND])
  unturned = faiss.IndexIVFRaBitQ(faiss.clone_index(like.quantizer), 128, 8)
  unturned.train(x_ND)
  unturned.add(x_ND)
  unturned.nprobe = 8
  _, true_QG = faiss_io.knn(xq_QD, x_ND, 1)
  ours_QR = faiss_baselines.search(index, xq_QD, 1, nprobe=8)
  theirs_QR = unturned.search(xq_QD, 1)[1]
  recall = lambda ids: (ids == true_QG).mean()
  # A bit of a coordinate that is mostly zero says little.
  assert recall(ours_QR) > recall(theirs_QR) + 0.05


def test_what_does_not_fit_is_refused():
  like, x_ND = _like(), _data()
  with pytest.raises(ValueError, match="one of .*IVF-PQ.* got 'IVF-XY'"):
    faiss_baselines.fit("IVF-XY", like, x_ND)
  with pytest.raises(ValueError, match="between 16 and inf, got 9"):
    faiss_baselines.fit("IVF-PQ", like, x_ND[:9])
  with pytest.raises(ValueError, match="16 dimensions cannot be cut into 5"):
    faiss_baselines.fit("IVF-PQ", _like(m=5), x_ND)
  with pytest.raises(ValueError, match=r"shape \(None, 16\), got \(600, 15\)"):
    faiss_baselines.fit("IVF-RQ", like, x_ND[:, :15])
