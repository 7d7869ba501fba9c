r"""IVF-QINCo2-M (arXiv 2501.03078): QINCo2-M on what the lists leave.

  python -m experiments.train --config=configs/ivf_qinco2_m.py:bigann1B \
      --config.ivf.centroids=centroids.npy

Without argument it trains on the bundled sample; that takes two cores a while.
More than 65,536 lists, as of bigann1B, need the centroids of
`python -m experiments.ivf_centroids`, which walks over the file.
"""

from configs import base


def get_config(arg: str = ""):
  return base.make_learned(
    arg,
    model=dict(network_dim=384, hidden_dim=384, num_blocks=4),
    sample=dict(
      model=dict(beam_size=4, num_joint_candidates=8),
      train=dict(num_epochs=12, peak_lr=0.001),
    ),
    train={},
    has_lists=True,
  )
