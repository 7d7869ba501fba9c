"""Files from a server on loopback that cuts, lies and refuses."""

import email.utils
import gzip
import hashlib
import io
import tarfile
import time

import numpy as np
import pytest

from tests import file_server
from vqjax.data import fetching, files, transfer, transport

DATA = np.random.default_rng(0).bytes(700_000)
SIZE = len(DATA)
CUT = 300_000


@pytest.fixture(name="waits", autouse=True)
def _waits(monkeypatch):
  waits = []
  monkeypatch.setattr(transfer, "_sleep", waits.append)
  return waits


@pytest.fixture(name="server")
def _server():
  with file_server.running(file_server.FileServer()) as server:
    server.files["/x.bin"] = DATA
    yield server


@pytest.fixture(name="order")
def _order(server, tmp_path):
  url = f"{server.url}/x.bin"
  return transfer.Order(tmp_path / "data" / "x.bin", url, url)


def _names(order):
  return sorted(path.name for path in order.path.parent.iterdir())


def _is_done(order, data=DATA):
  assert order.path.read_bytes() == data
  assert _names(order) == ["x.bin", "x.bin.download.json"]


def test_a_file_comes_whole_with_its_record(order):
  record = fetching.fetch(order)
  _is_done(order)
  checksum = hashlib.sha256(DATA).hexdigest()
  assert (record["bytes"], record["sha256"]) == (len(DATA), checksum)
  assert fetching.find(order, is_thorough=True) == record
  with pytest.raises(FileExistsError, match="x.bin exists already"):
    fetching.fetch(order)


def test_a_cut_connection_goes_on_by_range(server, order, waits):
  server.faults = [{"cut": CUT}, {"cut": 1000}]
  fetching.fetch(order)
  _is_done(order)
  ranges = [None, f"bytes={CUT}-", f"bytes={CUT + 1000}-"]
  assert [asked for _, asked in server.asked] == ranges
  assert waits == [1, 1]  # Each break came after new bytes.


def test_a_stopped_process_goes_on_by_range(server, order, monkeypatch):
  """What a kill leaves is a part and what it is of."""
  server.faults = [{"cut": CUT}]

  def stop(seconds):
    raise KeyboardInterrupt

  monkeypatch.setattr(transfer, "_sleep", stop)
  with pytest.raises(KeyboardInterrupt):
    fetching.fetch(order)
  assert _names(order) == [".x.part.bin", ".x.part.bin.json"]
  assert fetching.num_here(order) == CUT
  fetching.fetch(order)
  _is_done(order)
  assert server.asked[-1] == ("/x.bin", f"bytes={CUT}-")


def _leave_part(order, data, version='"1"', total=SIZE):
  part = transfer.part_path(order)
  part.parent.mkdir(parents=True, exist_ok=True)
  part.write_bytes(data)
  state = {"url": order.url, "version": version, "total": total}
  files.write_json(part.with_name(part.name + ".json"), state, overwrite=True)
  return part


def test_a_whole_part_needs_no_server(server, order):
  _leave_part(order, DATA)
  fetching.fetch(order)
  _is_done(order)
  assert server.asked == []


def test_416_is_the_end_if_all_is_here(server, order):
  _leave_part(order, DATA, total=None)
  fetching.fetch(order)
  _is_done(order)
  assert server.asked == [("/x.bin", f"bytes={len(DATA)}-")]


@pytest.mark.parametrize("num", [len(DATA) + 5, 2 * len(DATA)])
def test_416_of_a_part_too_long_starts_anew(num, server, order):
  _leave_part(order, b"a" * num, total=None)
  fetching.fetch(order)
  _is_done(order)
  assert server.asked[-1] == ("/x.bin", None)


def test_a_server_without_ranges_starts_anew(server, order):
  server.has_ranges = False
  server.faults = [{"cut": CUT}]
  fetching.fetch(order)
  _is_done(order)
  # It is asked to continue, which it cannot, and then for the whole file.
  assert [asked for _, asked in server.asked] == [None, f"bytes={CUT}-", None]


def test_a_server_without_ranges_that_always_cuts_is_given_up(server, order):
  server.has_ranges = False
  server.faults = [{"cut": CUT}] * 99
  with pytest.raises(OSError, match=f"ended at byte {CUT} of {len(DATA)}"):
    fetching.fetch(order)
  assert len(server.asked) < 20


@pytest.mark.parametrize("has_if_range", [True, False])
def test_a_file_that_changed_between_parts_starts_anew(
  has_if_range, server, order, monkeypatch, caplog
):
  """Also if the server answers with a range of the new one."""
  caplog.set_level("INFO", "absl")
  _leave_part(order, b"a" * CUT, version='"old"')
  if not has_if_range:
    monkeypatch.setattr(file_server._Handler, "_is_same", lambda self: True)
  fetching.fetch(order)
  _is_done(order)
  assert "the file on the server has changed since" in caplog.text
  assert len(server.asked) == (2 if has_if_range else 3)


