"""Product quantisation; the configuration `opq` learns a rotation first.

vqjax train --config=pq
"""

from ml_collections import config_dict

from configs import base


def get_config(arg: str = ""):
  base.check_argument(arg)
  config = config_dict.create(
    seed=0,
    codec="pq",
    model=dict(num_codes=8, codebook_size=256, opq=False),
    encode=dict(),
    init=dict(max_vectors=1_000_000, num_iterations=25),
  )
  config.data = base.make_data(arg)
  if arg == "smoke":
    config.model.update(num_codes=4, codebook_size=16)
  return config
