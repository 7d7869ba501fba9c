"""IVF-QINCo2-S (arXiv 2501.03078): QINCo2-S on the residuals of the lists.

  vqjax train --config=ivf_qinco2_s

finds the centroids of the lists by itself, from a sample. `vqjax ivf_centroids`
finds them for a file of any size; pass its output as
--config.ivf.centroids=FILE. More than 65,536 lists, as of bigann1B, need it.
docs/ivf.md has figures.
"""

from configs import qinco2_s


def get_config(arg: str = ""):
  return qinco2_s.get_config(arg, has_lists=True)
