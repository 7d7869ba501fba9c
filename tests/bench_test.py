"""The benchmark: its arithmetic, its turns, its lines; the PyTorch baseline."""

import json
import pathlib
import subprocess
import sys
from functools import partial

import jax
import numpy as np
import pytest
import qinco_cases
from jax import extend

from experiments import bench
from experiments.lib import (
  bench_arithmetic,
  bench_report,
  bench_subjects,
  bench_timing,
  cli,
  codecs,
)
from vqjax.codec import Codec
from vqjax.codecs import qinco, qinco_ranker, runner
from vqjax.codecs.rule import SearchRule
from vqjax.interop import faiss_io

ROOT = pathlib.Path(__file__).parents[1]
NUM = 3


def _config(**values):
  return cli.get_config(bench.OPTIONS, **values)


def _multiply_adds(jaxpr) -> int:
  """Those of all matrix products of a traced program, loops unrolled."""
  total = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      depth = np.prod([left[axis] for axis in contracted])
      total += int(depth * np.prod(equation.outvars[0].aval.shape))
    times = equation.params.get("length", 1)  # Of a scan.
    for inner in extend.core.jaxprs_in_params(equation.params):
      total += times * _multiply_adds(inner)
  return total


@pytest.mark.parametrize("case", qinco_cases.CASES)
@pytest.mark.parametrize(
  "sizes", [(3, 4, 0), (7, 4, 0), (0, 2, 0), (2, 4, 9), (2, 4, 20)]
)
def test_work_is_what_the_traced_program_multiplies(case, sizes):
  params = qinco_cases.make_params(**qinco_cases.CASES[case])
  if params.preselect_TKD is None:
    sizes = (0, sizes[1], 0)
  names = ("num_candidates", "beam_size", "num_joint_candidates")
  knobs = dict(zip(names, sizes, strict=True))
  tables = jax.eval_shape(qinco.prepare, params)
  x_ND = qinco_cases.vectors(NUM)
  traced = jax.make_jaxpr(partial(qinco.encode, rule=SearchRule(**knobs)))(
    tables, x_ND
  )
  work = bench_arithmetic.encode_work(tables, SearchRule(**knobs))
  assert NUM * work.total == _multiply_adds(traced.jaxpr)
  codes_NM = np.zeros((NUM, len(qinco.codebook_sizes(tables))), np.int32)
  traced = jax.make_jaxpr(qinco.decode)(tables, codes_NM)
  assert NUM * bench_arithmetic.decode_work(tables).total == _multiply_adds(
    traced.jaxpr
  )


@pytest.mark.parametrize("case", ["qinco2", "qinco2_same_dim", "ivf"])
@pytest.mark.parametrize("sizes", [(2, 4, 14, 9), (2, 4, 14, 4), (2, 4, 9, 9)])
def test_work_with_a_ranker_is_what_the_traced_program_multiplies(case, sizes):
  params = qinco_cases.make_params(**qinco_cases.CASES[case])
  knobs = dict(zip(codecs.SIZES, sizes, strict=True))
  x_ND = qinco_cases.vectors(NUM)
  tables = qinco_ranker.fit(
    qinco.prepare(params), x_ND, beam_size=4, num_joint_candidates=14, rank=3
  )
  traced = jax.make_jaxpr(partial(qinco.encode, rule=SearchRule(**knobs)))(
    tables, x_ND
  )
  work = bench_arithmetic.encode_work(tables, SearchRule(**knobs))
  assert NUM * work.total == _multiply_adds(traced.jaxpr)


def test_work_of_the_network_of_s():
  """7 steps, 512 candidates, of two blocks what follows the first relu."""
  params = qinco_cases.make_params(
    dim=128, num_networks=7, num_codewords=256, network_dim=128, hidden_dim=256
  )
  tables = jax.eval_shape(qinco.prepare, params)
  work = bench_arithmetic.encode_work(tables, SearchRule())
  assert work.network == 7 * 512 * (256 * 128 + 2 * 128 * 256)
  rest = 7 * 32 * (128 * 128 + 128 * 256 + 256 * 128) + 256 * 128
  assert work.total - work.network == rest


def test_contenders_take_turns():
  calls = []
  fns = {name: partial(calls.append, name) for name in "ab"}
  times = bench_timing.race(fns, repeats=3, max_seconds=60)
  assert "".join(calls) == "ababab"
  assert [len(times[name]) for name in "ab"] == [3, 3]
  short = bench_timing.race(fns, repeats=3, max_seconds=0)
  assert len(short["b"]) == 1


class _Clock:
  """A clock that only sleeping moves, whatever else the machine does."""

  def __init__(self):
    self.now = 0.0

  def perf_counter(self):
    return self.now

  def sleep(self, seconds):
    self.now += seconds


