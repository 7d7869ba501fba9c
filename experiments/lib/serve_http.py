"""HTTP for `vqjax serve`: Python's own server, a thread for each connection.

  POST /search   queries -> {"ids": [[...]], "distances": [[...]]}
  GET /health    what is served
  GET /stats     counts, latencies, memory

All answers are JSON; an error is {"error": "a sentence"}.
"""

import contextlib
import ipaddress
import json
import pathlib
import resource
import socket
import threading
import time
import urllib.parse
from concurrent import futures
from http import server

import numpy as np
from absl import logging

from experiments.lib import errors, serve_index
from experiments.lib.serve_index import Refused

_KEPT = 8192  # Latencies, of the last requests.
_PERCENTILES = (50, 90, 99)
_IDLE_SECONDS = 60  # Of a connection that says nothing.
_DIGITS = 18  # Of a length.
_DRAINED = 64 << 20  # Bytes of a refused body that are read: an answer follows.


class Stats:
  """Counts and the latencies of the last requests; takes no more memory."""

  def __init__(self, batcher):
    """Counts from here on."""
    self._batcher = batcher
    self._began, self._lock = time.monotonic(), threading.Lock()
    self._seconds = np.zeros(_KEPT)
    self._at = np.full(_KEPT, -np.inf)
    self._num, self._errors = 0, 0

  def answered(self, seconds: float) -> None:
    """Counts a request that was searched."""
    with self._lock:
      slot = self._num % _KEPT
      self._seconds[slot], self._at[slot] = seconds, time.monotonic()
      self._num += 1

  def refused(self) -> None:
    """Counts a request that was answered by an error."""
    with self._lock:
      self._errors += 1

  def describe(self) -> dict:
    """What `/stats` says."""
    with self._lock:
      num, num_errors = self._num, self._errors
      milliseconds = 1000 * self._seconds[: min(num, _KEPT)]
      at = self._at[: min(num, _KEPT)].copy()
    now, batches = time.monotonic(), self._batcher.num_batches
    recent = min(60.0, now - self._began)
    latency = {}
    if num:
      found = np.percentile(milliseconds, _PERCENTILES)
      latency = {f"p{p}": v for p, v in zip(_PERCENTILES, found, strict=True)}
      latency["max"] = milliseconds.max()
    return {
      "seconds": round(now - self._began, 1),
      "requests": num,
      "errors": num_errors,
      "queries": self._batcher.num_queries,
      "batches": batches,
      "queries_per_batch": round(
        self._batcher.num_queries / max(batches, 1), 2
      ),
      "requests_per_second": round(
        float(np.sum(at > now - recent)) / recent, 1
      ),
      "latency_ms": {name: round(float(v), 2) for name, v in latency.items()},
      "latency_of_last": min(num, _KEPT),
      "memory_bytes": memory_bytes(),
    }


def memory_bytes() -> int:
  """Resident bytes of this process; the most so far if the system hides it."""
  with contextlib.suppress(OSError, ValueError, IndexError):
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Server(server.ThreadingHTTPServer):
  """Answers from shards until `stop`."""

  daemon_threads = False  # `server_close` waits until all have answered.
  request_queue_size = 128
  allow_reuse_address = True

  def __init__(self, address, shards, batcher, defaults, limits, most: int):
    """Binds the address; `most` are connections at once.

    Raises:
      OSError: There is no such address, or another program has it.
    """
    host = address[0]
    with contextlib.suppress(ValueError):
      if ipaddress.ip_address(host).version == 6:
        self.address_family = socket.AF_INET6
    self.shards, self.batcher = shards, batcher
    self.defaults, self.limits = defaults, limits
    self.stats = Stats(batcher)
    self._free = threading.BoundedSemaphore(most)
    self._lock, self._open, self.is_stopping = threading.Lock(), set(), False
    try:
      super().__init__(address, _Handler)
    except OSError as error:
      raise OSError(
        f"Cannot listen at {host}, port {address[1]}: {error.strerror}. Choose "
        "another --port (0: any that is free) or --host."
      ) from error

  @property
  def url(self) -> str:
    """Where it answers."""
    host, port = self.server_address[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"

  def server_bind(self):
    """Binds without asking the name service for the host's name."""
    super(server.HTTPServer, self).server_bind()
    self.server_name, self.server_port = self.server_address[:2]

  def process_request(self, request, client_address):
    """Starts a thread for a connection, unless there are too many."""
    if not self._free.acquire(blocking=False):
      self.stats.refused()
      body = b'{"error": "There are too many connections; try again later."}'
      head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\nRetry-After: 1\r\n"
        "Connection: close\r\n\r\n"
      )
      with contextlib.suppress(OSError):
        request.sendall(head.encode() + body)
      self.shutdown_request(request)
      return
    with self._lock:
      self._open.add(request)
    super().process_request(request, client_address)

  def process_request_thread(self, request, client_address):
    """Answers a connection to its end."""
    try:
      super().process_request_thread(request, client_address)
    finally:
      with self._lock:
        self._open.discard(request)
      self._free.release()

  def handle_error(self, request, client_address):
    """Says nothing of clients that leave."""
    logging.debug("A connection broke.", exc_info=True)

  def stop(self) -> None:
    """Answers the requests that have come, then closes all connections."""
    self.is_stopping = True
    with self._lock:
      for request in self._open:
        with contextlib.suppress(OSError):
          request.shutdown(socket.SHUT_RD)  # They read an end next.
    self.server_close()


