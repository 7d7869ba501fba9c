"""What the benchmark measures: codecs, trained or drawn, and their vectors."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from experiments.lib import codecs
from vqjax import shipped
from vqjax.codec import Codec
from vqjax.codecs import qinco_loss
from vqjax.codecs.rule import LETTERS, SearchRule
from vqjax.data import batches, datasets, formats

PRESETS = "qinco2_xs,qinco2_s"
_PUBLISHED_BEAM = 32  # B of arXiv 2501.03078, with A = 16.
_MIN_DRAWN = 1 << 16  # Vectors; more rows than that come round again.
# Weights that are zero in an untrained network.
_DRAWN = ("word_TEU", "state_TDU", "mix_TUE", "down_TJHE", "out_TED")


class Subject(NamedTuple):
  """A codec with vectors to give it, in memory or in a file."""

  name: str
  codec: Codec
  x_ND: Any
  config: Any = None  # If the weights are drawn.


def load(config) -> list[Subject]:
  """Returns the codec of --codec, or the configurations' codecs."""
  if config.codec:
    codec = codecs.open_codec(config.codec)
    dataset = codecs.resolve_data(codec, config, base=config.data)
    x_ND = datasets.open_split(dataset, "base")
    return [Subject(config.codec, codec, x_ND)]
  files = (config.config or PRESETS).split(",")
  settings = {file: _load_config(file) for file in files}
  if config.data:
    x_ND = formats.open_vectors(config.data, role="--data")
  else:
    shape = max(config.kmeans_vectors, _MIN_DRAWN), config.dim
    x_ND = np.random.default_rng(0).standard_normal(shape, np.float32)
  return [_draw(file, drawn, x_ND) for file, drawn in settings.items()]


def rows(subject: Subject, num: int) -> np.ndarray:
  """Returns the first rows, repeated if there are too few."""
  return batches.read_rows(subject.x_ND, np.arange(num) % len(subject.x_ND))


def searches(
  subject: Subject, config, dtype: str = "float32"
) -> list[SearchRule]:
  """Returns the published rule and the codec's own.

  Those that the user asks for take the place of both, but for a ranker, which
  is measured as well.
  """
  find = functools.partial(codecs.search_rule, subject.codec, fits_ranker=True)
  asked = {name: config[name] for name in codecs.SIZES}
  wanted = find({**asked, "dtype": dtype})
  own = find({"dtype": dtype})
  has_ranker = wanted.num_ranked and wanted != own
  is_asked = any(value is not None for value in asked.values())
  if not own.num_joint_candidates or is_asked and not has_ranker:
    return [wanted]
  beam_size = min(own.beam_size, _PUBLISHED_BEAM)
  published = own.published().replace(beam_size=beam_size)
  return [published, own, *([wanted] if has_ranker else [])]


def training_rule(config, dtype: str) -> SearchRule:
  """Returns the search of a configuration's training step."""
  names = [name for name in codecs.SIZES if name in config.model]
  return SearchRule(**{name: config.model[name] for name in names}, dtype=dtype)


def sizes(codec: Codec, rule: SearchRule | None = None) -> dict:
  """Returns the letters of the papers, and how many of each."""
  tables = codec.tables
  codebooks = codec.codebook_sizes
  found = {"M": len(codebooks), "K": codebooks[-1], "D": codec.dim}
  if codec.name == "qinco":
    _, found["H"], found["E"] = tables.steps.first_down_THE.shape
    found["L"] = 1 + tables.steps.up_TJEH.shape[1]
  if rule is not None:
    sizes = rule.to_dict([n for n in codecs.SIZES if n in codec.spec.knobs])
    found |= {LETTERS[name]: size for name, size in sizes.items() if size}
  if "C" in found:  # Takes the place of A.
    found.pop("A", None)
  return found


def _load_config(file: str):
  """Returns the configuration of `NAME[:ARGUMENT]` or of a file."""
  path, _ = shipped.find_config(file)
  config = shipped.read_config(file)
  if config.codec != "qinco":
    raise ValueError(
      f"{path} is of codec {config.codec!r}, but weights are drawn for qinco "
      "alone: train it, then measure it with --codec=runs/NAME."
    )
  return config


def _draw(file: str, config, x_ND) -> Subject:
  """A codec with residual k-means as codewords and a random network."""
  name = pathlib.Path(file.partition(":")[0]).stem
  logging.info("Drawing the weights of %s.", name)
  subject = Subject(name, None, x_ND, config)
  model = {k: v for k, v in config.model.items() if k not in codecs.SIZES}
  sample_ND = rows(subject, max(8192, 2 * model["codebook_size"]))
  if config.ivf.num_lists:
    centroids_LD = rows(subject, config.ivf.num_lists)
    model["centroids_LD"] = jnp.asarray(centroids_LD)
  params = qinco_loss.init(
    jax.random.key(0), jnp.asarray(sample_ND), **model, num_iterations=2
  )
  # By numpy: jax.random compiles a program, for seconds, for every shape.
  drawn, rng = {}, np.random.default_rng(1)
  for field in _DRAWN:
    leaf = getattr(params, field)
    if leaf is not None:
      draw = rng.standard_normal(leaf.shape, np.float32)
      drawn[field] = jnp.asarray(0.1 / leaf.shape[-2] ** 0.5 * draw)
  params = params.replace(**drawn)
  info = {"encode": config.encode.to_dict()}
  return subject._replace(codec=Codec("qinco", params, info))
