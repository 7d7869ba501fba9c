"""Residual quantisation by greedy k-means, encoded with a beam.

vqjax train --config=rq

For semantic ids `--config.model.is_balanced=True` fits levels of which each
codeword gets equally many vectors, without a beam.
"""

from ml_collections import config_dict

from configs import base


def get_config(arg: str = ""):
  base.check_argument(arg)
  config = config_dict.create(
    seed=0,
    codec="rq",
    model=dict(num_codes=8, codebook_size=256, beam_size=5, is_balanced=False),
    encode=dict(beam_size=5),
    # A beam of 5 learns from five residuals per vector.
    init=dict(max_vectors=200_000, num_iterations=20),
  )
  config.data = base.make_data(arg)
  if arg == "smoke":
    config.model.update(num_codes=3, codebook_size=16)
  return config