def test_a_file_of_another_size_starts_anew(server, order):
  server.version = ""
  _leave_part(order, b"a" * CUT, version="", total=len(DATA) + 1)
  fetching.fetch(order)
  _is_done(order)
  assert server.asked[-1] == ("/x.bin", None)


def test_a_part_of_another_address_is_dropped(server, order):
  _leave_part(order._replace(url="http://elsewhere/x.bin"), b"a" * CUT)
  fetching.fetch(order)
  _is_done(order)
  assert server.asked == [("/x.bin", None)]


def test_a_wrong_range_starts_anew(server, order):
  _leave_part(order, DATA[:CUT])
  at = f"bytes 7-{len(DATA) - 1}/{len(DATA)}"
  server.faults = [{"headers": {"Content-Range": at}}]
  fetching.fetch(order)
  _is_done(order)
  assert server.asked[0] == ("/x.bin", f"bytes={CUT}-")
  assert server.asked[-1] == ("/x.bin", None)


def test_a_size_that_is_a_lie_is_given_up(server, order):
  server.has_ranges = False
  server.faults = [{"size": len(DATA) + 9}] * 99
  said = f"ended at byte {len(DATA)} of {len(DATA) + 9}, after 8 tries"
  with pytest.raises(OSError, match=said):
    fetching.fetch(order)
  assert not order.path.exists()


def test_a_server_that_says_no_size(server, order):
  server.faults = [{"size": None}]
  fetching.fetch(order)
  _is_done(order)
  assert server.asked == [("/x.bin", None)]


@pytest.mark.parametrize("as_date", [False, True])
def test_503_is_waited_for_as_long_as_it_asks(as_date, server, order, waits):
  seconds = "7"
  if as_date:
    seconds = email.utils.formatdate(time.time() + 7.5, usegmt=True)
  server.faults = [{"status": 503, "headers": {"Retry-After": seconds}}]
  server.faults += [{"status": 503}, {"status": 429}]
  fetching.fetch(order)
  _is_done(order)
  assert waits[0] == pytest.approx(7, abs=1.5)
  assert waits[1:] == [2, 4]


def test_patience_ends(server, order, waits):
  server.faults = [{"status": 503, "headers": {"Retry-After": "3600"}}]
  with pytest.raises(OSError, match="503.* come back in 3600 s. Run the same"):
    fetching.fetch(order)
  server.faults = [{"status": 500}] * 99
  with pytest.raises(OSError, match="500 Internal.*after 8 tries"):
    fetching.fetch(order)
  assert sum(waits) > 60


@pytest.mark.parametrize(
  ("fault", "kind", "message"),
  [
    ({"status": 404}, FileNotFoundError, "answers 404 Not Found.*--base_url"),
    ({"status": 403}, PermissionError, "answers 403 Forbidden"),
    ({"status": 416}, OSError, "answers 416 .*no waiting"),
    ({"headers": {"Content-Type": "text/html"}}, OSError, "a web page"),
    ({"headers": {"Content-Encoding": "gzip"}}, OSError, "gzip, which was not"),
  ],
)
def test_refusals_are_sentences(fault, kind, message, server, order, waits):
  server.faults = [fault]
  with pytest.raises(kind, match=message):
    fetching.fetch(order)
  assert not waits
  assert not order.path.exists()


def test_no_server_is_a_sentence(order):
  order = order._replace(url="http://127.0.0.1:9/x.bin")
  with pytest.raises(OSError, match="127.0.0.1:9/x.bin: no answer .*8 tries"):
    fetching.fetch(order)
  with pytest.raises(ValueError, match="begin with one of http, .*'file:///x'"):
    transport.open_url("file:///x")


def test_a_known_checksum_is_compared(order):
  wrong = order._replace(sha256="0" * 64)
  with pytest.raises(ValueError, match="not the 0{16}... that its publisher"):
    fetching.fetch(wrong)
  assert not order.path.exists()
  fetching.fetch(order._replace(sha256=hashlib.sha256(DATA).hexdigest()))
  _is_done(order)


def test_a_second_download_must_be_the_same(server, order):
  fetching.fetch(order)
  order.path.unlink()
  server.files["/x.bin"], server.version = DATA[::-1], '"2"'
  with pytest.raises(ValueError, match="that it had on 20"):
    fetching.fetch(order)
  assert not order.path.exists()
  fetching.fetch(order, overwrite=True)
  _is_done(order, DATA[::-1])


