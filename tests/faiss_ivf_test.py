import json

import faiss
import numpy as np
import pytest

from tests import fits, oracles
from vqjax.data import files
from vqjax.interop import faiss_ivf, faiss_lists

D, L, M, NUM = 12, 9, 3, 300
INFO = {"codec_fingerprint": "0123456789abcdef", "rows": [[0, NUM]]}


pytestmark = pytest.mark.usefixtures("one_thread")


def _case(k=16, num_lists=L, seed=0, num=NUM):
  rng = np.random.default_rng(seed)
  # List number 1 stays empty.
  lists_N = rng.integers(0, num_lists, num)
  lists_N[lists_N == 1] = 0
  return {
    "centroids_LD": rng.normal(scale=3, size=(num_lists, D)).astype(np.float32),
    "codebooks_MKD": rng.normal(size=(M, k, D)).astype(np.float32),
    "lists_N": lists_N,
    "codes_NM": rng.integers(0, k, (num, M)).astype(np.int32),
    "ids_N": rng.permutation(10 * num)[:num] + 2**40,
    "xq_QD": rng.normal(scale=3, size=(7, D)).astype(np.float32),
  }


def _words(case):
  return sum(
    book[code_N]
    for book, code_N in zip(
      case["codebooks_MKD"], case["codes_NM"].T, strict=True
    )
  )


def _empty(case, **kwargs):
  books = case["codebooks_MKD"]
  kwargs = {"coarse": "flat"} | kwargs
  return fits.make_index(case["centroids_LD"], books, **kwargs)


def _bounds(case):
  norm_N = np.square(_words(case), dtype=float).sum(axis=1)
  return norm_N.min(), norm_N.max()


def _filled(case, rows=slice(None), **kwargs):
  index = _empty(case, **kwargs)
  faiss_ivf.add_codes(
    index, case["lists_N"][rows], case["codes_NM"][rows], case["ids_N"][rows]
  )
  if "norm_range" not in kwargs:
    faiss_ivf.fit_norms(index)
  return index


def _stored(index):
  """Codes and norm bytes by id, one vector at a time."""
  num_codes, num_bits = index.rq.M, int(index.rq.nbits.at(0))
  found = {}
  for number in range(index.nlist):
    for i in range(index.invlists.list_size(number)):
      code_ptr = index.invlists.get_single_code(number, i)
      raw = faiss.rev_swig_ptr(code_ptr, index.code_size)
      bits = int.from_bytes(raw.tobytes(), "little")
      take = lambda m, n, bits=bits: bits >> (num_bits * m) & (1 << n) - 1
      code = [take(m, num_bits) for m in range(num_codes)]
      id_ = index.invlists.get_single_id(number, i)
      found[id_] = number, code, take(num_codes, 8)
  return found


def _distances(case, metric, norm_range):
  """Distances `[Q, N]` of the additive decoder, the norm by its byte."""
  c_ND, r_ND = case["centroids_LD"][case["lists_N"]], _words(case)
  low, high = norm_range
  norm_N = (r_ND.astype(float) ** 2).sum(axis=1)
  step = (high - low) / 256
  byte_N = np.clip(np.floor((norm_N - low) / step), 0, 255)
  norm_N = low + (byte_N + 0.5) * step
  out_QN = np.empty((len(case["xq_QD"]), len(r_ND)))
  for q, x_D in enumerate(case["xq_QD"].astype(float)):
    for n in range(len(r_ND)):
      gap_D = x_D - c_ND[n]
      out_QN[q, n] = (
        -x_D @ (c_ND[n] + r_ND[n])
        if metric == "ip"
        else gap_D @ gap_D - 2 * gap_D @ r_ND[n] + norm_N[n]
      )
  return -out_QN if metric == "ip" else out_QN


