# %% [markdown]
# # Semantic ids for items
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/vqjax/vqjax/blob/main/experiments/notebooks/semantic_ids.ipynb)
#
# A generative recommender predicts the next item token by token. It needs a short id
# for each item, such that similar items have similar ids and no two items share one.
# Here such ids are made of item embeddings: a codec gives each item a code, and
# collisions are resolved.

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
from IPython.display import Image

import vqjax

xt, xb, xq, gt = vqjax.load_dataset("sample_text")
items = np.float32(xb[:2_000])
names = [f"item-{i}" for i in range(len(items))]

# %% [markdown]
# ## Codes
#
# Two ways: residual k-means (`rq`), here balanced so that each codeword gets equally
# many items, and RQ-VAE, a residual quantiser inside an auto-encoder. With the
# default number of epochs RQ-VAE takes minutes; here it gets some of them.

# %%
rq = vqjax.fit(items, "rq", num_codes=3, codebook_size=64, is_balanced=True)
rqvae = vqjax.fit(items, "rqvae", codebook_sizes=(64, 64, 64), num_epochs=30)
rq, rqvae

# %% [markdown]
# ## Ids

# %%
ids = {name: vqjax.make_ids(codec, items, ids=names)
       for name, codec in {"RQ, balanced": rq, "RQ-VAE": rqvae}.items()}
for name, made in ids.items():
  before, after = made.report["before"], made.report["after"]
  print(f"{name}: collision rate {before['collision_rate']:.3f} before, "
        f"{after['collision_rate']:.3f} after")
dict(zip(names[:4], ids["RQ-VAE"].tokens[:4], strict=True))

# %% [markdown]
# ## The report
#
# The picture says how many items share an id before and after, whether items with the
# same first tokens are neighbours, and how evenly the codewords are used.

# %%
folder = pathlib.Path(tempfile.mkdtemp()) / "ids"
ids["RQ-VAE"].save(folder)
print(sorted(path.name for path in folder.iterdir()))
Image(filename=folder / "report.png")

# %% [markdown]
# ## New items
#
# Items that come later get ids of their own. No published id moves.

# %%
new = np.float32(xb[2_000:2_100])
more = vqjax.load_ids(folder).append(
  new, [f"new-{i}" for i in range(len(new))], codec=rqvae
)
print(more)
print("unchanged:", np.array_equal(more.codes[:2_000], ids["RQ-VAE"].codes))

# %% [markdown]
# Read on: [semantic ids](https://github.com/vqjax/vqjax/blob/main/docs/semantic_ids.md).
# Next notebook: `own_data.ipynb`.
