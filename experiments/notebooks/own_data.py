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
  pass

# %%
import pathlib
import tempfile

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
print(codes.shape, codes.dtype, "-", codes.nbytes, "bytes instead of", items.nbytes)

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
index.evaluate(folder / "query.npy", true_ids, k=10, nprobe=16)

# %% [markdown]
# Read on: [files and formats](https://github.com/vqjax/vqjax/blob/main/docs/files.md).