@pytest.mark.parametrize("metric", ["l2", "ip"])
@pytest.mark.parametrize("coarse", ["flat", "hnsw"])
@pytest.mark.parametrize(("k", "num_lists"), [(16, L), (256, L), (16, 1)])
def test_plain_faiss_searches_the_file(metric, coarse, k, num_lists, tmp_path):
  case, path = _case(k, num_lists), tmp_path / "index.faiss"
  made = _filled(case, coarse=coarse, metric=metric)
  faiss_ivf.save(made, path, INFO)
  index = faiss.read_index(str(path))
  index.nprobe = num_lists
  distances_QR, ids_QR = index.search(case["xq_QD"], 50)
  want_QN = _distances(case, metric, _bounds(case))
  row_of = {id_: row for row, id_ in enumerate(case["ids_N"])}
  rows_QR = np.vectorize(row_of.get)(ids_QR)
  # The found are at the distances of the oracle, and these are the best.
  np.testing.assert_allclose(
    distances_QR,
    np.take_along_axis(want_QN, rows_QR, axis=1),
    rtol=1e-4,
    atol=1e-3,
  )
  sign = -1 if metric == "ip" else 1
  best_QR = sign * np.sort(sign * want_QN, axis=1)[:, :50]
  np.testing.assert_allclose(distances_QR, best_QR, rtol=1e-4, atol=1e-3)
  again = fits.stock_search(
    made, case["xq_QD"], 50, nprobe=num_lists, ef_search=32
  )
  np.testing.assert_array_equal(again[1], ids_QR)


def test_search_looks_into_nprobe_lists():
  case = _case()
  index = _filled(case)
  _, ids_QR = fits.stock_search(index, case["xq_QD"], NUM, nprobe=2)
  lists_QP, _ = faiss_ivf.coarse_search(index, case["xq_QD"], 2)
  for ids_R, lists_P in zip(ids_QR, lists_QP, strict=True):
    want = case["ids_N"][np.isin(case["lists_N"], lists_P)]
    assert set(ids_R[ids_R >= 0]) == set(want)


@pytest.mark.parametrize("k", [2, 16, 32, 256, 512])
def test_faiss_stores_the_same_bytes(k):
  case = _case(k)
  theirs = _empty(case, norm_range=(5.0, 40.0))  # Some norms lie outside.
  x_ND = case["centroids_LD"][case["lists_N"]] + _words(case)
  theirs.add_with_ids(x_ND.astype(np.float32), case["ids_N"])
  found = _stored(theirs)
  case["lists_N"] = np.array([found[id_][0] for id_ in case["ids_N"]])
  case["codes_NM"] = np.array([found[id_][1] for id_ in case["ids_N"]])
  ours = _filled(case, norm_range=(5.0, 40.0))
  assert _stored(ours) == found
  norms = {norm for _, _, norm in found.values()}
  assert 255 in norms
  assert len(norms) > 3


@pytest.mark.parametrize("k", [16, 256, 512])
def test_contents_are_those_of_loops(k, tmp_path):
  case = _case(k)
  index = _filled(case)
  faiss_ivf.save(index, tmp_path / "a", INFO)
  mapped = faiss_ivf.load(tmp_path / "a", mmap=True).index
  want = _stored(index)
  for found in map(faiss_ivf.contents, (index, mapped)):
    assert found.codes_NM.dtype == (np.uint16 if k > 256 else np.uint8)
    assert found.starts.dtype == found.ids_N.dtype == np.int64
    assert found.starts[0] == 0
    assert found.starts[-1] == NUM
    np.testing.assert_array_equal(found.centroids_LD, case["centroids_LD"])
    np.testing.assert_array_equal(found.codebooks_MKD, case["codebooks_MKD"])
    assert set(found.ids_N) == set(case["ids_N"])
    for number in range(L):
      for i in range(found.starts[number], found.starts[number + 1]):
        code = found.codes_NM[i].tolist()
        assert (number, code) == want[found.ids_N[i]][:2]


@pytest.mark.parametrize("num_lists", [1, L, 300])
def test_contents_keep_the_order_of_adding_within_a_list(num_lists):
  case = _case(num_lists=num_lists)
  found = faiss_ivf.contents(_filled(case))
  order_N = np.argsort(case["lists_N"], kind="stable")
  np.testing.assert_array_equal(found.ids_N, case["ids_N"][order_N])
  np.testing.assert_array_equal(found.codes_NM, case["codes_NM"][order_N])


@pytest.mark.parametrize("num", [1, NUM])
def test_norms_are_of_centroid_and_words(num):
  case = _case(num=num)
  found = faiss_ivf.contents(_filled(case))
  order_N = np.argsort(case["lists_N"], kind="stable")
  c_ND = case["centroids_LD"][case["lists_N"]].astype(float)
  added_N = ((c_ND + _words(case)) ** 2 - c_ND**2).sum(axis=1)[order_N]
  list_N = case["lists_N"][order_N]
  got_N = found.low_L[list_N] + found.step_L[list_N] * found.norm_N
  for number in np.unique(list_N):
    mine = list_N == number
    half_a_step = np.ptp(added_N[mine]) / 510 + 1e-3
    np.testing.assert_allclose(got_N[mine], added_N[mine], atol=half_a_step)


