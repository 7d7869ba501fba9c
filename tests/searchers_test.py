"""Opening an index: metrics and kinds of residuals, against exact distances."""

import jax
import numpy as np
import pytest

from vqjax.codecs import kmeans, rq
from vqjax.interop import faiss_ivf, searchers
from vqjax.search import residual_bits
from vqjax.storage import codec_file, refiner_file

pytestmark = pytest.mark.usefixtures("one_thread")
_NUM, _LISTS, _DIM = 150, 4, 8


@pytest.fixture(scope="module", name="case")
def _case(tmp_path_factory):
  """A codec without lists, and its codes in lists of whole vectors."""
  folder = tmp_path_factory.mktemp("searchers")
  rng = np.random.default_rng(0)
  x_ND = rng.normal(size=(_NUM, _DIM)).astype(np.float32) + 1
  params = rq.fit(
    jax.random.key(0), x_ND, num_codes=3, codebook_size=8, num_iterations=3
  )
  codec_file.save_codec(folder / "codec", "rq", params, info={})
  codes_NM = np.asarray(rq.encode(params, x_ND, beam_size=2))
  centroids_LD = np.asarray(kmeans.fit(jax.random.key(1), x_ND, _LISTS))
  gap_NL = ((x_ND[:, None] - centroids_LD) ** 2).sum(axis=-1)
  info = {
    "codec_fingerprint": codec_file.load_codec(folder / "codec").fingerprint
  }
  for metric in ("l2", "ip"):
    index = faiss_ivf.make_index(
      centroids_LD,
      np.asarray(params.codebooks_MKD),
      coarse="flat",
      metric=metric,
      by_residual=False,
    )
    faiss_ivf.add_codes(index, gap_NL.argmin(axis=1), codes_NM, np.arange(_NUM))
    faiss_ivf.fit_norms(index)
    faiss_ivf.save(index, folder / f"{metric}.faiss", info)
  xq_QD = rng.normal(size=(12, _DIM)).astype(np.float32) + 1
  xhat_ND = np.asarray(rq.decode(params, codes_NM))
  return folder, x_ND, xq_QD, xhat_ND


def _exact(metric, xq_QD, xhat_ND):
  """Distances, or inner products, sorted as a search does."""
  if metric == "ip":
    return -np.sort(-(xq_QD @ xhat_ND.T), axis=1)
  return np.sort(((xq_QD[:, None] - xhat_ND) ** 2).sum(axis=-1), axis=1)


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_codes_of_whole_vectors_are_searched_in_lists(case, metric):
  folder, _, xq_QD, xhat_ND = case
  searcher = searchers.open_searcher(
    folder / "codec", folder / f"{metric}.faiss"
  )
  want_QN = _exact(metric, xq_QD, xhat_ND)
  for num_network, tolerance in ((0, 0.15), (_NUM, 1e-4)):  # A byte, exact.
    found = searcher.search(xq_QD, 9, nprobe=_LISTS, num_network=num_network)
    np.testing.assert_allclose(
      found.distances_QR, want_QN[:, :9], atol=tolerance
    )
  few = searcher.search(xq_QD, _NUM, nprobe=1, num_network=5)
  none = few.ids_QR < 0
  assert none.any()
  assert (
    few.distances_QR[none] == (-np.inf if metric == "ip" else np.inf)
  ).all()


@pytest.mark.parametrize("metric", ["l2", "ip"])
def test_residual_bits_come_nearer_to_the_truth(case, metric, tmp_path):
  folder, x_ND, xq_QD, xhat_ND = case
  index, info = faiss_ivf.load(folder / f"{metric}.faiss")
  contents = faiss_ivf.contents(index)
  rows = contents.ids_N
  rotation_DE = residual_bits.random_rotation(_DIM)
  bits_NW, scale_N, offset_N = map(
    np.array,
    residual_bits.describe(
      x_ND[rows], xhat_ND[rows], (xhat_ND[rows] ** 2).sum(1), rotation_DE
    ),
  )
  if metric == "ip":
    offset_N[:] = 0
  bits = residual_bits.make_bits(bits_NW, scale_N, offset_N, rotation_DE)
  path = tmp_path / "refiner.safetensors"
  refiner_file.save(path, bits, of_index=info["sha256"], info={})
  searcher = searchers.open_searcher(
    folder / "codec", folder / f"{metric}.faiss", refiner=path
  )
  at = dict(nprobe=_LISTS, num_network=0)
  errors = []
  for num_refined in (0, _NUM):
    found = searcher.search(xq_QD, _NUM, **at, num_refined=num_refined)
    true_QN = (
      np.einsum("qd,qnd->qn", xq_QD, x_ND[found.ids_QR])
      if metric == "ip"
      else ((xq_QD[:, None] - x_ND[found.ids_QR]) ** 2).sum(axis=-1)
    )
    errors.append(np.mean((found.distances_QR - true_QN) ** 2))
  assert errors[1] < 0.5 * errors[0]
