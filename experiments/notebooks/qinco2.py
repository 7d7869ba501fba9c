# %% [markdown]
# # QINCo2: training, and what the encoder's settings buy
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vqjax/vqjax/blob/main/experiments/notebooks/qinco2.ipynb)
#
# QINCo2 ([arXiv 2501.03078](https://arxiv.org/abs/2501.03078)) decodes a code step by
# step. At each step a small network, which sees what has been decoded so far,
# changes the codewords of that step. So each vector has codebooks of its own. The
# encoder keeps the best few partial codes, a beam.
#
# This notebook trains a small one by the command, then looks at four things: the
# course of the training, the use of the codewords, what a wider beam buys, and
# shorter codes from the same codec.

# %%
# Installs vqjax if it is missing, as on Colab.
import importlib.util

if importlib.util.find_spec("vqjax") is None:
  # %pip install -q "git+https://github.com/vqjax/vqjax"
  importlib.invalidate_caches()
  if importlib.util.find_spec("vqjax") is None:
    raise RuntimeError(
      "pip could not install vqjax; what it says above tells why. Needed are "
      "Python 3.11 or newer and a network."
    )

# %%
import json
import pathlib
import tempfile
import time

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

import vqjax

xt, xb, xq, _ = vqjax.load_dataset("sample_sift")
xb = np.float32(xb[:2_000])
workdir = pathlib.Path(tempfile.mkdtemp()) / "qinco2"

# %% [markdown]
# ## Train by the command
#
# A run folder holds everything. If training is stopped, run the same command again:
# it resumes, and ends with the same bits. `--config=qinco2_s` and the default schedule are
# for real use; here epochs are few and short. `vqjax train --help` explains the
# settings, `vqjax train --config=qinco2_xs --print_config` lists them.

# %%
# !vqjax train --config=qinco2_xs --workdir={workdir} --config.train.num_epochs=4 --config.train.epoch_size=15000 2>&1 | tail -4
sorted(path.name for path in workdir.iterdir())

# %%
Image(filename=workdir / "curves.png")

# %% [markdown]
# `metrics.jsonl` has the same as lines of JSON, one for each figure.

# %%
lines = (workdir / "metrics.jsonl").read_text().splitlines()
print(len(lines), "lines, the last:")
json.loads(lines[-1])

# %% [markdown]
# ## Are all codewords in use?
#
# If every codeword of a step were used equally often, the perplexity of the step
# would be 256 (of few vectors it is lower, by chance alone). Codewords that nothing
# uses are wasted bits. Training replaces them.

# %%
codec = vqjax.load(workdir)
codes = codec.encode(xb)
counts = np.stack([np.bincount(step, minlength=256) for step in codes.T])
share = np.maximum(counts / counts.sum(axis=1, keepdims=True), 1e-12)
perplexity = np.exp(-np.sum(share * np.log(share), axis=1))

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
left.imshow(np.sort(counts)[:, ::-1], aspect="auto", cmap="viridis")
left.set(xlabel="codewords, most used first", ylabel="step", title="uses")
left.set_yticks(range(8), range(1, 9))
right.bar(range(1, 9), perplexity)
right.axhline(256, color="0.5", ls="--", label="all equally often")
right.set(xlabel="step", ylabel="perplexity", ylim=(0, 270))
right.legend(loc="lower right")
figure.tight_layout();

# %% [markdown]
# ## What the beam and the candidates buy
#
# `beam_size` is the number of partial codes that are kept, `num_joint_candidates`
# the number of extensions that the network looks at in each step. Both cost time
# when encoding, and nothing when decoding. The codec keeps the values that it is
# to be used with; any call can change them.


# %%
def encode_at(beam_size, num_joint_candidates):
  """Returns the microseconds per vector and the mean squared error."""
  sizes = dict(beam_size=beam_size, num_joint_candidates=num_joint_candidates)
  codec.encode(xb, **sizes)  # Compiles.
  began = time.perf_counter()
  codes = codec.encode(xb, **sizes)
  seconds = time.perf_counter() - began
  error = np.mean(np.sum((xb - codec.decode(codes)) ** 2, axis=1))
  return 1e6 * seconds / len(xb), error


sizes = [(1, 8), (4, 8), (8, 16), (16, 32), (32, 64)]
points = np.array([encode_at(*size) for size in sizes])

figure, axes = plt.subplots(figsize=(7, 3.4))
axes.plot(*points.T, "o-")
for (beam, candidates), point in zip(sizes, points, strict=True):
  label = f"B={beam} C={candidates}"
  axes.annotate(label, point, xytext=(6, 6), textcoords="offset points")
axes.set(
  xscale="log",
  xlabel="microseconds per vector",
  ylabel="mean squared error",
  title="encoding: beam B, candidates C",
)
axes.set_xticks([], [], minor=True)
axes.set_xticks(points[:, 0].round(), [f"{us:.0f}" for us in points[:, 0]])
axes.margins(x=0.2, y=0.15);

# %% [markdown]
# ## Several rates from one codec
#
# The first codes of a vector are a code themselves. A coarse one decodes to less.

# %%
errors = [
  np.mean(np.sum((xb - codec.decode(codes[:, :num])) ** 2, axis=1))
  for num in range(1, 9)
]
figure, axes = plt.subplots(figsize=(7, 3))
axes.bar(range(1, 9), errors)
axes.set(xlabel="bytes that are decoded", ylabel="mean squared error");

# %% [markdown]
# Read on: [training](https://github.com/vqjax/vqjax/blob/main/docs/training.md) on
# your own file, resuming, several devices, and
# [results](https://github.com/vqjax/vqjax/blob/main/docs/results.md) of full
# training. Next notebook: `ivf_search.ipynb`.
