"""Inputs of the campaigns, made once for all of them."""

import types

import pytest

from tests.campaign import subjects
from vqjax import progress


@pytest.fixture(scope="session")
def inputs(tmp_path_factory):
  """What commands are given."""
  folder = tmp_path_factory.mktemp("campaign") / "inputs"
  return subjects.make_inputs(folder, seed=0)


@pytest.fixture(scope="session")
def others(tmp_path_factory):
  """Files of the same names and shapes with other contents."""
  folder = tmp_path_factory.mktemp("campaign") / "others"
  return subjects.make_inputs(folder, seed=1)


@pytest.fixture(autouse=True)
def _quiet(one_thread, monkeypatch):
  """One thread, as those that wait take time from others; no progress lines."""
  monkeypatch.setattr(progress, "sys", types.SimpleNamespace(stderr=None))
