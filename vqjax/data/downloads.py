"""What `vqjax download` can fetch: names, files, addresses, licences.

The addresses are those of the programs released with QINCo and QINCo2. A name
is that of a data set, or of a released file without its suffix.
"""

import pathlib
from collections.abc import Iterable
from typing import NamedTuple

from vqjax import shipped
from vqjax.data import transfer

BASE = "https://dl.fbaipublicfiles.com/QINCo"
MODELS = "models"  # Folder of all that is no data set.
DATA_SETS, INDEXES = "Data sets", "Indexes of QINCo"  # Groups.
CENTROIDS = "centroids of the lists"
_IRISA = "ftp://ftp.irisa.fr/local/texmex/corpus"
_YANDEX = "https://storage.yandexcloud.net/yandex-research/ann-datasets/DEEP"
_WEIGHTS = (
  "CC-BY-NC 4.0: released by the authors of QINCo, not for commercial use "
  "(https://creativecommons.org/licenses/by-nc/4.0)"
)
_TERMS = {
  "bigann": "BIGANN has terms of its own: http://corpus-texmex.irisa.fr",
  "deep1b": "Deep1B has terms of its own: https://big-ann-benchmarks.com",
  "contriever": "Terms of the authors of QINCo, who made these vectors: "
  "https://github.com/facebookresearch/Qinco",
  "fb_ssnpp": "Terms of Meta, who published SimSearchNet++: "
  "https://big-ann-benchmarks.com",
}
_MILLION = 1_000_000
_GND_BYTES = 800_800_000  # Ten pairs of ids and distances, 10,000 x 1,000.


class Remote(NamedTuple):
  """A file on a server; `path` is below the data root.

  An address that begins with / is below `BASE`. `rows` and `dim` are what the
  name says, None where it does not. `serves` is the address of a larger file
  that can lie in its place.
  """

  path: str
  url: str
  rows: int | None = None
  dim: int | None = None
  unpacked_bytes: int = 0
  serves: str = ""
  sha256: str | None = None

  @property
  def num_bytes(self) -> int:
    """What the file takes on disk if its name says so, else 0."""
    widths = {".bvecs": 1, ".fvecs": 4, ".fbin": 4}
    width = widths.get(pathlib.PurePath(self.path).suffix)
    if self.unpacked_bytes or not (width and self.rows and self.dim):
      return self.unpacked_bytes
    return self.rows * (4 * self.path.endswith("vecs") + width * self.dim)

  @property
  def pack(self) -> str:
    """How the file is packed: "gz", "tar" or ""."""
    if self.url.endswith(".tar.gz"):
      return "tar"
    return "gz" if self.url.endswith(".gz") else ""


class Download(NamedTuple):
  """What a name stands for; `dataset` is what it is, or is to be used with."""

  name: str
  what: str
  files: tuple[Remote, ...]
  licence: str
  dataset: str
  group: str


def _vecs(folder: str, name: str, url: str, rows: int, dim: int, serves=""):
  """A .bvecs or .fvecs file; packed or not."""
  width = dim if name.endswith(".bvecs") else 4 * dim
  unpacked = rows * (4 + width) if url.endswith(".gz") else 0
  return Remote(f"{folder}/{name}", url, rows, dim, unpacked, serves)


