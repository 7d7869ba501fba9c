"""QINCo in plain PyTorch, to compare with: no tables, nothing rearranged.

Every candidate goes through the whole network of `vqjax.codecs.qinco`, the
concatenation included, and its reconstruction is made before it is ranked.
PyTorch is no dependency: only this file imports it, and `bench` imports this
file only when asked to.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import torch

from vqjax.codecs import qinco


class Program(NamedTuple):
  """Both directions; inputs are numpy, decoded vectors stay on the device."""

  encode: Callable  # x_ND in data units to codes_NM, numpy.
  decode: Callable  # codes_NM to x_ND, a tensor.


def programs(
  params: qinco.QincoParams,
  *,
  num_candidates: int,
  beam_size: int,
  dtype: str = "float32",
) -> dict[str, Program]:
  """Returns the same network eager and compiled, on a GPU if PyTorch has one.

  `dtype` is for the products, by autocast. A compiled program compiles at
  its first call, which raises RuntimeError where that does not work.
  """
  if params.is_ivf:
    raise ValueError(
      "--torch has no IVF models; measure this codec without --torch."
    )
  device = "cuda" if torch.cuda.is_available() else "cpu"
  weights = jax.tree.map(
    lambda leaf: torch.tensor(np.asarray(leaf), device=device), params
  )
  torch.compiler.reset()  # It compiles for a limited number of block sizes.
  fns = _make_fns(weights, num_candidates, beam_size)
  eager = [_on_device(fn, device, dtype) for fn in fns]
  compiled = [
    _on_device(torch.compile(fn, dynamic=False), device, dtype) for fn in fns
  ]
  return {
    "torch eager": _program(*eager),
    "torch compiled": _program(*compiled),
  }


def _program(encode_fn, decode_fn) -> Program:
  return Program(lambda x_ND: encode_fn(x_ND).cpu().numpy(), decode_fn)


def _on_device(fn, device: str, dtype: str):
  """`fn` from numpy to a tensor that is there when it returns."""

  def run(x):
    with (
      torch.inference_mode(),
      torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"),
    ):
      out = fn(torch.tensor(np.asarray(x), device=device))
      if device == "cuda":
        torch.cuda.synchronize()
      return out

  return run


def _make_fns(weights, num_candidates: int, beam_size: int):
  """Returns encode and decode from tensors to tensors."""
  num_networks, num_codewords, _ = weights.codebooks_TKD.shape

  def encode(x_ND):
    z_ND = (x_ND - weights.mean_D) / weights.std
    error_NK = _sq_distances(z_ND[:, None], weights.first_KD)[:, 0]
    ids_NF = error_NK.topk(beam_size, dim=1, largest=False).indices
    xhat_NFD, codes_NFM = weights.first_KD[ids_NF], ids_NF[..., None]
    for t in range(num_networks):
      ids_NFC = _select(
        weights, t, z_ND[:, None] - xhat_NFD, num_candidates or num_codewords
      )
      words_NFCD = weights.codebooks_TKD[t][ids_NFC]
      state_NFCD = xhat_NFD[:, :, None].expand_as(words_NFCD)
      new_NFCD = state_NFCD + _network(weights, t, words_NFCD, state_NFCD)
      error_NC = ((z_ND[:, None, None] - new_NFCD) ** 2).sum(-1).flatten(1)
      best_NF = error_NC.topk(beam_size, dim=1, largest=False).indices
      xhat_NFD = _rows(new_NFCD.flatten(1, 2), best_NF)
      parents_NF = best_NF // ids_NFC.shape[2]
      last_NF = ids_NFC.flatten(1).gather(1, best_NF)
      codes_NFM = torch.cat(
        [_rows(codes_NFM, parents_NF), last_NF[..., None]], dim=-1
      )
    return codes_NFM[:, 0].int()

  def decode(codes_NM):
    xhat_ND = weights.first_KD[codes_NM[:, 0]]
    for t in range(codes_NM.shape[1] - 1):
      words_ND = weights.codebooks_TKD[t][codes_NM[:, t + 1]]
      xhat_ND = xhat_ND + _network(weights, t, words_ND, xhat_ND)
    return xhat_ND * weights.std + weights.mean_D

  return encode, decode


def _select(weights, t, residual_NFD, num_candidates):
  """The pre-selected codewords nearest to each residual: `[N, F, A]`."""
  num_codewords = weights.codebooks_TKD.shape[1]
  if num_candidates == num_codewords:
    ids_C = torch.arange(num_codewords, device=residual_NFD.device)
    return ids_C.expand(*residual_NFD.shape[:2], num_codewords)
  error_NFK = _sq_distances(residual_NFD, weights.preselect_TKD[t])
  return error_NFK.topk(num_candidates, dim=2, largest=False).indices


def _sq_distances(x_NFD, words_KD):
  """Squared distances `[N, F, K]`, in float32 also under autocast."""
  with torch.autocast(x_NFD.device.type, enabled=False):
    dot_NFK = x_NFD.float() @ words_KD.T
    x2_NF1 = (x_NFD**2).sum(-1, keepdim=True)
    return x2_NF1 - 2 * dot_NFK + (words_KD**2).sum(-1)


def _network(weights, t: int, words_D, xhat_D):
  """f(c, xhat) as written at the top of `vqjax.codecs.qinco`."""
  at = lambda leaf: None if leaf is None else leaf[t]
  times = lambda x, w: x if w is None else x @ w
  e = times(words_D, at(weights.in_TDE))
  concat = torch.cat([weights.word_TEU[t], weights.state_TDU[t]], dim=0)
  step = times(torch.cat([e, xhat_D], dim=-1) @ concat, at(weights.mix_TUE))
  bias_E = at(weights.bias_TE)
  e = e + (step if bias_E is None else step + bias_E)
  for up_EH, down_HE in zip(
    weights.up_TJEH[t], weights.down_TJHE[t], strict=True
  ):
    e = e + (e @ up_EH).relu() @ down_HE
  out = times(e, at(weights.out_TED)).float()
  return words_D + out if weights.add_word else out


def _rows(x_NCD, at_NF):
  """Picks rows `x_NCD[n, at_NF[n, f]]`: `[N, F, D]`."""
  index_NFD = at_NF[..., None].expand(-1, -1, x_NCD.shape[-1])
  return x_NCD.gather(1, index_NFD)
