"""IVF-QINCo2 with one narrow residual block: for processors.

  python -m experiments.train --config=configs/ivf_qinco2_xs.py

Not a published size; `experiments.ivf_pipeline` trains, indexes and searches it
in one go.
"""

from configs import base


def get_config(arg: str = ""):
  return base.make_learned(
    arg,
    model=dict(
      network_dim=64,
      hidden_dim=32,
      num_blocks=1,
      num_candidates=4,
      beam_size=4,
      num_joint_candidates=8,
    ),
    sample=dict(
      encode=dict(beam_size=32, num_joint_candidates=64),
      train=dict(num_epochs=60, peak_lr=4e-3),
    ),
    train={},
    has_lists=True,
  )
