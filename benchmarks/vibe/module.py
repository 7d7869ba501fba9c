"""vqjax for this benchmark; what it does is in methods.py."""

from ..base.module import BaseANN
from . import methods


class VqjaxIVF(methods.IVFCodec, BaseANN):
  """Codes in inverted lists."""


class VqjaxFastIVF(methods.FastIVF, BaseANN):
  """Whole vectors in inverted lists."""


class VqjaxHakes(methods.Hakes, BaseANN):
  """4-bit codes, searched by what was learned."""
