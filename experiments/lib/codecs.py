"""Codecs of commands: opened from --codec, with the options of the search."""

import functools
from collections.abc import Callable

import jax
from absl import logging

import vqjax
from experiments.lib import cli
from vqjax import cpu
from vqjax.codec import Codec
from vqjax.codecs.rule import LETTERS, SearchRule
from vqjax.data import datasets, files
from vqjax.recipes import product_dtype as product_dtype

RULES = ("joint", "published")
SIZES = tuple(LETTERS)  # A, B, C and F.


def open_codec(path: str) -> Codec:
  """Loads a run folder, a codec.safetensors or a released .pt file."""
  cli.keep_compiled()
  return vqjax.load(path)


def ranking_dtype(name: str) -> str:
  """As `product_dtype`, for vectors that are decoded to be compared.

  There `auto` is bfloat16 on CPUs that have it too.
  """
  if name == "auto" and jax.default_backend() == "cpu":
    return "bfloat16" if cpu.has_bfloat16() else "float32"
  return product_dtype(name)


def search_rule(
  codec: Codec, config, *, fits_ranker: bool = False
) -> SearchRule:
  """Returns the codec's own rule with the options that the user gave.

  --rule changes the kind of rule, sizes come after it. Asking for candidates
  per hypothesis (A) alone asks for the published rule. --num_ranked needs a
  codec with a ranker, unless the caller `fits_ranker`.

  Raises:
    ValueError: An option means nothing to this codec, or does not fit it.
  """
  names = (*SIZES, "num_steps")
  asked = {name: config[name] for name in names if config.get(name) is not None}
  rule = _of_kind(codec, config.get("rule"))
  if "num_candidates" in asked and "num_joint_candidates" not in asked:
    rule = rule.replace(num_joint_candidates=0)
  unknown = [name for name in asked if name not in codec.spec.knobs]
  if unknown:
    raise ValueError(
      f"--{unknown[0]} means nothing to a {codec.name} codec; leave it out."
    )
  rule = rule.replace(**asked)
  if codec.spec.has_network:
    rule = rule.replace(dtype=product_dtype(config.get("dtype") or "auto"))
  if fits_ranker:
    codec.spec.check_rule(codec.params, rule)
  else:
    codec.check_rule(rule, str(config.get("codec") or "FOLDER"))
  return rule


def _of_kind(codec: Codec, kind: str | None) -> SearchRule:
  """The codec's own rule as a joint or a published one; None for its own."""
  if kind is None:
    return codec.rule
  if kind not in RULES:
    raise ValueError(f"--rule must be {' or '.join(RULES)}; got {kind!r}.")
  if "num_joint_candidates" not in codec.spec.knobs:
    raise ValueError(
      f"--rule means nothing to a {codec.name} codec; leave it out."
    )
  if kind == "joint":
    return codec.rule.joint(codec.codebook_sizes[-1])
  return codec.rule.published()


def saving(codec: Codec, rule: SearchRule) -> str | None:
  """Says what --rule=joint would save; None if it would save nothing."""
  knobs = codec.spec.knobs
  is_joint = rule.num_joint_candidates or not rule.num_candidates
  if "num_joint_candidates" not in knobs or is_joint:
    return None
  joint = rule.joint(codec.codebook_sizes[-1])
  factor = rule.num_evaluated / joint.num_evaluated
  if factor <= 1:
    return None
  return (
    f"Encoding by {rule.describe(knobs)}, the rule of the codec. --rule=joint "
    f"({joint.describe(knobs)}) sends {factor:.1f} times fewer candidates "
    "through the network, at about the same error."
  )


def make_encoder(codec: Codec, config, x_ND) -> tuple[Callable, SearchRule]:
  """Returns `Codec.encode_blocks` of vectors by the options, and the rule.

  A graph of the centroids is made here, if the options ask for one.
  """
  rule, assign = search_rule(codec, config), config.get("assign") or "auto"
  line = saving(codec, rule)
  if line and not any(config.get(n) for n in ("rule", "num_candidates")):
    logging.info("%s", line)
  codec.encoder(rule, assign, is_shown=True)
  return functools.partial(codec.encode_blocks, x_ND, rule, assign), rule


def encode_data(codec: Codec, config) -> tuple[int, Callable, dict]:
  """Rows of --data, `make_encoder` of them, and what its codes are made of."""
  dataset = resolve_data(codec, config, base=config.data)
  x_ND = datasets.open_split(dataset, "base")
  blocks_fn, rule = make_encoder(codec, config, x_ND)
  about = codec.describe_search(rule, config.get("assign", "auto"))
  return len(x_ND), blocks_fn, {"data": files.identify(x_ND), "encode": about}


def resolve_data(
  codec: Codec, config, *, needs_base: bool = True, **paths
) -> datasets.Dataset:
  """Returns the data of the options, else those the codec was trained on."""
  trained_on = {k: v for k, v in codec.info.get("data", {}).items() if v}
  trained_on.pop("validation_size", None)
  if paths.get("base") is None and any(paths.values()):
    raise ValueError("--queries and --groundtruth need --data, their base.")
  if any(paths.values()):
    dataset = datasets.resolve(
      scale=codec.info.get("scale"), metric=codec.info.get("metric"), **paths
    )
  elif trained_on:
    root = config.get("data_root") or trained_on.pop("root", None)
    dataset = datasets.resolve(**{**trained_on, "root": root})
    if needs_base and not dataset.base:
      also = " (and --queries=FILE)" if "queries" in config else ""
      if "split" in config:
        also += ", or measure the held-out vectors with --split=validation"
      raise ValueError(
        "The codec was trained on a file without a base: give "
        f"--data=FILE{also}."
      )
  else:
    raise ValueError(
      "This codec does not say what it was trained on; give --data=FILE."
    )
  if dataset.dim != codec.dim:
    raise ValueError(
      f"The codec is for vectors of {codec.dim} dimensions, got "
      f"{dataset.dim} in {dataset.base or dataset.train or dataset.queries}."
    )
  return dataset


def check_cosine(codec: Codec, metric: str) -> bool:
  """Whether the codec is of vectors of length 1, which it was trained on.

  Raises ValueError if the metric asked for is cosine and it is not.
  """
  own = codec.info.get("metric") or "l2"
  if metric == "cosine" and own != "cosine":
    raise ValueError(
      f"--metric=cosine needs a codec of vectors of length 1, but this one was "
      f"trained for {own}; train with --config.data.metric=cosine."
    )
  return own == "cosine"
