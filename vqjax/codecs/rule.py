"""How an encoder searches for a code: one struct for all codecs.

A codec declares which of the fields its encoder looks at
(`vqjax.codecs.codec`); the others keep their defaults.
"""

import dataclasses

from vqjax.core import check_range

DTYPES = ("float32", "bfloat16")
LETTERS = {
  "num_candidates": "A",
  "beam_size": "B",
  "num_joint_candidates": "C",
  "num_ranked": "F",
}
_OLD_NAMES = {"num_finalists": "num_ranked"}


@dataclasses.dataclass(frozen=True)
class SearchRule:
  """Sizes of a search. The joint rule replaces A by C if C is set.

  References: A and B are as in arXiv 2501.03078.
  """

  num_candidates: int = 16  # A, codewords per hypothesis; 0 for all.
  beam_size: int = 32  # B, hypotheses kept.
  num_joint_candidates: int = 0  # C, pairs over all hypotheses; 0 for A.
  num_ranked: int = 0  # F, of the C, kept by a ranker; 0 for all.
  num_steps: int | None = None  # Code positions to fill; None for all.
  dtype: str = "float32"  # Of the factors of the network's products.

  @property
  def num_evaluated(self) -> int:
    """Codewords that a step sends through the network, if A is not 0."""
    joint = self.num_ranked or self.num_joint_candidates
    return joint or self.beam_size * self.num_candidates

  def replace(self, **values) -> "SearchRule":
    """Returns the rule with other values."""
    return dataclasses.replace(self, **values)

  def joint(self, num_codewords: int) -> "SearchRule":
    """Returns the joint rule that reaches the error of this published one.

    B=48 C=128 for A=16 B=32 (docs/performance.md); a joint rule stays.
    """
    if self.num_joint_candidates:
      return self
    beam_size = min(3 * self.beam_size // 2, num_codewords)
    joint = min(4 * self.beam_size, beam_size * num_codewords)
    return self.replace(beam_size=beam_size, num_joint_candidates=joint)

  def published(self) -> "SearchRule":
    """Returns the published rule, of which `joint` makes this one."""
    if not self.num_joint_candidates:
      return self
    beam_size = max(2 * self.beam_size // 3, 1)
    return self.replace(
      beam_size=beam_size, num_joint_candidates=0, num_ranked=0
    )

  def to_dict(self, knobs: tuple[str, ...]) -> dict:
    """Returns the values of these fields, to be stored.

    Those that say nothing if they are unset are left out.
    """
    values = {name: getattr(self, name) for name in knobs}
    for name in ("num_ranked", "num_steps"):
      if not values.get(name, 1):
        del values[name]
    return values

  def describe(self, knobs: tuple[str, ...]) -> str:
    """Returns the sizes that count, as `B=48 C=128`."""
    values = self.to_dict(knobs)
    if values.get("num_joint_candidates"):
      del values["num_candidates"]
    sizes = [
      f"{letter}={values[name]}"
      for name, letter in LETTERS.items()
      if values.get(name)
    ]
    return " ".join(sizes)


PUBLISHED = SearchRule()  # A=16 B=32.


def from_dict(values: dict, default: SearchRule | None = None) -> SearchRule:
  """Makes a rule of stored values, of old codec files too.

  Raises:
    ValueError: A name is no field.
  """
  values = {_OLD_NAMES.get(name, name): v for name, v in values.items()}
  known = [field.name for field in dataclasses.fields(SearchRule)]
  unknown = sorted(set(values) - set(known))
  if unknown:
    raise ValueError(
      f"A search has the settings {', '.join(known)}; got {unknown[0]}."
    )
  return dataclasses.replace(default or SearchRule(), **values)


def check(
  rule: SearchRule,
  *,
  num_codewords: int,
  num_codes: int,
  can_preselect: bool = True,
) -> None:
  """Raises ValueError unless the sizes of a search make sense together.

  Args:
    rule: The search.
    num_codewords: K, codewords per position.
    num_codes: M, code positions, the list number not counted.
    can_preselect: Whether the codec has pre-selection codebooks.
  """
  b, c, f = rule.beam_size, rule.num_joint_candidates, rule.num_ranked
  check_range(
    "beam_size",
    *(b, 1, num_codewords, f"the first step has {num_codewords} codewords"),
  )
  why = "codewords of a step; 0 for all"
  check_range("num_candidates", rule.num_candidates, 0, num_codewords, why)
  if rule.num_steps is not None:
    check_range("num_steps", rule.num_steps, 1, num_codes, "code positions")
  if c:
    most = b * num_codewords
    check_range("num_joint_candidates", c, b, most, "beam_size to all pairs")
  if f and c:
    check_range("num_ranked", f, b, c, "beam_size to num_joint_candidates")
  if rule.dtype not in DTYPES:
    raise ValueError(
      f"dtype must be {' or '.join(DTYPES)}, got {rule.dtype!r}."
    )
  if f and not c:
    raise ValueError(
      f"num_ranked={f} are chosen among the candidates of the joint rule: set "
      "num_joint_candidates too."
    )
  if not can_preselect and (rule.num_candidates or c):
    raise ValueError(
      "This codec has no pre-selection codebooks (QINCo1): every codeword goes "
      "through the network; set num_candidates=0 and num_joint_candidates=0."
    )