def test_contender_takes_the_best_block_and_enough_of_them(monkeypatch):
  """Of blocks that cost 2 ms, and 0.1 ms a vector."""
  clock = _Clock()
  monkeypatch.setattr(bench_timing, "time", clock)

  def make_fn(num, block):
    return lambda: clock.sleep(num / block * (0.002 + 0.0001 * block))

  got = bench_timing.contender(make_fn, (1, 10, 100), None)
  assert got.block == 100
  assert got.num_vectors % 100 == 0
  assert 0.2 < bench_timing.seconds(got.fn) < 0.6
  (row,) = bench_timing.measure(
    {"us": got}, bench_timing.Peak(lambda: clock.sleep(0.01), 1.0), repeats=2
  )
  assert row["median_us"] == pytest.approx(120)
  assert row["peak_gflops"] == pytest.approx(100)


@pytest.fixture
def in_a_hurry(monkeypatch):
  """Calls too short to be timed well."""
  monkeypatch.setattr(bench_timing, "_CALL_SECONDS", 0.0)
  monkeypatch.setattr(
    bench_timing, "_PRODUCTS", {"cpu": (((64, 32, 16), (128,) * 3), 2)}
  )
  monkeypatch.setattr(bench_timing, "REST", 0.0)
  monkeypatch.setattr(runner, "decode_block", lambda: 4)
  monkeypatch.setattr(bench_subjects, "_MIN_DRAWN", 500)


@pytest.mark.slow
def test_every_result_is_a_line_to_compare(tmp_path, in_a_hurry):
  output = tmp_path / "runs" / "bench.jsonl"
  options = dict(
    config="configs/qinco2_s.py:smoke",
    dim=8,
    kmeans_vectors=300,
    kmeans_words=8,
    repeats=2,
    output=str(output),
  )
  rows = bench.run(_config(**options))
  assert [json.loads(line) for line in output.open()] == rows
  assert [(row["task"], row["program"]) for row in rows] == [
    ("encode", "vqjax"), ("encode", "vqjax"), ("decode", "vqjax"),
    ("train", "step"), ("train", "its encode"), ("train", "its gradient"),
    ("kmeans", "vqjax"), ("kmeans", "faiss"),
    *(("kmeans", f"minibatch {at}") for at in ("60+2", "60+8", "200+2")),
  ]  # fmt: skip
  for row in rows[:-3]:  # The work of mini-batches is not counted.
    assert row["min_us"] <= row["median_us"] <= row["max_us"]
    assert row["gflops"] == pytest.approx(
      row["gflop_per_vector"] / row["median_us"] * 1e6, rel=1e-4
    )
    assert row["share"] == pytest.approx(
      row["gflops"] / row["peak_gflops"], rel=1e-4
    )
    assert row["jax"] == jax.__version__
    assert row["threads"] >= 1
  published, joint, decode, step, encode, gradient, *clusters = rows
  sizes = dict(M=3, K=16, D=8, E=16, H=16, L=2, A=4, B=4)
  assert sizes.items() <= published.items()
  assert joint["C"] == 8
  assert "A" not in joint
  assert published["block"] < published["num_vectors"]
  parts = encode["median_us"] + gradient["median_us"]
  assert step["ratio"] == pytest.approx(step["median_us"] / parts, rel=1e-4)
  assert clusters[0]["mse"] == pytest.approx(clusters[1]["mse"], rel=0.02)
  assert all(0 < row["mse"] < 2 * clusters[0]["mse"] for row in clusters)
  rows = bench.run(_config(**{**options, "tasks": "decode", "repeats": 1}))
  assert len(output.read_text().splitlines()) == 12  # Added, not replaced.


def _subject(**encode):
  codec = Codec(
    "qinco", qinco_cases.make_params(num_codewords=64), {"encode": encode}
  )
  return bench_subjects.Subject("x", codec, qinco_cases.vectors(4))


def test_searches_are_the_published_rule_and_the_own_one():
  own = dict(num_candidates=3, beam_size=48, num_joint_candidates=96)
  got = bench_subjects.searches(_subject(**own), _config(), "bfloat16")
  published = dict(num_candidates=3, beam_size=32, num_joint_candidates=0)
  assert got == [
    SearchRule(**knobs, dtype="bfloat16") for knobs in (published, own)
  ]
  (got,) = bench_subjects.searches(_subject(**own), _config(beam_size=4))
  assert got == SearchRule(**{**own, "beam_size": 4})
  del own["num_joint_candidates"]
  (got,) = bench_subjects.searches(_subject(**own), _config())
  assert got == SearchRule(**own)


def test_the_table_tells_searches_apart():
  row = dict(name="s", task="encode", dtype="float32", program="vqjax")
  rows = [row | dict(B=4, C=9), row | dict(B=4, C=9, F=5)]
  _, cells = bench_report.cells(rows)
  assert cells[0][0] == "s encode B=4 C=9 float32 vqjax"
  assert cells[1][0] == "s encode B=4 C=9 F=5 float32 vqjax"


def test_a_search_that_does_not_fit_is_refused():
  config = _config(num_candidates=2, beam_size=65)
  with pytest.raises(ValueError, match="beam_size .* between 1 and 64, got 65"):
    bench._check_searches(config, [_subject()])


