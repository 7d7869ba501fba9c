import numpy as np
import pytest

from vqjax.data import item_ids


def _table(tmp_path):
  pa = pytest.importorskip("pyarrow")
  import pyarrow.parquet as pq

  path = tmp_path / "items.parquet"
  columns = {
    "v": [[1.0], [2.0], [3.0]],
    "sku": ["b", "a", "ü"],
    "number": pa.array([7, 3, 5], pa.uint32()),
    "kind": pa.array(["x", "y", "z"]).dictionary_encode(),
    "twice": ["b", "a", "b"],
    "holes": ["b", None, "c"],
    "price": [1.0, 2.0, 3.0],
  }
  pq.write_table(pa.table(columns), path)
  return path


def test_columns_of_the_parquet_file(tmp_path):
  path = _table(tmp_path)
  read = lambda name: item_ids.read(name, 3, data=f"{path}#v")
  assert read("sku").tolist() == ["b", "a", "ü"]
  assert read("number").dtype == np.int64
  assert read("number").tolist() == [7, 3, 5]
  assert read("kind").tolist() == ["x", "y", "z"]
  assert item_ids.read(f"{path}#sku", 3).tolist() == ["b", "a", "ü"]
  for name, message in {
    "twice": "#twice must differ, but 'b' is in rows 0 and 2",
    "holes": "#holes has no value in row 1",
    "price": "#price must hold integers or text to be ids, got double",
    "nope": "no item ids 'nope'.* columns v, sku, number",
    f"{path}": "has several columns, v, sku.*items.parquet#name",
  }.items():
    with pytest.raises((ValueError, FileNotFoundError), match=message):
      read(name)


@pytest.mark.parametrize(
  "ids", [["b", "a", "ü\x0b\u2028"], ["1", "2", "3"], [7, -3, 5], ["07", "1"]]
)
def test_what_is_saved_is_read(tmp_path, ids):
  array = np.array(ids)
  ids_N = array.astype(object if array.dtype.kind == "U" else np.int64)
  item_ids.save(tmp_path / "ids.txt", ids_N)
  np.save(tmp_path / "ids.npy", array)
  for name in ("ids.txt", "ids.npy"):
    found = item_ids.read(tmp_path / name, len(ids))
    assert found.tolist() == ids
    assert found.dtype == ids_N.dtype
  (tmp_path / "ids.txt").write_text("2\n1\n")
  with pytest.raises(ValueError, match="truncated or of another run"):
    item_ids.read(tmp_path / "ids.txt", 2)


def test_ids_lie_beside_the_rows_they_name(tmp_path):
  ids_N, path = np.array(["b", "a"], object), tmp_path / "x.npy"
  for place in (path, tmp_path):
    item_ids.save_beside(place, ids_N)
    found = item_ids.load_beside(place, item_ids.describe(ids_N), 2)
    assert found.tolist() == ["b", "a"]
  assert item_ids.load_beside(path, item_ids.describe(None), 2) is None
  assert item_ids.pick(ids_N, np.array([[1, -1]])).tolist() == [["a", None]]
  assert item_ids.pick(np.array([7, 8]), np.array([1, -1])).tolist() == [8, -1]
  info = item_ids.describe(np.array(["a", "b"], object))
  with pytest.raises(ValueError, match="x.npy.ids.txt has other item ids than"):
    item_ids.load_beside(path, info, 2)
  item_ids.save_beside(path, np.array([3, 4]))  # Left by a stopped command.
  assert (tmp_path / "x.npy.ids.txt").read_text() == "3\n4\n"
  (tmp_path / "y.npy.ids.txt").write_text("mine")
  with pytest.raises(FileExistsError, match="y.npy.ids.txt exists already"):
    item_ids.save_beside(tmp_path / "y.npy", ids_N)
  (tmp_path / "x.npy.ids.txt").unlink()
  with pytest.raises(FileNotFoundError, match="x.npy.ids.txt is missing"):
    item_ids.load_beside(path, info, 2)


def test_text_of_other_programs(tmp_path):
  path = tmp_path / "ids.txt"
  path.write_bytes(b"\xef\xbb\xbf12\r\n-3\r\n")
  assert item_ids.read(path, 2).tolist() == [12, -3]
  path.write_text("12\n007")
  assert item_ids.read(path, 2).tolist() == ["12", "007"]
  assert item_ids.read(path, 1, may_be_longer=True).tolist() == ["12"]
  for text, message in {
    "a\n\nb\n": "id in row 1 is empty",
    "a\nb\na\n": "'a' is in rows 0 and 2",
    "a\nb\n": "an id for each of the 3 vectors, got 2",
    "": "got 0 ids",
  }.items():
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      item_ids.read(path, 3)
  path.write_bytes(b"a\n\xff\nb\n")
  with pytest.raises(ValueError, match="UTF-8.*byte 2"):
    item_ids.read(path, 3)
  np.save(tmp_path / "ids.npy", np.array([1.5, 2.0]))
  with pytest.raises(ValueError, match="integers or text of shape .N,., got f"):
    item_ids.read(tmp_path / "ids.npy", 2)
