"""Reads item codecs of other programs: RQ-VAE `.pth`, RQ-KMeans `.npz`.

The checkpoints are of the programs around LC-Rec (arXiv 2311.09049):
LC-Rec, MiniOneRec (arXiv 2510.24431), GRec, GenRec, and RQ-KMeans+, whose
encoder adds its network to its input. They are read without torch and without
running them; the optimiser in them is not read.

RQ-KMeans files are numpy archives of codebooks `codebook_0`, `codebook_1` and
so on, `[K, D]` each.
"""

import re
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from vqjax.codecs import rqvae
from vqjax.codecs.rq import RQParams
from vqjax.codecs.rqvae import Mlp, Norm, RQVAEParams
from vqjax.data import files
from vqjax.interop.torch_archive import Archive, Refused, Tensor

_LAYER = re.compile(r"mlp_layers\.(\d{1,4})\.weight")


def is_rqvae(root) -> bool:
  """Whether a checkpoint is a dict around the state dict of an RQ-VAE."""
  state = root.get("state_dict") if isinstance(root, dict) else None
  return isinstance(state, dict) and "rq.vq_layers.0.embedding.weight" in state


def from_archive(archive: Archive, root: dict) -> tuple[str, Any, dict]:
  """Converts an RQ-VAE checkpoint: codec name, parameters, info.

  `info` has the `sk_epsilons` of the levels and `sk_iters`, which the
  program's resolver of collisions takes, `epoch`, counted from 0, and the
  options that the model was trained with, as `trained_with`.

  Raises:
    Refused: A tensor is missing or does not fit the others.
  """
  state = _State(archive, root["state_dict"])
  given = getattr(root.get("args"), "__dict__", {})
  given = {k: v for k, v in given.items() if type(k) is str and _is_plain(v)}
  codebooks = state.codebooks()
  is_plus = any(name.startswith("encoder.mlp.") for name in state.names)
  encoder = state.mlp("encoder.mlp" if is_plus else "encoder")
  decoder = state.mlp("decoder")
  if is_plus:
    encoder = encoder.replace(skip_DE=jnp.eye(codebooks[0].shape[1]))
  params = RQVAEParams(encoder, decoder, codebooks)
  _check_chain(params)
  epoch, sk_iters = root.get("epoch"), given.get("sk_iters")
  info = {
    "encode": {"beam_size": 1},
    "source": "RQ-KMeans+" if is_plus else "RQ-VAE",
    "epoch": epoch if type(epoch) is int else None,
    "sk_epsilons": _epsilons(given.get("sk_epsilons"), len(codebooks)),
    "sk_iters": sk_iters if type(sk_iters) is int else 50,
    "trained_with": given,
  }
  return "rqvae", params, info


def _epsilons(values, num_levels: int) -> list[float]:
  """Epsilons of the levels; 0 in place of what is no epsilon."""
  values = values if type(values) is list else []
  is_one = lambda v: type(v) in (int, float) and 0 <= v < 1e6
  values = [float(v) if is_one(v) else 0.0 for v in values[:num_levels]]
  return values + [0.0] * (num_levels - len(values))


def _is_plain(value) -> bool:
  """Whether JSON has it: numbers, short text, or a list of them."""
  if type(value) is list:
    return len(value) <= 64 and all(
      type(each) is not list and _is_plain(each) for each in value
    )
  if type(value) is str:
    return len(value) <= 1024
  is_number = type(value) in (int, float) and abs(value) < 1e30
  return is_number or type(value) in (bool, type(None))


