"""Training of mini-batch k-means: steps in chunks, until it has converged.

  run = begin(rule, first_KD, batch_size)
  while not run.is_done and batches are left:
    run = advance(rule, run, batches, tol=5e-5)

A `Run` is what a stopped training goes on from: the batches of its queue follow
from their numbers (`vqjax.data.batches`), all else is in it.
"""

import contextlib
import dataclasses
import functools

import jax
import numpy as np

from vqjax import devices
from vqjax.codecs import kmeans, minibatch_kmeans, near_assign
from vqjax.codecs.minibatch_kmeans import Queue, Rule, State
from vqjax.core import check_shape
from vqjax.data import batches

# Of a closing pass at a time; of near ones many, which fill their tiles.
_PASS_ROWS, _NEAR_ROWS = 16384, 65536
_FULL_EVERY = 4  # Closing passes, of which one compares with all centroids.
_FURTHER = 1.8  # Times the way to the mean.


@dataclasses.dataclass(frozen=True)
class Run:
  """A training after `num_steps` steps."""

  state: State
  queue: Queue
  num_steps: int = 0
  history: tuple[float, ...] = (1.0,)  # Smoothed share of changed labels.
  # Step, sub-vector, fullest and emptiest cluster of each split.
  splits: tuple[tuple[int, int, int, int], ...] = ()
  is_done: bool = False  # The last of the history is below the tolerance.

  @property
  def words_MKS(self) -> np.ndarray:
    """The centroids."""
    return np.asarray(self.state.words_MKS)

  @property
  def words_KD(self) -> np.ndarray:
    """The centroids of plain k-means."""
    (words_KD,) = self.words_MKS
    return words_KD


def begin(rule: Rule, first_KD, batch_size: int) -> Run:
  """Returns a run of no steps; `batch_size` may grow later."""
  state = minibatch_kmeans.start(rule, first_KD)
  num = padded_size(batch_size)
  h, dim = rule.history_size, np.shape(first_KD)[1]
  empty_BD = devices.split_rows(np.zeros((num, dim), np.float32))
  queue = Queue(
    (empty_BD,) * h,
    np.zeros((num, h), bool),
    np.zeros((num, h, rule.num_subvectors), np.int32),
  )
  return Run(devices.to_local_devices(state), queue)


def pack(run: Run) -> dict[str, np.ndarray]:
  """Returns all of a run but the batches that wait in its queue."""
  return {
    "words_MKS": run.words_MKS,
    "sums_MKS": np.asarray(run.state.sums_MKS),
    "counts_MK": np.asarray(run.state.counts_MK),
    "labels_BHM": np.asarray(run.queue.labels_BHM),
    "num_steps": np.int64(run.num_steps),
    "history": np.array(run.history, np.float64),
    "splits": np.array(run.splits, np.int64).reshape(-1, 4),
    "is_done": np.bool_(run.is_done),
  }


def unpack(rule: Rule, kept: dict, batches) -> Run:
  """Returns the run that was packed, with its last batches `[n, D]`.

  They are as many as there were steps, at most `history_size`.

  Raises:
    ValueError: The shapes do not fit the rule or each other.
  """
  h, m = rule.history_size, rule.num_subvectors
  words_MKS, labels_BHM = kept["words_MKS"], kept["labels_BHM"]
  check_shape("words_MKS", words_MKS, (m, None, None))
  check_shape("sums_MKS", kept["sums_MKS"], words_MKS.shape)
  check_shape("counts_MK", kept["counts_MK"], words_MKS.shape[:2])
  check_shape("labels_BHM", labels_BHM, (None, h, m))
  num, dim = len(labels_BHM), m * words_MKS.shape[2]
  put, is_row_BT = _pad(batches, num, len(batches))
  missing = h - len(put)
  empty_BD = devices.split_rows(np.zeros((num, dim), np.float32))
  is_row_BH = np.pad(is_row_BT, ((0, 0), (missing, 0)))
  queue = Queue((empty_BD,) * missing + put, is_row_BH, labels_BHM)
  state = State(words_MKS, kept["sums_MKS"], kept["counts_MK"])
  return Run(
    devices.to_local_devices(state),
    queue,
    int(kept["num_steps"]),
    tuple(map(float, kept["history"])),
    tuple(tuple(map(int, split)) for split in kept["splits"]),
    bool(kept["is_done"]),
  )


def padded_size(batch_size: int) -> int:
  """Rows of a batch that the devices share evenly."""
  return batch_size + -batch_size % devices.num_own_devices()


