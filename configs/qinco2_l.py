"""QINCo2-L (arXiv 2501.03078): sixteen residual blocks of width 384.

  vqjax train --config=qinco2_l:bigann1M

A model for accelerators: four epochs of the bundled sample take an hour on two
cores.
"""

from configs import base


def get_config(arg: str = ""):
  return base.make_learned(
    arg,
    model=dict(network_dim=384, hidden_dim=384, num_blocks=16),
    sample=dict(
      model=dict(beam_size=4, num_joint_candidates=8),
      train=dict(num_epochs=4, peak_lr=0.0005),
    ),
    train={},
  )
