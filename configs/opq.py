"""Optimised product quantisation: `pq` after a learned rotation (faiss).

vqjax train --config=opq
"""

from configs import pq


def get_config(arg: str = ""):
  config = pq.get_config(arg)
  config.model.opq = True
  return config
