"""How good and how fast a codec is; `Codec.evaluate` and the command use it."""

import time
from collections.abc import Callable

import numpy as np

from vqjax import evaluation
from vqjax.core import check_range
from vqjax.data import batches


class Decoded:
  """Decoded blocks, whose squared errors and seconds are summed on the way."""

  def __init__(self, blocks_fn: Callable, vectors, rows: range | None = None):
    """Decodes the first block, which compiles.

    Args:
      blocks_fn: Returns an iterator of the decoded blocks, in order.
      vectors: An open file.
      rows: Those that are decoded; None for all.
    """
    self._blocks_fn, self._vectors = blocks_fn, vectors
    self._rows = range(len(vectors)) if rows is None else rows
    self.error, self.seconds = 0.0, 0.0
    next(blocks_fn(), None)

  def __iter__(self):
    """Yields the blocks `[n, D]`, and measures them."""
    blocks, row = self._blocks_fn(), 0
    while True:
      began = time.perf_counter()
      xhat_ND = next(blocks, None)
      self.seconds += time.perf_counter() - began
      if xhat_ND is None:
        return
      rows = self._rows[row : row + len(xhat_ND)]
      x_ND = batches.read_rows(self._vectors, rows)
      self.error += float(np.sum((x_ND - xhat_ND) ** 2, dtype=np.float64))
      yield xhat_ND
      row += len(xhat_ND)

  def measure(self) -> None:
    """Goes through all blocks."""
    for _ in self:
      pass


def evaluate(
  codec,
  base,
  *,
  queries=None,
  true_ids=None,
  metric: str | None = None,
  ranks: tuple[int, ...] = (1, 10, 100),
  progress: bool = False,
  **settings,
) -> dict:
  """Measures error, time, and the recall of exact search in decoded vectors.

  Args:
    codec: The `vqjax.Codec`.
    base: Vectors `[N, D]`, an array, a memory map or a path.
    queries: `[Q, D]`, of the same kind, for the recall.
    true_ids: Ids `[Q, G]` of their true neighbours, nearest first, -1 for
      none; an array or a path. Found by exact search if left out.
    metric: "l2", "ip", or "cosine" for a codec that was trained for it; None
      for the codec's.
    ranks: R of each 1-recall@R, the share of queries whose nearest neighbour,
      or a vector as near, is among the first R found.
    progress: Shows progress lines.
    **settings: As for `encode`.

  Returns:
    `mse`, the squared error per vector, summed over dimensions; `1-recall@R`
    with queries; `encode_us` and `decode_us`, microseconds per vector.
  """
  vectors, metric = codec.open_vectors(base, "base"), metric or codec.metric
  if metric == "cosine" != codec.metric:
    raise ValueError(
      "The cosine needs a codec of vectors of length 1, but this one was "
      f"trained for {codec.metric}; train it with metric cosine."
    )
  check_range("vectors of the base", len(vectors), 1, 1 << 40)
  rule = codec.rule.replace(**codec.check_settings(settings))
  _, first = codec.encoder(rule)
  codec.encode(vectors[:first], **settings)  # Compiles.
  began = time.perf_counter()
  codes_NM = codec.encode(vectors, progress=progress, **settings)
  encode_us = (time.perf_counter() - began) / len(vectors) * 1e6
  decoded = Decoded(lambda: codec.decode_blocks(codes_NM, rule.dtype), vectors)
  num, recalls = min(max(ranks), len(vectors)), {}
  if queries is None:
    decoded.measure()
  else:
    true = codec.open_truth(vectors, queries, true_ids, metric, progress)
    ids_QR = evaluation.nearest(true.xq_QD, iter(decoded), num, metric)[1]
    names = {f"1-recall@{r}": f"1-recall@{min(r, num)}" for r in ranks}
    values = true.recalls(ids_QR, set(names.values()))
    recalls = {name: values[names[name]] for name in names}
  return {
    "mse": decoded.error / len(vectors),
    **recalls,
    "encode_us": encode_us,
    "decode_us": decoded.seconds / len(vectors) * 1e6,
  }