def test_rows_come_round_again():
  subject = _subject()
  rows_ND = bench_subjects.rows(subject, 9)
  for n in range(9):
    np.testing.assert_array_equal(rows_ND[n], subject.x_ND[n % 4])


@pytest.mark.slow
def test_asked_sizes_and_types_are_measured(tmp_path, in_a_hurry):
  data = str(tmp_path / "x.npy")
  np.save(data, qinco_cases.vectors(100, dim=6).astype(np.float16))
  rows = bench.run(
    _config(
      config="configs/qinco2_s.py:smoke",
      data=data,
      tasks="encode",
      dtype="float32,bfloat16",
      num_candidates=2,
      beam_size=3,
      repeats=1,
      output=str(tmp_path / "b.jsonl"),
    )
  )
  assert [row["dtype"] for row in rows] == ["float32", "bfloat16"]
  assert all((row["A"], row["B"], row["D"]) == (2, 3, 6) for row in rows)
  assert rows[0]["mse"] == pytest.approx(rows[1]["mse"], rel=0.05)


@pytest.mark.parametrize(
  ("values", "error", "message"),
  [
    (dict(tasks="encode,fly"), ValueError, "may name encode, .*'encode,fly'"),
    (dict(dtype="float16"), ValueError, "float32, bfloat16; got 'float16'"),
    (dict(dim=0), ValueError, "dim must lie between 1 .* got 0"),
    (dict(repeats=0), ValueError, "repeats must lie between 1 .* got 0"),
    (dict(output="b.txt"), ValueError, r"end in \.jsonl, got b.txt"),
    (dict(config="configs/no.py"), FileNotFoundError, "configs/no.py"),
    (dict(config="configs/pq.py"), ValueError, "codec 'pq'.*--codec=runs"),
    (dict(codec="runs/x", config="y"), ValueError, "not both"),
    (dict(kmeans_words=70_000), ValueError, "kmeans_words .* got 70000"),
  ],
)
def test_senseless_options_are_refused(values, error, message, tmp_path):
  output = str(tmp_path / "b.jsonl")
  good = dict(config="configs/qinco2_s.py:smoke", dim=8, output=output)
  with pytest.raises(error, match=message):
    bench.run(_config(**{**good, **values}))
  assert not pathlib.Path(output).exists()


def test_help_shows_how_to_use_it():
  done = subprocess.run(
    [sys.executable, "-m", "experiments.bench", "--help"],
    cwd=ROOT, capture_output=True, text=True,
  )  # fmt: skip
  assert "vqjax bench --config=" in done.stdout


def test_kmeans_of_faiss_starts_where_told():
  x_ND = qinco_cases.vectors(60)
  start_KD = x_ND[:5]
  words_KD = faiss_io.fit_kmeans(x_ND, 5, num_iterations=1, start_KD=start_KD)
  ids_N = np.array([((start_KD - x) ** 2).sum(axis=1).argmin() for x in x_ND])
  want_KD = [x_ND[ids_N == k].mean(axis=0) for k in range(5)]
  np.testing.assert_allclose(words_KD, want_KD, rtol=1e-5, atol=1e-5)
  with pytest.raises(ValueError, match="between 1 and 60, got 61"):
    faiss_io.fit_kmeans(x_ND, 61)
  with pytest.raises(ValueError, match=r"start .*\(4, 6\), got \(5, 6\)"):
    faiss_io.fit_kmeans(x_ND, 4, start_KD=start_KD)


def _torch_baseline():
  pytest.importorskip("torch", reason="PyTorch is no dependency")
  from experiments.lib import torch_baseline

  return torch_baseline


@pytest.mark.parametrize("case", [c for c in qinco_cases.CASES if c != "ivf"])
@pytest.mark.parametrize("num_candidates", [0, 3])
def test_pytorch_finds_our_codes(case, num_candidates):
  torch_baseline = _torch_baseline()
  params = qinco_cases.make_params(**qinco_cases.CASES[case])
  if params.preselect_TKD is None:
    num_candidates = 0
  knobs = dict(num_candidates=num_candidates, beam_size=4)
  program = torch_baseline.programs(params, **knobs)["torch eager"]
  x_ND = qinco_cases.vectors(50)
  codes_NM = np.asarray(qinco.encode(params, x_ND, rule=SearchRule(**knobs)))
  np.testing.assert_array_equal(program.encode(x_ND), codes_NM)
  np.testing.assert_allclose(
    program.decode(codes_NM),
    qinco.decode(params, codes_NM),
    rtol=1e-4,
    atol=1e-4,
  )


def test_pytorch_refuses_lists():
  torch_baseline = _torch_baseline()
  params = qinco_cases.make_params(num_lists=11)
  with pytest.raises(ValueError, match="--torch has no IVF models"):
    torch_baseline.programs(params, num_candidates=3, beam_size=2)
