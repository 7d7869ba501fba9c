"""Codes on disk: the bytes of a shard, claims, damage, and reading in order."""

import concurrent.futures
import json
import os
import re

import numpy as np
import pytest

from vqjax.data import codes, files

SIZES = (300, 16, 256)  # 2 + 1 + 1 bytes a row.
NUM, NUM_SHARDS = 23, 4


def _codes(num=NUM, sizes=SIZES):
  rng = np.random.default_rng(0)
  return rng.integers(sizes, size=(num, len(sizes))).astype(np.int32)


def _manifest(vectors=None, **values):
  vectors = np.zeros((NUM, 6), np.float32) if vectors is None else vectors
  given = dict(
    codec="qinco",
    fingerprint="abc",
    codebook_sizes=SIZES,
    encode={"beam_size": 4},
    command="vqjax encode --codec=c",
    num_shards=NUM_SHARDS,
  )
  return codes.describe(vectors, **{**given, **values})


def _write(folder, manifest, shards, codes_NM, block_size=3):
  for shard in shards:
    rows = codes.shard_rows(len(codes_NM), manifest["num_shards"], shard)
    mine_NM = codes_NM[rows.start : rows.stop]
    starts = range(0, len(mine_NM), block_size)
    blocks = (mine_NM[i : i + block_size] for i in starts)
    codes.write_shard(folder, manifest, shard, blocks)


@pytest.fixture
def folder(tmp_path):
  manifest = codes.claim(tmp_path / "codes", _manifest())
  _write(tmp_path / "codes", manifest, (2, 0, 3, 1), _codes())
  return tmp_path / "codes"


def test_every_code_takes_the_whole_bytes_of_its_codebook():
  sizes = (1, 2, 16, 256, 257, 65536, 65537, 1 << 24, (1 << 24) + 1, 1 << 31)
  widths = (1, 1, 1, 1, 2, 2, 3, 3, 4, 4)
  codes_NM = np.concatenate([_codes(50, sizes), [np.array(sizes) - 1]])
  raw = codes.to_bytes(codes_NM, sizes)
  for i, row in enumerate(codes_NM):
    want = b"".join(
      int(code).to_bytes(w, "little") for code, w in zip(row, widths, strict=1)
    )
    assert raw[i].tobytes() == want
  back_NM = codes.from_bytes(raw, sizes)
  np.testing.assert_array_equal(back_NM, codes_NM)
  assert back_NM.dtype == np.int32


def test_codes_of_256_words_are_their_own_bytes():
  codes_NM = _codes(9, (256,) * 5)
  np.testing.assert_array_equal(codes.to_bytes(codes_NM, (256,) * 5), codes_NM)


@pytest.mark.parametrize(("num", "shards"), [(7, 7), (23, 4), (10**9, 17)])
def test_shards_share_the_rows_evenly_and_in_order(num, shards):
  parts = [codes.shard_rows(num, shards, i) for i in range(shards)]
  assert parts[0].start == 0
  assert parts[-1].stop == num
  for a, b in zip(parts[:-1], parts[1:], strict=True):
    assert a.stop == b.start
  assert max(map(len, parts)) - min(map(len, parts)) <= 1
  with pytest.raises(ValueError, match=f"between 0 and {shards - 1}, got"):
    codes.shard_rows(num, shards, shards)


@pytest.mark.parametrize("block_size", [1, 5, 6, NUM, 99])
def test_blocks_run_through_all_shards_in_order(folder, block_size):
  found = codes.open_codes(folder)
  assert found.shape == (NUM, 3)
  assert found.meta["codec_fingerprint"] == "abc"
  blocks = list(found.blocks(block_size))
  assert {len(block) for block in blocks[:-1]} <= {block_size}
  assert {block.dtype for block in blocks} == {np.dtype(np.int32)}
  np.testing.assert_array_equal(np.concatenate(blocks), _codes())


