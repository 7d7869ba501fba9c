"""Reads the checkpoints of the authors of QINCo and QINCo2, without torch.

Two kinds of file are known. A v2 file (QINCo2) is a dict around a state dict,
a v1 file (QINCo) a whole pickled module; either becomes tensors by name first.
The state of an optimiser is never read.

Torch keeps linear weights as `(out, in)`; ours multiply from the right. The
input of the concatenation is `[e ; xhat]`; in v1 e is the codeword itself.
Centroids of IVF models are stored in normalised units, as our `first_KD`.
References: arXiv 2401.14732, arXiv 2501.03078 and their released programs.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vqjax.codecs import pq_qinco
from vqjax.codecs.qinco import QincoParams
from vqjax.interop import rqvae_files
from vqjax.interop.torch_archive import (
  Archive,
  Module,
  Refused,
  Tensor,
  open_archive,
)

_MAX_MODULES = 100_000


def load_checkpoint(path) -> tuple[str, Any, dict]:
  """Loads a released checkpoint: codec name, parameters, info.

  The codec is "qinco" or "pq_qinco"; an RQ-VAE is read by `rqvae_files`.
  `info["encode"]` holds the checkpoint's own A and B as keyword arguments of
  `encode`, `info["source"]` the kind of file, `info["epoch"]` the epoch that
  ended when a v2 file was written.

  Raises:
    ValueError: If the file is none of these checkpoints, is damaged, or
      names anything that such a checkpoint does not use.
  """
  with open_archive(path) as (archive, root):
    if rqvae_files.is_rqvae(root):
      return rqvae_files.from_archive(archive, root)
    if isinstance(root, dict):
      return _from_v2(archive, root)
    if isinstance(root, Module):
      return _from_v1(archive, root)
    raise Refused("holds neither a state dict nor a QINCo module.")


class _Reader(NamedTuple):
  """Named tensors of a codec."""

  archive: Archive
  tensors: dict

  def read(self, name: str, want: tuple | None = None) -> np.ndarray:
    if not isinstance(self.tensors.get(name), Tensor):
      raise Refused(f"has no tensor {name!r}, which its sizes call for.")
    x = self.archive.array(name, self.tensors[name])
    if want is not None and x.shape != want:
      raise Refused(f"has tensor {name!r} of shape {x.shape}, expected {want}.")
    return x

  def stack(self, name: str, want: tuple, steps, num_blocks=None):
    """Stacks over steps, and over blocks if `name` has an `{l}`."""
    if num_blocks is None:
      one = lambda m: self.read(name.format(m=m), want)
    else:
      one = lambda m: np.stack(
        [self.read(name.format(m=m, l=l), want) for l in range(num_blocks)]
      )
    return np.stack([one(m) for m in steps])


def _turn(x: np.ndarray) -> np.ndarray:
  """Torch's `(out, in)` weights to ours, `(in, out)`."""
  return x.swapaxes(-1, -2)


def _steps(first: int, stop: int) -> range:
  if stop <= first:
    raise Refused("has no step with a network, so it is no QINCo.")
  return range(first, stop)


def _show(value) -> str:
  """Short text for messages; nested values could take forever to print."""
  is_plain = type(value) in (str, int, float, bool, type(None))
  return repr(value)[:40] if is_plain else f"a {type(value).__name__}"


def _sizes(values, names: str) -> list[int]:
  """Reads positive integers by name from a dict."""
  for name in names.split():
    if type(values.get(name)) is not int or values[name] < 1:
      raise Refused(
        f"must give {name} as a positive integer, got "
        f"{_show(values.get(name))}."
      )
  return [values[name] for name in names.split()]


def _make(**fields) -> QincoParams:
  """Builds parameters from numpy arrays; checks the scale."""
  if not fields["std"] > 0:
    raise Refused(f"must have a scale above 0, got {fields['std']}.")
  static = {name: fields.pop(name) for name in ("add_word", "is_ivf")}
  to_jax = lambda x: None if x is None else jnp.asarray(x, jnp.float32)
  return QincoParams(**{k: to_jax(x) for k, x in fields.items()}, **static)


