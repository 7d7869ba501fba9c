"""Lines of metrics: their digits, and what damage leaves of them."""

import json
import pathlib

import pytest

from vqjax.training import writers


def test_small_numbers_keep_their_digits(tmp_path):
  writer = writers.Writer(tmp_path)
  writer.write(1, {"kl": 3.4612345678e-9, "usage_M": [1e-12, 123456.789]})
  writer.close()
  (row,) = writers.read_rows(tmp_path / "metrics.jsonl")
  assert row == {"step": 1, "kl": 3.46123457e-9, "usage_M": [1e-12, 123456.789]}


@pytest.mark.parametrize(
  "damage", [b"\xff\xfe{", b"[1, 2]", b"{}", b"[" * 3000, b'{"step": null}']
)
def test_damaged_lines_are_left_out(damage, tmp_path, caplog):
  file = tmp_path / "metrics.jsonl"
  file.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n{"ste')
  assert writers.read_rows(file) == [{"step": 1}, {"step": 3}]
  assert "metrics.jsonl has 1 damaged lines of 4" in caplog.text
  file.write_bytes(b'{"step": 1}\n{"ste')  # As a kill leaves it.
  caplog.clear()
  assert writers.read_rows(file) == [{"step": 1}]
  assert not caplog.text


def test_a_kill_while_old_lines_are_dropped_loses_none(tmp_path, monkeypatch):
  file = tmp_path / "metrics.jsonl"
  lines = "".join(json.dumps({"step": step}) + "\n" for step in range(9))
  file.write_text(lines)

  def dying(path, text):
    with open(path, "w") as half:
      half.write(text[:5])
    raise KeyboardInterrupt

  monkeypatch.setattr(pathlib.Path, "write_text", dying)
  with pytest.raises(KeyboardInterrupt):
    writers.Writer(tmp_path, first_step=5)
  assert file.read_text() == lines
