# %% [markdown]
# # Quickstart
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vqjax/vqjax/blob/main/experiments/notebooks/quickstart.ipynb)
#
# Train a codec on vectors, turn each vector into 8 bytes, turn them back, and
# measure what was lost, next to two codecs of faiss. Half a minute on two CPU
# cores.

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
import tempfile

import faiss
import matplotlib.pyplot as plt
import numpy as np

import vqjax

# %% [markdown]
# ## Vectors
#
# vqjax comes with SIFT descriptors of photographs: vectors to train on (`xt`), a
# base to compress and search (`xb`), and queries (`xq`). A part of them will do
# here. For your own data put arrays `[N, D]` or paths of files in their place.
# `gt` are the ids of the nearest vectors of the base, by exact search.

# %%
xt, xb, xq, _ = vqjax.load_dataset("sample_sift")
xt, xb, xq = (np.float32(x) for x in (xt[:20_000], xb[:5_000], xq[:500]))
_, gt = faiss.knn(xq, xb, 1)
print("train", xt.shape, "base", xb.shape, "queries", xq.shape)

# %% [markdown]
# ## Fit, encode, decode
#
# `qinco2_xs` is the smallest QINCo2: a small network makes each codebook from
# what has been decoded so far. Three epochs are enough to show how it works; left
# out, `num_epochs` is 60.

# %%
codec = vqjax.fit(xt, "qinco2_xs", num_codes=8, num_epochs=3, seed=0)
codec

# %%
codes = codec.encode(xb)
decoded = codec.decode(codes)
print("codes", codes.shape, codes.dtype, "decoded", decoded.shape)
print("the first code:", codes[0])

# %%
figure, axes = plt.subplots(figsize=(9, 2.6))
axes.bar(np.arange(128), xb[0], color="0.75", label="vector, 128 numbers")
axes.plot(decoded[0], color="C0", lw=1.5, label="decoded from 8 bytes")
axes.set(xlabel="dimension", title="One vector and what its code gives back")
axes.legend();

# %% [markdown]
# ## How good is it?
#
# The error is the squared distance between a vector and its decoded form. The
# **1-recall@R** is the share of queries whose true nearest neighbour is among the
# first R results of a search in the decoded vectors.

# %%
measured = codec.evaluate(xb, queries=xq, true_ids=gt)
measured

# %% [markdown]
# Two codecs of faiss of the same size learn from the same vectors. The README has
# OPQ and LSQ too, and QINCo2 after a full training.

# %%
RANKS = (1, 2, 5, 10, 20, 50, 100)


def measure(decoded):
  """Returns the mean squared error, and 1-recall@R for each R."""
  index = faiss.IndexFlatL2(decoded.shape[1])
  index.add(decoded)
  _, found = index.search(xq, max(RANKS))
  hits = found == gt
  error = np.mean(np.sum((xb - decoded) ** 2, axis=1))
  return error, [np.mean(hits[:, :rank].any(axis=1)) for rank in RANKS]


def faiss_decoded(factory):
  """Compresses the base by a codec of faiss."""
  index = faiss.index_factory(128, factory)
  index.train(xt)
  return index.sa_decode(index.sa_encode(xb))


results = {
  "QINCo2-XS (vqjax)": measure(decoded),
  "RQ (faiss)": measure(faiss_decoded("RQ8x8")),
  "PQ (faiss)": measure(faiss_decoded("PQ8x8")),
}

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4))
for row, (name, (error, recalls)) in enumerate(results.items()):
  left.barh(row, error, color=f"C{row}")
  left.text(error, row, f" {error:,.0f}", va="center")
  right.plot(RANKS, recalls, "o-", color=f"C{row}", label=name)
left.set_yticks(range(len(results)), results)
left.invert_yaxis()
left.margins(x=0.2)
left.set(xlabel="mean squared error (lower is better)")
right.set(xscale="log", xlabel="R", ylabel="1-recall@R (higher is better)")
right.legend()
figure.suptitle("8 bytes per vector")
figure.tight_layout();

# %% [markdown]
# ## Search
#
# An index puts the codes into lists, so that a query is compared with few of them.

# %%
index = vqjax.build_index(codec, xb, num_lists=64)
distances, ids = index.search(xq, k=10, nprobe=8)
print("results of the first query:", ids[0])
index.evaluate(xq, gt, nprobe=8)

# %%
index.add(xq[:5])  # These queries become the vectors 5000 to 5004.
print(len(index), "vectors;", index.search(xq[0], k=1)[1])

# %% [markdown]
# ## Save and load

# %%
folder = tempfile.mkdtemp()
codec.save(f"{folder}/codec")
index.save(f"{folder}/index")
again = vqjax.load(f"{folder}/codec")
print(np.array_equal(again.decode(codes), decoded))
vqjax.load_index(f"{folder}/index")

# %% [markdown]
# Next: what training and the encoder's settings buy (`qinco2.ipynb`), search at
# many settings (`ivf_search.ipynb`), or your own file (`own_data.ipynb`).
