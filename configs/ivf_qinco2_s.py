"""IVF-QINCo2-S (arXiv 2501.03078): QINCo2-S on what the lists leave.

  python -m experiments.train --config=configs/ivf_qinco2_s.py

finds the centroids of the lists by itself; those of
`python -m experiments.ivf_centroids`, which walks over a file of any size, go
to --config.ivf.centroids=FILE. More than 65,536 lists, as of bigann1B, need
them.
"""

from configs import base


def get_config(arg: str = ""):
  return base.make_learned(
    arg,
    model=dict(network_dim=128, hidden_dim=256, num_blocks=2),
    sample=dict(
      model=dict(beam_size=4, num_joint_candidates=8),
      train=dict(num_epochs=40, peak_lr=2e-3),
    ),
    train={},
    has_lists=True,
  )
