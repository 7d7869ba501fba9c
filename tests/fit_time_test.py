"""How long a fit takes, by a clock that moves only when it is told to."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.lib import fit_time
from vqjax import fitting
from vqjax.codecs.pq import PQParams
from vqjax.codecs.rq import RQParams


class _Clock:
  now = 0.0

  def perf_counter(self):
    return self.now


@pytest.fixture
def asked(monkeypatch):
  """Vectors and codes of the fits that were made: a row and code take 1 ms."""
  clock, found = _Clock(), []

  def fit(config, xt_ND, num_rows):
    model, num = config.model, min(config.init.max_vectors, num_rows)
    beam = model.get("beam_size", 1)
    if num not in [pair[0] for pair in found]:
      clock.now += 3  # Compiles.
    found.append((num, model.num_codes))
    work = 1 + (model.num_codes - 1) * beam if config.codec == "rq" else 1
    clock.now += 1e-3 * num * work
    words_MKD = jnp.zeros((model.num_codes, 4, xt_ND.shape[1]))
    return (RQParams if config.codec == "rq" else PQParams)(words_MKD)

  monkeypatch.setattr(fit_time, "time", clock)
  monkeypatch.setattr(fitting, "fit_closed", fit)
  return found


def _estimate(name, num=20_000, **model):
  config = fitting.make_config(name, model=model)
  return fit_time.estimate(config, np.zeros((num, 4), np.float32), num)


@pytest.mark.parametrize("is_balanced", [False, True])
def test_rq_is_measured_on_few_vectors_and_two_codes(asked, is_balanced):
  beam = 1 if is_balanced else 5
  found = _estimate("rq", num_codes=32, is_balanced=is_balanced, beam_size=beam)
  assert asked == [(800, 2), (800, 2)]
  assert found.seconds == pytest.approx(10 + 20 * (1 + 31 * beam))
  assert found.params.codebooks_MKD.shape == (32, 4, 4)


def test_pq_grows_by_a_line(asked):
  found = _estimate("pq", num_codes=4)
  assert {num for num, _ in asked} == {800, 1600}
  assert found.seconds == pytest.approx(3 + 20)


def test_few_vectors_are_all_fitted(asked):
  assert _estimate("rq", num=500, num_codes=1).seconds == pytest.approx(10.5)
  assert {num for num, _ in asked} == {500}


def test_opq_takes_longer(asked, monkeypatch):
  monkeypatch.setattr(fit_time, "_opq_seconds", lambda *_: 7.0)
  assert _estimate("opq", num_codes=4).seconds == pytest.approx(30)