def test_slices_are_those_of_the_array(folder):
  found, want_NM = codes.open_codes(folder), _codes()
  for start in range(NUM):
    for stop in range(NUM + 1):
      np.testing.assert_array_equal(found[start:stop], want_NM[start:stop])
  np.testing.assert_array_equal(found[-5:], want_NM[-5:])
  assert found[9:2].shape == (0, 3)
  with pytest.raises(ValueError, match="steps of 1, got 2"):
    found[::2]
  with pytest.raises(ValueError, match="at least 1, got 0"):
    found.blocks(0)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64, np.uint64])
def test_a_file_made_elsewhere_is_read_as_int32(dtype, tmp_path):
  codes_NM = _codes(sizes=(100, 7))
  np.save(tmp_path / "c.npy", codes_NM.astype(dtype))
  found = codes.open_codes(tmp_path / "c.npy")
  assert found.meta == {}
  (block_NM,) = found.blocks(99)
  assert block_NM.dtype == np.int32
  np.testing.assert_array_equal(block_NM, codes_NM)


def test_a_file_that_holds_no_codes_is_refused(tmp_path):
  path = tmp_path / "c.npy"
  np.save(path, np.zeros((3, 2), np.float32))
  with pytest.raises(TypeError, match="integer codes, got float32"):
    codes.open_codes(path)
  np.save(path, np.array([[0, 1], [1 << 31, 2]]))
  with pytest.raises(ValueError, match="Code 2147483648 in row 1, column 0"):
    codes.open_codes(path)[:]
  files.write_json(files.description_path(path), _manifest())
  with pytest.raises(ValueError, match=r"shape \[23, 3\], but .* has \[2, 2\]"):
    codes.open_codes(path)


def test_many_processes_may_claim_a_folder_at_once(tmp_path):
  manifests = [_manifest(command=f"command {i}") for i in range(16)]
  with concurrent.futures.ThreadPoolExecutor(16) as pool:
    claim_fn = lambda manifest: codes.claim(tmp_path / "c", manifest)
    found = list(pool.map(claim_fn, manifests))
  first = codes.load_manifest(tmp_path / "c")
  assert all({**m, "command": ""} == {**first, "command": ""} for m in found)
  assert [p.name for p in (tmp_path / "c").iterdir()] == ["manifest.json"]
  for shard in range(NUM_SHARDS):  # Whoever of them makes it.
    _write(tmp_path / "c", manifests[shard], [shard], _codes())
  assert codes.find_problems(tmp_path / "c") == {}


def test_who_claims_second_replaces_nothing(tmp_path, monkeypatch):
  theirs, path = _manifest(fingerprint="xyz"), tmp_path / "manifest.json"
  link = os.link

  def link_after_them(source, target):
    path.write_text(json.dumps(theirs))
    link(source, target)

  # Between the look whether there is a manifest and the end of writing ours.
  monkeypatch.setattr(os, "link", link_after_them)
  with pytest.raises(ValueError, match="fingerprint is xyz, now it is abc"):
    codes.claim(tmp_path, _manifest())
  assert codes.load_manifest(tmp_path) == theirs
  assert list(tmp_path.iterdir()) == [path]


def test_a_file_system_without_links_can_be_claimed(tmp_path, monkeypatch):
  def link(source, target):
    raise PermissionError("no links here")

  monkeypatch.setattr(os, "link", link)
  manifest = _manifest()
  assert codes.claim(tmp_path, manifest) == manifest
  assert codes.claim(tmp_path, _manifest(command="other")) == manifest
  assert [p.name for p in tmp_path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (dict(fingerprint="xyz"), "their codec_fingerprint is abc, now it is xyz"),
    (dict(encode={"beam_size": 5}), "encode.beam_size is 4, now it is 5"),
    (dict(encode={"beam_size": 4, "dtype": "x"}), "dtype is None, now it is x"),
    (dict(encode={}), "encode.beam_size is 4, now it is None"),
    (dict(num_shards=5), "num_shards is 4, now it is 5"),
    (
      dict(codebook_sizes=SIZES[:2]),
      r"shape is \[23, 3\], now it is \[23, 2\]",
    ),
    (dict(vectors=np.ones((NUM, 6), "f4")), "data.checksum_of_sample is"),
    (dict(vectors=np.zeros((NUM, 6), "u1")), "data.dtype is float32, .* uint8"),
    (dict(vectors=np.zeros((9, 6), "f4")), r"shape is \[23, 3\], .* \[9, 3\]"),
  ],
)
def test_a_folder_of_other_codes_is_refused_by_name(change, message, folder):
  before = (folder / "manifest.json").read_bytes()
  with pytest.raises(ValueError, match=message):
    codes.claim(folder, _manifest(**change))
  assert (folder / "manifest.json").read_bytes() == before


