"""QINCo2-M (arXiv 2501.03078): four residual blocks of width 384.

  vqjax train --config=qinco2_m:bigann1M

Without argument it trains on the bundled sample, slowly on a CPU.
"""

from configs import base


def get_config(arg: str = "", *, has_lists: bool = False):
  return base.make_learned(
    arg,
    model=dict(network_dim=384, hidden_dim=384, num_blocks=4),
    sample=dict(
      model=dict(beam_size=4, num_joint_candidates=8),
      train=dict(num_epochs=12, peak_lr=0.001),
    ),
    train={},
    has_lists=has_lists,
  )
