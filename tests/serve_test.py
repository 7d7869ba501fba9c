"""Indexes behind HTTP: answers, limits, errors, batches, a stop."""

import contextlib
import http.client
import io
import json
import os
import signal
import socket
import struct
import threading
import time
import types

import numpy as np
import pytest

import vqjax
from experiments import serve
from experiments.lib import batching, load, serve_http, serve_index
from vqjax.index_build import build_index

pytestmark = pytest.mark.usefixtures("one_thread")
_NUM, _DIM = 300, 8
_LIMITS = serve_index.Limits(max_bytes=20_000, max_queries=50, max_k=60)


@pytest.fixture(scope="module", name="x_ND")
def _x():
  return np.random.default_rng(0).normal(size=(_NUM, _DIM)).astype(np.float32)


@pytest.fixture(scope="module", name="folders")
def _folders(x_ND, tmp_path_factory):
  folder = tmp_path_factory.mktemp("serve")
  codec = vqjax.fit(x_ND, "rq:smoke", num_codes=3)
  half = _NUM // 2
  ids_N = np.random.default_rng(1).permutation(1000)[:_NUM]
  for name, part in {
    "whole": slice(None),
    "low": slice(0, half),
    "high": slice(half, None),
  }.items():
    index = build_index(codec, x_ND[part], 4, ids=ids_N[part])
    index.save(folder / name)
  return {name: str(folder / name) for name in ("whole", "low", "high")}


@contextlib.contextmanager
def _serving(shards, *, window_s=0.002, most=20):
  with batching.Batcher(
    shards.search, window_s=window_s, max_queries=64
  ) as batcher:
    settings = serve_index.Settings()
    home = serve_http.Server(
      ("127.0.0.1", 0), shards, batcher, settings, _LIMITS, most
    )
    thread = threading.Thread(target=home.serve_forever, args=(0.01,))
    thread.start()
    try:
      yield home
    finally:
      home.shutdown()
      home.stop()
      thread.join()


@pytest.fixture(scope="module", name="home")
def _home(folders):
  with _serving(serve_index.Shards([folders["whole"]])) as home:
    yield home


@pytest.fixture(name="ask")
def _ask(home):
  connection = load.connect(home.url)
  yield lambda *args: load.ask(connection, *args)
  connection.close()


def _npy(x) -> bytes:
  file = io.BytesIO()
  np.save(file, x)
  return file.getvalue()


def test_answers_are_those_of_the_library(ask, folders, x_ND):
  index = vqjax.load_index(folders["whole"])
  for k, nprobe in [(10, 2), (3, 4)]:
    distances, ids = index.search(x_ND[:7], k, nprobe=nprobe)
    body = {"queries": x_ND[:7].tolist(), "k": k, "nprobe": nprobe}
    for address, sent in [
      ("/search", json.dumps(body).encode()),
      (f"/search?k={k}&nprobe={nprobe}", _npy(x_ND[:7])),
      (f"/search?k={k}&nprobe={nprobe}", _npy(np.asfortranarray(x_ND[:7]))),
    ]:
      status, answer = ask("POST", address, sent)
      assert status == 200
      assert answer["ids"] == ids.tolist()
      np.testing.assert_allclose(answer["distances"], distances, rtol=1e-5)


def test_one_vector_is_one_query_and_what_is_missing_is_null(folders, x_ND):
  shards = serve_index.Shards([folders["low"]])
  with _serving(shards) as home:
    connection = load.connect(home.url)
    body = json.dumps({"queries": x_ND[0].tolist(), "k": 60, "nprobe": 1})
    status, answer = load.ask(connection, "POST", "/search", body)
    connection.close()
  assert status == 200
  assert np.shape(answer["ids"]) == (1, 60)
  assert (answer["ids"][0][-1], answer["distances"][0][-1]) == (-1, None)


def test_shards_find_what_the_whole_finds(folders, x_ND):
  shards = serve_index.Shards([folders["low"], folders["high"]])
  whole = serve_index.Shards([folders["whole"]])
  assert len(shards) == len(whole) == _NUM
  settings = serve_index.Settings(k=9, nprobe=4)
  distances, ids = whole.search(x_ND[:20], settings)
  merged, merged_ids = shards.search(x_ND[:20], settings)
  # The norms of each shard are rounded on their own.
  np.testing.assert_allclose(merged, distances, rtol=1e-4, atol=1e-4)
  # Those of equal codes are as near as each other.
  for row, last in enumerate(distances[:, -1]):
    surely = set(ids[row, distances[row] < last - 1e-3])
    assert surely <= set(merged_ids[row])
  assert np.mean(merged_ids == ids) > 0.8


