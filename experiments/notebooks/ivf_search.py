# %% [markdown]
# # Search in inverted lists
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vqjax/vqjax/blob/main/experiments/notebooks/ivf_search.ipynb)
#
# An index for large data sets puts vectors into lists, each with a centroid. A query
# looks at `nprobe` lists only. With learned codes it does so in stages, each more
# accurate and for fewer vectors: an additive decoder scans the lists, a pairwise
# decoder re-ranks the best, the network decodes the best of these. This notebook
# builds such an index, measures it at many settings, and draws the trade-off beside
# IVF-PQ of faiss at equal size of the codes.

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
import time

import faiss
import matplotlib.pyplot as plt
import numpy as np

import vqjax

xt, xb, xq, gt = vqjax.load_dataset("sample_sift")
xt, xb = np.float32(xt[:20_000]), np.float32(xb[:10_000])
xq = np.float32(xq[:500])
_, gt = faiss.knn(xq, xb, 1)

# %% [markdown]
# ## A codec with lists
#
# In `ivf_qinco2_xs` the centroid of the list is where the decoding of a vector
# starts. `vqjax ivf_pipeline --config=ivf_qinco2_xs` does all that follows by one
# command, for files of any size.

# %%
codec = vqjax.fit(
  xt, "ivf_qinco2_xs", ivf={"num_lists": 64}, num_epochs=3, seed=0
)
index = vqjax.build_index(codec, xb, beam_size=8, num_joint_candidates=16)
index

# %%
distances, ids = index.search(xq, k=10, nprobe=8)
print("ids", ids.shape, "squared distances", distances.shape)

# %% [markdown]
# ## Operating points
#
# `nprobe` lists are searched, and the network decodes the best `num_network` vectors.
# Both raise recall and cost time.


# %%
def best_of(search_fn, rounds=3):
  """Returns queries per second and 1-recall@1."""
  seconds = []
  for _ in range(rounds):
    began = time.perf_counter()
    found = search_fn()
    seconds.append(time.perf_counter() - began)
  return np.mean(found[:, 0] == gt[:, 0]), len(xq) / min(seconds)


ours = {
  num_network: [
    best_of(
      lambda p=nprobe, n=num_network: (
        index.search(xq, k=10, nprobe=p, num_network=n)[1]
      )
    )
    for nprobe in (1, 2, 4, 8, 16)
  ]
  for num_network in (0, 20)
}

# %%
flat = faiss.IndexFlatL2(128)
pq = faiss.IndexIVFPQ(flat, 128, 64, 8, 8)
pq.train(xt)
pq.add(xb)


def search_pq(nprobe):
  """Searches IVF-PQ."""
  pq.nprobe = nprobe
  return pq.search(xq, 10)[1]


baseline = [
  best_of(lambda p=nprobe: search_pq(p)) for nprobe in (1, 2, 4, 8, 16)
]

# %%
figure, axes = plt.subplots(figsize=(8, 4))
for num_network, points in ours.items():
  axes.plot(*np.array(points).T, "o-", label=f"vqjax, network on {num_network}")
axes.plot(*np.array(baseline).T, "s--", color="0.4", label="IVF-PQ (faiss)")
axes.set(
  yscale="log",
  xlabel="1-recall@1",
  ylabel="queries per second",
  title="8-byte codes and a list number, nprobe from 1 to 16",
)
axes.legend();

# %% [markdown]
# IVF-PQ is faster; what it misses no number of lists brings back. After so short a
# training the network gains nothing over the pairwise decoder, which was fitted to
# these very vectors. After a full training it does, see
# [IVF search](https://github.com/vqjax/vqjax/blob/main/docs/ivf.md). The command `vqjax search` measures a grid like this one, for the same index folder:
#
# ```sh
# vqjax search --index=my_index --queries=query.npy --data=base.npy --output=search.json
# ```

# %% [markdown]
# ## Add, and ids of your own

# %%
more = xb[:3] + 1
index.add(more, ids=np.array([900_001, 900_002, 900_003]))
print(index.search(more, k=1, nprobe=8)[1].ravel(), len(index))

# %% [markdown]
# Read on: [IVF search](https://github.com/vqjax/vqjax/blob/main/docs/ivf.md),
# [refiners](https://github.com/vqjax/vqjax/blob/main/docs/refiners.md). Next
# notebook: `hakes.ipynb`.
