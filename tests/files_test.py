"""Outputs and their descriptions: kills, rivals, full disks, damage."""

import concurrent.futures
import errno
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from vqjax.data import files, json_files, temporary

KIND = ("vqjax thing", 1)


class Killed(BaseException):
  """Stands for the end of a process: nothing is cleaned up after it."""


def kill_at(monkeypatch, number: int) -> None:
  """Lets the process end before its change `number` of what is on disk."""
  calls = []

  def at_point(name, path):
    calls.append(name)
    if len(calls) > number:
      raise Killed

  monkeypatch.setattr(temporary, "at_point", at_point)


def write(path, text, overwrite=False):
  meta = {"format": KIND[0], "version": KIND[1], "text": text}
  with files.atomic_output(path, overwrite, description=meta) as temp:
    temp.write_text(text)
  return meta


def read(path):
  """What a reader takes from a file and its description."""
  found = files.read_description(path, KIND)
  files.check_file(path, found)
  return path.read_text(), found.get("text")


@pytest.mark.parametrize("is_there", [False, True])
def test_a_kill_leaves_nothing_or_a_whole_output(tmp_path, is_there):
  states = set()
  for number in range(20):
    path = tmp_path / str(number) / "a.txt"
    if is_there:
      write(path, "old")
    with pytest.MonkeyPatch.context() as patch:
      kill_at(patch, number)
      try:
        write(path, "new text", overwrite=is_there)
      except Killed:
        pass
      else:
        break
    state = read(path) if path.exists() else None
    assert state in (None, ("old", "old"), ("new text", "new text"))
    states.add(state)
    if is_there or state is None:  # The same command again.
      write(path, "new text", overwrite=is_there)
    assert read(path) == ("new text", "new text")
    found = files.read_json(files.description_path(path))
    assert found["bytes"] == path.stat().st_size
  assert number > 6
  assert states == {None, *([("old", "old")] if is_there else [])} | {
    ("new text", "new text")
  }


def test_a_file_without_a_description_loses_the_old_one(tmp_path):
  path = tmp_path / "a.txt"
  write(path, "old")
  with files.atomic_output(path, overwrite=True) as temp:
    temp.write_text("new")
  assert os.listdir(tmp_path) == ["a.txt"]


def test_of_two_writers_one_succeeds(tmp_path):
  path = tmp_path / "a.txt"

  def attempt(text):
    meta = {"format": KIND[0], "version": KIND[1], "text": text}
    with files.atomic_output(path, description=meta) as temp:
      temp.write_text(text)
      barrier.wait()

  for _ in range(5):
    barrier = threading.Barrier(4)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      done = [pool.submit(attempt, f"text {i}") for i in range(4)]
    errors = [d.exception() for d in done]
    assert sum(error is None for error in errors) == 1
    assert sum(isinstance(e, FileExistsError) for e in errors) == 3
    text, described = read(path)
    assert text == described
    for found in tmp_path.iterdir():
      found.unlink()


def test_a_description_of_others_is_not_replaced(tmp_path):
  path, beside = tmp_path / "a.txt", tmp_path / "a.txt.json"
  beside.write_text('{"mine": 1}')
  with pytest.raises(FileExistsError, match="a.txt.json exists already and"):
    files.check_output(path, described=True)
  with pytest.raises(FileExistsError, match="a.txt.json exists already and"):
    write(path, "text")
  write(path, "text", overwrite=True)


def test_temporary_files_of_dead_processes_go(tmp_path, monkeypatch):
  code = (
    "import os, sys; from vqjax.data import files\n"
    "with files.atomic_output(sys.argv[1]) as t:\n"
    "  t.write_text('half'); os._exit(9)"
  )
  subprocess.run([sys.executable, "-c", code, tmp_path / "a.txt"], check=False)
  (left,) = tmp_path.iterdir()
  with temporary.beside(tmp_path / "b.txt") as living:
    living.write_text("of this process")
    foreign = tmp_path / left.name.replace("tmp-", "tmp-x")
    foreign.write_text("of another host")
    for path in (living, foreign):
      os.utime(path, (0, 0))
    monkeypatch.setattr(temporary, "_cleaned", set())
    files.check_output(tmp_path / "c.txt")
    assert left.exists()  # It is young.
    os.utime(left, (time.time() - 100,) * 2)
    monkeypatch.setattr(temporary, "_cleaned", set())
    files.check_output(tmp_path / "c.txt")
    assert not left.exists()
    assert living.exists()
    assert foreign.exists()