@pytest.mark.parametrize("num_shards", [-1, NUM + 1])
def test_no_shard_is_empty(num_shards):
  with pytest.raises(ValueError, match=f"between 1 and 23, got {num_shards}"):
    _manifest(num_shards=num_shards)


class _Counted:
  """Vectors that count how many of their rows are read."""

  def __init__(self, x_ND):
    self.shape, self.dtype, self.num_read, self._x_ND = (
      x_ND.shape,
      "f4",
      0,
      x_ND,
    )

  def __getitem__(self, rows):
    self.num_read += len(rows)
    return self._x_ND[rows]


def test_identity_reads_few_rows_and_notices_another_file():
  x_ND = np.random.default_rng(0).normal(size=(5000, 4)).astype(np.float32)
  counted = _Counted(x_ND)
  assert files.identify(counted) == files.identify(x_ND)
  assert 0 < counted.num_read <= 256
  assert files.identify(x_ND[::-1]) != files.identify(x_ND)
  for row in (0, 4999):  # Such as a file that was cut or grew.
    other_ND = x_ND.copy()
    other_ND[row, 0] += 1
    assert files.identify(other_ND) != files.identify(x_ND)


def _flip_a_byte(path):
  raw = bytearray(path.read_bytes())
  raw[-3] ^= 1
  path.write_bytes(raw)


def _make_foreign(path):
  record = json.loads(path.with_suffix(".json").read_text())
  record["manifest"] = "0" * 16
  path.with_suffix(".json").write_text(json.dumps(record))


DAMAGE = [
  (lambda path: path.unlink(), "is missing"),
  (lambda path: path.with_suffix(".json").unlink(), "is not finished"),
  (lambda path: path.with_suffix(".json").write_text("{"), "damaged record"),
  (lambda path: path.with_suffix(".json").write_text("{}"), "damaged record"),
  (lambda path: path.with_suffix(".json").write_text("[]"), "damaged record"),
  (lambda path: path.write_bytes(path.read_bytes()[:-4]), "148 bytes, .* 152"),
  (_flip_a_byte, "does not match its checksum"),
]


@pytest.mark.parametrize(("damage_fn", "message"), DAMAGE)
def test_a_damaged_shard_is_found_and_made_again(damage_fn, message, folder):
  manifest, everything = codes.load_manifest(folder), range(NUM_SHARDS)
  assert codes.find_problems(folder) == {}
  assert codes.unfinished(folder, manifest, everything) == []
  damage_fn(codes.shard_path(folder, NUM_SHARDS, 2))
  calls = []
  problems = codes.find_problems(folder, progress=lambda *a: calls.append(a))
  assert list(problems) == [2]
  assert calls[-1] == (NUM_SHARDS, NUM_SHARDS)
  assert re.search(message, problems[2])
  assert codes.unfinished(folder, manifest, everything) == [2]
  assert codes.unfinished(folder, manifest, [0, 1]) == []
  _write(folder, manifest, [2], _codes())
  assert codes.find_problems(folder) == {}
  np.testing.assert_array_equal(codes.open_codes(folder)[:], _codes())


