"""What a codec is to the programs that run it: functions and knobs.

Every codec module ends with its `CODEC`; `vqjax.codecs.registry` finds it by
name. Parameters are what is learned and stored, tables what `prepare` makes of
them for `encode` and `decode`, which take parameters as well.
"""

import dataclasses
from collections.abc import Callable

from vqjax.codecs.rule import SearchRule


@dataclasses.dataclass(frozen=True)
class CodecSpec:
  """A kind of codec. Codes are int32, the list number of an IVF model first."""

  name: str
  Params: type  # Frozen dataclass of arrays.
  prepare: Callable  # params -> tables
  dim: Callable  # params or tables -> D
  codebook_sizes: Callable  # -> codewords at each code position
  # (tables, x_ND, lists_N or None, SearchRule) -> codes_NM
  encode: Callable
  # (tables, codes_NM) -> x_ND, with `dtype` if that is a knob
  decode: Callable
  knobs: tuple[str, ...]  # Fields of `SearchRule` that `encode` looks at.
  rule: SearchRule = SearchRule()  # If nothing else is stored.
  check_rule: Callable = lambda params, rule: None  # Raises ValueError.
  # (key, x_ND, *, num_codes, ...) -> params; None if it is trained.
  fit: Callable | None = None
  is_ivf: Callable = lambda params: False  # Whether codes begin with a list.
  # params -> what people call it; None for the name.
  title: Callable = lambda params: None
  centroids: Callable | None = None  # -> centroids of the lists, in data units
  # Of codecs that quantise residuals, in the space where they do so:
  latent: Callable | None = None  # (tables, x_ND) -> z_NE
  levels: Callable | None = None  # tables -> a codebook [K, E] per position

  def __post_init__(self):
    """Raises ValueError if a knob is no field of a rule."""
    unknown = set(self.knobs) - set(vars(SearchRule()))
    if unknown:
      raise ValueError(f"{self.name} has unknown knobs: {sorted(unknown)}.")

  @property
  def has_network(self) -> bool:
    """Whether products of a network have a type to choose."""
    return "dtype" in self.knobs
