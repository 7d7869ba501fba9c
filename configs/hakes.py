"""HAKES (arXiv 2505.12524): learns the query side of an IVF-PQ index.

  vqjax hakes --config=hakes

runs on the bundled sentence embeddings in a minute, `:smoke` in seconds,
`:sample_sift` on the bundled SIFT vectors. For your own files set
--config.data.base=FILE [--config.data.train_queries=FILE
--config.data.queries=FILE --config.data.groundtruth=FILE]. `:published` has
the published settings. docs/hakes.md has figures.

The released program's options, in its order, are data.num_base, data.dim,
samples.num_queries, samples.num_neighbours, train.num_neighbours,
data.num_queries, data.base and its siblings, base.path, train.num_epochs,
train.batch_size, train.reduction_lr, train.codebook_lr,
train.reduction_weight, JAX_PLATFORMS in the environment, --workdir.
"""

from ml_collections import config_dict

ARGUMENTS = ("smoke", "sample_sift", "sample_text", "published")


def get_config(arg: str = ""):
  if arg and arg not in ARGUMENTS:
    raise ValueError(
      f"Unknown argument {arg!r} after the colon of --config; known are "
      f"{', '.join(ARGUMENTS)}. For a file of your own leave it out and set "
      "--config.data.base=FILE."
    )
  config = _ours()
  if arg.startswith("sample"):
    config.data.name = arg
  if arg == "published":
    config.train.update(
      num_epochs=5,
      num_neighbours=50,
      batch_size=512,
      neighbour_side="query",
      reduction_lr=1e-4,
      codebook_lr=1e-4,
      weight_decay=0.999,
      temperature=1.0,
      list_temperature=0.0,
    )
    config.samples.update(num_queries=100_000, num_neighbours=50)
  if arg == "smoke":
    _shrink(config)
  return config


def _ours() -> config_dict.ConfigDict:
  none = config_dict.placeholder
  return config_dict.create(
    seed=0,
    data=dict(
      name="sample_text",  # A named data set; own files replace it.
      root=none(str),  # Of named sets; else $VQJAX_DATA.
      base=none(str),
      train_queries=none(str),  # Else vectors of the base.
      train_neighbours=none(str),  # Ids in the base, nearest first.
      queries=none(str),
      groundtruth=none(str),
      num_base=none(int),  # First rows of a file.
      num_queries=none(int),
      metric=none(str),  # "ip", "cosine" or "l2".
      dim=none(int),  # Of files without a header (.bin).
      groundtruth_dim=none(int),  # Ids per row there.
    ),
    base=dict(
      path=none(str),  # An existing findex.bin.
      reduced_dim=none(int),  # d_r; None: a quarter of d, an eighth from 1536.
      num_codes=none(int),  # m; None: half of d_r.
      num_lists=none(int),  # None: the power of two from sqrt(N) up.
      max_vectors=262_144,  # Sample to train on.
      opq_iterations=50,
      kmeans_iterations=50,
    ),
    samples=dict(
      num_queries=10_000,
      num_neighbours=100,  # Found for each.
      num_validation=500,  # Further queries, held out.
      find_by="exact",  # "index": by the base index, as in the paper.
    ),
    train=dict(
      num_epochs=8,
      early_stop=2,  # Epochs without a lower held-out KL; 0: all epochs.
      num_neighbours=100,  # Used, of those found.
      batch_size=256,  # Over all devices.
      reduction_lr=1e-3,  # A', b'
      codebook_lr=1e-3,  # C'
      centroid_lr=1e-3,
      weight_decay=0.0,
      warm_up=0.1,  # Share of the steps.
      reduction_weight=-1.0,  # lambda; negative: as large as the other term.
      neighbour_side="base",  # R~ as in the paper; "query": released program.
      score=none(str),  # "ip", "l2" or "l2_released"; None: the metric.
      temperature=none(float),  # None: 1, or the spread of larger scores.
      list_temperature=0.6,  # 0: centroids do not learn.
      log_every=20,  # Steps.
      tracker="none",  # Or "tensorboard", "wandb", "trackio".
    ),
    centroids=dict(
      rule="learned",  # "mean": of a sample's reduced vectors, as published.
      assign_by="query",  # "base": lists of the sample as in the paper.
      sample=0.1,  # Share of the base; 0: the training queries.
    ),
    index=dict(store="float32"),  # "float16" or "sq8": to refine with.
    evaluate=dict(
      k=10,
      num_probes=(5, 10, 20, 50, 100, 200),
      refine_factors=(2.0, 5.0, 10.0, 20.0, 50.0),  # k'/k
      num_rounds=3,
      num_threads=none(int),
      factory=none(str),  # Also "OPQ48_96,IVF1024,PQ48x4fs,RFlat".
    ),
  )


def _shrink(config: config_dict.ConfigDict) -> None:
  config.data.update(num_base=2000, num_queries=50)
  config.base.update(reduced_dim=16, num_codes=8, num_lists=16)
  config.base.update(opq_iterations=3, kmeans_iterations=5)
  config.samples.update(num_queries=256, num_neighbours=20, num_validation=64)
  config.train.update(num_epochs=3, num_neighbours=20, batch_size=64)
  config.evaluate.update(num_probes=(1, 4), refine_factors=(1.0, 3.0))
