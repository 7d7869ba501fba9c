import numpy as np
import pytest

from vqjax.data import row_ids

_RNG = np.random.default_rng(0)


@pytest.mark.parametrize(("largest", "size"), [(2**32 - 1, 4), (2**32, 8)])
def test_ids_stay_on_disk_in_few_bytes(tmp_path, largest, size):
  ids_N = np.append(_RNG.permutation(50), [largest, 7_000])
  path = tmp_path / "a.faiss"
  row_ids.save_beside(path, ids_N)
  mapped_N = row_ids.open_beside(path, ids_N)
  assert row_ids.num_bytes(mapped_N) == {"ram": 0, "disk": 52 * size}
  assert np.load(tmp_path / "a.faiss.order.npy").tolist() == ids_N.tolist()
  rows_QR = np.array([[3, -1], [50, 51]])
  want = [[-1 if r < 0 else ids_N[r] for r in rows] for rows in rows_QR]
  found_QR = row_ids.pick(mapped_N, rows_QR)
  assert found_QR.dtype == np.int64
  assert found_QR.tolist() == want


def test_a_file_that_does_not_fit_costs_memory_alone(tmp_path):
  ids_N, path = _RNG.permutation(50), tmp_path / "a.faiss"
  beside = row_ids.path_beside(path)

  def check():
    found_N = row_ids.open_beside(path, ids_N)
    assert row_ids.num_bytes(found_N) == {"ram": 200, "disk": 0}
    assert found_N.tolist() == ids_N.tolist()

  check()  # There is none.
  row_ids.save_beside(path, ids_N[::-1])
  check()
  row_ids.save_beside(path, ids_N[:-1])  # What was left behind is replaced.
  check()
  beside.write_bytes(beside.read_bytes()[:-3])
  check()
  row_ids.save_beside(path, ids_N)
  assert row_ids.num_bytes(row_ids.open_beside(path, ids_N))["ram"] == 0


def test_files_of_others_stay(tmp_path):
  path = tmp_path / "a.faiss"
  row_ids.path_beside(path).write_text("mine")
  with pytest.raises(FileExistsError, match=r"a\.faiss\.order\.npy"):
    row_ids.save_beside(path, np.arange(3), overwrite=True)
  other = tmp_path / "b.faiss"
  row_ids.save_beside(other, np.arange(3))
  other.write_text("an index")
  with pytest.raises(FileExistsError, match=r"b\.faiss exists"):
    row_ids.save_beside(other, np.arange(4))
  assert len(np.load(row_ids.path_beside(other))) == 3


def test_refusals(tmp_path):
  with pytest.raises(ValueError, match="least id must .* 0 .*got -1"):
    row_ids.narrow(np.array([3, -1]))
  np.save(tmp_path / "x.npy", np.ones((3, 2), np.float32))
  with pytest.raises(ValueError, match=r"x\.npy must hold uint32 or int64"):
    row_ids.open_ids(tmp_path / "x.npy")