def test_what_cannot_be_written_is_found_before(tmp_path):
  (tmp_path / "file").write_text("")
  with pytest.raises(NotADirectoryError, match="file is a file, not a folder"):
    files.check_output(tmp_path / "file" / "a.npy")
  with pytest.raises(OSError, match="will take about .* MB free; free some"):
    files.check_output(tmp_path / "a.npy", num_bytes=1 << 60)
  files.check_output(tmp_path / "new" / "folder" / "a.npy")
  assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(sys.platform != "linux", reason="writes into /proc")
def test_a_folder_that_takes_no_files_is_found_before():
  with pytest.raises(OSError, match="/proc/x/a.npy cannot be written"):
    files.check_output("/proc/x/a.npy")


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError("4096 requested and 512 written"),
    RuntimeError("Can't decrement id ref count (errno = 28, ...)"),
    ValueError('I/O error: Os { code: 28, kind: StorageFull, message: "" }'),
  ],
)
def test_full_disks_of_all_libraries_are_one_line(tmp_path, error):
  def fail():
    with files.atomic_output(tmp_path / "a.npy") as temp:
      temp.write_text("abc")
      raise error

  with pytest.raises(OSError, match="disk is full: could not write .*a.npy"):
    fail()
  assert os.listdir(tmp_path) == []


def test_find_made(tmp_path):
  path, wanted = tmp_path / "a.txt", {"text": "abc"}
  assert files.find_made(path, wanted) is None
  write(path, "abc")
  assert files.find_made(path, wanted)["bytes"] == 3
  assert files.find_made(path, wanted, overwrite=True) is None
  with pytest.raises(FileExistsError, match="with text=abc, now it is x; cho"):
    files.find_made(path, {"text": "x"})
  path.write_text("abx")
  with pytest.raises(ValueError, match="does not match the checksum"):
    files.find_made(path, wanted)
  path.write_text("ab")
  with pytest.raises(ValueError, match="has 2 bytes, its description .* 3"):
    files.find_made(path, wanted)
  files.description_path(path).unlink()
  with pytest.raises(FileExistsError, match="without a description"):
    files.find_made(path, wanted)
  path.unlink()
  assert files.find_made(path, wanted) is None


@pytest.mark.parametrize(
  ("text", "said"),
  [
    (b"[" * 3000 + b"]" * 3000, "more than 64 brackets"),
    (b"[" * 300_000, "more than 64 brackets|damaged"),
    (b'{"a": ' * 70 + b"1" + b"}" * 70, "more than 64 brackets"),
    (b'{"a": "\xff"}', "not text in UTF-8 at byte 7"),
    (b'{"a": ', "damaged, or no JSON file: Expecting value"),
    (b"[1]", "expected an object, got list"),
    (b"null", "expected an object, got NoneType"),
    (b"", "damaged"),
  ],
)
def test_damaged_json_is_one_sentence(tmp_path, text, said):
  path = tmp_path / "a.json"
  path.write_bytes(text)
  with pytest.raises(ValueError, match=said) as e:
    json_files.read_json(path)
  assert str(path) in str(e.value)
  path.write_text(json.dumps({"a": [[1, {"b": 2}]]}))
  assert json_files.read_json(path) == {"a": [[1, {"b": 2}]]}


def test_fields_have_types():
  found = {"n": 3, "sizes": [1, 2], "flag": True}
  good = {"n": int, "sizes": [int], "flag": bool}
  json_files.check_fields("a.json", found, good)
  for name, kind in (("n", str), ("sizes", int), ("flag", int), ("x", str)):
    with pytest.raises(ValueError, match=f"a.json is damaged: its '{name}' is"):
      json_files.check_fields("a.json", found, {name: kind})
  with pytest.raises(ValueError, match="its 'sizes' is"):
    json_files.check_fields("a.json", {"sizes": [1, "2"]}, {"sizes": [int]})
