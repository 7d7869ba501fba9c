# %% [markdown]
# # Your own Parquet file: codes, index, results
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vqjax/vqjax/blob/main/experiments/notebooks/own_data.ipynb)
#
# A Parquet file with a column of embeddings and a column of ids is all that is needed.
# This notebook writes one, so that it runs as it is; put the path of yours in its
# place. All steps are commands, which read the file in blocks, however large it is.

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

import matplotlib.pyplot as plt
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import vqjax

folder = pathlib.Path(tempfile.mkdtemp())
xt, xb, xq, gt = vqjax.load_dataset("sample_text")
items = np.float32(xb[:6_000])
pq.write_table(
  pa.table(
    {
      "item_id": [f"word-{i}" for i in range(len(items))],
      "embedding": pa.FixedSizeListArray.from_arrays(items.ravel(), 384),
    }
  ),
  folder / "items.parquet",
)
np.save(folder / "query.npy", np.float32(xq[:200]))

# %% [markdown]
# ## Train
#
# `items.parquet#embedding` names the column. `rq` is a residual quantiser, trained
# in seconds; for less error use `--config=qinco2_s`.

# %%
# !cd {folder} && vqjax train --config=rq --config.data.train=items.parquet#embedding --workdir=codec 2>&1 | tail -4
codec = vqjax.load(folder / "codec")
codec

# %% [markdown]
# ## Encode, with the ids kept

# %%
# !cd {folder} && vqjax encode --codec=codec --data=items.parquet#embedding --output=codes.npy 2>&1 | tail -4
codes = np.load(folder / "codes.npy")
print(codes.shape, codec.num_bytes, "bytes each instead of", 4 * codec.dim)
print(codes[0])

# %% [markdown]
# ## Index and search

# %%
# !cd {folder} && vqjax build_index --codec=codec --data=items.parquet#embedding --ids=item_id --num_lists=64 --output=index 2>&1 | tail -4
index = vqjax.load_index(folder / "index")
distances, ids = index.search(folder / "query.npy", k=5, nprobe=16)
ids[:3]

# %% [markdown]
# ## Recall
#
# The true neighbours are found by exact search.

# %%
scores = np.float32(xq[:200]) @ items.T
true_ids = np.argsort(-scores, axis=1)[:, :10]
recalls = {
  nprobe: index.evaluate(folder / "query.npy", true_ids, k=10, nprobe=nprobe)
  for nprobe in (1, 2, 4, 8, 16, 32, 64)
}
figure, axes = plt.subplots(figsize=(7, 3.4))
for name in ("1-recall@1", "1-recall@10", "knn_recall@10"):
  found = [measured[name] for measured in recalls.values()]
  axes.plot(list(recalls), found, "o-", label=name)
axes.set(xscale="log", xlabel="nprobe, of 64 lists", ylabel="recall")
axes.set_title("384 numbers in 8 bytes")
axes.legend();

# %% [markdown]
# 8 bytes are few for 384 dimensions. More codes (`--config.model.num_codes=32`), a
# learned codec (`--config=qinco2_s`) and a refiner (`vqjax refiner`) raise the
# recall. `--plan` says what each would cost before the work.

# %% [markdown]
# Read on: [files and formats](https://github.com/vqjax/vqjax/blob/main/docs/files.md).
