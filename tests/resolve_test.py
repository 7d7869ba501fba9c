"""Ids made unique: against all ways to do so, and the released program."""

import itertools
import json
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest

import vqjax
from vqjax.codec import Codec
from vqjax.codecs import sinkhorn as sinkhorn_lib
from vqjax.codecs.rq import RQParams
from vqjax.ids import errors as errors_lib
from vqjax.ids import groups, mapping, resolve

GOLDEN = pathlib.Path(__file__).parents[1] / "third_party/golden/rqvae"
K, L = 4, 3
CASES = {  # Of the released program: data, epsilon that it took.
  "collide_clean": ("collide3_x", 0.3),
  "collide_wide_eps0": ("collide2_x", 0.003),
}


def _errors(x, books, rows_N=None):
  codec = Codec("rq", RQParams(jnp.asarray(books, jnp.float32)))
  found = errors_lib.make_errors(
    codec.spec, codec.tables, x, codec.decode, rows_N=rows_N
  )
  return codec, found


@pytest.fixture(name="data", scope="module")
def _data():
  """Vectors in a few heaps, so that codes collide, and a codec of them."""
  rng = np.random.default_rng(1)
  x = rng.normal(size=(5, 3))[rng.integers(0, 5, 40)]
  x = (x + rng.normal(size=(40, 3)) * 0.4).astype(np.float32)
  books = rng.normal(size=(L, K, 3)) * np.array([1.0, 0.5, 0.3])[:, None, None]
  codec, errors = _errors(x, books)
  return x, books, codec.encode(x).astype(int), errors


def _error(x, books, codes):
  return sum(
    float(((x[i] - sum(books[m][k] for m, k in enumerate(code))) ** 2).sum())
    for i, code in enumerate(codes)
  )


def _least(x, books, codes, rows, capacity):
  """The least error over all assignments of last codewords to colliding rows.

  Those of other rows of the same prefix are taken.
  """
  prefix = tuple(codes[rows[0]][:-1])
  others = [
    code[-1]
    for i, code in enumerate(codes.tolist())
    if i not in rows and tuple(code[:-1]) == prefix
  ]
  slots = [k for k in range(K) for _ in range(capacity - others.count(k))]
  return min(
    _error(x[rows], books, [(*prefix, k) for k in words])
    for words in set(itertools.permutations(slots, len(rows)))
  )


@pytest.mark.parametrize("capacity", [1, 2])
def test_nearest_adds_the_least_error_of_all_assignments(data, capacity):
  x, books, codes, _ = data
  # No prefix is over-full: a part of the items.
  keep = np.flatnonzero(groups.ranks(groups.labels(codes, 2)[0]) < 4 * capacity)
  codes = codes[keep]
  _, errors = _errors(x, books, keep)
  found, num_early = resolve.nearest(codes, errors, capacity=capacity)
  assert num_early == 0
  _, sizes = np.unique(found, axis=0, return_counts=True)
  assert sizes.max() <= capacity
  over = resolve.over_full(codes, capacity)
  assert over.sum() > 6
  assert (found[~over] == codes[~over]).all()
  label = groups.labels(codes, 2)[0]
  for rows in groups.pieces(label, np.flatnonzero(over)):
    got = _error(x[keep[rows]], books, found[rows])
    want = _least(x[keep], books, codes, rows.tolist(), capacity)
    assert got == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("resolve_fn", [resolve.nearest, resolve.backtrack])
def test_ids_are_unique_while_there_are_enough(data, resolve_fn):
  x, _, codes, errors = data
  again = np.concatenate([x, x[:24]])  # As many items as ids.
  codes = np.concatenate([codes, codes[:24]])
  rows = np.r_[np.arange(40), np.arange(24)]
  _, errors = _errors(x, data[1], rows)
  found, num_early = resolve_fn(codes, errors)
  assert len(np.unique(found, axis=0)) == len(again) == K**L
  assert num_early > 0
  assert (resolve_fn(codes, errors)[0] == found).all()  # The same again.
  one_more = np.concatenate([codes, codes[:1]])
  _, errors = _errors(x, data[1], np.r_[rows, 0])
  found = resolve_fn(one_more, errors)[0]
  assert len(np.unique(found, axis=0)) == K**L


def test_backtrack_adds_less_error_than_nearest(data):
  x, books, codes, errors = data
  near, back = (
    f(codes, errors)[0] for f in (resolve.nearest, resolve.backtrack)
  )
  assert len(np.unique(back, axis=0)) == len(x)
  assert _error(x, books, codes) < _error(x, books, back)
  assert _error(x, books, back) < _error(x, books, near)


def test_large_groups_are_settled_in_pieces(data, monkeypatch):
  _, _, codes, errors = data
  whole = resolve.nearest(codes, errors, capacity=3)[0]
  monkeypatch.setattr(resolve, "WIDTH", 2)
  monkeypatch.setattr(resolve, "_NUMBERS", 1)
  for resolve_fn in (resolve.nearest, resolve.backtrack):
    found = resolve_fn(codes, errors, capacity=3)[0]
    _, sizes = np.unique(found, axis=0, return_counts=True)
    assert sizes.max() <= 3
    assert (found != whole).any()


