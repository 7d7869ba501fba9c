r"""IVF-QINCo2-M (arXiv 2501.03078): QINCo2-M on the residuals of the lists.

  vqjax train --config=ivf_qinco2_m:bigann1B \
      --config.ivf.centroids=centroids.npy

Without argument it trains on the bundled sample, slowly on a CPU.
More than 65,536 lists, as of bigann1B, need centroids from
`vqjax ivf_centroids`, which reads the file block by block.
"""

from configs import qinco2_m


def get_config(arg: str = ""):
  return qinco2_m.get_config(arg, has_lists=True)