def test_only_a_thorough_look_reads_the_codes(folder):
  _flip_a_byte(codes.shard_path(folder, NUM_SHARDS, 1))
  assert codes.find_problems(folder, is_thorough=False) == {}
  assert list(codes.find_problems(folder)) == [1]


def test_reading_stops_at_a_damaged_shard(folder):
  rows = [codes.shard_rows(NUM, NUM_SHARDS, i) for i in range(NUM_SHARDS)]
  _flip_a_byte(codes.shard_path(folder, NUM_SHARDS, 2))
  found = codes.open_codes(folder)
  np.testing.assert_array_equal(
    found[: rows[2].start], _codes()[: rows[2].start]
  )
  np.testing.assert_array_equal(
    found[rows[3].start :], _codes()[rows[3].start :]
  )
  message = (
    "codes-00002-of-00004.npy is damaged: it does not match its checksum. "
    f"vqjax encode --verify --output={folder} says how"
  )
  for _ in range(2):  # It stays damaged.
    with pytest.raises(ValueError, match=re.escape(message)):
      found[rows[2].start : rows[2].start + 1]
  blocks = found.blocks(4)
  with pytest.raises(ValueError, match="00002-of-00004.npy is damaged"):
    list(blocks)


def test_a_checksum_is_compared_once_and_only_where_codes_are_read(
  folder, monkeypatch
):
  summed, sha256 = [], files.sha256
  monkeypatch.setattr(
    files, "sha256", lambda path: summed.append(path.name) or sha256(path)
  )
  found = codes.open_codes(folder)
  assert not summed
  assert found[9:9].shape == (0, 3)
  found[0:1]
  assert summed == ["codes-00000-of-00004.npy"]
  for _ in range(2):
    assert sum(len(block) for block in found.blocks(5)) == NUM
  assert summed == [f"codes-0000{i}-of-00004.npy" for i in range(4)]


def test_codes_that_are_no_ids_are_found(folder, monkeypatch):
  path, manifest = codes.shard_path(folder, NUM_SHARDS, 3), _manifest()
  bad_NM = np.full((NUM, 3), 16, np.int32)
  with pytest.raises(ValueError, match="Code 16 in row 0, column 1 must lie"):
    _write(folder, manifest, [3], bad_NM)
  assert codes.find_problems(folder) == {}  # The shard before is untouched.
  monkeypatch.setattr(codes, "check_ids", lambda *args: None)
  _write(folder, manifest, [3], bad_NM)
  monkeypatch.undo()
  found = codes.find_problems(folder)[3]
  assert "Code 16 in row 0, column 1 must lie between 0 and 15" in found
  with pytest.raises(ValueError, match="Code 16 in row 17, column 1"):
    codes.open_codes(folder)[:]
  assert path.exists()


def test_a_shard_of_another_run_is_refused_not_replaced(folder, tmp_path):
  manifest, other = codes.load_manifest(folder), _manifest(fingerprint="xyz")
  _write(tmp_path / "other", other, [1], _codes()[::-1])
  for suffix in (".npy", ".json"):
    path = codes.shard_path(folder, NUM_SHARDS, 1).with_suffix(suffix)
    path.write_bytes((tmp_path / "other" / path.name).read_bytes())
  before = path.read_bytes()
  with pytest.raises(ValueError, match=r"00001-of-00004.npy is of another c"):
    codes.unfinished(folder, manifest, range(NUM_SHARDS))
  assert "of another codec" in codes.find_problems(folder)[1]
  with pytest.raises(ValueError, match="lacks 1 of its 4 shards: codes-00001"):
    codes.open_codes(folder)
  assert path.read_bytes() == before


def test_a_renamed_shard_is_found(folder):
  for suffix in (".npy", ".json"):
    path = codes.shard_path(folder, NUM_SHARDS, 1).with_suffix(suffix)
    path.write_bytes(
      codes.shard_path(folder, NUM_SHARDS, 2).with_suffix(suffix).read_bytes()
    )
  assert list(codes.find_problems(folder)) == [1]