def test_published_ids_stay(data):
  _, _, codes, errors = data
  old = resolve.nearest(codes[:25], errors)[0]
  both = np.concatenate([old, codes[25:]])
  for resolve_fn in (resolve.nearest, resolve.backtrack):
    found = resolve_fn(both, errors, num_fixed=25)[0]
    assert (found[:25] == old).all()
    assert len(np.unique(found, axis=0)) == len(codes)


def test_published_ids_that_collide_take_one_place(data):
  """Of a prefix of 4 ids 4 items have one: 3 are free."""
  _, _, codes, _ = data
  _, errors = _errors(data[0], data[1], np.r_[0, 0, 0, 0, np.arange(4)])
  both = np.concatenate([codes[[0] * 4], codes[[0] * 4]])
  found, num_early = resolve.nearest(both, errors, num_fixed=4)
  assert len(np.unique(found[3:], axis=0)) == 5
  assert num_early > 0  # The fourth found no room.
  assert (found[4:, :2] == codes[0, :2]).all(axis=1).sum() == 3


def test_errors_of_levels_are_those_of_decoded_variants(data, monkeypatch):
  x, books, codes, errors = data
  codec, _ = _errors(x, books)
  decoded = errors_lib.DecodedErrors(
    errors.sizes, 3, lambda rows: x[rows], codec.decode
  )
  at = np.array([3, 3, 7])
  rows = np.arange(10)
  want = decoded.children(decoded.read(rows), at, codes[at], L - 1)
  for word in range(K):  # At a level before, too.
    variant = codes[7].copy()
    variant[1] = word
    got = decoded.children(x[rows], [7], codes[[7]], 1)[0, word]
    assert got == pytest.approx(_error(x[[7]], books, [variant]), rel=1e-5)
  for table in (errors_lib._TABLE, 0):  # Products kept, or not.
    monkeypatch.setattr(errors_lib, "_TABLE", table)
    data_nX = errors.read(rows)
    got = errors.children(data_nX, at, codes[at], L - 1)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    first = errors.children(data_nX, at, codes[at], 0)
    wanted = ((x[at][:, None] - books[0][None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(first, wanted, rtol=1e-5)


@pytest.fixture(name="golden", params=list(CASES))
def _golden(request):
  x_name, epsilon = CASES[request.param]
  codec = vqjax.load(GOLDEN / f"{request.param}.pth")
  x = np.load(GOLDEN / f"{x_name}.npy")
  codes = codec.encode(x).astype(int)
  errors = errors_lib.make_errors(codec.spec, codec.tables, x, codec.decode)
  return request.param, codes, errors, epsilon


def _index(name):
  return mapping.parse(json.loads((GOLDEN / name).read_text()), name)[1]


def test_sinkhorn_is_that_of_the_released_program(golden):
  name, codes, errors, epsilon = golden
  assert (codes == _index(f"{name}_before.json")).all()
  trace = json.loads((GOLDEN / f"{name}_trace.json").read_text())
  if name == "collide_clean":  # No ties: the whole loop can be compared.
    found, rounds = resolve.sinkhorn(codes, errors, epsilon=epsilon)
    assert (found == _index(f"{name}_after.json")).all()
    assert rounds == len(trace) == 10
    short, _ = resolve.sinkhorn(codes, errors, epsilon=epsilon, max_rounds=1)
    assert (short != found).any()
  num = 0  # Picks whose two best are further apart than rounding.
  for group in itertools.chain(*trace):  # Ends of levels before never change.
    rows = np.array(group["items"])
    cost = errors.children(
      errors.read(rows), np.arange(len(rows)), codes[rows], L - 1
    )
    is_clear = np.array(group["rel_gap"]) > 1e-6
    picks = sinkhorn_lib.assign(cost, epsilon)[is_clear]
    assert (picks == np.array(group["codes"])[is_clear, -1]).all()
    num += len(picks)
  assert num == {"collide_clean": 80, "collide_wide_eps0": 4}[name]


def test_token_counts_items_with_the_same_code():
  golden = json.loads((GOLDEN / "rqkmeans_dedup.json").read_text())
  codes = np.array(golden["codes_zero_based"])
  label = groups.labels(codes)[0]
  token = resolve.token(label)
  _, index, first = mapping.parse(golden["index"], "index")
  assert first == 1
  assert (np.column_stack([codes, token]) == index).all()
  every = resolve.token(label, every=True)
  assert ((every == token) | ((every == 0) & (token == -1))).all()
  counts = groups.counts_of(codes)
  assert ((resolve.token(label, capacity=2) >= 0) == (counts > 2)).all()


def test_labels_are_those_of_distinct_prefixes():
  codes = np.random.default_rng(0).integers(-1, 3, (60, 3))
  for length, (label, num) in enumerate(groups.prefix_labels(codes), 1):
    rows = [tuple(row) for row in codes[:, :length].tolist()]
    assert num == len(set(rows)) == label.max() + 1
    for a, b in itertools.combinations(range(60), 2):
      assert (label[a] == label[b]) == (rows[a] == rows[b])
  label = groups.labels(codes, 1)[0]
  seen = {}
  for row, rank in zip(label.tolist(), groups.ranks(label), strict=True):
    assert rank == seen.get(row, 0)
    seen[row] = rank + 1
