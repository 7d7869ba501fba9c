"""QINCo2 with one narrow residual block: for CPUs.

  vqjax train --config=qinco2_xs

Not a published size. On two cores a training step takes 83 us per vector and
decoding 2 us (2026-11-21, docs/performance.md).
"""

from configs import base


def get_config(arg: str = "", *, has_lists: bool = False):
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
    has_lists=has_lists,
  )