def _bigann() -> Iterable[Download]:
  part = lambda name: f"{_IRISA}/bigann_{name}.bvecs.gz"
  file = lambda *args: _vecs("bigann", *args)
  queries = file("bigann_query.bvecs", part("query"), 10_000, 128)
  at = "/datasets/bigann"
  small = (
    file(
      *("bigann_learn.bvecs", f"{at}/bigann_learn_10M10k.bvecs"),
      *(10_010_000, 128, part("learn")),
    ),
    file(
      *("bigann_base.bvecs", f"{at}/bigann1M.bvecs"),
      *(_MILLION, 128, part("base")),
    ),
    queries,
    Remote("bigann/gnd/idx_1M.ivecs", f"{at}/gnd/idx_1M.ivecs", 10_000),
  )
  gnd = f"{_IRISA}/bigann_gnd.tar.gz"
  whole = (
    file("bigann_learn.bvecs", part("learn"), 100 * _MILLION, 128),
    file("bigann_base.bvecs", part("base"), 1000 * _MILLION, 128),
    queries,
    Remote("bigann/gnd", gnd, unpacked_bytes=_GND_BYTES),
  )
  yield _dataset("bigann1M", "bigann", "SIFT, the first million", small)
  what = "SIFT, the first 10 million out of the files of the billion"
  yield _dataset("bigann10M", "bigann", what, whole)
  yield _dataset("bigann1B", "bigann", "SIFT, the billion", whole)


def _deep() -> Iterable[Download]:
  at = "/datasets/deep1b"
  queries = Remote(
    "deep1b/query.public.10K.fbin", f"{_YANDEX}/query.public.10K.fbin",
    *(10_000, 96),
  )  # fmt: skip
  file = lambda *args: _vecs("deep1b", *args)
  small = (
    file("learn.fvecs", f"{at}/learn10M10k.fvecs", 10_010_000, 96),
    file("base.fvecs", f"{at}/base1M.fvecs", _MILLION, 96),
    queries,
    Remote(
      "deep1b/deep1M_groundtruth.ivecs", f"{at}/deep1M_groundtruth.ivecs",
      10_000,
    ),
  )  # fmt: skip
  whole = (
    Remote(
      "deep1b/learn.350M.fbin", f"{_YANDEX}/learn.350M.fbin",
      *(350 * _MILLION, 96),
    ),
    Remote(
      "deep1b/base.1B.fbin", f"{_YANDEX}/base.1B.fbin", *(1000 * _MILLION, 96)
    ),
    queries,
    Remote(
      "deep1b/deep1B_groundtruth.ivecs", f"{at}/deep1B_groundtruth.ivecs",
      10_000,
    ),
  )  # fmt: skip
  yield _dataset(
    "deep1M", "deep1b", "image descriptors, the first million", small
  )
  yield _dataset("deep1B", "deep1b", "image descriptors, the billion", whole)


def _of_meta(name, folder, at, what, dim, train, num_train) -> Download:
  """A data set of four .npy files in one folder."""
  names = {train: (num_train, dim), "database1M.npy": (_MILLION, dim)}
  names |= {"queries.npy": (None, dim), "ground_truth1M.npy": (None, None)}
  files = (
    Remote(f"{folder}/{file}", f"/datasets/{at}/{file}", *shape)
    for file, shape in names.items()
  )
  return _dataset(name, folder, what, tuple(files))


def _dataset(name: str, folder: str, what: str, files) -> Download:
  return Download(name, what, tuple(files), _TERMS[folder], name, DATA_SETS)


def _model(name: str, url: str, what: str, dataset: str, group: str):
  file = Remote(f"{MODELS}/{url.rpartition('/')[2]}", url)
  return Download(name, what, (file,), _WEIGHTS, dataset, group)


def _qinco2() -> Iterable[Download]:
  at, known = "/qinco2-models", {"FB_ssnpp1M": "fb_ssnpp1M"}
  for data in ("bigann1M", "deep1M", "contriever1M", "FB_ssnpp1M"):
    for model in ("qinco1", "qinco2_L"):
      for size in ("8x8", "16x8"):
        name = f"{model}-{data}-{size}"
        what = f"{model.replace('_', '-')}, {size.partition('x')[0]} bytes"
        group = "Checkpoints of QINCo2"
        dataset = known.get(data, data)
        yield _model(name, f"{at}/{name}.pt", what, dataset, group)
  for data in ("bigann1B", "deep1B"):
    group = "IVF checkpoints of QINCo2, and centroids"
    for model in ("S", "M"):
      for size in ("8x8", "16x8", "32x8"):
        name = f"IVF-qinco2_{model}-{data}-{size}"
        what = f"{model}, {size.partition('x')[0]} bytes, 1,048,576 lists"
        yield _model(name, f"{at}/{name}.pt", what, data, group)
    name = f"ivf_centroids_{data}_1048576"
    yield _model(name, f"{at}/{name}.npy", CENTROIDS, data, group)


