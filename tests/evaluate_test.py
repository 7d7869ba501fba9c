"""What `evaluate` refuses before it measures anything."""

import numpy as np
import pytest

from experiments import evaluate
from experiments.lib import cli
from vqjax.codecs import rq
from vqjax.storage import codec_file


@pytest.fixture
def given(tmp_path):
  """A codec of 4 codes for vectors of 6 dimensions, and such vectors."""
  rng = np.random.default_rng(0)
  params = rq.RQParams(rng.normal(size=(4, 8, 6)).astype(np.float32))
  codec_file.save_codec(tmp_path / "codec", "rq", params, info={})
  np.save(tmp_path / "x.npy", rng.normal(size=(50, 6)).astype(np.float32))
  return {"codec": str(tmp_path / "codec"), "data": str(tmp_path / "x.npy")}


@pytest.mark.parametrize("name", ["PQ", "OPQ"])
def test_parts_that_are_not_equal_are_refused_at_once(name, given, monkeypatch):
  run = lambda **values: evaluate.run(
    cli.get_config(evaluate.OPTIONS, **given, **values)
  )
  monkeypatch.delattr(evaluate, "_measure")
  message = f"^{name} cuts .* 6 dimensions cannot be cut into 4; leave {name}"
  with pytest.raises(ValueError, match=message):
    run(baselines=f"RQ,{name}")
  for baselines, num_steps in ((name, 3), ("RQ,LSQ", None)):
    with pytest.raises(ValueError, match="trained on what the codec was"):
      run(baselines=baselines, num_steps=num_steps)