def test_shards_that_do_not_fit_together(folders, monkeypatch):
  with pytest.raises(ValueError, match=r"Id \d+ is in .*low and in .*low"):
    serve_index.Shards([folders["low"], folders["low"]])
  kinds = {"a": (8, "l2"), "b": (8, "cosine")}
  opened = lambda path: types.SimpleNamespace(
    **dict(zip(("dim", "metric"), kinds[path[-1]], strict=True))
  )
  monkeypatch.setattr(serve_index.vqjax, "load_index", opened)
  with pytest.raises(ValueError, match="8 dimensions and metric cosine, but"):
    serve_index.Shards(["a", "b"])
  with pytest.raises(ValueError, match="row 1 is a vector of zeros"):
    serve_index.Shards(["b"]).check(np.eye(8, k=1)[[0, 7]])


_GOOD = [0.5] * _DIM


@pytest.mark.parametrize(
  ("body", "status", "words"),
  [
    (b"{", 400, "neither JSON nor a .npy"),
    (b"[" * 9000, 400, "neither JSON nor a .npy"),
    (b"[1]", 400, "must be like"),
    ({"queries": [[1.0, 2.0]]}, 400, "dimension 8, got 2"),
    ({"queries": [_GOOD, [1.0]]}, 400, "vectors of equal length"),
    ({"queries": []}, 400, "one vector or a list"),
    ({"queries": [["1"] * _DIM]}, 400, "of numbers"),
    ({"queries": [[1e300] * _DIM]}, 400, "finite.*row 0"),
    (b'{"queries": [[NaN,0,0,0,0,0,0,0]]}', 400, "finite.*row 0"),
    ({"queries": [_GOOD], "k": 0}, 400, "k must lie between 1 and 60, got 0"),
    ({"queries": [_GOOD], "k": 61}, 400, "between 1 and 60"),
    ({"queries": [_GOOD], "k": True}, 400, "k must be an integer"),
    ({"queries": [_GOOD], "nprobes": 3}, 400, "did you mean 'nprobe'"),
    ({"queries": [_GOOD], "num_refined": 9}, 400, "needs a refiner"),
    ({"queries": [_GOOD] * 51}, 413, "50 queries, got 51"),
    (b" " * 20_001, 413, "20000 bytes, got 20001"),
    (_npy(np.zeros((2, 3), "f4")), 400, "dimension 8, got 3"),
    (_npy(np.zeros((2, 8), "f4"))[:-1], 400, r"shape \(2, 8\).*63 bytes"),
    (_npy(np.zeros((2, 8), "c8")), 400, "must be numbers, got complex64"),
    (_npy(np.zeros((2, 8), "f4"))[:30], 400, "damaged"),
  ],
)
def test_what_is_wrong_is_said(ask, body, status, words):
  body = body if isinstance(body, bytes) else json.dumps(body).encode()
  got, answer = ask("POST", "/search", body)
  assert (got, list(answer)) == (status, ["error"])
  pytest.raises(ValueError, _fail, answer["error"]).match(words)
  # And the server goes on.
  assert ask("GET", "/health")[0] == 200


def _fail(text):
  raise ValueError(text)


