"""The card of a published codec: README.md with its metadata."""

import importlib.metadata
import pathlib

import jax

from vqjax import __version__
from vqjax.data import datasets, files, json_files
from vqjax.progress import count

_PACKAGES = ("jax", "numpy")
_NAMES = {"mse": "MSE", "encode_us": "encode us", "decode_us": "decode us"}


def published_info(info: dict) -> dict:
  """What a codec says of itself, without folders of this machine."""
  data = info.get("data")
  if not data:
    return info
  paths = [name for name in datasets.SPLITS if data.get(name)]
  named = {name: pathlib.PurePath(data[name]).name for name in paths}
  return {**info, "data": {**data, **named, "root": None}}


def identity(path: str, vectors) -> dict:
  """File name, rows and what `files.identify` finds, for the card."""
  name = pathlib.PurePath(path).name
  return {"file": name, "rows": len(vectors), **files.identify(vectors)}


def render(codec, repo: str, licence: str, record: dict, measured: dict) -> str:
  """Returns README.md.

  Args:
    codec: With `published_info`.
    repo: OWNER/NAME, or the name of the folder.
    licence: As the hub names it.
    record: config.json of the run; empty if there is none.
    measured: `figures` of `codec.evaluate`, `data` and `queries` of `identity`;
      empty if nothing was measured.
  """
  head = ["---", f"license: {licence}", "library_name: vqjax", "tags:"]
  head += ["- vector-quantization", "- similarity-search", "---", ""]
  size = f"{codec.dim} dimensions to {codec.num_bytes:g} bytes"
  body = [f"# {repo.rpartition('/')[2]}", ""]
  body += [f"Codec `{codec.name}` of vqjax: vectors of {size}.", ""]
  body += ["```python", "import vqjax", ""]
  source = f"hf://{repo}" if "/" in repo else repo
  body += [f'codec = vqjax.load("{source}")', "codes = codec.encode(x)"]
  body += ["decoded = codec.decode(codes)", "```", ""]
  body += _table(_about(codec, licence, record))
  return "\n".join([*head, *body, "", *_measured(measured)])


def _about(codec, licence: str, record: dict) -> list:
  """Rows of the table: what the codec is and where it is from."""
  training, data = codec.info.get("training", {}), codec.info.get("data", {})
  positions = codec.codebook_sizes[codec.is_ivf :]
  sizes = ", ".join(map(str, sorted(set(positions))))
  lists = codec.is_ivf and count(codec.codebook_sizes[0], "list")
  known = record.get("derived", {})
  trained = known.get("data", {}).get("train", {})
  mse = training.get("validation_mse")
  held_out = training.get("num_held_out")
  versions = [f"{p} {importlib.metadata.version(p)}" for p in _PACKAGES]
  return [
    ("codec", codec.name),
    ("dimensions", codec.dim),
    ("metric", codec.metric),
    ("code", f"{codec.num_codes} codewords, codebooks of {sizes}"),
    ("bytes of a code", f"{codec.num_bytes:g}"),
    ("lists", lists or "none"),
    ("search", _pairs(codec.rule.to_dict(codec.spec.knobs)) or "none"),
    ("trained on", data.get("train") or data.get("name") or "not recorded"),
    ("training vectors", known.get("training_vectors", "not recorded")),
    ("their sample", _pairs(trained) or "not recorded"),
    ("MSE, held-out", f"{mse:g} of {held_out}" if held_out else "not recorded"),
    ("seed", training.get("seed", record.get("seed", "not recorded"))),
    ("fingerprint", codec.fingerprint),
    ("versions", f"vqjax {__version__}, {', '.join(versions)}"),
    ("licence", licence),
  ]


def _measured(measured: dict) -> list[str]:
  """The figures and of what they are."""
  if not measured:
    return ["Not measured: publish was not given vectors (`--data`).", ""]
  figures = measured["figures"]
  lines = ["## Measured", "", f"- base: {_pairs(measured['data'])}"]
  if measured["queries"]:
    lines += [f"- queries: {_pairs(measured['queries'])}"]
  lines += [f"- device: {jax.devices()[0].device_kind}", ""]
  lines += _table([(_NAMES.get(k, k), f"{v:.5g}") for k, v in figures.items()])
  return [
    *lines,
    "",
    "MSE is the squared error of a decoded vector, summed over its dimensions. "
    "1-recall@R is the share of queries whose true nearest neighbour is among "
    "the first R results of an exact search in the decoded vectors. Times are "
    "microseconds per vector.",
    "",
  ]


def _table(rows: list) -> list[str]:
  return ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows)]


def _pairs(values: dict) -> str:
  return ", ".join(f"{name} {value}" for name, value in values.items())


def read_record(codec: str) -> dict:
  """Returns config.json of a run folder; empty if there is none."""
  path = files.user_path(codec)
  path = (path if path.is_dir() else path.parent) / "config.json"
  return json_files.read_json(path) if path.is_file() else {}
