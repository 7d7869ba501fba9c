"""How commands meet their surroundings: streams, homes, locales, signals."""

import contextlib
import errno
import io
import logging as std_logging
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from absl import flags
from absl import logging as absl_logging

from configs import qinco2_s
from experiments.lib import cli, compiled, errors, parsing, process
from tests import commands
from vqjax import core, devices
from vqjax.codecs import pq
from vqjax.data import formats
from vqjax.storage import codec_file

ROOT = pathlib.Path(__file__).parents[1]


def _error_of(fn) -> Exception:
  with pytest.raises(Exception) as caught:  # noqa: PT011 Any, it is returned.
    fn()
  return caught.value


def _no_such_field():
  return {}["codebooks"]


@pytest.mark.parametrize(
  ("fn", "is_for_user"),
  [
    (lambda: core.check_range("--threads", 9, 1, 2), True),
    (lambda: formats.open_vectors("none.fvecs"), True),
    (lambda: open("/no/such/folder/x"), True),  # noqa: SIM115
    (lambda: cli.require({}, "output"), True),
    (_no_such_field, False),
    (lambda: pq.encode(1, 2, 3, 4, 5, 6, 7), False),  # A wrong call.
    (lambda: np.ones(3) + np.ones(4), False),
    (lambda: int("three"), False),
    (lambda: jax.jit(lambda x: x + np.ones(3))(np.ones(2)), False),
  ],
)
def test_errors_that_somebody_wrote_are_for_users(fn, is_for_user):
  assert errors.is_for_user(_error_of(fn)) == is_for_user


def test_a_fault_of_ours_keeps_its_traceback(caplog):
  with pytest.raises(KeyError, match="codebooks"), errors.user_errors():
    _no_such_field()
  with pytest.raises(SystemExit) as end, errors.user_errors():
    core.check_range("--threads", 9, 1, 2)
  assert end.value.code == 1


def _record(path, level):
  return std_logging.LogRecord("x", level, str(path), 1, "text", (), None)


def test_warnings_of_libraries_reach_people():
  site = pathlib.Path(sys.prefix, "lib/site-packages")
  shown = lambda path, level: errors.is_for_people(_record(path, level))
  assert shown(ROOT / "vqjax/training/loop.py", std_logging.INFO)
  assert shown(site / "jax/_src/xla_bridge.py", std_logging.WARNING)
  assert not shown(site / "jax/_src/xla_bridge.py", std_logging.INFO)
  assert not shown(site / "orbax/checkpoint/x.py", std_logging.WARNING)
  assert shown(site / "orbax/checkpoint/x.py", std_logging.ERROR)
  # Where others have a folder of that name.
  assert not shown(site / "others/experiments/x.py", std_logging.INFO)


@pytest.mark.parametrize(
  ("environ", "want"),
  [
    ({"HOME": "/h"}, "/h/.cache/vqjax"),
    ({"HOME": "/h", "XDG_CACHE_HOME": "/x"}, "/x/vqjax"),
    ({"HOME": "/h", "XDG_CACHE_HOME": "relative"}, "/h/.cache/vqjax"),
    ({"HOME": ""}, None),
    ({}, None),
    ({"XDG_CACHE_HOME": "/x"}, "/x/vqjax"),
  ],
)
def test_compiled_programs_lie_in_the_cache_if_there_is_one(
  environ, want, monkeypatch
):
  for name in ("HOME", "XDG_CACHE_HOME"):
    monkeypatch.delenv(name, raising=False)
  # As for a user who has no entry in the list of users.
  monkeypatch.setattr(os.path, "expanduser", lambda path: path)
  for name, value in environ.items():
    monkeypatch.setenv(name, value)
  assert compiled._cache_folder() == (want and pathlib.Path(want))


def test_the_cache_has_a_size_limit(tmp_path):
  for age in range(5):
    file = tmp_path / f"program-{age}"
    file.write_bytes(bytes(100))
    os.utime(file, (1e9 - age, 1e9 - age))
  compiled.trim(tmp_path, 250)
  assert sorted(os.listdir(tmp_path)) == ["program-0", "program-1"]
  compiled.trim(tmp_path, 200)
  assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize(
  "error",
  [RuntimeError("Unable to initialize backend 'cuda'\nmore"), AssertionError()],
)
def test_a_platform_without_its_plugin_is_named(error, monkeypatch):
  def fail():
    raise error

  monkeypatch.setattr(jax, "devices", fail)
  before = jax.config.jax_platforms
  jax.config.update("jax_platforms", "cuda")
  try:
    with pytest.raises(ValueError, match=r"JAX_PLATFORMS=cuda .*vqjax\[cuda\]"):
      devices.check_platforms()
  finally:
    jax.config.update("jax_platforms", before)


class _Full(io.StringIO):
  def write(self, text):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_stream_loses_words_not_work(monkeypatch):
  said = io.StringIO()
  monkeypatch.setattr(sys, "stderr", said)
  stream = process._Steady(_Full(), "Standard output")
  stream.write("a")
  stream.write("b")
  stream.flush()
  assert said.getvalue().count("Standard output cannot be written") == 1
  closed = io.StringIO()
  closed.close()
  process._Steady(closed).write("a")
  # A reader that has seen enough, as of `| head -1`, is told nothing.
  read, write = os.pipe()
  os.close(read)
  with contextlib.suppress(OSError), os.fdopen(write, "w") as pipe:
    process._Steady(pipe, "A pipe").write("a")
  assert said.getvalue().count("\n") == 1


