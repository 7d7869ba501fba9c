"""Servers on loopback that misbehave as asked, over http and ftp."""

import contextlib
import http.server
import re
import socketserver
import threading


class FileServer(http.server.ThreadingHTTPServer):
  """Serves `files`, bytes by path; `faults` are taken one per GET.

  A fault is a dict: `status` with `headers` instead of the file; `cut`, after
  how many bytes the connection breaks; `size`, what Content-Length claims;
  `headers` of the answer.
  """

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _Handler)
    self.files, self.faults, self.asked = {}, [], []
    self.has_ranges, self.has_head, self.version = True, True, '"1"'

  @property
  def url(self) -> str:
    return f"http://127.0.0.1:{self.server_port}"

  def handle_error(self, *_):
    pass  # A client that hung up.


class _Handler(http.server.BaseHTTPRequestHandler):
  def log_message(self, *_):
    pass

  def do_HEAD(self):  # noqa: N802
    data = self.server.files.get(self.path)
    if not self.server.has_head:
      return self._refuse(405, {})
    if data is None:
      return self._refuse(404, {})
    return self._head(200, {"Content-Length": len(data)})

  def do_GET(self):  # noqa: N802
    asked = self.headers.get("Range")
    self.server.asked.append((self.path, asked))
    fault = self.server.faults.pop(0) if self.server.faults else {}
    data = self.server.files.get(self.path)
    if "status" in fault:
      return self._refuse(fault["status"], fault.get("headers", {}))
    if data is None:
      return self._refuse(404, {})
    first, status, headers = 0, 200, {}
    if asked and self.server.has_ranges and self._is_same():
      first, status = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]), 206
      if first >= len(data):
        return self._refuse(416, {"Content-Range": f"bytes */{len(data)}"})
      at = f"bytes {first}-{len(data) - 1}/{len(data)}"
      headers = {"Content-Range": at}
    if self.server.version:
      headers["ETag"] = self.server.version
    size = fault.get("size", len(data) - first)
    if size is not None:
      headers["Content-Length"] = size
    self._head(status, headers | fault.get("headers", {}))
    self.wfile.write(data[first:][: fault.get("cut")])
    self.close_connection = True
    return None

  def _is_same(self) -> bool:
    wanted = self.headers.get("If-Range", self.server.version)
    return wanted == self.server.version

  def _refuse(self, status, headers) -> None:
    self._head(status, {"Content-Length": 0, **headers})

  def _head(self, status, headers) -> None:
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name, str(value))
    self.end_headers()


class FtpServer(socketserver.ThreadingTCPServer):
  """As much of an ftp server as `ftplib` needs to read files."""

  daemon_threads = True

  def __init__(self):
    super().__init__(("127.0.0.1", 0), _FtpHandler)
    self.files, self.cuts, self.asked, self.has_rest = {}, [], [], True

  @property
  def url(self) -> str:
    return f"ftp://127.0.0.1:{self.server_address[1]}"


class _FtpHandler(socketserver.StreamRequestHandler):
  def handle(self):
    server, rest = self.server, 0
    say = lambda text: self.wfile.write(f"{text}\r\n".encode())
    say("220 hello")
    for line in self.rfile:
      verb, _, value = line.decode().strip().partition(" ")
      data = server.files.get(value)
      if verb in ("USER", "PASS"):
        say("230 in")
      elif verb == "TYPE":
        say("200 binary")
      elif verb == "MDTM":
        say("213 20260101000000")
      elif verb in ("SIZE", "RETR") and data is None:
        say("550 no such file")
      elif verb == "SIZE":
        say(f"213 {len(data)}")
      elif verb == "REST" and server.has_rest:
        rest = int(value)
        say("350 from there")
      elif verb == "PASV":
        passive = socketserver.socket.create_server(("127.0.0.1", 0))
        port = passive.getsockname()[1]
        say(f"227 in (127,0,0,1,{port >> 8},{port & 255})")
      elif verb == "RETR":
        server.asked.append(rest)
        say("150 comes")
        cut = server.cuts.pop(0) if server.cuts else None
        with passive, passive.accept()[0] as connection:
          connection.sendall(data[rest:][:cut])
        rest = 0
        say("226 done" if cut is None else "426 broken")
      else:
        say("502 not known")


@contextlib.contextmanager
def running(server):
  """Runs a server until the block ends."""
  thread = threading.Thread(target=server.serve_forever, args=(0.01,))
  thread.start()
  try:
    yield server
  finally:
    server.shutdown()
    server.server_close()
    thread.join()
