r"""Measures how fast this machine encodes, decodes, trains and clusters.

  vqjax bench
  vqjax bench --tasks=encode,decode
  vqjax bench --codec=runs/qinco2_s --dtype=float32,bfloat16
  vqjax bench --config=qinco2_l:bigann1M --torch

A trained --codec is measured on its own vectors. A --config is measured without
training: its codewords are a residual k-means of the vectors, so that the
search resembles a trained codec's, and its network changes them by a few
percent. Its vectors are standard normal numbers unless --data names a file.

  encode   by the published rule (A) and at the codec's own sizes (B and C),
           in the blocks of the encode command, from memory
  decode   random codes; the vectors stay on the device
  train    a step of the training loop, compared with its encode and its
           gradient (with --config; its ratio is to the sum of these two)
  kmeans   compared with faiss's, from the same start, and with mini-batches:
           60+8 is 60 steps and 8 closing passes. MSE is of all vectors

GFLOP/s count two operations per multiply-add of the matrix products that remain
once the tables are made; a training step counts as its encode and three
decodes. The peak is the fastest matrix product of the same type, timed
interleaved. share is the part of this peak that is reached, network the same
for the network's products alone. Every result is a line of JSON added to
--output, with device, versions and spread.
"""

import contextlib
import functools
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.lib import (
  bench_report,
  bench_subjects,
  bench_timing,
  bench_training,
  cli,
  codecs,
)
from experiments.lib.bench_arithmetic import Work, decode_work, encode_work
from vqjax.codecs import kmeans, runner
from vqjax.codecs.rule import SearchRule
from vqjax.core import check_range
from vqjax.data import batches, files
from vqjax.fast_ivf import MiniBatchKMeans
from vqjax.interop import faiss_io

TASKS = ("encode", "decode", "train", "kmeans")
DTYPES = ("float32", "bfloat16")
_MSE_ROWS = 256  # The same vectors for all rules and types.
_ITERATIONS, _WHOLE = 10, ("vqjax", "faiss")  # Of k-means; who makes these.
_BATCH, _MINIBATCH = 1024, ((60, 2), (60, 8), (200, 2))  # Steps and passes.

OPTIONS = {
  "codec": cli.CODEC_OPTION,
  "config": cli.Option(
    str,
    None,
    "Names or files of configurations, with commas; "
    f"{bench_subjects.PRESETS} if unset.",
  ),
  **cli.DATA_OPTIONS,
  "dim": cli.Option(int, 128, "Dimensions of the vectors, without --data."),
  "tasks": cli.Option(str, ",".join(TASKS), "Which of these to measure."),
  "dtype": cli.Option(str, "float32", "Any of float32,bfloat16."),
  **{name: cli.SEARCH_OPTIONS[name] for name in codecs.SIZES},
  "kmeans_vectors": cli.Option(int, 60_000, "Vectors of k-means."),
  "kmeans_words": cli.Option(int, 1024, "Centroids of k-means."),
  "torch": cli.Option(bool, False, "Also measure the same network in PyTorch."),
  "repeats": cli.Option(int, 9, "Timed calls per result, at most."),
  "output": cli.Option(
    str, "runs/bench.jsonl", "File that results are added to."
  ),
}


@cli.takes(OPTIONS)
def run(config) -> list[dict]:
  """Adds the results to `config.output` and returns them."""
  tasks, dtypes = _check(config)
  subjects = bench_subjects.load(config)
  _check_searches(config, subjects)
  about, results = bench_report.machine(), []
  logging.info(
    "%(device)s, %(num_devices)d x %(platform)s, %(threads)d threads, "
    "vqjax %(vqjax)s, jax %(jax)s.",
    about,
  )
  pathlib.Path(config.output).parent.mkdir(parents=True, exist_ok=True)
  with open(config.output, "a") as file:
    for found in _results(config, tasks, dtypes, subjects):
      results.append(found | about)
      file.write(json.dumps(results[-1], default=float) + "\n")
      file.flush()
      if found.get("share", 0) > 1:
        logging.warning(
          "%s ran at %.0f %% of the peak: something disturbed the peak. "
          "Measure again when the machine is quiet.",
          found["task"],
          100 * found["share"],
        )
  table = cli.table(*bench_report.cells(results))
  logging.info("%s\nAdded to %s", table, config.output)
  return results


