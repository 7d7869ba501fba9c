"""Figures of ids, against loops, and the mappings that are read for them."""

import collections

import numpy as np
import pytest

from vqjax import id_reports
from vqjax.ids import duplicates, mapping, pictures, report


@pytest.fixture(name="codes", scope="module")
def _codes():
  return np.random.default_rng(0).integers(0, 3, (50, 3)) * np.array([1, 1, 2])


def test_figures_are_those_of_loops(codes):
  rows = np.array([0, 7])
  near = np.array([[1, 2, 3], [8, 9, 10]])
  found = report.figures(codes, [3, 4, 5], (rows, near))
  for length, got in enumerate(found["prefixes"], 1):
    prefixes = [tuple(row) for row in codes[:, :length].tolist()]
    counts = collections.Counter(prefixes)
    assert got["items"] == 50
    assert got["distinct"] == len(counts)
    assert got["collision_rate"] == (50 - len(counts)) / 50
    shared = sum(n for n in counts.values() if n > 1)
    assert got["sharing_rate"] == shared / 50
    assert got["largest_group"] == max(counts.values())
    pairs = sum(n * (n - 1) for n in counts.values())
    assert got["chance_share"] == pytest.approx(pairs / (50 * 49))
    same = [
      prefixes[a] == prefixes[b]
      for a, n in zip(rows, near, strict=True)
      for b in n
    ]
    assert got["neighbour_share"] == pytest.approx(np.mean(same))
    if length < 3:
      longer = {tuple(row) for row in codes[:, : length + 1].tolist()}
      fans = collections.Counter(row[:-1] for row in longer)
      assert got["fan_out"] == pytest.approx(np.mean(list(fans.values())))
      assert got["largest_fan_out"] == max(fans.values())
  assert found["collision_rate"] == found["prefixes"][-1]["collision_rate"]
  for level, size, got in zip(codes.T, [3, 4, 5], found["levels"], strict=True):
    counts = [int((level == k).sum()) for k in range(size)]
    used = sum(n > 0 for n in counts)
    entropy = -sum(n / 50 * np.log2(n / 50) for n in counts if n)
    apart = np.mean([[abs(a - b) for a in counts] for b in counts])
    assert (got["size"], got["used"], got["dead"]) == (size, used, size - used)
    assert got["utilisation"] == used / size
    assert got["entropy"] == pytest.approx(entropy)
    assert got["perplexity"] == pytest.approx(2**entropy)
    assert got["gini"] == pytest.approx(apart / (2 * 50 / size))


def test_missing_tokens_and_one_item_have_figures():
  codes = np.array([[0, 1, -1], [0, 2, 0], [0, 2, 1]])
  found = report.figures(codes, None)
  assert found["distinct"] == 3
  assert [level["size"] for level in found["levels"]] == [1, 3, 2]
  assert found["levels"][2]["perplexity"] == 2  # Of those that have one.
  alone = report.figures(codes[:1, :1], None)
  assert alone["collision_rate"] == 0
  assert alone["levels"][0]["entropy"] == 0
  for head, rows in report.tables({"after": alone}):
    assert all(len(row) == len(head) for row in rows)


def test_neighbours_are_the_nearest_other_rows():
  x = np.random.default_rng(0).normal(size=(40, 4)).astype("f4")
  x[20:32] = x[0]  # More duplicates than neighbours.
  rows, ids = id_reports.neighbours(x)
  assert rows.tolist() == list(range(40))
  assert ids.shape == (40, 10)
  for row, got in zip(rows, ids, strict=True):
    away = ((x - x[row]) ** 2).sum(axis=1)
    away[row] = np.inf
    np.testing.assert_allclose(away[got], np.sort(away)[:10], atol=1e-5)
  assert id_reports.neighbours(x[:1]) is None
  assert id_reports.neighbours(x[:3])[1].shape == (3, 2)


def test_duplicates_are_listed_with_their_floor():
  x = np.random.default_rng(0).normal(size=(9, 4)).astype("f4")
  x[4], x[8], x[6] = x[1], x[1], x[5]
  x[0, 0], x[2] = 0, x[0]
  x[2, 0] = -0.0
  items = np.array(list("abcdefghi"), object)
  sums = duplicates.checksums(x)
  found = duplicates.listing(items, sums)
  assert found["groups"] == [["a", "c"], ["b", "e", "i"], ["f", "g"]]
  assert (found["items"], found["distinct_vectors"]) == (7, 5)
  assert found["floor"] == pytest.approx(4 / 9)
  rows, unit = duplicates.units(sums)
  assert rows.tolist() == [0, 1, 3, 5, 7]
  assert unit.tolist() == [0, 1, 0, 2, 1, 3, 3, 4, 1]
  # Of published items 1 and 4, told apart, a later one joins the first.
  rows, unit = duplicates.units(sums, np.arange(6)[:, None])
  assert rows.tolist() == [0, 1, 2, 3, 4, 5, 7]
  assert unit.tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 1]


@pytest.mark.parametrize(
  ("found", "codes", "first"),
  [
    ({"a": ["<a_0>", "<b_7>"], "b": ["<a_1>"]}, [[0, 7], [1, -1]], 0),
    ({"a": ["<a_1>", "<b_7>"], "b": ["<a_3>"]}, [[0, 6], [2, -1]], 1),
    ({"7": [0, 12]}, [[0, 12]], 0),
    ({"7": "<a_0><b_2>", "8": "a_1 b_0"}, [[0, 2], [1, 0]], 0),
  ],
)
def test_mappings_of_other_programs_are_read(found, codes, first):
  items, got, number = mapping.parse(found, "index.json")
  assert items.tolist() == list(found)
  assert (got.tolist(), number) == (codes, first)


@pytest.mark.parametrize(
  ("value", "word"),
  [
    (["<a_x>"], "<a_x>"),
    ([], r"\[\]"),
    ([True], "True"),
    ({}, "{}"),
    ("", "''"),
    ([-1], "-1"),
  ],
)
def test_what_is_no_id_is_named(value, word):
  with pytest.raises(ValueError, match=f"item 'b' must be tokens.*{word}"):
    mapping.parse({"a": [0], "b": value}, "index.json")
  with pytest.raises(ValueError, match="has no items"):
    mapping.parse({}, "index.json")


def test_items_find_their_vectors():
  items = np.array(["3", "1"], object)
  assert mapping.rows_of(items, None, 4, "a").tolist() == [3, 1]
  assert mapping.rows_of(items, np.array([1, 2, 3]), 3, "a").tolist() == [2, 0]
  with pytest.raises(ValueError, match="item '3'.*row numbers, 0 to 2"):
    mapping.rows_of(items, None, 3, "a")
  with pytest.raises(ValueError, match="item '3'.*item ids of this mapping"):
    mapping.rows_of(items, np.array(["1", "2"]), 2, "a")


def test_pictures_are_drawn_with_and_without_what_may_be_missing(
  tmp_path, codes
):
  near = np.array([0, 7]), np.array([[1, 2], [8, 9]])
  after = report.figures(codes, None, near)
  both = {"before": after, "after": after}
  for name, found, before in (
    ("a", both, codes),
    ("b", {"after": report.figures(codes, None)}, None),
  ):
    path = pictures.draw(
      tmp_path / f"{name}.png", codes, found, before_NL=before
    )
    assert path.read_bytes().startswith(b"\x89PNG")
