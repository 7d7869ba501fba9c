"""What all configurations share: data, files, the arguments after the colon.

`--config=NAME` runs on the bundled sample with a schedule that fits two cores,
`--config=NAME:smoke` in seconds, `--config=NAME:bigann1M` (or another named
data set) at the published sizes and schedule. QINCo2 is trained and encoded by
the joint rule (C). For the published rule (A) set model.num_joint_candidates=0,
encode.num_joint_candidates=0 and encode.beam_size=32.
"""

from ml_collections import config_dict

SAMPLES = ("sample_sift", "sample_text")
DATASETS = (
  "bigann1M",
  "bigann10M",
  "bigann1B",
  "deep1M",
  "deep1B",
  "contriever1M",
  "fb_ssnpp1M",
)
_NUM_LISTS = {
  "": 256,
  "smoke": 8,
  "sample_sift": 256,
  "sample_text": 64,
  "bigann1B": 1 << 20,
  "deep1B": 1 << 20,
}


def check_argument(arg: str, *others: str) -> None:
  """Raises ValueError unless `arg` may follow the colon of `--config`."""
  known = ("smoke", *others, *SAMPLES, *DATASETS)
  if arg and arg not in known:
    raise ValueError(
      f"Unknown argument {arg!r} after the colon of --config; known are "
      f"{', '.join(known)}. For a file of your own leave it out and set "
      "--config.data.train=FILE."
    )


def make_data(arg: str, sample: str = "sample_sift") -> config_dict.ConfigDict:
  """Returns `config.data`: a named data set, or paths of one's own."""
  named = arg if arg in SAMPLES + DATASETS else sample
  data = config_dict.create(
    name=named,
    root=config_dict.placeholder(str),  # Of named sets; else $VQJAX_DATA.
    train=config_dict.placeholder(str),  # Own files replace the set.
    base=config_dict.placeholder(str),
    queries=config_dict.placeholder(str),
    groundtruth=config_dict.placeholder(str),
    num_train=config_dict.placeholder(int),  # First rows of a file.
    num_base=config_dict.placeholder(int),
    num_queries=config_dict.placeholder(int),
    metric=config_dict.placeholder(str),  # "l2", "ip" or "cosine".
    scale=config_dict.placeholder(float),  # Of reported errors.
    # Last training vectors, held out. None: a tenth, at most 3,000 (of more
    # than 300,000 vectors a hundredth, at most 10,000). 0: none, and the
    # validation is on the training vectors.
    validation_size=config_dict.placeholder(int),
  )
  if arg == "smoke":
    data.update(num_train=1200, num_base=500, num_queries=50)
    data.validation_size = 200
  return data


def make_learned(
  arg: str, *, model: dict, sample: dict, train: dict, has_lists: bool = False
) -> config_dict.ConfigDict:
  """Returns the configuration of a QINCo; `sample` is the bundled schedule.

  `model` and `train` hold what differs from QINCo2 as published. With
  `has_lists` it is an IVF model.
  """
  check_argument(arg)
  config = _published()
  config.model.update(model)
  config.train.update(train)
  if config.model.is_qinco1:
    for sizes in (config.model, config.encode):
      sizes.update(num_candidates=0, num_joint_candidates=0)
    config.encode.beam_size = 1
  config.data = make_data(arg)
  if has_lists:
    config.ivf.num_lists = _NUM_LISTS.get(arg, 1 << 16)
  if arg in ("", "smoke", *SAMPLES):
    # A fixed amount of work, whatever the size of the file, in the many large
    # steps that a small set needs.
    config.train.update(epoch_size=60_000, batch_size=256, ramp_epochs=1)
    config.init.max_vectors = 100_000
    for group, values in sample.items():
      config[group].update(values)
  if arg not in ("", *SAMPLES):
    config.train.noise_share = 0.0
  if arg == "smoke":
    _shrink(config)
  return config


def _published() -> config_dict.ConfigDict:
  """Returns QINCo2-S as in the paper, except unused codewords and rule."""
  return config_dict.create(
    seed=0,
    codec="qinco",
    model=dict(
      num_steps=8,  # M
      codebook_size=256,  # K
      network_dim=config_dict.placeholder(int),  # d_e; None: the data's.
      hidden_dim=256,  # d_h
      num_blocks=2,  # L
      low_rank=config_dict.placeholder(int),  # h of QINCo-LR.
      is_qinco1=False,
      beam_size=32,  # B
      num_joint_candidates=64,  # C; 0 is the published rule, with A.
      num_candidates=16,  # A; without effect if C is set.
    ),
    # Lists with frozen centroids before the M steps; 0: none.
    ivf=dict(
      num_lists=0,
      centroids=config_dict.placeholder(str),  # File; k-means if unset.
      num_iterations=25,  # Of that k-means.
      assign="auto",  # Vectors to lists: "blocks", "hnsw", or by their number.
    ),
    # Sizes the finished codec is encoded with, unless told otherwise. They
    # reach the error of the published A=16 B=32 (docs/performance.md).
    encode=dict(beam_size=48, num_joint_candidates=128, num_candidates=16),
    init=dict(
      max_vectors=1_000_000,
      num_iterations=10,  # k-means per level
      noise=0.1,
      zero_output=True,  # False: the released start, for comparison.
    ),
    train=dict(
      num_epochs=60,
      epoch_size=10_000_000,  # Vectors; at most one pass over the set.
      batch_size=1024,  # Per device.
      accumulate=1,  # Batches whose gradients make one step.
      # Of the network's products: "float32", "bfloat16", or "auto": float32 on
      # CPUs and bfloat16 on accelerators; sums and distances are float32.
      dtype="auto",
      schedule="ramp_cosine",
      peak_lr=8e-4,
      ramp_epochs=3,
      weight_decay=0.1,
      clip_value=0.1,  # 0: no clipping.
      # Of the variance of training vectors that is replaced by noise with their
      # covariance, against learning them by heart (docs/what_was_tried.md).
      # None: none for many vectors, else by their number. 0: none.
      noise_share=config_dict.placeholder(float),
      redraw="split",  # Idle codewords become copies of used ones; or "none".
      cut_patience=10,  # Epochs, of the schedule "plateau".
      stop_patience=20,
      early_stop=0,  # Validations without a new best, of any schedule; 0: none.
      log_every=50,  # Steps.
      checkpoint_minutes=10.0,  # And at the end of every epoch.
      keep_checkpoints=2,  # Latest ones, in addition to the best.
      tracker="none",  # Or "tensorboard", "wandb", "trackio".
      start=config_dict.placeholder(str),  # Codec to start from.
    ),
  )


def _shrink(config: config_dict.ConfigDict) -> None:
  """Makes the model and the schedule so small that they run in seconds."""
  config.model.update(
    num_steps=3,
    codebook_size=16,
    hidden_dim=16,
    num_blocks=min(config.model.num_blocks, 2),
    num_candidates=min(config.model.num_candidates, 4),
    num_joint_candidates=min(config.model.num_joint_candidates, 8),
    beam_size=min(config.model.beam_size, 4),
  )
  if config.model.network_dim:
    config.model.network_dim = 16
  config.encode = config_dict.create(
    num_candidates=config.model.num_candidates,
    beam_size=4,
    num_joint_candidates=config.model.num_joint_candidates,
  )
  config.train.update(num_epochs=2, epoch_size=512, batch_size=128)
  config.train.ramp_epochs = 1