def _from_v2(archive: Archive, root: dict):
  """Converts a QINCo2 checkpoint: a dict around a state dict."""
  model, given = root.get("model"), root.get("parameters")
  if not isinstance(model, dict) or not isinstance(given, dict):
    raise Refused(
      "is no QINCo2 checkpoint: expected entries 'model' and 'parameters', "
      f"got {', '.join(map(_show, list(root)[:8])) or 'none'}."
    )
  (d,) = _sizes(root, "data_dim")
  (beam_size,) = _sizes(given, "B")
  num_candidates = 0 if given.get("qinco1_mode") else given.get("A") or 0
  if type(num_candidates) is not int or num_candidates < 0:
    raise Refused(f"must give A as an integer, got {_show(num_candidates)}.")
  epoch = root.get("epoch")
  info = {
    "encode": {"num_candidates": num_candidates, "beam_size": beam_size},
    "source": "v2",
    "epoch": epoch if type(epoch) is int else None,
  }
  params = _v2_qinco(_Reader(archive, model), given, d, num_candidates > 0)
  return "qinco", params, info


def _v2_qinco(reader, given: dict, d: int, has_preselect: bool) -> QincoParams:
  """Converts the state dict of a QINCo2 whose sizes are `given`."""
  k, num_codes, h, num_blocks = _sizes(given, "K M dh L")
  e = d if given.get("de") is None else _sizes(given, "de")[0]
  is_ivf = bool(given.get("ivf_in_use"))
  first, first_shape = "steps.0.codebook.weight", (k, d)
  if is_ivf:
    first = "steps.0.ivf_centroids.weight"
    first_shape = (_sizes(given, "ivf_K")[0], d)
  if "steps.1.substep.codebook.weight" in reader.tensors:
    has_preselect = True
  steps = _steps(1, num_codes + is_ivf)
  of = lambda name, *want: reader.stack("steps.{m}." + name, want, steps)
  in_blocks = lambda name, *want: _turn(
    reader.stack(
      "steps.{m}.residual_blocks.{l}." + name, want, steps, num_blocks
    )
  )
  concat_TUE = _turn(of("concat.mlp.weight", e, e + d))
  return _make(
    mean_D=reader.read("data_mean", (d,)),
    std=reader.read("data_std", ()),
    first_KD=reader.read(first, first_shape),
    codebooks_TKD=of("codebook.weight", k, d),
    preselect_TKD=of("substep.codebook.weight", k, d)
    if has_preselect
    else None,
    in_TDE=None if e == d else _turn(of("in_proj.weight", e, d)),
    word_TEU=concat_TUE[:, :e],
    state_TDU=concat_TUE[:, e:],
    mix_TUE=None,
    bias_TE=of("concat.mlp.bias", e),
    up_TJEH=in_blocks("up_proj.weight", h, e),
    down_TJHE=in_blocks("down_proj.weight", e, h),
    out_TED=None if e == d else _turn(of("out_proj.weight", d, e)),
    add_word=not given.get("qinco1_mode"),
    is_ivf=is_ivf,
  )


def _from_v1(archive: Archive, root: Module):
  """Converts a pickled QINCo module, or a PQ of several."""
  kind = type(root).__name__
  info = {
    "encode": {"num_candidates": 0, "beam_size": 1},
    "source": f"v1 {kind}",
    "epoch": None,
  }
  if kind == "PQ_QINCo":
    return "pq_qinco", _v1_pq_qinco(archive, root), info
  return "qinco", _v1_qinco(archive, root), info


def _v1_pq_qinco(archive: Archive, root: Module) -> pq_qinco.PqQincoParams:
  """Converts a PQ-QINCo; `opq_matrix` multiplies from the left."""
  if _attribute(root, "db_scale", 1) != 1:
    raise Refused(
      "has a db_scale in addition to the scales of its sub-quantizers."
    )
  children = _named(root, "_modules", Module)
  subs = []
  while f"sub_quantizer_{len(subs)}" in children:
    subs.append(children[f"sub_quantizer_{len(subs)}"])
  if not subs or len(subs) < len(children):
    raise Refused(
      "has no modules sub_quantizer_0, sub_quantizer_1 and so on, or others."
    )
  blocks = [_v1_qinco(archive, sub) for sub in subs]
  rotation_DD = None
  own = _named(root, "_parameters", Tensor)
  if "opq_matrix" in own:
    d = sum(block.mean_D.shape[0] for block in blocks)
    opq_DD = _Reader(archive, own).read("opq_matrix", (d, d))
    rotation_DD = jnp.asarray(_turn(opq_DD))
  try:
    return pq_qinco.recombine(blocks, rotation_DD)
  except ValueError as error:
    raise Refused(f"cannot be used: {error}") from error


