# %% [markdown]
# # Cosine IVF, with the names of FastIVF
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vqjax/vqjax/blob/main/experiments/notebooks/fast_ivf.ipynb)
#
# `vqjax.fast_ivf` has the classes of the FastIVF package: lists by mini-batch
# k-means, whole vectors or product codes in them, many queries at a time. Programs
# for that package run with the import changed. Every index is saved as a plain
# faiss file.

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
import pathlib
import tempfile
import time

import faiss
import matplotlib.pyplot as plt
import numpy as np

import vqjax
from vqjax.fast_ivf import FastIVF, FastIVFPQ, MiniBatchKMeans

_, xb, xq, gt = vqjax.load_dataset("sample_text")
xb, xq, gt = np.float32(xb), np.float32(xq), np.asarray(gt)[:, :10]
print("base", xb.shape, "queries", xq.shape)

# %% [markdown]
# ## Mini-batch k-means
#
# Each step looks at one batch, so that data may be larger than memory: an array, a
# memory map, or an iterator of batches. `train` returns the smoothed share of
# vectors that still change their centroid.

# %%
kmeans = MiniBatchKMeans(num_centroids=128, batch_size=512, seed=0)
history = kmeans.train(xb)
labels = kmeans.predict(xb)

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3))
left.plot(history)
left.set(yscale="log", xlabel="step", ylabel="share that changes, smoothed")
right.bar(range(128), np.sort(np.bincount(labels, minlength=128))[::-1])
right.set(xlabel="centroids, largest first", ylabel="vectors")
figure.tight_layout();

# %% [markdown]
# ## Three indexes
#
# `FastIVF` keeps whole vectors. `FastIVFPQ` keeps product codes; here faiss's fast
# scan finds 100 candidates by them, which are scored again by whole vectors.

# %%
flat = FastIVF(384, nlist=128, seed=0, kmeans_max_steps=300)
flat.train(xb)
codes = FastIVFPQ(
  384,
  nlist=128,
  pq_num_centroids=16,
  pq_num_subvectors=96,
  engine="fastscan",
  seed=0,
  kmeans_max_steps=300,
)
codes.train(xb)
baseline = faiss.index_factory(384, "IVF128,Flat", faiss.METRIC_INNER_PRODUCT)
baseline.train(xb)
baseline.add(xb)


# %%
def measure(search_fn, rounds=3):
  """Returns knn_recall@10 and queries per second."""
  seconds = []
  for _ in range(rounds):
    began = time.perf_counter()
    ids = search_fn()
    seconds.append(time.perf_counter() - began)
  hits = [np.isin(a, b).mean() for a, b in zip(ids, gt, strict=True)]
  return np.mean(hits), len(xq) / min(seconds)


def search(index, nprobe, **settings):
  """Searches any of the three."""
  index.nprobe = nprobe
  return index.search(xq, k=10, **settings)[1]


curves = {
  "FastIVF": (flat, {}),
  "FastIVFPQ, 100 candidates": (
    codes,
    {"rescore": True, "num_candidates": 100},
  ),
  "faiss IVFFlat": (baseline, {}),
}
figure, axes = plt.subplots(figsize=(8, 4))
for name, (index, settings) in curves.items():
  points = [
    measure(lambda n=n, i=index, s=settings: search(i, n, **s))
    for n in (1, 2, 5, 10, 20, 50)
  ]
  axes.plot(*np.array(points).T, "o-", label=name)
axes.set(
  yscale="log",
  xlabel="knn_recall@10",
  ylabel="queries per second",
  title="nprobe 1 to 50 of 128 lists",
)
axes.legend();

# %% [markdown]
# ## Add, remove, save
#
# The folder holds a plain faiss file, which stock faiss searches with the same
# result.

# %%
flat.add(xb[:2], ids=[90_000, 90_001])
flat.remove([90_001])
folder = pathlib.Path(tempfile.mkdtemp()) / "lists"
flat.save(folder)
again = faiss.read_index(str(folder / "index.faiss"))
flat.nprobe = 10
faiss.ParameterSpace().set_index_parameter(again, "nprobe", 10)
same = np.array_equal(again.search(xq, 5)[1], flat.search(xq, k=5)[1])
print(len(flat), "vectors; faiss finds the same:", same)

# %% [markdown]
# Read on: [fast IVF](https://github.com/vqjax/vqjax/blob/main/docs/fast_ivf.md), with
# figures on 117,639 vectors. Next notebook: `own_data.ipynb`.