def _check(config) -> tuple[list[str], list[str]]:
  """Returns tasks and dtypes; raises ValueError before any work is done."""
  lists = []
  for name, known in (("tasks", TASKS), ("dtype", DTYPES)):
    lists.append([word for word in config[name].split(",") if word])
    if not lists[-1] or set(lists[-1]) - set(known):
      raise ValueError(
        f"--{name} may name {', '.join(known)}; got {config[name]!r}."
      )
  check_range("repeats", config.repeats, 1, 100_000)
  check_range("dim", config.dim, 1, 65536)
  check_range("kmeans_words", config.kmeans_words, 1, config.kmeans_vectors)
  if config.codec and config.config:
    raise ValueError("Give --codec or --config, not both.")
  if not config.output.endswith(".jsonl"):
    raise ValueError(f"--output must end in .jsonl, got {config.output}.")
  files.check_output(config.output, overwrite=True)
  if config.torch and importlib.util.find_spec("torch") is None:
    logging.warning("PyTorch is not installed here: measuring without it.")
    config.torch = False
  return tuple(lists)


def _check_searches(config, subjects) -> None:
  """Raises ValueError if a size of the search does not fit a codec."""
  for subject in subjects:
    for rule in bench_subjects.searches(subject, config):
      subject.codec.spec.check_rule(subject.codec.params, rule)


def _results(config, tasks, dtypes, subjects):
  """Yields a result for each program, as soon as it is measured."""
  peak_of = functools.cache(bench_timing.find_peak)
  measure = {"encode": _encode, "decode": _decode, "train": _train}
  for subject in subjects:
    for task in measure:
      for dtype in dtypes if task in tasks else ():
        if dtype != "float32" and subject.codec.name != "qinco":
          logging.info("%s has no %s; left out.", subject.codec.name, dtype)
          continue
        yield from measure[task](config, subject, dtype, peak_of(dtype))
  if "kmeans" in tasks:
    yield from _kmeans(config, subjects[0], peak_of("float32"))


def _about(subject, task: str, dtype: str, sizes: dict) -> dict:
  """What a result is of; says so before the work begins."""
  text = " ".join(f"{letter}={size}" for letter, size in sizes.items())
  logging.info("Measuring %s %s %s: %s", subject.name, task, dtype, text)
  return {"name": subject.name, "task": task, "dtype": dtype, **sizes}


def _encode(config, subject, dtype, peak):
  for rule in bench_subjects.searches(subject, config, dtype):
    sizes = bench_subjects.sizes(subject.codec, rule)
    about = _about(subject, "encode", dtype, sizes)
    # Fitted to vectors other than the measured ones, if there are any.
    others_ND = bench_subjects.rows(subject, 3 * _MSE_ROWS)[_MSE_ROWS:]
    codec, work = _with_ranker(subject.codec, rule, others_ND), None
    if codec.name == "qinco":
      work = encode_work(codec.tables, rule)
    encode_fn, block = codec.encoder(rule)
    contenders = {
      "vqjax": bench_timing.contender(
        _encoder(subject, encode_fn, _codes), [block], work
      )
    }
    blocks = (block, 8 * block, 32 * block)  # PyTorch may like larger ones.
    for name, program in _torch(config, subject, dtype, rule).items():
      with _left_out(name):
        make_fn = _encoder(subject, program.encode, _plain_codes)
        contenders[name] = bench_timing.contender(make_fn, blocks, work)
    x_ND = bench_subjects.rows(subject, _MSE_ROWS)
    codes_NM = _codes(encode_fn, x_ND, block)
    xhat_ND = np.asarray(codec.decoder()(codes_NM))
    mse = np.mean(np.sum((x_ND - xhat_ND) ** 2, axis=1))
    ours, *theirs = _measure(config, contenders, peak)
    yield about | ours | {"mse": mse}
    yield from (about | row for row in theirs)


def _with_ranker(codec, rule, x_ND):
  """The codec with a ranker, if a rule asks for one and it has none."""
  if not rule.num_ranked or codec.ranker is not None:
    return codec
  settings = rule.to_dict(codec.spec.knobs)
  with cli.progress(len(x_ND), "fit the ranker") as done:
    return codec.with_ranker(x_ND, progress=done, **settings)


def _encoder(subject, encode_fn, codes_fn):
  """Returns `make_fn` of `bench_timing.contender`."""

  def make_fn(num, block):
    x_ND = bench_subjects.rows(subject, num)
    return lambda: codes_fn(encode_fn, x_ND, block)

  return make_fn


def _codes(encode_fn, x_ND, block: int) -> np.ndarray:
  """All blocks through `encode_fn`, as the commands do it."""
  blocks = batches.map_blocks(encode_fn, x_ND, block_size=block)
  return np.concatenate([codes_NM for _, codes_NM in blocks])


def _plain_codes(encode_fn, x_ND, block: int) -> np.ndarray:
  """The same one block after the other: PyTorch uses all cores by itself."""
  starts = range(0, len(x_ND), block)
  return np.concatenate([encode_fn(x_ND[i : i + block]) for i in starts])


def _measure(config, contenders, peak) -> list[dict]:
  """Times ours (the first) next to the others, with rests in between."""
  rest = bench_timing.REST if len(contenders) > 1 else 0.0
  return bench_timing.measure(
    contenders, peak, repeats=config.repeats, rest=rest
  )


