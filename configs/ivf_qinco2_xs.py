"""IVF-QINCo2 with one narrow residual block: for CPUs.

  vqjax train --config=ivf_qinco2_xs

Not a published size. `vqjax ivf_pipeline` trains, indexes and searches it in
one go. docs/ivf.md has figures.
"""

from configs import qinco2_xs


def get_config(arg: str = ""):
  return qinco2_xs.get_config(arg, has_lists=True)