def _attribute(module, name: str, default=None):
  value = vars(module).get(name)
  return default if value is None else value


def _named(module, name: str, kind: type) -> dict[str, Any]:
  """Those entries of a dict attribute that are of one kind, by name."""
  entries = _attribute(module, name, {})
  if not isinstance(entries, dict):
    raise Refused(f"has a module whose {name} are no dict.")
  return {
    key: value
    for key, value in entries.items()
    if isinstance(key, str) and isinstance(value, kind)
  }


def _flat_tensors(root: Module) -> dict[str, Tensor]:
  """Tensors of a module and its children by name, `step1.codebook.weight`."""
  found, waiting = {}, [("", root)]
  for _ in range(_MAX_MODULES):
    if not waiting:
      return found
    prefix, module = waiting.pop()
    for name, tensor in _named(module, "_parameters", Tensor).items():
      found[prefix + name] = tensor
    # A module may contain itself: names end that.
    waiting += [
      (f"{prefix}{name}.", child)
      for name, child in _named(module, "_modules", Module).items()
      if len(prefix) + len(name) < 100
    ]
  raise Refused(f"has more than {_MAX_MODULES} modules.")


def _v1_qinco(archive: Archive, module: Module) -> QincoParams:
  """Converts one QINCo; of IVF models all steps have a network."""
  kind = type(module).__name__
  if kind not in ("QINCo", "QINCoLR", "IVFQINCo"):
    raise Refused(f"holds a {kind}, expected a QINCo model.")
  reader = _Reader(archive, _flat_tensors(module))
  is_ivf = kind == "IVFQINCo"
  d, k, num_codes, num_blocks, h = _sizes(vars(module), "d K M L h")
  num_first = _sizes(vars(module), "K_IVF")[0] if is_ivf else k
  steps = _steps(0 if is_ivf else 1, num_codes)
  of = lambda name, *want: reader.stack("step{m}." + name, want, steps)
  in_blocks = lambda name, *want: _turn(
    reader.stack("step{m}.residual_block{l}." + name, want, steps, num_blocks)
  )
  mix_TUE = bias_TE = None
  if kind == "QINCoLR":
    rank = reader.read(f"step{steps[0]}.MLPconcat.0.weight").shape[0]
    concat_TUE = _turn(of("MLPconcat.0.weight", rank, 2 * d))
    mix_TUE = _turn(of("MLPconcat.1.weight", d, rank))
  else:
    concat_TUE = _turn(of("MLPconcat.weight", d, 2 * d))
    bias_TE = of("MLPconcat.bias", d)
  return _make(
    mean_D=np.zeros(d, np.float32),
    std=_v1_scale(archive, module),
    first_KD=reader.read("codebook0.weight", (num_first, d)),
    codebooks_TKD=of("codebook.weight", k, d),
    preselect_TKD=None,
    in_TDE=None,
    word_TEU=concat_TUE[:, :d],
    state_TDU=concat_TUE[:, d:],
    mix_TUE=mix_TUE,
    bias_TE=bias_TE,
    up_TJEH=in_blocks("0.weight", h, d),
    down_TJHE=in_blocks("2.weight", d, h),
    out_TED=None,
    add_word=False,
    is_ivf=is_ivf,
  )


def _v1_scale(archive: Archive, module: Module) -> np.ndarray:
  """Reads `db_scale`: a number, or a tensor of one number."""
  scale = _attribute(module, "db_scale", 1.0)
  if isinstance(scale, Tensor):
    scale = archive.array("db_scale", scale)
  elif type(scale) not in (int, float) or not np.isfinite(scale):
    raise Refused(f"must give db_scale as a number, got {_show(scale)}.")
  if np.size(scale) != 1:
    raise Refused(f"must give db_scale as one number, got {np.size(scale)}.")
  return np.float32(np.reshape(scale, ()))