def test_addresses_methods_and_requests_that_there_are_not(ask, home):
  assert ask("GET", "/search")[0] == 404
  for k in ("x", ""):
    assert ask("POST", f"/search?k={k}", _npy(np.zeros((1, 8))))[0] == 400
  status, answer = ask("PUT", "/search")
  assert (status, list(answer)) == (501, ["error"])
  for said, status in [
    (b"GET a b HTTP/1.1\r\n\r\n", b"400"),
    (b"POST /search HTTP/1.1\r\nContent-Length: x\r\n\r\n", b"411"),
    (b"POST / HTTP/1.1\r\nContent-Length: %s\r\n\r\n" % (b"9" * 5000), b"413"),
    (b"POST /search HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"411"),
  ]:
    with socket.create_connection(home.server_address[:2], 5) as raw:
      raw.sendall(said)
      raw.shutdown(socket.SHUT_WR)
      assert status in raw.makefile("rb").read()


def test_a_client_that_leaves_is_no_fault_of_the_server(ask, home, caplog):
  before = home.stats.describe()["errors"]
  with socket.create_connection(home.server_address[:2], 5) as raw:
    at_once = struct.pack("ii", 1, 0)  # Closes by a reset.
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
    raw.sendall(b"POST /search HTTP/1.1\r\nContent-Length: 99\r\n\r\n{")
    time.sleep(0.1)
  deadline = time.monotonic() + 5
  while home.stats.describe()["errors"] == before:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  assert "failed" not in caplog.text
  assert ask("GET", "/health")[0] == 200


def test_a_search_that_fails_is_not_said_to_be_a_stop(caplog):
  error = RuntimeError("RESOURCE_EXHAUSTED")
  assert serve_http._refusal(error, is_stopping=True)[0] == 503
  assert serve_http._refusal(error, is_stopping=False)[0] == 500
  assert "A request failed" in caplog.text


def test_requests_are_searched_together():
  sizes, gate = [], threading.Event()

  def search(queries_QD, settings):
    gate.wait(5)
    sizes.append(len(queries_QD))
    if settings == "bad":
      raise ValueError("bad settings")
    return queries_QD[:, 0], queries_QD[:, 1]

  x_ND = np.arange(40.0).reshape(20, 2)
  with batching.Batcher(search, window_s=0.2, max_queries=8) as batcher:
    found = [batcher.submit(x_ND[i : i + 1], "same") for i in range(20)]
    bad = batcher.submit(x_ND[:1], "bad")
    large = batcher.submit(x_ND, "same")
    gate.set()
    for i, future in enumerate(found):
      assert [part.tolist() for part in future.result(5)] == [
        [2 * i],
        [2 * i + 1],
      ]
    with pytest.raises(ValueError, match="bad settings"):
      bad.result(5)
    assert len(large.result(5)[0]) == 20
  assert sizes == [8, 8, 4, 1, 20]
  with pytest.raises(RuntimeError, match="closed"):
    batcher.submit(x_ND, "same")


def test_connections_are_limited(folders):
  with _serving(serve_index.Shards([folders["low"]]), most=1) as home:
    first, second = load.connect(home.url), load.connect(home.url)
    assert load.ask(first, "GET", "/health")[0] == 200
    assert load.ask(second, "GET", "/health")[0] == 503
    first.close()
    second.close()


def test_a_load_of_many_connections(home, folders, x_ND):
  """Every answer is the library's; /stats counts; a broken one is seen."""
  shards = serve_index.Shards([folders["whole"]])
  bodies = [json.dumps({"queries": [x.tolist()]}).encode() for x in x_ND[:20]]
  is_right = load.make_check(shards, x_ND[:20], 10)
  before = home.stats.describe()
  found = load.send(
    home.url, bodies, 60, rate=400, connections=3, is_right=is_right
  )
  assert (found.errors, found.wrong) == ([], 0)
  after = home.stats.describe()
  assert after["requests"] - before["requests"] == 60
  assert after["latency_ms"]["p50"] <= after["latency_ms"]["p99"]
  found = load.send(
    home.url, bodies[1:], 3, rate=400, connections=1, is_right=is_right
  )
  assert found.wrong == 3


def test_the_command_stops_after_the_last_answer(
  folders, x_ND, monkeypatch, capfd
):
  """A kept connection does not hold it, and a waiting request is answered."""
  answers = []

  def visit(url):
    idle, busy = load.connect(url), load.connect(url)
    try:
      load.ask(idle, "GET", "/health")
      body = json.dumps({"queries": x_ND[:2].tolist()})
      busy.request("POST", "/search", body)
      time.sleep(0.1)  # It waits for others.
    finally:
      os.kill(os.getpid(), signal.SIGINT)
    response = busy.getresponse()
    answers.append((response.status, response.headers["Connection"]))
    with pytest.raises((http.client.HTTPException, OSError)):
      load.ask(idle, "GET", "/health")

  def announce(_, home):
    threads.append(threading.Thread(target=visit, args=(home.url,)))
    threads[0].start()

  threads = []
  monkeypatch.setattr(serve, "_announce", announce)
  found = serve.run(
    index=folders["whole"], port=0, window_ms=400.0, max_batch=3
  )
  threads[0].join(10)
  assert answers == [(200, "close")]
  assert found["requests"] == 1


def test_hosts_and_ports(caplog, folders, home):
  config = serve.cli.get_config(serve.OPTIONS, index="i", host="0.0.0.0")
  shards = serve_index.Shards([folders["low"]])

  class Home:
    url = "http://0.0.0.0:8000"

  Home.shards = shards
  serve._announce(config, Home)
  assert "no authentication" in caplog.text
  with pytest.raises(ValueError, match="--k must lie between 1 and 5"):
    serve.run(index=folders["low"], k=10, max_k=5)
  with pytest.raises(ValueError, match="--nprobe must lie between 1 and"):
    serve.run(index=folders["low"], nprobe=0)
  with pytest.raises(ValueError, match="--index must name a folder, got ','"):
    serve.run(index=",")
  port = home.server_address[1]
  with pytest.raises(OSError, match=f"port {port}.*--port"):
    serve.run(index=folders["low"], port=port)
