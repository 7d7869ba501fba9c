# %% [markdown]
# # HAKES: more recall from an IVF-PQ index
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vqjax/vqjax/blob/main/experiments/notebooks/hakes.ipynb)
#
# An IVF-PQ index often reduces the dimension of its vectors first. HAKES
# ([arXiv 2505.12524](https://arxiv.org/abs/2505.12524)) learns, for queries, a reduction,
# codebooks and centroids that keep the true neighbours near. The codes of the base
# stay as they are, and stock faiss searches the index.

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

import faiss
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Image

import vqjax

workdir = pathlib.Path(tempfile.mkdtemp()) / "hakes"

# %% [markdown]
# ## Train
#
# The command runs six stages, and each writes a file. Run it again to continue with
# the first one that is missing. Here it uses the bundled sentence embeddings,
# with a smaller sample than its default. `train_queries=FILE` takes queries that
# people have asked, which is better than vectors of the base.

# %%
# !vqjax hakes --config=hakes --workdir={workdir} --config.samples.num_queries=2000 --config.train.num_epochs=3 --config.base.opq_iterations=10 --config.base.kmeans_iterations=10 --config.evaluate.num_rounds=1 2>&1 | tail -4
sorted(path.name for path in workdir.iterdir())

# %% [markdown]
# ## Recall before and after
#
# `knn_recall@10` is the share of the true 10 neighbours that are among the 10
# results.

# %%
record = json.loads((workdir / "evaluation.json").read_text())
figure, axes = plt.subplots(figsize=(7, 3.4))
for color, (name, points) in zip("C1 C0".split(), record["points"].items()):
  chosen = [p for p in points if p["refine_factor"] == 10]
  probes = [p["num_probes"] for p in chosen]
  recalls = [p["recall"] for p in chosen]
  axes.plot(probes, recalls, "o-", color=color, label=name)
axes.set(
  xscale="log",
  xlabel="nprobe, of 128 lists",
  ylabel=record["recall"],
  title="100 results re-ranked with whole vectors",
)
axes.legend();

# %% [markdown]
# The command also draws recall against speed, at all its settings.

# %%
Image(filename=workdir / "operating_points.png")

# %% [markdown]
# ## The index is a faiss index

# %%
index = faiss.read_index(str(workdir / "index.faiss"))
print(type(faiss.downcast_index(index)).__name__, index.ntotal, "vectors")
_, _, xq, _ = vqjax.load_dataset("sample_text")
faiss.ParameterSpace().set_index_parameter(index, "nprobe", 20)
scores, ids = index.search(np.float32(xq[:3]), 5)
ids

# %% [markdown]
# Read on: [HAKES](https://github.com/vqjax/vqjax/blob/main/docs/hakes.md), with figures
# on 117,639 vectors. Next notebook: `semantic_ids.ipynb`.