def test_an_empty_index_has_empty_contents():
  found = faiss_ivf.contents(_empty(_case()))
  assert found.codes_NM.shape == (0, M)
  assert (found.starts == 0).all()


def test_blocks_change_nothing(monkeypatch):
  case = _case(16)
  want = _filled(case)
  monkeypatch.setattr(faiss_lists, "BLOCK", 7)
  got = _filled(case)
  assert _stored(got) == _stored(want)
  for a, b in zip(
    faiss_ivf.contents(got), faiss_ivf.contents(want), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("coarse", ["flat", "hnsw"])
def test_halves_merge_to_the_whole(coarse):
  case = _case()
  halves = (
    _filled(case, rows, coarse=coarse) for rows in (slice(140), slice(140, NUM))
  )
  merged = faiss_ivf.merge(halves)
  whole = _filled(case, coarse=coarse)
  assert merged.ntotal == NUM
  for a, b in zip(
    faiss_ivf.contents(merged), faiss_ivf.contents(whole), strict=True
  ):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  ("name", "change"),
  [
    ("centroids", lambda case: case["centroids_LD"].__setitem__((2, 3), 0.5)),
    ("words", lambda case: case["codebooks_MKD"].__setitem__((0, 1, 2), 0.5)),
    ("metric", None),
  ],
)
def test_other_parts_are_not_merged(name, change):
  case, bounds = _case(), (5.0, 60.0)
  index = _filled(case, norm_range=bounds)
  kwargs = {"metric": "ip"} if name == "metric" else {}
  if change is not None:
    change(case)
  other = _filled(case, norm_range=bounds, **kwargs)
  with pytest.raises(ValueError, match=f"Part 1 has other {name} than part 0"):
    faiss_ivf.merge([index, other])


