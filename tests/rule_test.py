"""How searches are described, stored, checked, and turned into each other."""

import pytest

from vqjax.codecs import registry, rule
from vqjax.codecs.rule import SearchRule

KNOBS = registry.get("qinco").knobs
PUBLISHED = SearchRule(num_candidates=16, beam_size=32)
JOINT = SearchRule(num_candidates=16, beam_size=48, num_joint_candidates=128)


def test_the_joint_rule_and_the_published_one_are_each_others_inverse():
  assert PUBLISHED.joint(256) == JOINT
  assert JOINT.published() == PUBLISHED
  assert JOINT.joint(256) == JOINT
  assert PUBLISHED.published() == PUBLISHED
  narrow = SearchRule(beam_size=8).joint(8)
  rule.check(narrow, num_codewords=16, num_codes=4)
  assert (narrow.beam_size, narrow.num_joint_candidates) == (8, 32)


def test_what_goes_through_the_network():
  assert PUBLISHED.num_evaluated == 512
  assert JOINT.num_evaluated == 128
  assert JOINT.replace(num_ranked=56).num_evaluated == 56


@pytest.mark.parametrize(
  "search", [PUBLISHED, JOINT.replace(num_ranked=56, num_steps=4)]
)
def test_a_stored_rule_is_read_again(search):
  assert rule.from_dict(search.to_dict(KNOBS)) == search


def test_rules_of_old_codec_files_are_read():
  old = {"num_candidates": 16, "beam_size": 32}
  assert rule.from_dict(old) == PUBLISHED
  old = {"beam_size": 48, "num_joint_candidates": 128, "num_finalists": 56}
  assert rule.from_dict(old) == JOINT.replace(num_ranked=56)
  assert rule.from_dict({}, SearchRule(beam_size=1)).beam_size == 1
  with pytest.raises(ValueError, match="has the settings .*; got width"):
    rule.from_dict({"width": 3})


def test_a_rule_is_stored_by_the_knobs_of_its_codec():
  assert SearchRule(beam_size=5).to_dict(registry.get("rq").knobs) == {
    "beam_size": 5
  }
  assert PUBLISHED.to_dict(registry.get("pq").knobs) == {}


def test_a_rule_is_described_by_the_letters_of_the_papers():
  assert PUBLISHED.describe(KNOBS) == "A=16 B=32"
  assert JOINT.replace(num_ranked=56).describe(KNOBS) == "B=48 C=128 F=56"


@pytest.mark.parametrize(
  ("values", "message"),
  [
    (dict(beam_size=17), "beam_size must lie between 1 and 16, got 17"),
    (dict(num_candidates=17), "num_candidates must .* 0 and 16, got 17"),
    (dict(num_steps=0), "num_steps must lie between 1 and 4, got 0"),
    (dict(num_joint_candidates=7), "between 8 and 128, got 7"),
    (dict(num_ranked=9), "set num_joint_candidates too"),
    (dict(num_joint_candidates=16, num_ranked=17), "8 and 16, got 17"),
    (dict(dtype="float16"), "float32 or bfloat16, got 'float16'"),
  ],
)
def test_sizes_that_make_no_sense_are_refused(values, message):
  search = SearchRule(beam_size=8).replace(**values)
  with pytest.raises(ValueError, match=message):
    rule.check(search, num_codewords=16, num_codes=4)
