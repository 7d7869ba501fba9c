r"""IVF-QINCo2-M (arXiv 2501.03078): QINCo2-M on what the lists leave.

  python -m experiments.train --config=configs/ivf_qinco2_m.py:bigann1B \
      --config.ivf.centroids=centroids.npy

Without argument it trains on the bundled sample; that takes two cores a while.
More than 65,536 lists, as of bigann1B, need the centroids of
`python -m experiments.ivf_centroids`, which walks over the file.
"""

from configs import qinco2_m


def get_config(arg: str = ""):
  return qinco2_m.get_config(arg, has_lists=True)