class _Handler(server.BaseHTTPRequestHandler):
  """A connection."""

  protocol_version = "HTTP/1.1"
  server_version, sys_version = "vqjax", ""
  disable_nagle_algorithm = True  # Or an answer waits for 40 ms.
  timeout = _IDLE_SECONDS

  def do_GET(self):
    """Answers /health and /stats."""
    self._respond({"/health": self._health, "/stats": self._stats})

  def do_POST(self):
    """Answers /search."""
    self._respond({"/search": self._search})

  def send_error(self, code, message=None, explain=None):
    """Refuses what is no request for this server."""
    text = message or self.responses.get(code, ("Error",))[0]
    self.close_connection = True
    self.server.stats.refused()
    self._send(int(code), {"error": f"{text}."})

  def log_message(self, *_):
    """Says nothing; /stats counts."""

  def _respond(self, routes: dict) -> None:
    try:
      path = urllib.parse.urlsplit(self.path).path
      try:
        body = self._read_body()
      except OSError:  # The client has left, or says nothing more.
        self.close_connection = True
        self.server.stats.refused()
        return
      if path not in routes:
        known = "GET /health, GET /stats, POST /search"
        raise Refused(
          f"There is no {self.command} {path[:100]}; there are {known}.", 404
        )
      status, answer = 200, routes[path](body)
    except Exception as error:
      status, answer = _refusal(error, self.server.is_stopping)
      self.server.stats.refused()
    self._send(status, answer)

  def _read_body(self) -> bytes:
    """The body, if it is not too large."""
    most = self.server.limits.max_bytes
    length = self.headers.get("Content-Length", "0")
    if "Transfer-Encoding" in self.headers or not (
      length.isascii() and length.isdigit()
    ):
      self.close_connection = True
      raise Refused("The request needs a Content-Length.", 411)
    if len(length) > _DIGITS or int(length) > most:
      self.close_connection = True
      left = min(int(length[:_DIGITS]), _DRAINED)
      while left and (part := self.rfile.read(min(left, 1 << 16))):
        left -= len(part)
      raise Refused(
        f"A request may have {most} bytes, got {length:.20}: send fewer "
        "queries at a time.",
        413,
      )
    body = self.rfile.read(int(length))
    if len(body) < int(length):
      self.close_connection = True
      raise Refused(f"The body ends after {len(body)} of {length} bytes.")
    return body

  def _search(self, body: bytes) -> dict:
    began, home = time.perf_counter(), self.server
    fields = dict(
      urllib.parse.parse_qsl(
        urllib.parse.urlsplit(self.path).query, keep_blank_values=True
      )
    )
    queries_QD, settings = serve_index.read_request(
      body, fields, home.defaults, home.limits
    )
    home.shards.check(queries_QD)
    found = home.batcher.submit(queries_QD, settings).result()
    distances_QR, ids_QR = found
    home.stats.answered(time.perf_counter() - began)
    is_there = np.isfinite(distances_QR)  # JSON has no infinity.
    distances_QR = np.where(is_there, distances_QR.astype(object), None)
    return {"ids": ids_QR.tolist(), "distances": distances_QR.tolist()}

  def _health(self, _) -> dict:
    return {"status": "ok", **self.server.shards.describe()}

  def _stats(self, _) -> dict:
    return self.server.stats.describe()

  def _send(self, status: int, answer: dict) -> None:
    data = json.dumps(answer, allow_nan=False).encode()
    self.close_connection |= self.server.is_stopping
    self.send_response(status)
    self.send_header("Content-Type", "application/json")
    self.send_header("Content-Length", str(len(data)))
    if self.close_connection:
      self.send_header("Connection", "close")
    self.end_headers()
    if self.command != "HEAD":
      self.wfile.write(data)


def _refusal(error: Exception, is_stopping: bool) -> tuple[int, dict]:
  """Status and answer for an error."""
  if isinstance(error, Refused):
    return error.status, {"error": str(error)}
  is_system = isinstance(error, OSError | MemoryError | ImportError)
  if errors.is_for_user(error) and not is_system:
    return 400, {"error": str(error)}
  is_late = isinstance(error, RuntimeError | futures.CancelledError)
  if is_late and is_stopping:
    return 503, {"error": "The server is stopping."}
  logging.exception("A request failed.")
  return 500, {"error": "The search failed; the server's log says why."}
