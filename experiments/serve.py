r"""Serves an index folder, or several shards, over HTTP.

  vqjax serve --index=my_index
  vqjax serve --index=shard0,shard1 --port=8000 --nprobe=32

  curl -s localhost:8000/search -d '{"queries": [[0.1, ...]], "k": 10}'
  curl -s 'localhost:8000/search?k=10&nprobe=32' --data-binary @queries.npy
  curl -s localhost:8000/health; curl -s localhost:8000/stats

Requests that come within --window_ms are searched together. Of several shards
the nearest of all are returned; their ids must differ. Answers are those of
`index.search` with the same settings, which flags set for all requests and
fields for one: k, nprobe, ef_search, num_refined, num_pairwise, num_network.

Only this machine can connect unless --host says otherwise. There is no
authentication and no encryption: put a proxy in front before others may.
Ctrl-C or SIGTERM answers the requests that have come, and stops.
docs/serving.md says more.
"""

from absl import logging

from experiments.lib import batching, cli, serve_http, serve_index
from vqjax.core import check_range
from vqjax.progress import count
from vqjax.search.refiners import round_up

REQUIRED = ("index",)
_DEFAULTS, _LIMITS = serve_index.Settings(), serve_index.Limits()
OPTIONS = {
  "index": cli.Option(str, None, "Folder of an index; several with commas."),
  "host": cli.Option(
    str, "127.0.0.1", "Address to listen at; 0.0.0.0 lets all machines connect."
  ),
  "port": cli.Option(int, 8000, "Port; 0 for any that is free."),
  "k": cli.Option(int, _DEFAULTS.k, "Results, if a request does not say."),
  "nprobe": cli.Option(int, None, "Lists that are searched; 16 if unset."),
  "ef_search": cli.Option(int, None, "Effort in a graph of the centroids."),
  "num_refined": cli.Option(int, None, "Candidates for the refiner."),
  "num_pairwise": cli.Option(
    int, _DEFAULTS.num_pairwise, "Candidates for the pairwise decoder."
  ),
  "num_network": cli.Option(
    int, _DEFAULTS.num_network, "Candidates that the network decodes."
  ),
  "window_ms": cli.Option(
    float, 2.0, "Milliseconds that a request waits for others."
  ),
  "max_batch": cli.Option(int, 64, "Queries that are searched together."),
  "max_bytes": cli.Option(int, _LIMITS.max_bytes, "Bytes of a request."),
  "max_queries": cli.Option(int, _LIMITS.max_queries, "Queries of a request."),
  "max_k": cli.Option(
    int, _LIMITS.max_k, "Results and candidates that a request may ask for."
  ),
  "max_connections": cli.Option(int, 128, "Connections at once."),
  "threads": cli.Option(int, None, "Cores to use; all if unset."),
  "warm_up": cli.Option(
    bool, True, "Compile the search for all sizes of batches before serving."
  ),
}
_WARM_QUERIES, _WARM_SEARCHES = 32, 4  # Before serving, for each size.
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Serves until Ctrl-C or SIGTERM; returns what `/stats` said at the end."""
  cli.require(config, *REQUIRED)
  _check(config)
  cli.keep_compiled()
  folders = [part.strip() for part in config.index.split(",") if part.strip()]
  if not folders:
    raise ValueError(f"--index must name a folder, got {config.index!r}.")
  shards = serve_index.Shards(folders)
  defaults = serve_index.Settings(
    **{name: config[name] for name in serve_index.Settings._fields}
  )
  limits = serve_index.Limits(
    **{name: config[name] for name in serve_index.Limits._fields}
  )
  with batching.Batcher(
    shards.search,
    window_s=config.window_ms / 1000,
    max_queries=config.max_batch,
  ) as batcher:
    address = (config.host, config.port)
    home = serve_http.Server(
      *(address, shards, batcher, defaults, limits, config.max_connections)
    )
    try:
      if config.warm_up and len(shards):
        _warm_up(shards, defaults, config.max_batch)
      _announce(config, home)
      home.serve_forever(poll_interval=0.1)
    except KeyboardInterrupt:
      logging.info("Stopping: the requests that have come are answered.")
    finally:
      home.stop()
  found = home.stats.describe()
  logging.info(
    "Stopped after %s and %s.",
    count(found["requests"], "request"),
    count(found["errors"], "error"),
  )
  return found


def _check(config) -> None:
  check_range("--port", config.port, 0, 65_535)
  check_range("--window_ms", config.window_ms, 0, 1000)
  for name in ("max_batch", "max_bytes", "max_queries", "max_connections"):
    check_range(f"--{name}", config[name], 1, 1 << 30)
  check_range("--max_k", config.max_k, 1, 1 << 20)
  for name in ("nprobe", "ef_search"):
    if config[name] is not None:
      check_range(f"--{name}", config[name], 1, (1 << 31) - 1)
  for name in ("k", "num_refined", "num_pairwise", "num_network"):
    if config[name] is not None:
      least = int(name == "k")
      check_range(f"--{name}", config[name], least, config.max_k, "--max_k")


def _warm_up(shards, settings, max_batch: int) -> None:
  """Searches batches of all sizes: what is compiled then is kept.

  Batches of one size differ in the lists they need, so that small ones are
  searched more often.
  """
  sizes = sorted({min(round_up(n), max_batch) for n in range(1, max_batch + 1)})
  jobs = [
    (size, seed)
    for size in sizes
    for seed in range(max(_WARM_QUERIES // size, _WARM_SEARCHES))
  ]
  with cli.progress(len(jobs), "Compiling", unit="batches") as show:
    for done, (size, seed) in enumerate(jobs):
      shards.search(shards.sample(size, seed), settings)
      show(done + 1, len(jobs))


def _announce(config, home) -> None:
  if config.host not in _LOOPBACK:
    logging.warning(
      "Other machines can connect to %s: there is no authentication and no "
      "encryption. Let a proxy with both stand in front.",
      home.url,
    )
  logging.info(
    "Serving %s of %s at %s; Ctrl-C stops.\nNext:\n  curl -s %s/health",
    count(len(home.shards), "vector"),
    *(config.index, home.url, home.url),
  )


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
