import itertools
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqjax.data import batches, formats


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 1000, 4097])
def test_permute_is_a_permutation(size):
  got = batches.permute(np.arange(size), size, seed=3, round=1)
  assert got.dtype == np.int64
  np.testing.assert_array_equal(np.sort(got), np.arange(size))


def test_permute_pointwise_and_stable():
  size = 10**9 + 7
  rows = np.array([0, 5, size - 1, 123_456_789])
  got = batches.permute(rows, size, 0, 0)
  assert got.max() < size
  for row, want in zip(rows, got, strict=True):
    assert batches.permute([row], size, 0, 0) == want
  # Written down on 2026-11-21: old runs must resume with the same batches.
  np.testing.assert_array_equal(
    batches.permute(np.arange(6), 6, 0, 0), [5, 2, 1, 3, 0, 4]
  )
  np.testing.assert_array_equal(
    got, [571_527_777, 800_188_245, 447_002_341, 145_786_236]
  )


def test_permute_mixes():
  size = 20_000
  one = batches.permute(np.arange(size), size, 0, 0)
  two = batches.permute(np.arange(size), size, 0, 1)
  other = batches.permute(np.arange(size), size, 1, 0)
  # Four standard deviations of the correlation of independent orders.
  limit = 4 / np.sqrt(size)
  pairs = [(np.arange(size), one), (one[1:], one[:-1]), (one, two)]
  for a, b in [*pairs, (one, other)]:
    assert abs(np.corrcoef(a, b)[0, 1]) < limit
  assert (one == two).sum() < 10
  # Evenly spread: first tenth over ten bins, chi-square with 9 degrees.
  counts = np.bincount(one[: size // 10] * 10 // size, minlength=10)
  assert ((counts - 200) ** 2 / 200).sum() < 30


@pytest.mark.parametrize("size", [3, 5, 7, 12])
def test_permute_is_fair_for_small_sizes(size):
  num = 2000
  first = [batches.permute([0], size, 0, r)[0] for r in range(num)]
  counts = np.bincount(first, minlength=size)
  # 99.9 % of chi-square with 11 degrees of freedom is 31.3.
  assert ((counts - num / size) ** 2 / (num / size)).sum() < 32


def test_permute_refused():
  with pytest.raises(ValueError, match="at least 1 row to permute, got 0"):
    batches.permute([0], 0, 0, 0)
  with pytest.raises(ValueError, match="between 0 and 4, got 2 to 5"):
    batches.permute([2, 5], 5, 0, 0)


@pytest.mark.parametrize(("batch", "num"), [(4, 10), (5, 10), (7, 3), (1, 1)])
def test_every_pass_takes_each_row_once(batch, num):
  num_steps = 6 * num
  rows = np.concatenate(
    [batches.batch_rows(2, step, batch, num) for step in range(num_steps)]
  )
  passes = rows.reshape(-1, num)
  np.testing.assert_array_equal(
    np.sort(passes, axis=1), np.tile(np.arange(num), (len(passes), 1))
  )
  if num == 10:
    assert len(np.unique(passes, axis=0)) == len(passes)


def test_batch_rows_far_out_and_refused():
  got = batches.batch_rows(0, np.int32(2_000_000), 4096, 10**9)
  want = batches.batch_rows(0, 2_000_000, 4096, 10**9)
  np.testing.assert_array_equal(got, want)
  assert len(np.unique(want)) == 4096
  with pytest.raises(ValueError, match="got -1, 4 and 10"):
    batches.batch_rows(0, -1, 4, 10)


@pytest.mark.parametrize(
  ("num", "size", "want"),
  [
    (60_000, 10_000, 50_000),
    (100, 10_000, 50),
    (3, 10, 2),
    (2, 1, 1),
    (3000, None, 2700),  # At most a tenth, unless asked for more.
    (60_000, None, 57_000),
    (500_000, None, 495_000),
    (100_000_000, None, 99_990_000),
    (3, None, 2),
  ],
)
def test_split(num, size, want):
  assert batches.split(num, size) == (want, slice(want, num))


def test_none_held_out_is_validation_on_all():
  assert batches.split(7, 0) == (7, slice(0, 7))


def test_split_refused():
  with pytest.raises(ValueError, match="at least 2 vectors.*got 1"):
    batches.split(1)
  with pytest.raises(ValueError, match="validation_size .*got -1"):
    batches.split(10, -1)


def make_file(folder, x, suffix):
  path = folder / f"x{suffix}"
  if suffix == ".hdf5":
    pytest.importorskip("h5py")
  formats.write_vectors(path, x)
  return formats.open_vectors(path)


@pytest.mark.parametrize("suffix", [".bvecs", ".fvecs", ".npy", ".hdf5"])
def test_read_rows(tmp_path, suffix):
  x = np.random.default_rng(0).integers(0, 256, size=(300, 7), dtype=np.uint8)
  vectors = make_file(tmp_path, x, suffix)
  rows = np.random.default_rng(1).integers(0, 300, size=200)
  got = batches.read_rows(vectors, rows)
  assert got.dtype == np.float32
  np.testing.assert_array_equal(got, x[rows])


def test_read_rows_refused():
  x = np.ones((50, 3), np.float64)
  x[40, 1], x[7, 0], x[8, 0] = np.nan, np.inf, 1e300
  np.testing.assert_array_equal(batches.read_rows(x, [3, 1]), x[:2])
  with pytest.raises(ValueError, match="2 of 4 rows, first in row 7, 40;"):
    batches.read_rows(x, [40, 9, 7, 2])
  with pytest.raises(ValueError, match=r"has 1e\+300 in row 8, column 0"):
    batches.read_rows(x, [9, 8])
  with pytest.raises(ValueError, match="between 0 and 49, got 3 to 50"):
    batches.read_rows(x, [50, 3])


def test_reader_parts_make_the_batch(tmp_path):
  x = np.arange(200, dtype=np.float32).reshape(100, 2)
  vectors = make_file(tmp_path, x, ".fvecs")
  whole = batches.BatchReader(vectors, 5, 12, 90)
  parts = [batches.BatchReader(vectors, 5, 12, 90, i, 3) for i in range(3)]
  for step in (0, 7, 1):
    want = x[batches.batch_rows(5, step, 12, 90)]
    np.testing.assert_array_equal(whole(step), want)
    got = np.concatenate([part(step) for part in parts])
    np.testing.assert_array_equal(got, want)


def test_reader_refused():
  x = np.zeros((10, 2), np.float32)
  with pytest.raises(ValueError, match="multiple of the 3 processes, got 8"):
    batches.BatchReader(x, 0, 8, process_count=3)
  with pytest.raises(ValueError, match="between 1 and 10, got 11"):
    batches.BatchReader(x, 0, 8, 11)
  with pytest.raises(ValueError, match="below 2, got 2"):
    batches.BatchReader(x, 0, 8, process_index=2, process_count=2)


def our_threads():
  names = [t.name for t in threading.enumerate()]
  return [name for name in names if name.startswith("vqjax-prefetch")]


def test_prefetch_order_and_depth():
  made = []

  def make_item(step):
    made.append(step)
    return step * 10

  items = batches.prefetch(make_item, itertools.count(), depth=3)
  assert [next(items) for _ in range(4)] == [0, 10, 20, 30]
  deadline = time.monotonic() + 5
  while len(made) < 7 and time.monotonic() < deadline:
    time.sleep(0.01)
  time.sleep(0.05)
  assert made == list(range(7))
  items.close()
  assert our_threads() == []
  assert list(batches.prefetch(str, range(5))) == list("01234")
  assert list(batches.prefetch(str, [])) == []


def test_prefetch_runs_in_a_thread():
  names = batches.prefetch(lambda _: threading.current_thread().name, [0])
  assert next(names).startswith("vqjax-prefetch")


def test_prefetch_raises_at_its_step():
  def make_item(step):
    if step == 2:
      raise KeyError("bad step 2")
    return step

  got = []
  with pytest.raises(KeyError, match="bad step 2"):
    got.extend(batches.prefetch(make_item, range(9)))
  items = batches.prefetch(make_item, range(9))
  assert [next(items), next(items)] == [0, 1]
  with pytest.raises(KeyError):
    next(items)
  assert our_threads() == []
  with pytest.raises(ValueError, match="depth must be at least 1, got 0"):
    batches.prefetch(make_item, [1], depth=0)


@pytest.mark.parametrize("num", [1, 10, 20, 33])
def test_map_blocks(num):
  x = np.random.default_rng(0).normal(size=(num, 3)).astype(np.float16)
  traces, seen = [], []

  @jax.jit
  def fn(x_ND):
    traces.append(x_ND.shape)
    return {"sum": x_ND.sum(axis=1), "pair": (x_ND, jnp.argmax(x_ND, axis=1))}

  out = list(
    batches.map_blocks(
      fn, x, block_size=10, progress=lambda *args: seen.append(args)
    )
  )
  assert traces == [(min(10, num), 3)]
  assert [start for start, _ in out] == list(range(0, num, 10))
  assert seen == [(min(s + 10, num), num) for s, _ in out]
  assert isinstance(out[0][1]["sum"], np.ndarray)
  same = np.concatenate([block["pair"][0] for _, block in out])
  np.testing.assert_array_equal(same, x)
  sums = np.concatenate([block["sum"] for _, block in out])
  np.testing.assert_allclose(sums, x.astype(np.float32).sum(1), rtol=1e-5)


def test_map_blocks_works_on_two_at_once():
  both = threading.Barrier(2, timeout=20)

  def fn(x_ND):
    both.wait()  # Breaks unless another block is in work.
    return x_ND[:, 0]

  x = np.arange(8, dtype=np.float32)[:, None]
  blocks = list(batches.map_blocks(fn, x, block_size=2))
  assert [start for start, _ in blocks] == [0, 2, 4, 6]
  np.testing.assert_array_equal(np.concatenate([y for _, y in blocks]), x[:, 0])


@pytest.mark.parametrize("num", [0, 1, 4, 5, 11])
def test_in_blocks_is_the_function_of_all_rows(num):
  sizes, both = [], threading.Barrier(2, timeout=20)

  def fn(x_ND):
    sizes.append(len(x_ND))
    if num == 5:
      both.wait()  # Breaks unless another block is in work.
    return x_ND.sum(axis=1)

  x_ND = np.arange(2.0 * num).reshape(num, 2)
  got_N = batches.in_blocks(fn, 4)(x_ND)
  np.testing.assert_array_equal(got_N, x_ND.sum(axis=1))
  assert sizes == ([num] if num <= 4 else [4] * -(-num // 4))
  with pytest.raises(ValueError, match="block_size .*got 0"):
    batches.in_blocks(fn, 0)


def test_in_blocks_raises_what_a_block_raised():
  def fn(x_N):
    if x_N[0] >= 8:
      raise ValueError("no such row")
    return x_N

  with pytest.raises(ValueError, match="no such row"):
    batches.in_blocks(fn, 4)(np.arange(20))


def test_map_blocks_refused():
  x = np.zeros((25, 2), np.float32)
  x[23, 0] = np.inf
  with pytest.raises(ValueError, match="first in row 23;"):
    list(batches.map_blocks(lambda x: x, x, block_size=10))
  with pytest.raises(ValueError, match="block_size .*got 0"):
    batches.map_blocks(lambda x: x, x, block_size=0)
  items = batches.map_blocks(lambda x: x, x, block_size=5)
  next(items)
  items.close()
  assert our_threads() == []


def test_subsample():
  x = np.arange(500, dtype=np.uint16)[:, None]
  one, two = (batches.subsample(x, 50, seed) for seed in (0, 1))
  np.testing.assert_array_equal(one, batches.subsample(x, 50, 0))
  assert one.dtype == np.float32
  assert (np.diff(one[:, 0]) > 0).all()
  assert not np.array_equal(one, two)
  assert batches.subsample(x, 50, 0, num_rows=60).max() < 60
  np.testing.assert_array_equal(batches.subsample(x, 900, 0), x)
  # Means of 50 of 0..499 have standard deviation 19.4.
  means = [batches.subsample(x, 50, seed).mean() for seed in range(30)]
  assert abs(np.mean(means) - 249.5) < 4 * 19.4 / np.sqrt(30)
  with pytest.raises(ValueError, match="num_rows <= 500, got 5 and 501"):
    batches.subsample(x, 5, 0, num_rows=501)


def test_map_blocks_over_some_rows():
  x_ND = np.arange(40, dtype=np.float32).reshape(20, 2)
  seen = []
  out = list(
    batches.map_blocks(
      lambda x_ND: x_ND + 1,
      x_ND,
      block_size=4,
      rows=range(7, 17),
      progress=lambda *args: seen.append(args),
    )
  )
  assert [start for start, _ in out] == [7, 11, 15]
  got_ND = np.concatenate([block_ND for _, block_ND in out])
  np.testing.assert_array_equal(got_ND, x_ND[7:17] + 1)
  assert seen == [(4, 10), (8, 10), (10, 10)]
  with pytest.raises(ValueError, match="consecutive ones of the 20"):
    batches.map_blocks(np.sin, x_ND, block_size=4, rows=range(15, 21))


def test_vectors_are_read_with_their_lists():
  rng = np.random.default_rng(0)
  x_ND = rng.integers(0, 255, (50, 3)).astype(np.uint8)
  lists_N = rng.integers(0, 1 << 30, 50)
  vectors = batches.WithLists(x_ND, lists_N)
  assert len(vectors) == 50
  rows = np.array([7, 3, 49])
  blocks = batches.map_blocks(batches.split_lists, vectors, block_size=50)
  reader = batches.BatchReader(vectors, 0, 8)
  for got, at in (
    (batches.read_rows(vectors, rows), rows),
    (reader(3), batches.batch_rows(0, 3, 8, 50)),
    (batches.subsample(vectors, 50, 0), slice(None)),
    (batches.WithLists(*next(blocks)[1]), slice(None)),
  ):
    got_ND, got_N = batches.split_lists(got)
    assert (got_ND.dtype, got_N.dtype) == (np.float32, np.int32)
    np.testing.assert_array_equal(got_ND, x_ND[at])
    np.testing.assert_array_equal(got_N, lists_N[at])
  assert batches.split_lists(x_ND)[1] is None


def test_bad_rows_of_a_part_are_named_as_in_the_file(tmp_path):
  x_ND = np.zeros((50, 3), np.float32)
  x_ND[37, 1] = np.nan
  part = make_file(tmp_path, x_ND, ".fvecs")[10:][20:]
  joined = batches.WithLists(part, np.arange(20))
  for read in (
    lambda: batches.read_rows(part, [0, 7]),
    lambda: list(batches.map_blocks(np.sin, part, block_size=5)),
    lambda: batches.read_rows(joined, [7]),
    lambda: list(batches.map_blocks(batches.split_lists, joined, block_size=5)),
  ):
    with pytest.raises(ValueError, match="x.fvecs must .* in row 37;"):
      read()