def advance(rule: Rule, run: Run, batches, *, tol: float) -> Run:
  """Runs one step for each batch float32 `[n, D]`, at most `CHUNK` of them.

  Stops at the step whose smoothed share of changed labels is below `tol`: that
  step leaves no trace but this number.
  """
  sizes = [len(run.queue.is_row_BH), *map(len, batches)]
  run = _grow(run, padded_size(max(sizes)))
  num = len(run.queue.is_row_BH)
  put, is_row_BT = _pad(batches, num, minibatch_kmeans.CHUNK)
  run_fn = functools.partial(
    minibatch_kmeans.run_steps, rule, run.state, run.queue, put, is_row_BT
  )
  state, queue, trace = run_fn(len(batches))
  trace = jax.tree.map(lambda x: np.asarray(x)[: len(batches)], trace)
  num_steps, history, is_done = len(batches), list(run.history), False
  first = max(rule.history_size - run.num_steps, 0)  # Nothing waited before.
  for t in range(first, len(batches)):
    share = trace.num_changed_T[t] / max(trace.num_labels_T[t], 1)
    history.append(minibatch_kmeans.smoothed(history[-1], float(share)))
    if history[-1] < tol:
      num_steps, is_done = t, True
      state, queue, _ = run_fn(t)  # The same, up to here.
      break
  splits = [
    (run.num_steps + int(t), int(m), *map(int, trace.splits_TM2[t, m]))
    for t, m in np.argwhere(trace.splits_TM2[:num_steps, :, 0] >= 0)
  ]
  return Run(
    state,
    queue,
    run.num_steps + num_steps + is_done,
    tuple(history),
    (*run.splits, *splits),
    is_done,
  )


def _pad(batches, num: int, at_least: int):
  """Batches of `num` rows on the devices, and which of them are rows."""
  is_row_BT = np.zeros((num, max(at_least, len(batches))), bool)
  put = []
  for t, x_ND in enumerate(batches):
    is_row_BT[: len(x_ND), t] = True
    missing = num - len(x_ND)
    x_BD = np.pad(x_ND, ((0, missing), (0, 0))) if missing else x_ND
    put.append(devices.split_rows(x_BD))
  return (*put, *put[:1] * (is_row_BT.shape[1] - len(put))), is_row_BT


def _grow(run: Run, num: int) -> Run:
  """Makes room for batches of `num` rows in the queue."""
  more = num - len(run.queue.is_row_BH)
  if not more:
    return run
  pad = lambda x: np.pad(x, [(0, more)] + [(0, 0)] * (np.ndim(x) - 1))
  batches, is_row_BH, labels_BHM = run.queue
  batches = tuple(devices.split_rows(pad(x_BD)) for x_BD in batches)
  queue = Queue(batches, pad(is_row_BH), pad(labels_BHM))
  return dataclasses.replace(run, queue=queue)


def make_assign_fn(rule: Rule, words_MKS):
  """Returns `x_ND -> (ids_NM, squared distances_NM)` over the devices."""
  return functools.partial(
    _assign_program(rule), devices.to_local_devices(words_MKS)
  )


@functools.lru_cache(maxsize=32)
def _assign_program(rule: Rule):
  fn = functools.partial(minibatch_kmeans.assign, rule)
  return devices.data_parallel(lambda words_MKS, x_ND: fn(x_ND, words_MKS))


def close(
  rule: Rule, vectors, words_MKS, num_passes: int, *, progress_fn=None
) -> np.ndarray:
  """Centroids after passes over open vectors `[N, D]`, each by all of them.

  A pass labels all vectors and moves each centroid to the mean of its own; one
  that has none moves to the vector that is farthest from its centroid. Before
  the last pass centroids move further, 1.8 times as far: below 2 the error
  cannot grow by that, and fewer passes are needed. Three passes of four may
  compare vectors with near centroids alone (`near_assign`).

  `progress_fn` takes the number of a pass and returns the context of a
  `(done, total)` callback, or of None.
  """
  m, k, _ = words_MKS.shape
  labels_NM = np.zeros((len(vectors), m), np.int32)
  for number in range(num_passes):
    is_near = number % _FULL_EVERY and m == 1 and near_assign.pays(k)
    if is_near:
      rows = batches.WithLists(vectors, labels_NM[:, 0])
      assign_fn = near_assign.make_assign_fn(
        words_MKS[0], by_product=rule.is_cosine
      )
    else:
      rows, assign_fn = vectors, make_assign_fn(rule, words_MKS)
    line = progress_fn(number) if progress_fn else contextlib.nullcontext()
    with line as done:
      report = kmeans.pass_over(
        rows,
        words_MKS,
        assign_fn,
        block_size=_NEAR_ROWS if is_near else _PASS_ROWS,
        progress=done,
        labels_NM=labels_NM,
      )
    means_MKS = minibatch_kmeans.as_centroids(rule, report.words_KD)
    if number < num_passes - 1:
      has_any_MK1 = (report.counts_K > 0)[..., None]
      further_MKS = words_MKS + _FURTHER * (means_MKS - words_MKS)
      further_MKS = minibatch_kmeans.as_centroids(rule, further_MKS)
      means_MKS = np.where(has_any_MK1, further_MKS, means_MKS)
    words_MKS = means_MKS
  return words_MKS