@pytest.mark.parametrize("k", [16, 256])
@pytest.mark.parametrize("block", [7, 16384])
def test_a_norm_far_out_is_told_by_plain_faiss(k, block, monkeypatch):
  monkeypatch.setattr(faiss_lists, "BLOCK", block)
  case = _case(k)
  case["codebooks_MKD"][:, 0] *= 8  # Codewords that one vector alone has.
  case["codes_NM"] = np.maximum(case["codes_NM"], 1)
  case["codes_NM"][NUM // 2] = 0
  index = _filled(case)
  low, high = _bounds(case)
  got = index.rq.norm_min, index.rq.norm_max
  np.testing.assert_allclose(got, (low, high), rtol=1e-6)
  index.nprobe = L
  far, x_D = case["ids_N"][NUM // 2], case["centroids_LD"][1]
  distances_1R, ids_1R = index.search(x_D[None], NUM)
  got = distances_1R[0, ids_1R[0] == far][0]
  c_D = case["centroids_LD"][case["lists_N"][NUM // 2]]
  want = np.square(x_D - c_D - _words(case)[NUM // 2]).sum()
  assert want > 1000
  assert got == pytest.approx(want, abs=(high - low) / 256)


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_bytes_of_norms_are_the_same_at_every_scale(scale):
  case, scaled = _case(), _case()
  for name in ("centroids_LD", "codebooks_MKD"):
    scaled[name] = scaled[name] * np.float32(scale)
  assert _stored(_filled(scaled)) == _stored(_filled(case))


def test_parts_of_other_norms_merge_to_the_whole():
  case = _case()
  case["codebooks_MKD"][:, 0] *= 8
  parts = [_filled(case, slice(0, 100)), _filled(case, slice(100, NUM))]
  assert parts[0].rq.norm_max != parts[1].rq.norm_max
  assert _stored(faiss_ivf.merge(parts)) == _stored(_filled(case))


def test_norms_are_right_before_they_are_fitted():
  case = _case()
  index = _empty(case)
  faiss_ivf.add_codes(index, case["lists_N"], case["codes_NM"], case["ids_N"])
  low, high = index.rq.norm_min, index.rq.norm_max
  assert low <= _bounds(case)[0] <= _bounds(case)[1] <= high
  assert faiss_ivf.fit_norms(_empty(case)) == (low, high)  # Nothing to fit.


def test_coarse_search_is_exact_by_a_flat_quantiser():
  case = _case(num_lists=40)
  index = _empty(case)
  lists_QP, distances_QP = faiss_ivf.coarse_search(index, case["xq_QD"], 5)
  want_QL = oracles.sq_distances(case["xq_QD"], case["centroids_LD"])
  assert lists_QP.dtype == np.int32
  np.testing.assert_array_equal(lists_QP, want_QL.argsort(axis=1)[:, :5])
  np.testing.assert_allclose(
    distances_QP, np.sort(want_QL, axis=1)[:, :5], rtol=1e-4
  )


def test_a_graph_finds_the_same_lists_with_effort():
  case = _case(num_lists=500)
  flat, graph = (_empty(case, coarse=kind) for kind in ("flat", "hnsw"))
  filled = _filled(case, coarse="hnsw")
  want_QP, _ = faiss_ivf.coarse_search(flat, case["xq_QD"], 20)
  got_QP, _ = faiss_ivf.coarse_search(graph, case["xq_QD"], 20, 500)
  np.testing.assert_array_equal(got_QP, want_QP)
  assert faiss_ivf.describe(graph)["coarse"] == "hnsw"
  # Without effort some are missed: the option arrives.
  x_ND = np.random.default_rng(3).normal(size=(300, D)).astype(np.float32)
  least_N, most_N = (
    faiss_ivf.coarse_search(graph, x_ND, 1, effort)[0] for effort in (1, 500)
  )
  assert (least_N != most_N).any()
  least_QR, most_QR = (
    fits.stock_search(filled, x_ND, 1, nprobe=1, ef_search=effort)[1]
    for effort in (1, 500)
  )
  assert (least_QR != most_QR).any()


@pytest.mark.parametrize("kind", faiss_lists.COARSE)
def test_lists_of_vectors(kind, monkeypatch):
  monkeypatch.setattr(faiss_lists, "BLOCK", 64)
  case = _case(num_lists=100)
  x_ND = np.random.default_rng(1).integers(0, 9, (150, D)).astype(np.uint8)
  seen = []
  coarse = faiss_ivf.make_coarse(
    case["centroids_LD"], kind, progress=lambda *at: seen.append(at)
  )
  assert seen == [(64, 100), (100, 100)]
  lists_N = faiss_ivf.assign_lists(coarse, x_ND)
  assert lists_N.dtype == np.int32
  np.testing.assert_array_equal(
    lists_N, oracles.nearest(x_ND.astype(np.float32), case["centroids_LD"])
  )


def test_what_is_kept_finds_lists_but_no_vectors():
  case = _case()
  index = _filled(case, coarse="hnsw")
  want = faiss_ivf.coarse_search(index, case["xq_QD"], 3)
  kept = faiss_ivf.keep_coarse(index)
  del index
  assert kept.ntotal == 0
  for a, b in zip(
    faiss_ivf.coarse_search(kept, case["xq_QD"], 3), want, strict=True
  ):
    np.testing.assert_array_equal(a, b)
  _, ids_QR = fits.stock_search(kept, case["xq_QD"], 5, nprobe=3)
  assert (ids_QR == -1).all()


@pytest.mark.parametrize("mmap", [False, True])
def test_a_saved_index_is_the_same(mmap, tmp_path):
  case, path = _case(), tmp_path / "index.faiss"
  index = _filled(case, coarse="hnsw")
  faiss_ivf.save(index, path, INFO)
  loaded = faiss_ivf.load(path, mmap=mmap)
  assert _stored(loaded.index) == _stored(index)
  assert loaded.info.items() >= INFO.items()
  sizes = dict(num_vectors=NUM, num_codes=M, codebook_size=16, num_lists=L)
  assert loaded.info.items() >= sizes.items()
  assert loaded.info["dim"] == D
  assert loaded.info["metric"] == "l2"
  assert loaded.info["faiss_version"] == faiss.__version__
  faiss_ivf.check_codec(path, loaded.info, INFO["codec_fingerprint"])
  with pytest.raises(ValueError, match="codes of codec 0123456789abcdef, but"):
    faiss_ivf.check_codec(path, loaded.info, "another")
  with pytest.raises(FileExistsError, match="exists already"):
    faiss_ivf.save(index, path, INFO)
  faiss_ivf.save(_empty(case), path, INFO, overwrite=True)
  assert faiss_ivf.load(path).index.ntotal == 0


def _edit(path, **values):
  info = json.loads(path.read_text())
  path.write_text(json.dumps(info | values))


@pytest.mark.parametrize(
  ("harm", "match"),
  [
    (
      lambda path, beside: path.write_bytes(path.read_bytes()[:-9]),
      "truncated or of another run",
    ),
    (
      lambda path, beside: path.write_bytes(path.read_bytes()[:-1] + b"!"),
      "does not match the checksum",
    ),
    (lambda path, beside: beside.unlink(), "has no description"),
    (lambda path, beside: beside.write_text("{"), "json is damaged"),
    (lambda path, beside: beside.write_text("{}"), "must have format"),
    (lambda path, beside: _edit(beside, version=7), "has version 7"),
    (lambda path, beside: _edit(beside, num_lists=8), "description says"),
    (lambda path, beside: path.unlink(), "There is no file"),
  ],
)
def test_files_that_do_not_fit_are_refused(harm, match, tmp_path):
  path = tmp_path / "index.faiss"
  faiss_ivf.save(_filled(_case()), path, INFO)
  harm(path, files.description_path(path))
  with pytest.raises((ValueError, OSError), match=match):
    faiss_ivf.load(path)


def test_an_index_without_a_description_is_refused(tmp_path):
  path = tmp_path / "index.faiss"
  faiss.write_index(_filled(_case()), str(path))
  with pytest.raises(FileNotFoundError, match="so its codec is unknown"):
    faiss_ivf.load(path)
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match="no index file, or is truncated"):
    faiss_ivf.load(path)
  faiss.write_index(faiss.IndexFlat(D), str(path))
  with pytest.raises(ValueError, match="norm, as IVF1024,RQ8x8_Nqint8; got"):
    faiss_ivf.load(path)


@pytest.mark.parametrize(
  ("values", "match"),
  [
    ({"codes_NM": np.full((NUM, M), 16)}, "Code 16 in row 0, column 0"),
    ({"codes_NM": np.zeros((NUM, M + 1), int)}, r"\(None, 3\), got \(300, 4\)"),
    (
      {"lists_N": np.arange(NUM) % (L + 1)},
      "largest of the lists .* 0 and 8, got 9",
    ),
    ({"lists_N": np.full(NUM, -1)}, "least of the lists .* 0 and 8, got -1"),
    ({"ids_N": np.full(NUM, -5)}, "least of the ids .* got -5"),
    ({"ids_N": np.arange(9)}, r"ids must have shape \(300,\)"),
  ],
)
def test_codes_out_of_range_are_refused(values, match):
  case = _case()
  index = _empty(case)
  case |= values
  with pytest.raises(ValueError, match=match):
    faiss_ivf.add_codes(index, case["lists_N"], case["codes_NM"], case["ids_N"])
  assert index.ntotal == 0


@pytest.mark.parametrize(
  ("kwargs", "match"),
  [
    ({"coarse": "tree"}, "coarse must be one of .* got 'tree'"),
    ({"metric": "cosine"}, "metric must be one of .* got 'cosine'"),
  ],
)
def test_options_that_make_no_sense_are_refused(kwargs, match):
  with pytest.raises(ValueError, match=match):
    _empty(_case(), **kwargs)


def test_sizes_that_do_not_fit_are_refused():
  case = _case()
  books, bounds = case["codebooks_MKD"], (1.0, 2.0)
  with pytest.raises(ValueError, match="power of two .* got 15"):
    fits.make_index(case["centroids_LD"], books[:, :15], norm_range=bounds)
  with pytest.raises(ValueError, match=r"\(None, 12\), got \(9, 11\)"):
    fits.make_index(case["centroids_LD"][:, :11], books, norm_range=bounds)
  index = _empty(case)
  with pytest.raises(ValueError, match="between 1 and 9, got 10"):
    faiss_ivf.coarse_search(index, case["xq_QD"], 10)
  with pytest.raises(ValueError, match=r"\(None, 12\), got \(7, 3\)"):
    faiss_ivf.coarse_search(index, case["xq_QD"][:, :3], 1)
  with pytest.raises(ValueError, match="got 0"):
    faiss_ivf.merge([])


def test_a_list_far_out_costs_the_others_no_precision():
  case = _case()
  before_L = faiss_ivf.contents(_filled(case)).step_L
  far = case["lists_N"][0]
  case["centroids_LD"] = case["centroids_LD"].copy()
  case["centroids_LD"][far] *= 1000
  after_L = faiss_ivf.contents(_filled(case)).step_L
  others = np.arange(L) != far
  np.testing.assert_allclose(after_L[others], before_L[others], rtol=1e-5)
  assert after_L[far] > 100 * before_L[far]
