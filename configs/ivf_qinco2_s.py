"""IVF-QINCo2-S (arXiv 2501.03078): QINCo2-S on what the lists leave.

  python -m experiments.train --config=configs/ivf_qinco2_s.py

finds the centroids of the lists by itself; those of
`python -m experiments.ivf_centroids`, which walks over a file of any size, go
to --config.ivf.centroids=FILE. More than 65,536 lists, as of bigann1B, need
them.
"""

from configs import qinco2_s


def get_config(arg: str = ""):
  return qinco2_s.get_config(arg, has_lists=True)