def _qinco1() -> Iterable[Download]:
  for data in ("bigann", "deep"):
    group = "IVF checkpoints of QINCo, and centroids"
    for lists in ("65k", "1M"):
      for size in ("8x8", "16x8"):
        for depth in (2, 4):
          name = f"{data}_IVF{lists}_{size}_L{depth}"
          what = f"L={depth}, {size.partition('x')[0]} bytes, {lists} lists"
          url = f"/models/{name}.pt"
          yield _model(name, url, what, f"{data}1B", group)
      name = f"{data}_centroids_{lists}"
      yield _model(name, f"/ivf/{name}.npy", CENTROIDS, f"{data}1B", group)
  names = [("bigann10M", "IVF65k_16x8_L2")]
  for data in ("bigann1B", "deep1B"):
    for size in ("8x8", "16x8", "32x8"):
      names += [(data, f"IVF1M_{size}_L{depth}") for depth in (2, 4)]
  for data, rest in names:
    name, what = f"{data}_{rest}", f"index of the base of {data}"
    yield _model(name, f"/ivf/{name}.faissindex", what, data, INDEXES)


ALL = {
  each.name: each
  for each in (
    *_bigann(),
    *_deep(),
    _of_meta(
      *("contriever1M", "contriever", "ContrieverEmb", "text embeddings"),
      *(768, "training_set.npy", None),
    ),
    _of_meta(
      *("fb_ssnpp1M", "fb_ssnpp", "FB_ssnpp", "image embeddings"),
      *(256, "training_set10010k.npy", 10_010_000),
    ),
    *_qinco2(),
    *_qinco1(),
  )
}
_SMALL = {"bigann10M": "bigann1M", "bigann1B": "bigann1M", "deep1B": "deep1M"}


def get(name: str, *, is_small: bool = False) -> Download:
  """Returns what a name stands for; capitals and the suffix do not matter.

  `is_small` takes the million of a larger data set. Raises ValueError if there
  is no such name.
  """
  known = {each.lower(): each for each in ALL}
  stem = pathlib.PurePath(name).name
  for suffix in (".pt", ".npy", ".faissindex"):
    stem = stem.removesuffix(suffix)
  if stem.lower() not in known:
    raise ValueError(
      f"There is nothing called {name!r} to download"
      f"{shipped.did_you_mean(stem, known.values())} "
      "vqjax download --list shows all names."
    )
  found = known[stem.lower()]
  return ALL[_SMALL.get(found, found) if is_small else found]


def codec_of(index: Download) -> Download | None:
  """Returns the checkpoint whose codes are in a prebuilt index, if released."""
  data, _, rest = index.name.partition("_")
  return ALL.get(f"{data.removesuffix('10M').removesuffix('1B')}_{rest}")


def order(remote: Remote, root, base: str | None = None) -> transfer.Order:
  """Returns the order of a file below a data root.

  A mirror at `base` has the paths of `BASE`, and files of other servers below
  the name of their server.
  """
  base = base and base.rstrip("/")
  full = lambda url: BASE + url if url.startswith("/") else url
  if base and remote.url.startswith("/"):
    url = base + remote.url
  elif base:
    url = f"{base}/{remote.url.partition('://')[2]}"
  else:
    url = full(remote.url)
  return transfer.Order(
    pathlib.Path(root) / remote.path,
    full(remote.url),
    url,
    remote.pack,
    remote.unpacked_bytes,
    remote.sha256,
    (full(remote.serves),) if remote.serves else (),
  )