def _decode(config, subject, dtype, peak):
  codec = subject.codec
  about = _about(subject, "decode", dtype, bench_subjects.sizes(codec))
  codebooks = codec.codebook_sizes
  block = 8 * runner.decode_block()
  codes_NM = np.random.default_rng(0).integers(
    0, codebooks, (block, len(codebooks)), dtype=np.int32
  )
  work = decode_work(codec.tables) if codec.name == "qinco" else None

  def contender(decode_fn, *blocks):
    def make_fn(num, block):
      def run_fn():
        for _ in range(num // block):
          jax.block_until_ready(decode_fn(codes_NM[:block]))

      return run_fn

    return bench_timing.contender(make_fn, blocks, work)

  decode_fn = codec.decoder(dtype)
  contenders = {"vqjax": contender(decode_fn, block // 4, block)}
  # The search makes no difference to decoding.
  rule = SearchRule(num_candidates=0, beam_size=1)
  for name, program in _torch(config, subject, dtype, rule).items():
    with _left_out(name):  # PyTorch may like smaller ones.
      contenders[name] = contender(
        program.decode, block // 16, block // 4, block
      )
  yield from (about | row for row in _measure(config, contenders, peak))


def _torch(config, subject, dtype, rule: SearchRule) -> dict:
  """PyTorch's encode and decode by name; none where not wanted."""
  is_joint = rule.num_joint_candidates  # Ours alone.
  if not config.torch or subject.codec.name != "qinco" or is_joint:
    return {}
  from experiments.lib import torch_baseline

  return torch_baseline.programs(
    subject.codec.params,
    dtype=dtype,
    num_candidates=rule.num_candidates,
    beam_size=rule.beam_size,
  )


@contextlib.contextmanager
def _left_out(name: str):
  """Leaves out a program that does not compile or fit in memory."""
  try:
    yield
  except RuntimeError as error:
    logging.warning("Measuring without %s: %.300s", name, error)


def _train(config, subject, dtype, peak):
  if subject.config is None:
    logging.info("A training step is measured with --config; left out.")
    return
  rule = bench_subjects.training_rule(subject.config, dtype)
  sizes = bench_subjects.sizes(subject.codec, rule)
  about = _about(subject, "train", dtype, sizes)
  step, *parts = bench_timing.measure(
    bench_training.contenders(subject, rule),
    peak,
    repeats=config.repeats,
  )
  step["ratio"] = step["median_us"] / sum(row["median_us"] for row in parts)
  yield from (about | row for row in (step, *parts))


def _kmeans(config, subject, peak):
  num_codewords = config.kmeans_words
  num = config.kmeans_vectors
  x_ND = bench_subjects.rows(subject, num)
  sizes = {"N": num, "K": num_codewords, "D": x_ND.shape[1]}
  about = _about(subject, "kmeans", "float32", sizes)
  words, contenders = {}, {}
  count = num_codewords * x_ND.shape[1] * _ITERATIONS
  for name, fn in _kmeans_programs(x_ND, num_codewords).items():
    # The work is known of those that make whole passes.
    work = Work(count, count) if name in _WHOLE else None
    contenders[name] = bench_timing.Contender(
      fn, num, work, bench_timing.seconds(fn)
    )
    words[name] = np.asarray(fn())
  for row in _measure(config, contenders, peak):
    error_N1, _ = faiss_io.knn(x_ND, words[row["program"]], 1)
    mse = error_N1.mean(dtype=float)
    passes = {"iterations": _ITERATIONS} if row["program"] in _WHOLE else {}
    yield about | row | passes | {"mse": mse}


def _kmeans_programs(x_ND, num_codewords: int) -> dict:
  """Functions that return centroids, by name."""
  on_device_ND, key = jnp.asarray(x_ND), jax.random.key(0)
  start_KD = kmeans.fit(key, on_device_ND, num_codewords, num_iterations=0)

  def minibatch(max_steps, closing_passes):
    program = MiniBatchKMeans(
      num_codewords,
      min(_BATCH, len(x_ND)),
      metric="l2",
      max_steps=max_steps,
      closing_passes=closing_passes,
      verbose=False,
    )
    program.train(x_ND)
    return program.centroids

  return {
    "vqjax": lambda: kmeans.fit(  # Draws the same start itself.
      key, on_device_ND, num_codewords, num_iterations=_ITERATIONS
    ),
    "faiss": lambda: faiss_io.fit_kmeans(
      x_ND,
      num_codewords,
      num_iterations=_ITERATIONS,
      start_KD=np.asarray(start_KD),
    ),
    **{
      f"minibatch {steps}+{passes}": functools.partial(minibatch, steps, passes)
      for steps, passes in _MINIBATCH
    },
  }


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__)