class _State(NamedTuple):
  """Tensors of a state dict by name."""

  archive: Archive
  tensors: dict

  @property
  def names(self) -> list[str]:
    return [name for name in self.tensors if isinstance(name, str)]

  def read(self, name: str, want: tuple) -> jnp.ndarray:
    """Reads a tensor; None in `want` fits any size."""
    tensor = self.tensors.get(name)
    if not isinstance(tensor, Tensor):
      raise Refused(f"has no tensor {name!r}, which its layers call for.")
    x = self.archive.array(name, tensor)
    fits = [w in (None, size) for w, size in zip(want, x.shape, strict=False)]
    if len(want) != x.ndim or not all(fits):
      raise Refused(f"has tensor {name!r} of shape {x.shape}, expected {want}.")
    return jnp.asarray(x)

  def codebooks(self) -> tuple:
    """Reads the codebooks, numbered from 0."""
    name = "rq.vq_layers.{}.embedding.weight"
    count = 0
    while name.format(count) in self.tensors:
      count += 1
    if count > rqvae.MAX_LEVELS:
      raise Refused(f"has {count} levels; at most {rqvae.MAX_LEVELS} fit.")
    first_KE = self.read(name.format(0), (None, None))
    want = None, first_KE.shape[1]
    rest = (self.read(name.format(at), want) for at in range(1, count))
    return first_KE, *rest

  def mlp(self, prefix: str) -> Mlp:
    """Reads a network; a layer has a weight matrix, a norm a vector."""
    numbers = sorted(
      int(match[1])
      for name in self.names
      if (match := _LAYER.fullmatch(name.removeprefix(f"{prefix}.")))
      and name.startswith(prefix)
    )
    has_mean = lambda at: (
      f"{prefix}.mlp_layers.{at}.running_mean" in self.tensors
    )
    weights, biases, norms = [], [], []
    for at in numbers:
      name = f"{prefix}.mlp_layers.{at}."
      if has_mean(at):
        names = "weight", "bias", "running_mean", "running_var"
        h = weights[-1].shape[1] if weights else None
        norms.append(Norm(*(self.read(name + each, (h,)) for each in names)))
        continue
      weights.append(self.read(name + "weight", (None, None)).T)
      biases.append(self.read(name + "bias", (weights[-1].shape[1],)))
    if not weights or len(norms) not in (0, len(weights) - 1):
      raise Refused(
        f"has {len(weights)} linear layers and {len(norms)} batch norms in its "
        f"{prefix}; expected one norm per layer but the last, or none."
      )
    return Mlp(tuple(weights), tuple(biases), tuple(norms))


def _check_chain(params: RQVAEParams) -> None:
  """Refuses layers that do not fit each other."""
  e = params.codebooks[0].shape[1]
  d = params.encoder.weights[0].shape[0]
  for name, mlp, first, last in (
    ("encoder", params.encoder, d, e),
    ("decoder", params.decoder, e, d),
  ):
    widths = [first]
    for weight_HH in mlp.weights:
      if weight_HH.shape[0] != widths[-1]:
        break
      widths.append(weight_HH.shape[1])
    if len(widths) <= len(mlp.weights) or widths[-1] != last:
      raise Refused(
        f"has layers in its {name} that do not fit each other: expected {first}"
        f" to {last} dimensions, got {[x.shape for x in mlp.weights]}."
      )
  if params.encoder.skip_DE is not None and d != e:
    raise Refused(
      f"adds its encoder of {e} dimensions to vectors of {d}; expected equal "
      "ones, as RQ-KMeans+ has them."
    )


def load_npz(path) -> tuple[str, Any, dict]:
  """Loads the codebooks of an RQ-KMeans: codec name, parameters, info.

  Levels of one size are the codec "rq", others an "rqvae" without networks.

  Raises:
    ValueError: The file has no codebooks, or they do not fit each other.
  """
  path = files.user_path(path)
  try:
    with np.load(path, allow_pickle=False) as file:
      count = 0
      while f"codebook_{count}" in file.files:
        count += 1
      books = [file[f"codebook_{at}"] for at in range(count)]
  except Exception as error:  # zipfile and zlib have their own.
    raise ValueError(
      f"{path} is damaged or no archive of numpy ({error})."
    ) from error
  if not 1 <= count <= rqvae.MAX_LEVELS:
    raise ValueError(
      f"{path} must hold 1 to {rqvae.MAX_LEVELS} arrays codebook_0, codebook_1 "
      f"and so on, as RQ-KMeans writes them; got {count}."
    )
  for at, book in enumerate(books):
    is_book = book.ndim == 2 and book.dtype.kind == "f" and book.size
    if not is_book or book.shape[1] != books[0].shape[1]:
      raise ValueError(
        f"{path} has codebook_{at} of shape {book.shape}, {book.dtype}; "
        "expected floats [K, D] with one D."
      )
    if not np.isfinite(book.astype(np.float32)).all():
      raise ValueError(f"{path} has NaN or Inf in codebook_{at}.")
  info = {"encode": {"beam_size": 1}, "source": "RQ-KMeans"}
  if len({len(book) for book in books}) == 1:
    return "rq", RQParams(jnp.asarray(np.stack(books), jnp.float32)), info
  none = Mlp((), ())
  codebooks = tuple(jnp.asarray(book, jnp.float32) for book in books)
  return "rqvae", RQVAEParams(none, none, codebooks), info
