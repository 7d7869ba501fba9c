"""QINCo (arXiv 2401.14732): every codeword through the network, no beam.

  vqjax train --config=qinco1:bigann1M

is the paper's L=16. Without argument a network of two blocks is trained on the
bundled sample.
"""

from configs import base


def get_config(arg: str = ""):
  return base.make_learned(
    arg,
    model=dict(
      is_qinco1=True,
      hidden_dim=256,
      num_blocks=16,
      num_candidates=0,
      beam_size=1,
    ),
    sample=dict(
      model=dict(num_blocks=2),
      train=dict(
        num_epochs=6, schedule="ramp_cosine", peak_lr=1e-3, redraw="split"
      ),
    ),
    train=dict(
      schedule="plateau",
      peak_lr=1e-4,
      weight_decay=0.0,
      clip_value=0.0,
      redraw="none",
      num_epochs=200,
    ),
  )
