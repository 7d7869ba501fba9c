"""The stages of a HAKES run up to the index; each writes what the next reads.

base       findex.bin           OPQ, lists, 4-bit codewords, by faiss
samples    samples.npz          training queries and their neighbours
learn      learned.bin          query side, with the centroids of the training
centroids  uindex.bin           query side with the centroids to search by
index      index.faiss          for stock faiss
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.lib import hakes_data
from vqjax import devices
from vqjax.codecs import hakes
from vqjax.data import batches, files, numpy_files
from vqjax.interop import faiss_hakes, hakes_files
from vqjax.training import checkpoints as checkpoints_lib
from vqjax.training import hakes_learner, loop, writers

_MADE_AGAIN = "Remove {}, and the same command makes it again."
_SAMPLE_PASS = 1 << 61  # Of the permutation that draws training queries.


def base(config, data, workdir: pathlib.Path) -> bool:
  """Learns the base side, or takes the one in `config.base.path`."""
  knobs = config.base.to_dict()
  path, num_max = knobs.pop("path"), knobs.pop("max_vectors")
  if path:
    file = hakes_files.load(path)
    if file.metric != data.metric:
      raise ValueError(
        f"{path} is for {file.metric}, but data.metric is {data.metric}."
      )
    _check_dim(path, file.side, data)
    _save(workdir / "findex.bin", file.side, data)
    return True
  d = data.dim
  e = knobs.pop("reduced_dim") or d // (8 if d >= 1536 else 4)
  sizes = {
    "reduced_dim": e,
    "num_codes": knobs.pop("num_codes") or e // 2,
    "num_lists": knobs.pop("num_lists")
    or 1 << math.ceil(math.log2(math.sqrt(len(data.base)))),
  }
  x_ND = batches.read_rows(data.base, _draw(len(data.base), num_max, 0))
  logging.info("Base parameters of %d vectors: %s.", len(x_ND), _text(sizes))
  side = faiss_hakes.fit_base(x_ND, **sizes, metric=data.metric, **knobs)
  _save(workdir / "findex.bin", side, data)
  return True


def samples(config, data, workdir: pathlib.Path) -> bool:
  """Draws training queries and finds their neighbours."""
  knobs, source = config.samples, data.train_queries
  is_base = source is None
  source = data.base if is_base else source
  num_held = min(knobs.num_validation, max(len(source) // 10, 1))
  num = min(knobs.num_queries, len(source) - num_held)
  rows_N = _draw(len(source), num + num_held, config.seed)
  k = min(knobs.num_neighbours, len(data.base) - 1)
  x_ND = batches.read_rows(source, rows_N)
  logging.info(
    "%d training queries of %s, %d held out; %d neighbours of each.",
    num,
    "the base itself" if is_base else "data.train_queries",
    num_held,
    k,
  )
  if data.train_neighbours is not None:
    near_QG = np.asarray(data.train_neighbours)[rows_N]
  else:
    near_QG = _find(config, data, workdir, x_ND, k + is_base)
    if is_base:
      near_QG = _without_itself(near_QG, rows_N)
  if near_QG.min() < 0 or near_QG.max() >= len(data.base):
    raise ValueError(
      f"Neighbours must be rows of the base, 0 to {len(data.base) - 1}, got "
      f"{near_QG.min()} to {near_QG.max()}."
    )
  with files.atomic_output(workdir / "samples.npz") as temporary:
    np.savez(
      temporary,
      queries=x_ND,
      neighbours=near_QG.astype(np.int32),
      num_held_out=num_held,
    )
  return True


def _find(config, data, workdir, x_ND, k):
  if config.samples.find_by == "exact":
    return hakes_data.neighbours(data, x_ND, k)
  if config.samples.find_by != "index":
    raise ValueError(
      "samples.find_by must be 'exact' or 'index', got "
      f"{config.samples.find_by!r}."
    )
  side = hakes_files.load(workdir / "findex.bin").side
  index = _fill(data, side, "float32")
  num_probes = max(len(side.centroids_LE) // 10, 1)
  near_QG = faiss_hakes.search(
    index, x_ND, k, num_probes=num_probes, refine_factor=10
  )
  if near_QG.min() < 0:
    raise ValueError(
      f"The base index found fewer than {k} neighbours of some queries in "
      f"{num_probes} lists; set samples.find_by=exact or fewer "
      "samples.num_neighbours."
    )
  return near_QG


def _without_itself(near_QG, rows_N):
  """Drops the query from its neighbours; the last one if it is not there."""
  is_self_QG = near_QG == rows_N[:, None]
  is_self_QG[~is_self_QG.any(axis=1), -1] = True
  return near_QG[~is_self_QG].reshape(len(near_QG), -1)


def read_samples(workdir: pathlib.Path) -> dict[str, np.ndarray]:
  """Training queries, their neighbours, and how many are held out."""
  path = workdir / "samples.npz"
  try:
    found = numpy_files.load_npz(path)
    num, held = len(found["queries"]), int(found["num_held_out"])
    is_whole = 0 < held < num == len(found["neighbours"])
  except (ValueError, KeyError, TypeError) as error:
    text = f"{path} is damaged: {error}."
    if isinstance(error, ValueError):
      text = str(error)
    raise ValueError(f"{text} {_MADE_AGAIN.format(path)}") from error
  if not is_whole:
    raise ValueError(f"{path} is damaged. {_MADE_AGAIN.format(path)}")
  return found


def learn(config, data, workdir: pathlib.Path) -> bool:
  """Learns the query side; False when interrupted."""
  train, params = config.train, _start(workdir)
  found = read_samples(workdir)
  num = len(found["queries"]) - int(found["num_held_out"])
  held_out = slice(num, len(found["queries"]))
  if train.batch_size > num:
    raise ValueError(
      f"A batch takes {train.batch_size} training queries, but there are only "
      f"{num}; lower train.batch_size."
    )
  near_QG = found["neighbours"][:, : train.num_neighbours]
  table = _look_up(params.base, data, found["queries"], near_QG)
  knobs = _loss_knobs(config, data, table)
  plan = loop.Plan(
    seed=config.seed,
    num_epochs=train.num_epochs,
    steps_per_epoch=num // train.batch_size,
    batch_size=train.batch_size,
    stop_patience=train.early_stop,
    log_every=train.log_every,
    measure="kl",
  )
  before = hakes_learner.validation(params, table, held_out, knobs)
  logging.info(
    "Held-out KL of the base parameters: codes %.3e, reduced %.3e.",
    before["coded_kl"],
    before["reduced_kl"],
  )
  batch_fn = hakes_learner.make_batch_fn(
    table, num, train.batch_size, config.seed
  )
  rates = {"reduction": train.reduction_lr, "codebooks": train.codebook_lr}
  if train.list_temperature:
    rates["centroids"] = train.centroid_lr
  learner = hakes_learner.make_learner(table, held_out, knobs, tuple(rates))
  params = _loop(config, workdir, params, learner, batch_fn, plan, rates)
  if params is None:
    return False
  after = hakes_learner.validation(params, table, held_out, knobs)
  _report(before, after)
  _save(workdir / "learned.bin", jax.device_get(params.query), data)
  return True


def _loss_knobs(config, data, table) -> dict:
  names = ("reduction_weight", "neighbour_side", "list_temperature")
  knobs = {name: config.train[name] for name in names}
  knobs["score"] = config.train.score or data.metric
  knobs["temperature"] = (
    config.train.temperature
    or hakes_learner.natural_temperature(table, knobs["score"])
  )
  return knobs


def _start(workdir) -> hakes.HakesParams:
  """Both sides equal to the base parameters."""
  side = jax.tree.map(
    jnp.asarray, hakes_files.load(workdir / "findex.bin").side
  )
  return hakes.HakesParams(side, jax.tree.map(jnp.copy, side))


def _look_up(side, data, queries_QD, near_QG) -> hakes_learner.Samples:
  """Vectors, codes and lists of all neighbours, each once."""
  rows_N, near_QG = np.unique(near_QG, return_inverse=True)
  near_QG = near_QG.reshape(len(queries_QD), -1).astype(np.int32)
  vectors_ND = batches.read_rows(data.base, rows_N)

  @jax.jit
  def keep_fn(x_ND):
    return hakes.encode(side, x_ND), hakes.assign(side, x_ND, data.metric)

  parts = [
    out for _, out in batches.map_blocks(keep_fn, vectors_ND, block_size=16_384)
  ]
  codes_NM, lists_N = (np.concatenate(x) for x in zip(*parts, strict=True))
  if np.array_equal(vectors_ND.astype(np.float16), vectors_ND):
    vectors_ND = vectors_ND.astype(np.float16)  # Half of the memory to read.
  return hakes_learner.Samples(
    queries_QD, near_QG, vectors_ND, codes_NM.astype(np.uint8), lists_N
  )


def _loop(config, workdir, params, learner, batch_fn, plan, rates):
  """Runs or resumes the training loop: the best parameters, or None."""
  train = config.train
  schedules = {
    name: hakes_learner.make_schedule(rate, plan.total_steps, train.warm_up)
    for name, rate in rates.items()
  }
  tx = hakes_learner.make_optimiser(schedules, weight_decay=train.weight_decay)
  state = loop.make_state(
    params, tx, (), hakes_learner.METRICS, learner.frozen_fn
  )
  checkpoints = checkpoints_lib.Checkpoints(workdir / "checkpoints")
  step, writer = 0, None
  try:
    found = checkpoints.restore_latest(devices.abstract(state))
    if found is not None:
      step, state = found
      logging.info("Resuming from step %d of %d.", step, plan.total_steps)
    name = train.get("tracker", "none")  # Own files may be without.
    tracker = writers.open_tracker(name, workdir, config.to_dict())
    writer = writers.Writer(workdir, first_step=step, tracker=tracker)
    outcome = loop.train(
      learner,
      tx,
      schedules["reduction"],
      state,
      batch_fn,
      plan,
      checkpoints=checkpoints,
      writer=writer,
    )
    if not outcome.is_done:
      return None
    best, state = checkpoints.restore_best(outcome.state)
    logging.info("The best held-out KL is at step %d.", best)
    return state.params
  finally:
    if writer is not None:
      writer.close()
    checkpoints.close()


def _report(before, after) -> None:
  logging.info(
    "Held-out KL of codes: base %.3e, learned %.3e.",
    before["coded_kl"],
    after["coded_kl"],
  )
  if after["coded_kl"] >= before["coded_kl"]:
    logging.warning(
      "Learning did not lower the held-out KL: more samples.num_queries, or a "
      "lower train.reduction_lr and train.codebook_lr, may help."
    )


def centroids(config, data, workdir: pathlib.Path) -> bool:
  """Chooses the centroids that queries look for lists with."""
  knobs = config.centroids
  learned = hakes_files.load(workdir / "learned.bin").side
  if knobs.rule not in ("learned", "mean"):
    raise ValueError(
      f"centroids.rule must be 'learned' or 'mean', got {knobs.rule!r}."
    )
  # Without the term of the lists in the loss they have not moved.
  if knobs.rule == "learned" and config.train.list_temperature:
    _save(workdir / "uindex.bin", learned, data)
    return True
  if knobs.sample:
    num = max(round(knobs.sample * len(data.base)), 1)
    rows_N = _draw(len(data.base), num, config.seed + 1)
    x_ND = batches.read_rows(data.base, rows_N)
  else:
    x_ND = read_samples(workdir)["queries"]
  old = hakes_files.load(workdir / "findex.bin").side
  params = jax.tree.map(jnp.asarray, hakes.HakesParams(old, learned))
  sums_LE, counts_L = hakes.centroid_sums(
    params, jnp.asarray(x_ND), data.metric, assign_by=knobs.assign_by
  )
  new_LE = hakes.mean_centroids(
    params.base.centroids_LE, sums_LE, counts_L, data.metric
  )
  _save(
    workdir / "uindex.bin",
    learned.replace(centroids_LE=np.asarray(new_LE)),
    data,
  )
  return True


def index(config, data, workdir: pathlib.Path) -> bool:
  """Writes the index file for stock faiss, and compares what is read back."""
  old, new = (
    hakes_files.load(workdir / name).side
    for name in ("findex.bin", "uindex.bin")
  )
  built = _fill(data, old, config.index.store)
  faiss_hakes.set_side(built, new)
  path = workdir / "index.faiss"
  x_QD = batches.read_rows(data.base, np.arange(min(20, len(data.base))))
  knobs = {"num_probes": 4, "refine_factor": 4}

  def check(written):
    read = faiss_hakes.load(written)
    same = jax.tree.map(np.array_equal, faiss_hakes.side_of(read), new)
    ids = [faiss_hakes.search(i, x_QD, 5, **knobs) for i in (built, read)]
    if not all(jax.tree.leaves(same)) or not np.array_equal(*ids):
      raise OSError(f"{path} did not read back as written: it was not kept.")

  faiss_hakes.save(built, path, check_fn=check)
  return True


def _fill(data, side, store):
  """An index of all vectors of the base, by the base side."""
  sample_ND = batches.read_rows(data.base, _draw(len(data.base), 65536, 0))
  made = faiss_hakes.make_index(
    side, data.metric, store=store, sample_ND=sample_ND
  )
  logging.info("Adding %d vectors to the index.", len(data.base))
  faiss_hakes.add(made, side, hakes_data.blocks(data))
  return made


def _draw(size: int, num: int, seed: int) -> np.ndarray:
  """Rows of a random sample without repetition, in random order."""
  return batches.permute(np.arange(min(num, size)), size, seed, _SAMPLE_PASS)


def _check_dim(path, side, data) -> None:
  if side.reduction_ED.shape[1] != data.dim:
    raise ValueError(
      f"{path} is for vectors of {side.reduction_ED.shape[1]} dimensions, "
      f"data.base has {data.dim}."
    )


def _save(path, side, data) -> None:
  file = hakes_files.HakesFile(side, data.metric, len(data.base))
  hakes_files.save(file, path)


def _text(sizes: dict) -> str:
  return ", ".join(f"{name} {size}" for name, size in sizes.items())