def test_a_file_changed_since_it_came_is_found(order):
  fetching.fetch(order)
  order.path.write_bytes(DATA[:-1] + b"a")
  assert fetching.find(order)
  with pytest.raises(ValueError, match="x.bin is not what was .*other content"):
    fetching.find(order, is_thorough=True)
  order.path.write_bytes(b"a")
  with pytest.raises(ValueError, match="has 1 bytes. Add --overwrite"):
    fetching.find(order)
  with pytest.raises(FileExistsError, match="not from http://other"):
    fetching.find(order._replace(source="http://other"))


@pytest.mark.parametrize("cut", [None, CUT])
def test_gz_is_unpacked_while_it_comes(cut, server, order):
  """Of two members, as some programs write it."""
  packed = gzip.compress(DATA[:CUT], 1) + gzip.compress(DATA[CUT:], 1)
  server.files["/x.bin.gz"] = packed
  order = order._replace(
    url=f"{server.url}/x.bin.gz", source=f"{server.url}/x.bin.gz", pack="gz"
  )
  server.faults = [{"cut": cut}]
  record = fetching.fetch(order)
  _is_done(order)
  assert record["bytes"] == len(packed)
  assert fetching.find(order, is_thorough=True) == record


@pytest.mark.parametrize("num", [5, 100_000])
def test_a_damaged_gz_is_a_sentence(num, server, order):
  server.files["/x.bin.gz"] = gzip.compress(DATA, 1)[:-num]
  order = order._replace(url=f"{server.url}/x.bin.gz", pack="gz")
  with pytest.raises(ValueError, match="x.bin.gz is damaged, or no gz"):
    fetching.fetch(order)
  assert _names(order) == []


def _tar(members) -> bytes:
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode="w:gz") as archive:
    for name, data in members.items():
      info = tarfile.TarInfo(name)
      info.size = len(data)
      archive.addfile(info, io.BytesIO(data))
  return out.getvalue()


def test_tar_is_unpacked_beside_what_is_there(server, order):
  server.files["/x.tar.gz"] = _tar({"gnd/a": DATA, "gnd/sub/b": b"b"})
  folder = order.path.with_name("gnd")
  order = transfer.Order(folder, "s", f"{server.url}/x.tar.gz", "tar")
  folder.mkdir(parents=True)
  (folder / "a").write_bytes(DATA)  # Of an earlier download.
  server.faults = [{"cut": CUT}]
  record = fetching.fetch(order)
  assert (folder / "sub" / "b").read_bytes() == b"b"
  assert set(record["files"]) == {"gnd/a", "gnd/sub/b"}
  assert fetching.find(order, is_thorough=True) == record
  assert _names(order) == ["gnd", "gnd.download.json"]


def test_a_tar_stays_in_its_folder(server, order):
  server.files["/x.tar.gz"] = _tar({"../outside": b"b"})
  url = f"{server.url}/x.tar.gz"
  order = transfer.Order(order.path.with_name("gnd"), url, url, "tar")
  with pytest.raises(ValueError, match="no tar archive"):
    fetching.fetch(order)
  assert not (order.path.parent / "outside").exists()


def test_two_processes_do_not_mix(order):
  part = transfer.part_path(order)
  part.parent.mkdir()
  with (
    transfer.locked(part),
    pytest.raises(OSError, match="Another process is fetching"),
  ):
    fetching.fetch(order)


def test_a_disk_without_room_is_a_sentence(order):
  order = order._replace(unpacked_bytes=1 << 60)
  with pytest.raises(OSError, match="x.bin will take about .* MB free"):
    fetching.fetch(order)


@pytest.mark.parametrize("has_rest", [True, False])
def test_ftp_goes_on_too(has_rest, tmp_path):
  with file_server.running(file_server.FtpServer()) as server:
    server.files["/x.bin"], server.cuts = DATA, [CUT]
    server.has_rest = has_rest
    url = f"{server.url}/x.bin"
    order = transfer.Order(tmp_path / "x.bin", url, url)
    assert fetching.size_of(order) == len(DATA)
    fetching.fetch(order)
    _is_done(order)
    assert server.asked == ([0, CUT] if has_rest else [0, 0, 0])
    url = f"{server.url}/none"
    with pytest.raises(FileNotFoundError, match="/none answers 550"):
      fetching.fetch(transfer.Order(tmp_path / "none", url, url))


def test_sizes_are_asked_for(server, order):
  assert fetching.size_of(order) == len(DATA)
  with pytest.raises(FileNotFoundError, match="answers 404"):
    fetching.size_of(order._replace(url=f"{server.url}/none"))
  server.has_head = False
  assert fetching.size_of(order) is None
