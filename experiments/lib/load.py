r"""Sends queries to `vqjax serve` at a steady rate, and says what came back.

  python -m experiments.lib.load --queries=query.npy --rate=200 --seconds=600 \
      --index=my_index

Each request has one query. They are sent when they are due, whether or not the
answers to earlier ones have come, as long as a connection is free; a latency
counts from when its request was due. --index also compares all answers with
those of the library, at the server's default settings.
"""

import http.client
import json
import threading
import time
import urllib.parse
from typing import NamedTuple

import numpy as np
from absl import logging

from experiments.lib import cli, serve_index
from vqjax.codec import open_array
from vqjax.core import check_range
from vqjax.data import batches

REQUIRED = ("queries",)
OPTIONS = {
  "url": cli.Option(str, "http://127.0.0.1:8000", "The server."),
  "queries": cli.Option(str, None, "Vectors to send, again and again."),
  "rate": cli.Option(float, 200.0, "Requests a second."),
  "seconds": cli.Option(float, 600.0, "How long."),
  "connections": cli.Option(int, 16, "Connections that are kept open."),
  "k": cli.Option(int, 10, "Results of a query."),
  "index": cli.Option(
    str, None, "Folder of the index, or several: compares the answers."
  ),
}
_TOLERANCE = 1e-4  # Of a distance: float32 sums of batches of another size.


class Result(NamedTuple):
  """Of a load; `wrong` are answers that differ from the library's."""

  sent: int
  errors: list[str]
  wrong: int
  seconds: float
  latency_ms: dict[str, float]


def ask(
  connection: http.client.HTTPConnection, method: str, path: str, body=None
) -> tuple[int, dict]:
  """Returns the status and the answer of one request."""
  connection.request(method, path, body)
  response = connection.getresponse()
  return response.status, json.loads(response.read())


def connect(url: str) -> http.client.HTTPConnection:
  """Returns a connection that is kept open."""
  parts = urllib.parse.urlsplit(url)
  return http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)


def send(
  url: str,
  bodies: list[bytes],
  num: int,
  *,
  rate: float,
  connections: int,
  is_right=lambda row, answer: True,
) -> Result:
  """Sends `num` requests, the bodies in turn, and waits for all answers."""
  seconds, errors, lock = np.zeros(num), [], threading.Lock()
  state = {"next": 0, "wrong": 0}
  began = time.perf_counter()

  def work():
    connection = connect(url)
    while True:
      with lock:
        row, state["next"] = state["next"], state["next"] + 1
      if row >= num:
        connection.close()
        return
      due = began + row / rate
      time.sleep(max(due - time.perf_counter(), 0))
      try:
        status, answer = ask(
          connection, "POST", "/search", bodies[row % len(bodies)]
        )
        if status != 200:
          raise OSError(f"{status}: {answer['error']}")
        seconds[row] = time.perf_counter() - due
        if not is_right(row % len(bodies), answer):
          with lock:
            state["wrong"] += 1
      except (OSError, ValueError, http.client.HTTPException) as error:
        connection.close()
        with lock:
          errors.append(str(error) or type(error).__name__)

  threads = [threading.Thread(target=work) for _ in range(connections)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  taken = time.perf_counter() - began
  latency = {
    f"p{p:g}": round(1000 * float(np.percentile(seconds, p)), 2)
    for p in (50, 90, 99, 99.9, 100)
  }
  return Result(num, errors, state["wrong"], taken, latency)


def make_check(shards, queries_QD, k: int):
  """Returns whether an answer to query `row` is the library's."""
  settings = serve_index.Settings(k=k)
  distances_QR, ids_QR = shards.search(queries_QD, settings)
  rank = np.where(np.isfinite(distances_QR), distances_QR, 0)

  def is_right(row: int, answer: dict) -> bool:
    found = np.asarray(answer["distances"][0], float)
    near = np.allclose(np.nan_to_num(found), rank[row], rtol=_TOLERANCE)
    # Of equal distances either id may come first.
    same = set(answer["ids"][0]) == set(ids_QR[row].tolist())
    return bool(near and same)

  return is_right


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Sends the queries; returns the figures."""
  cli.require(config, *REQUIRED)
  check_range("--rate", config.rate, 0.1, 1e5)
  queries = open_array(config.queries, name="queries")
  queries_QD = batches.read_rows(queries, np.arange(len(queries)))
  bodies = [
    json.dumps({"queries": [row_D.tolist()], "k": config.k}).encode()
    for row_D in queries_QD
  ]
  is_right = lambda row, answer: True
  if config.index:
    shards = serve_index.Shards(config.index.split(","))
    is_right = make_check(shards, queries_QD, config.k)
  connection = connect(config.url)
  before = ask(connection, "GET", "/stats")[1]["memory_bytes"]
  connection.close()
  found = send(
    config.url,
    bodies,
    max(int(config.rate * config.seconds), 1),
    rate=config.rate,
    connections=config.connections,
    is_right=is_right,
  )
  stats = ask(connect(config.url), "GET", "/stats")[1]
  logging.info(
    "%d requests in %.1f s (%.1f a second), %d errors%s, %d answers differ\n"
    "latency in ms: %s\nmemory of the server: %.1f MB before, %.1f after\n"
    "queries in a batch: %.2f",
    *(found.sent, found.seconds, found.sent / found.seconds),
    *(len(found.errors), f" ({found.errors[0]})" if found.errors else ""),
    *(found.wrong, found.latency_ms, before / 1e6),
    *(stats["memory_bytes"] / 1e6, stats["queries_per_batch"]),
  )
  return found._asdict() | {"memory_before": before, "stats": stats}


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
