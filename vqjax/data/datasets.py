"""Named data sets: their files, dimension, metric and reporting scale.

A `Dataset` has up to four files: vectors to train on, the base to compress and
search, queries, and the ids of their true neighbours in the base. The two
samples come with a clone of the repository; the others are read from a data
root, the argument `root`, the environment variable VQJAX_DATA, or data/:

  ROOT/bigann/bigann_learn.bvecs, ROOT/deep1b/..., ROOT/contriever/...

A file that is missing is no error before it is opened; then the message says
how to get it.
"""

import dataclasses
import math
import os
import pathlib
import shlex
from typing import Any, NamedTuple

from vqjax import shipped
from vqjax.data import formats, hdf5, unit

METRICS = ("l2", "ip", "cosine")
SPLITS = ("train", "base", "queries", "groundtruth")
OWN = "own"  # Name of files of the user's own.
_ROLES = {
  "train": "training vectors",
  "base": "base vectors",
  "queries": "queries",
  "groundtruth": "ground truth",
}
_MILLION = 1_000_000
# Of ann-benchmarks and VIBE.
_DISTANCES = {"euclidean": "l2", "l2": "l2", "ip": "ip", "dot": "ip"}
_DISTANCES |= dict.fromkeys(("angular", "cosine", "normalized"), "cosine")


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Files of one data set; `num_*` is how many first rows of a file count.

  `metric` is "l2" (squared, less is nearer), "ip" (inner product, more is
  nearer) or "cosine": then vectors are of length 1 when read. Errors are
  reported as squared L2 times `scale`.
  """

  name: str
  dim: int
  train: str | None = None
  base: str | None = None
  queries: str | None = None
  groundtruth: str | None = None
  num_train: int | None = None
  num_base: int | None = None
  num_queries: int | None = None
  metric: str = "l2"
  scale: float = 1.0
  how_to_get: str = ""


_CLONE = (
  "The samples come with a clone of the vqjax repository, in its folder "
  "third_party; run from a clone installed with pip install -e."
)


def _bigann(name: str, num_base: int) -> Dataset:
  return Dataset(
    name,
    128,
    train="bigann/bigann_learn.bvecs",
    base="bigann/bigann_base.bvecs",
    queries="bigann/bigann_query.bvecs",
    groundtruth=f"bigann/gnd/idx_{num_base // _MILLION}M.ivecs",
    num_base=num_base,
    scale=1e-4,
  )


_BUNDLED = (
  Dataset(
    "sample_sift",
    128,
    train="sample_sift/learn.bvecs",
    base="sample_sift/base.bvecs",
    queries="sample_sift/query.bvecs",
    groundtruth="sample_sift/groundtruth.ivecs",
    how_to_get=_CLONE,
    scale=1e-4,
  ),
  Dataset(
    "sample_text",
    384,
    train="sample_text/base.npy",
    base="sample_text/base.npy",
    queries="sample_text/query.npy",
    groundtruth="sample_text/groundtruth.npy",
    metric="ip",
    how_to_get=_CLONE,
  ),
)
_NAMED = (
  _bigann("bigann1M", _MILLION),
  _bigann("bigann10M", 10 * _MILLION),
  _bigann("bigann1B", 1000 * _MILLION),
  Dataset(
    "deep1M",
    96,
    train="deep1b/learn.fvecs",
    base="deep1b/base.fvecs",
    queries="deep1b/query.public.10K.fbin",
    groundtruth="deep1b/deep1M_groundtruth.ivecs",
    num_base=_MILLION,
  ),
  Dataset(
    "deep1B",
    96,
    train="deep1b/learn.350M.fbin",
    base="deep1b/base.1B.fbin",
    queries="deep1b/query.public.10K.fbin",
    groundtruth="deep1b/deep1B_groundtruth.ivecs",
  ),
  Dataset(
    "contriever1M",
    768,
    train="contriever/training_set.npy",
    base="contriever/database1M.npy",
    queries="contriever/queries.npy",
    groundtruth="contriever/ground_truth1M.npy",
    num_base=_MILLION,
  ),
  Dataset(
    "fb_ssnpp1M",
    256,
    train="fb_ssnpp/training_set10010k.npy",
    base="fb_ssnpp/database1M.npy",
    queries="fb_ssnpp/queries.npy",
    groundtruth="fb_ssnpp/ground_truth1M.npy",
    num_base=_MILLION,
    scale=1e-4,
  ),
)
# Files that hold the same vectors, or begin with them; of other programs.
_SAME = {
  "deep1b/learn.fvecs": ("deep1b/learn.350M.fbin",),
  "deep1b/learn.350M.fbin": ("deep1b/learn.fvecs",),
  "deep1b/base.fvecs": ("deep1b/base.1B.fbin",),
  "deep1b/base.1B.fbin": ("deep1b/base.fvecs",),
  "deep1b/query.public.10K.fbin": (
    "deep1b/deep1B_queries.fvecs",
    "deep1b/queries.fvecs",
  ),
  "deep1b/deep1B_groundtruth.ivecs": ("deep1b/groundtruth.public.10K.ibin",),
  "fb_ssnpp/training_set10010k.npy": ("FB_ssnpp/training_set10010000.npy",),
  "fb_ssnpp/database1M.npy": ("FB_ssnpp/FB_ssnpp_database.u8bin",),
  "fb_ssnpp/queries.npy": ("FB_ssnpp/FB_ssnpp_public_queries.u8bin",),
  "fb_ssnpp/ground_truth1M.npy": ("FB_ssnpp/ground_truth1M.npy",),
}
DEFAULT_ROOT = "data"
NAMES = tuple(d.name for d in (*_BUNDLED, *_NAMED))


def _bundled_root() -> pathlib.Path:
  return shipped.root() / "third_party"


def get_dataset(name: str, root=None) -> Dataset:
  """Looks up a data set by name; its paths lie under `root` or VQJAX_DATA."""
  found = [d for d in (*_BUNDLED, *_NAMED) if d.name == name]
  if not found:
    for path in (data_root(root) / name, data_root(root) / f"{name}.hdf5"):
      if path.suffix in (".hdf5", ".h5") and path.is_file():
        return _benchmark(name, path)
    raise ValueError(
      f"Unknown data set {name!r}; the known ones are {', '.join(NAMES)}, and "
      f"NAME.hdf5 of ann-benchmarks or VIBE in {data_root(root)}. For files of "
      "your own give their paths instead."
    )
  dataset = found[0]
  if dataset in _BUNDLED:
    root, hint = _bundled_root(), dataset.how_to_get
  else:
    is_given = bool(root or os.environ.get("VQJAX_DATA"))
    root = data_root(root)
    hint = (
      f"vqjax download {name} --data_root={shlex.quote(str(root))} gets it."
    )
    if not (is_given or root.is_dir()):
      raise ValueError(
        f"Data set {name} needs a data root, the folder that holds "
        f"{pathlib.Path(dataset.base).parent}/: set the "
        f"environment variable VQJAX_DATA. {hint}"
      )
  paths = {part: _find(root, getattr(dataset, part)) for part in SPLITS}
  return dataclasses.replace(dataset, **paths, how_to_get=hint)


def _benchmark(name: str, path: pathlib.Path) -> Dataset:
  """The data set of an HDF5 file of ann-benchmarks or VIBE.

  Such a file has the base in "train", which is trained on too, queries in
  "test", and "neighbors". Its metric is its attribute "distance", else the end
  of its name.
  """
  parts, distance = hdf5.describe(path)
  distance = (distance or path.stem.rpartition("-")[2]).lower()
  if distance not in _DISTANCES:
    raise ValueError(
      f"{path} has the distance {distance!r}, expected one of "
      f"{', '.join(_DISTANCES)}; give its parts as files of your own, "
      f"{path.name}#train, with a metric."
    )
  if missing := [p for p in ("train", "test") if p not in parts]:
    raise ValueError(
      f"{path} must have the data sets train and test as ann-benchmarks and "
      f"VIBE name them, but has no {missing[0]}; it has {', '.join(parts)}."
    )
  has_truth = "neighbors" in parts
  return Dataset(
    name,
    formats.open_vectors(f"{path}#train").shape[1],
    train=f"{path}#train",
    base=f"{path}#train",
    queries=f"{path}#test",
    groundtruth=f"{path}#neighbors" if has_truth else None,
    metric=_DISTANCES[distance],
  )


def data_root(root=None) -> pathlib.Path:
  """Returns the folder of named sets: `root`, else VQJAX_DATA, else data."""
  root = root or os.environ.get("VQJAX_DATA") or DEFAULT_ROOT
  return pathlib.Path(os.path.expanduser(root))


def _find(root: pathlib.Path, name: str) -> str:
  """The path of a file, or of another of the same vectors that is there."""
  paths = [root / each for each in (name, *_SAME.get(name, ()))]
  return str(next((path for path in paths if path.exists()), paths[0]))


def resolve(
  name: str | None = None,
  root=None,
  *,
  train=None,
  base=None,
  queries=None,
  groundtruth=None,
  metric: str | None = None,
  scale: float | None = None,
  num_train: int | None = None,
  num_base: int | None = None,
  num_queries: int | None = None,
) -> Dataset:
  """Data set `name`, or files of one's own as soon as one path is given.

  Paths of one's own are never mixed with those of a named data set, whose
  queries would not fit. Give what is at hand; their dimensions must agree.
  `num_*` limits a file to its first rows; None leaves a value as it is.
  """
  values = dict(metric=metric, scale=scale, num_train=num_train)
  values |= dict(num_base=num_base, num_queries=num_queries)
  values = {k: value for k, value in values.items() if value is not None}
  if not 0 < values.get("scale", 1) < math.inf:
    raise ValueError(
      "The scale of reported errors (--config.data.scale) must be a positive "
      f"number, got {scale}."
    )
  if values.get("metric", "l2") not in METRICS:
    raise ValueError(f"The metric must be one of {METRICS}, got {metric!r}.")
  paths = dict(train=train, base=base, queries=queries, groundtruth=groundtruth)
  paths = {k: os.fspath(path) for k, path in paths.items() if path}
  if paths:
    return Dataset(OWN, _common_dim(paths), **paths, **values)
  if not name:
    raise ValueError(
      f"No data: give paths, or a name out of {', '.join(NAMES)}."
    )
  return dataclasses.replace(get_dataset(name, root), **values)


def shape_of(path) -> tuple[int, int]:
  """Returns rows and columns of a file of vectors or of neighbours."""
  return tuple(formats.open_vectors(path).shape)


def _common_dim(paths: dict[str, str]) -> int:
  """The one dimension of all files but the ground truth."""
  dims = {
    f"{part} {path}": formats.open_vectors(path).shape[1]
    for part, path in paths.items()
    if part != "groundtruth"
  }
  if not dims:
    raise ValueError(
      "Files of your own need at least one of train, base and queries."
    )
  if len(set(dims.values())) > 1:
    listed = ", ".join(f"{name} has {dim}" for name, dim in dims.items())
    raise ValueError(f"All files must have one dimension, but {listed}.")
  return next(iter(dims.values()))


def open_split(dataset: Dataset, split: str, *, max_vectors=None, role=None):
  """Opens "train", "base", "queries" or "groundtruth" as an array `[N, D]`.

  Checks the dimension; `search.truth_check` compares a ground truth with the
  others.

  `max_vectors` is a further limit on the number of rows; `role` is what
  messages call these vectors, the split's own if None.
  """
  if split not in SPLITS:
    raise ValueError(f"The split must be one of {SPLITS}, got {split!r}.")
  path = getattr(dataset, split)
  if not path:
    raise ValueError(
      f"Data set {dataset.name} has no {split} file; give one with its path."
    )
  limit = dataset.num_queries if split == "groundtruth" else None
  limit = getattr(dataset, f"num_{split}", limit)
  limits = [n for n in (limit, max_vectors) if n is not None]
  try:
    vectors = formats.open_vectors(
      path,
      max_vectors=min(limits, default=None),
      role=role or _ROLES[split],
    )
  except FileNotFoundError as e:
    if dataset.name == OWN:
      raise
    file = pathlib.Path(path)
    raise FileNotFoundError(
      f"Data set {dataset.name} lacks {file.name} ({split}): looked in "
      f"{file.parent}. {dataset.how_to_get}"
    ) from e
  if split == "groundtruth":
    return vectors
  if vectors.shape[1] != dataset.dim:
    raise ValueError(
      f"{path} must have dimension {dataset.dim} for data set {dataset.name}, "
      f"got {vectors.shape[1]}."
    )
  return unit.UnitVectors(vectors) if dataset.metric == "cosine" else vectors


class Vectors(NamedTuple):
  """Arrays of a data set: memory maps, or files that read the rows asked for.

  `xt` to train on, `xb` to compress and search, queries `xq`, and the ids `gt`
  of their true neighbours in `xb`, nearest first. A part that the set does not
  have is None.
  """

  xt: Any
  xb: Any
  xq: Any
  gt: Any


def load_dataset(name: str, root=None) -> Vectors:
  """Opens all parts of a named data set, `sample_sift` or `sample_text` first.

  Nothing is read yet: `np.asarray(xb)` reads a part, `xb[:1000]` some rows.

  Args:
    name: One of `NAMES`. The two samples come with vqjax.
    root: Folder of the other sets; None for the environment's VQJAX_DATA.

  Raises:
    ValueError: There is no such set, or no folder is known for it.
    FileNotFoundError: A file is missing; the message says how to get it.
  """
  dataset = get_dataset(name, root)
  return Vectors(
    *(
      open_split(dataset, split) if getattr(dataset, split) else None
      for split in SPLITS
    )
  )
