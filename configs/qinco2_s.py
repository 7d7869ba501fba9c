"""QINCo2-S (arXiv 2501.03078): two residual blocks of width 128 and 256.

  vqjax train --config=qinco2_s

trains on the bundled SIFT sample in 8 to 24 minutes on two cores, to an MSE of
1.256e4 and a 1-recall@1 of .538 (2026-11-30, docs/results.md). `:bigann1M` has
the paper's sizes and schedule.
"""

from configs import base


def get_config(arg: str = "", *, has_lists: bool = False):
  return base.make_learned(
    arg,
    model=dict(network_dim=128, hidden_dim=256, num_blocks=2),
    sample=dict(
      model=dict(beam_size=4, num_joint_candidates=8),
      train=dict(num_epochs=40, peak_lr=2e-3),
    ),
    train={},
    has_lists=has_lists,
  )
