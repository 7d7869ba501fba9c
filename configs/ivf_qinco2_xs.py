"""IVF-QINCo2 with one narrow residual block: for processors.

  python -m experiments.train --config=configs/ivf_qinco2_xs.py

Not a published size; `experiments.ivf_pipeline` trains, indexes and searches it
in one go.
"""

from configs import qinco2_xs


def get_config(arg: str = ""):
  return qinco2_xs.get_config(arg, has_lists=True)