def test_a_shard_appears_whole_or_not_at_all(tmp_path):
  manifest = codes.claim(tmp_path, _manifest())
  names = lambda: sorted(path.name for path in tmp_path.iterdir())

  def broken():
    yield _codes()[:3]
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    codes.write_shard(tmp_path, manifest, 1, broken())
  assert names() == ["manifest.json"]
  with pytest.raises(ValueError, match="must get 6 codes, got 5"):
    codes.write_shard(tmp_path, manifest, 1, [_codes()[:5]])
  assert names() == ["manifest.json"]
  with pytest.raises(ValueError, match="lacks 4 of its 4 shards"):
    codes.open_codes(tmp_path)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    (None, "no folder of codes: it has no manifest.json"),
    ("{", "is damaged, or no JSON file"),
    ("{}", "must have format 'vqjax codes'"),
    ('{"format": "vqjax codes", "version": 9}', "version 9, this vqjax .* 1;"),
  ],
)
def test_a_folder_of_something_else_is_refused(text, message, tmp_path):
  if text is not None:
    (tmp_path / "manifest.json").write_text(text)
  with pytest.raises((ValueError, OSError), match=message):
    codes.open_codes(tmp_path)


def test_shards_can_be_read_without_vqjax(folder):
  manifest = json.loads((folder / "manifest.json").read_text())
  parts = [np.load(path) for path in sorted(folder.glob("codes-*.npy"))]
  raw = np.concatenate(parts)
  assert raw.dtype == np.dtype(manifest["dtype"])
  assert raw.shape == (manifest["shape"][0], manifest["row_bytes"])
  low_N, high_N = raw[:, 0].astype(int), raw[:, 1].astype(int)
  np.testing.assert_array_equal(low_N + 256 * high_N, _codes()[:, 0])
  np.testing.assert_array_equal(raw[:, 2:], _codes()[:, 1:])


def _described_file(tmp_path):
  path = tmp_path / "c.npy"
  with files.atomic_output(path, description=_manifest(num_shards=0)) as temp:
    np.save(temp, _codes())
  return path


def test_a_changed_file_of_codes_is_found_as_it_is_read(tmp_path):
  path = _described_file(tmp_path)
  np.testing.assert_array_equal(codes.open_codes(path)[:], _codes())
  raw = bytearray(path.read_bytes())
  raw[-4] ^= 1
  path.write_bytes(raw)
  found = codes.open_codes(path)  # Opening reads no codes.
  with pytest.raises(ValueError, match="c.npy is damaged, or was changed"):
    found[:5]
  path.write_bytes(raw + b"0")
  with pytest.raises(ValueError, match="c.npy"):
    codes.open_codes(path)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"shape": None}, "its 'shape' is None"),
    ({"shape": [23]}, "shape .23. does not fit 3 codebooks"),
    ({"codebook_sizes": [4, "x", 4]}, "its 'codebook_sizes' is"),
    ({"codebook_sizes": [0, 4, 4]}, "its codebook sizes are"),
    ({"codec_fingerprint": 3}, "its 'codec_fingerprint' is 3"),
    ({"data": []}, "its 'data' is"),
    ({"command": {}}, "its 'command' is"),
  ],
)
def test_damaged_descriptions_are_one_sentence(tmp_path, changes, said):
  path = _described_file(tmp_path)
  beside = files.description_path(path)
  beside.write_text(json.dumps(json.loads(beside.read_text()) | changes))
  with pytest.raises(ValueError, match=f"c.npy.json is damaged: {said}"):
    codes.open_codes(path)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"num_shards": "4"}, "its 'num_shards' is '4'"),
    ({"num_shards": 99}, "23 codes .* cannot be in 99 shards"),
    ({"row_bytes": 7}, "cannot be in 4 shards of 7 bytes"),
  ],
)
def test_damaged_manifests_are_one_sentence(folder, changes, said):
  path = folder / "manifest.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changes))
  with pytest.raises(ValueError, match=f"manifest.json is damaged: .*{said}"):
    codes.open_codes(folder)
