import numpy as np
import pytest

from vqjax.data import csv_files, formats

X = np.random.default_rng(0).normal(size=(25, 3)).astype(np.float32)


def _text(x=X, delimiter=",", end="\n"):
  return "".join(delimiter.join(f"{v:.9g}" for v in row) + end for row in x)


@pytest.mark.parametrize("piece_rows", [1, 5, 6, 4096])
@pytest.mark.parametrize(
  "text",
  [
    _text(),
    _text().strip(),
    "a,b,c\n" + _text() + "\n\n",
    "\ufeff" + _text(delimiter=";", end="\r\n"),
    "x\ty\tz\n" + _text(delimiter="\t"),
    _text(delimiter="  "),
  ],
)
def test_rows_come_as_an_array_has_them(
  tmp_path, monkeypatch, piece_rows, text
):
  monkeypatch.setattr(csv_files, "_PIECE_ROWS", piece_rows)
  monkeypatch.setattr(csv_files, "_SCANNED_BYTES", 64)
  monkeypatch.setattr(csv_files, "_FEW_BYTES", 30)
  path = tmp_path / "x.csv"
  path.write_bytes(text.encode())
  got = formats.open_vectors(path)
  assert (got.shape, got.dtype) == ((25, 3), np.float32)
  rows = np.random.default_rng(1).integers(-25, 25, size=60)
  for at in (slice(0, 25), slice(4, 11), slice(6, 6), rows, rows[::-1]):
    np.testing.assert_array_equal(got[at], X[at])


@pytest.mark.parametrize("piece_rows", [2, 4096])
@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("1,2", "3 numbers on each line, got 2 in row 3, '1,2'"),
    ("1,2,x", "got text in row 3"),
    ("", "in row 3, ''"),
    ("1,,3", "got text in row 3"),
  ],
)
def test_a_bad_line_is_named(tmp_path, monkeypatch, piece_rows, line, message):
  monkeypatch.setattr(csv_files, "_PIECE_ROWS", piece_rows)
  path = tmp_path / "x.csv"
  path.write_text(f"a,b,c\n{_text(X[:3])}{line}\n{_text(X[3:])}")
  with pytest.raises(ValueError, match=message):
    np.asarray(formats.open_vectors(path))


def test_what_holds_no_vectors_is_refused(tmp_path):
  path = tmp_path / "x.csv"
  path.write_text("id,name\n")
  with pytest.raises(ValueError, match="no line of numbers"):
    formats.open_vectors(path)
  path.write_text("id,name\n1,x\n")
  with pytest.raises(ValueError, match="got text in row 0, '1,x'"):
    formats.open_vectors(path)
  with pytest.raises(ValueError, match="cannot be written"):
    formats.write_vectors(path, X, overwrite=True)
