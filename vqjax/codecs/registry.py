"""Name of a codec to its module.

Every codec module has the same functions, so that commands, evaluation and
files need not know which codec they hold:

  Params                      frozen dataclass of arrays
  fit(key, x_ND, ...)         closed form; qinco has init and loss instead,
                              in qinco_loss, and pq_qinco is put together
                              from QINCos by recombine
  prepare(params)             what encode and decode take, computed once;
                              they take the parameters as well
  encode(tables, x_ND, *, num_steps=None, ...)   codes_NM, int32
  decode(tables, codes_NM)                       x_ND, data units
  codebook_sizes(params)      words at each code position
  dim(params)                 dimensions of the vectors

`encode` has knobs of its own beside `num_steps`; each has a default. Where a
prefix of a code is a code, `decode` takes fewer columns. Codecs that add up
words have `lookup(params, queries_QD)` as well.
"""

import importlib
from types import ModuleType

_MODULES = {
  "pq": "vqjax.codecs.pq",
  "rq": "vqjax.codecs.rq",
  "qinco": "vqjax.codecs.qinco",
  "pq_qinco": "vqjax.codecs.pq_qinco",
}


def names() -> tuple[str, ...]:
  """Returns the names of all codecs."""
  return tuple(_MODULES)


def get(name: str) -> ModuleType:
  """Returns the module of the codec called `name`; imports it on demand."""
  if name not in _MODULES:
    known = ", ".join(names())
    raise ValueError(f"codec must be one of {known}; got {name!r}.")
  return importlib.import_module(_MODULES[name])


def name_of(params) -> str:
  """Returns the name of the codec that `params` are the parameters of."""
  for name, module in _MODULES.items():
    if type(params).__module__ == module:
      return name
  raise TypeError(
    f"expected parameters of one of {', '.join(names())}; "
    f"got {type(params).__name__}."
  )
