"""Name of a codec to its `CodecSpec`, the record of its functions and knobs."""

import importlib

from vqjax.codecs.codec import CodecSpec

_MODULES = {
  "pq": "vqjax.codecs.pq",
  "rq": "vqjax.codecs.rq",
  "qinco": "vqjax.codecs.qinco",
  "pq_qinco": "vqjax.codecs.pq_qinco",
  "rqvae": "vqjax.codecs.rqvae",
}


def names() -> tuple[str, ...]:
  """Returns the names of all codecs."""
  return tuple(_MODULES)


def get(name: str) -> CodecSpec:
  """Returns the codec called `name`; imports its module on demand."""
  if name not in _MODULES:
    known = ", ".join(names())
    raise ValueError(f"codec must be one of {known}; got {name!r}.")
  return importlib.import_module(_MODULES[name]).CODEC