_SURROUNDINGS = {
  "LC_ALL": "C",
  "PYTHONUTF8": "0",
  "PYTHONCOERCECLOCALE": "0",
  "JAX_ENABLE_X64": "1",
}


@pytest.mark.parametrize("streams", ["2>/dev/full >&-", "2>&- >/dev/full <&-"])
def test_a_training_ends_well_in_bad_surroundings(streams, tmp_path):
  folder = tmp_path / "größe"
  args = commands.command("train", "--config=pq:smoke", f"--workdir={folder}")
  environ = {k: v for k, v in os.environ.items() if k != "HOME"}
  done = subprocess.run(
    ["bash", "-c", f'"$@" {streams}', "-", *args],
    cwd=ROOT,
    env=environ | _SURROUNDINGS,
  )
  assert done.returncode == 0
  assert (folder / "summary.json").exists()
  # Nothing that a library says has got into a file.
  assert codec_file.load_codec(folder).name == "pq"


def test_a_second_ctrl_c_ends_at_once():
  program = (
    "import threading, time; from experiments.lib import process; "
    "threading.Thread(target=time.sleep, args=(60,)).start(); "
    "process.end_at_once_on_ctrl_c(); print('end', flush=True)"
  )
  with subprocess.Popen(
    [sys.executable, "-c", program],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as running:
    assert running.stdout.readline() == "end\n"
    running.send_signal(signal.SIGINT)
    assert running.stderr.read() == ""
  assert running.returncode == 130


def test_help_names_required_flags_first():
  options = {
    "k": cli.Option(int, 10, "Results per query."),
    "resume": cli.Option(bool, False, "Go on."),
    "output": cli.Option(str, None, "File."),
  }
  text = parsing.help_text("Does it.\n\n  vqjax", options, ("output",))
  lines = text.splitlines()
  assert lines[4:6] == ["Required flags:", "  --output: File."]
  assert lines[7:9] == [
    "Flags:",
    "  --k: Results per query. (an integer) (default: 10)",
  ]
  assert "  --[no]resume: Go on." in lines


def test_wrong_flags_are_one_line_with_a_suggestion():
  for args, words in (
    (["--confg=pq"], "'confg'. Did you mean: config? See --help."),
    (["config=pq"], "Unexpected argument 'config=pq'. Flags begin with --."),
    (["--config=pq", "--data=x"], "has --config.data.train and --config.data."),
    (["--config=pq", "--config.data.trian=x"], 'trian\'. Did you mean "train"'),
    (["--config=pq", "--config.model.num_steps=8"], "config.model has codeb"),
  ):
    done = commands.run("train", *args, check=False)
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
  "args",
  [["--config=pq:smoke"], ["--config", "pq:smoke"], ["-config=pq:smoke"]],
)
def test_config_takes_a_name(args):
  found = parsing._find_configs(["train", *args, "--resume"])
  assert found == ["train", f"--config={ROOT}/configs/pq.py:smoke", "--resume"]
  with pytest.raises(flags.Error, match="no configuration 'pqq': did you"):
    parsing._find_configs(["train", "--config=pqq"])


def test_a_configuration_is_printed_as_flags():
  config = qinco2_s.get_config("smoke")
  fields = list(cli._fields(config))
  assert "--config.train.num_epochs=2" in fields
  assert "--config.model.low_rank=None" in fields
  assert len(fields) == len(set(fields)) > 40


def test_a_name_that_is_no_utf8_is_refused():
  argv = ["train", "--workdir=r\udce9s"]  # Latin-1, as Python reads it.
  with pytest.raises(SystemExit, match="udce9s' is not UTF-8.* rename"):
    parsing.parse(argv, "doc", {}, ())


def test_a_setting_can_be_unset():
  args = ["train", "--config=x", "--config.data.num_train=None", "--a=None"]
  rest, names = parsing._take_unset(args)
  assert rest == ["train", "--config=x", "--a=None"]
  config = qinco2_s.get_config("smoke")
  assert config.data.num_train == 1200
  parsing._unset(config, [*names, "model.low_rank"])
  assert config.data.num_train is None
  with pytest.raises(flags.Error, match="--config.train.batch_size needs a v"):
    parsing._unset(config, ["train.batch_size"])


@pytest.mark.parametrize(
  ("value", "text"),
  [
    (16.18, "16.1800"),
    (0.0, "0.0000"),
    (3.4612e-9, "3.461e-09"),
    (0.0001234567, "0.0001235"),
  ],
)
def test_small_figures_keep_their_digits(value, text):
  assert cli.number(value) == text


def test_a_pipeline_does_not_say_what_to_run_next():
  handler = absl_logging.get_absl_handler()
  record = std_logging.LogRecord(
    "absl", std_logging.INFO, __file__, 1, "%d%% done.\nNext:\n  x", (9,), None
  )
  with errors.without_next_steps():
    assert handler.filter(record)
    assert record.getMessage() == "9% done."
    record.msg = "Next:\n  x"  # Alone.
    assert not handler.filter(record)
