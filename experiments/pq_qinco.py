r"""Divides vectors into parts, and joins the QINCos of the parts to one codec.

  vqjax pq_qinco --prepare --data=learn.bvecs --num_blocks=4 \
      --opq --output=runs/pq_qinco
  vqjax train --config=qinco2_s --config.data.train=runs/pq_qinco/part-0.npy \
      --workdir=runs/pq_qinco/codec-0                    and so on for each part
  vqjax pq_qinco --recombine --output=runs/pq_qinco
  vqjax evaluate --codec=runs/pq_qinco --split=validation

--prepare writes part-0.npy, part-1.npy, ...: float32, consecutive
dimensions of the vectors. --opq rotates the vectors first, by a matrix that
faiss learns. Run again, the same command keeps the finished parts and makes the
others. prepared.json describes them.

The parts are trained separately, on one machine or many, all with the same
options. A code is the code of part 0, then of part 1, and so on: it has
`config.model.num_steps` positions of each part.

--recombine checks that each codec was trained on its part, writes
codec.safetensors into the same folder and measures it on the held-out vectors.
If they lie elsewhere, --parts=a,b,c names them.

Reference: arXiv 2401.14732, section 3.3.
"""

import os
import pathlib
import shlex

import jax.numpy as jnp
from absl import logging

from experiments.lib import cli, pq_parts
from vqjax import fitting
from vqjax.codec import Codec
from vqjax.codecs import pq_qinco
from vqjax.data import batches, datasets, files, formats
from vqjax.storage import codec_file

REQUIRED = ("output",)
OPTIONS = {
  "prepare": cli.Option(bool, False, "Divide --data into parts."),
  "recombine": cli.Option(bool, False, "Join the codecs of the parts."),
  "data": cli.Option(
    str,
    None,
    "Training vectors; with --recombine their new place, if they moved.",
  ),
  "num_vectors": cli.Option(
    int, None, "Use only the first vectors, this many."
  ),
  "num_blocks": cli.Option(
    int, None, "Number of parts; a divisor of the dimensions."
  ),
  "opq": cli.Option(bool, False, "Learn a rotation first (OPQ, by faiss)."),
  "seed": cli.Option(int, 0, "Draws the vectors that --opq learns from."),
  "output": cli.Option(str, None, "Folder of the parts and the codec."),
  "parts": cli.Option(
    str, None, "Codecs of the parts, a,b,c; codec-0, ... in --output if unset."
  ),
  "overwrite": cli.Option(bool, False, "Replace an existing codec."),
}
_BELONGS = {  # Options that only one of the two has.
  "prepare": ("num_vectors", "num_blocks", "opq", "seed"),
  "recombine": ("parts", "overwrite"),
}


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Prepares or recombines; returns what is written down about it."""
  cli.require(config, *REQUIRED)
  if config.prepare == config.recombine:
    raise ValueError("Give either --prepare or --recombine; see --help.")
  mode, other = "prepare", "recombine"
  if config.recombine:
    mode, other = other, mode
  for name in _BELONGS[other]:
    if config[name] != OPTIONS[name].default:
      raise ValueError(f"--{name} belongs to --{other}, not to --{mode}.")
  return pq_parts.prepare(config) if config.prepare else _recombine(config)


def _recombine(config) -> dict:
  """Writes the codec that the parts make, and measures it."""
  folder = pathlib.Path(config.output)
  for name in (codec_file.TENSORS_NAME, codec_file.HEADER_NAME):
    files.check_output(folder / name, overwrite=config.overwrite)
  paths, prepared, rotation_DD = _find_parts(config, folder)
  vectors = _open_source(config, prepared)
  parts = [codec_file.load_codec(path) for path in paths]
  for block, (path, part) in enumerate(zip(paths, parts, strict=True)):
    if part.name != "qinco":
      raise ValueError(
        f"{path} is a {part.name} codec; the parts must be of codec qinco."
      )
    _check_trained_on(pq_parts.part_path(folder, block), path, part)
  params = pq_qinco.recombine(
    [part.params for part in parts],
    None if rotation_DD is None else jnp.asarray(rotation_DD),
  )
  info = _make_info(paths, parts, config.data or prepared["source"], vectors)
  info["training"]["validation_mse"] = _held_out_mse(params, info, vectors)
  file = codec_file.save_codec(
    folder, "pq_qinco", params, info=info, overwrite=config.overwrite
  )
  _log_recombined(folder, parts, info)
  return {"codec": str(file), **info}


def _find_parts(config, folder):
  """Paths of the codecs, prepared.json, and rotation."""
  if not (folder / pq_parts.PREPARED_NAME).exists():
    raise FileNotFoundError(
      f"{folder} has no {pq_parts.PREPARED_NAME}: run --prepare first."
    )
  prepared = pq_parts.load_prepared(folder)
  num = prepared["num_blocks"]
  paths = [path.strip() for path in (config.parts or "").split(",") if path]
  paths = paths or [pq_parts.codec_path(folder, block) for block in range(num)]
  if len(paths) != num:
    raise ValueError(
      f"{folder} has {num} parts, but --parts names {len(paths)} codecs."
    )
  return paths, prepared, pq_parts.load_rotation(folder, prepared)


def _open_source(config, prepared: dict):
  """Opens the vectors that the parts were cut from."""
  path = config.data or prepared["source"]
  if not config.data and not os.path.exists(path):
    raise FileNotFoundError(
      f"The parts were cut from {path}, which is not there any more: say by "
      "--data=FILE where it is."
    )
  vectors = formats.open_vectors(
    path, max_vectors=prepared["num_vectors"], role="training vectors"
  )
  found = {"num_vectors": len(vectors), **files.identify(vectors)}
  for name, value in found.items():
    if prepared[name] != value:
      raise ValueError(
        f"{path} is not what the parts were cut from: {name} is {value}, it "
        f"was {prepared[name]}."
      )
  return vectors


def _check_trained_on(part, path, codec) -> None:
  """Raises ValueError unless the codec in `path` was trained on file `part`."""
  recorded = codec.info.get("data", {}).get("train")
  if not recorded or not _is_same(recorded, part):
    raise ValueError(
      f"{path} must be trained on {part}, but was on "
      f"{recorded or 'what it does not say'}: train it with "
      f"--config.data.train={part}."
    )


def _is_same(recorded: str, part: pathlib.Path) -> bool:
  """Compares two files, by their names if one has been moved away."""
  if not (os.path.exists(recorded) and part.exists()):
    return pathlib.Path(recorded).name == part.name
  found, wanted = map(formats.open_vectors, (recorded, part))
  return found.shape == wanted.shape and files.identify(
    found
  ) == files.identify(wanted)


def _make_info(paths, parts, source, vectors) -> dict:
  """What the codec says of itself, from what its parts say."""
  first = parts[0].info
  for path, part in zip(paths, parts, strict=True):
    data = part.info.get("data", {})
    for name in ("num_train", "validation_size"):
      value, wanted = data.get(name), first.get("data", {}).get(name)
      if value != wanted:
        raise ValueError(
          f"All parts must be trained with the same --config.data.{name}, or "
          f"they hold out different vectors: {path} had {value}, {paths[0]} "
          f"had {wanted}."
        )
    if part.info.get("encode") != first.get("encode"):
      logging.warning(
        "%s was made to be encoded with %s; the options of %s are taken: %s.",
        *(path, part.info.get("encode"), paths[0], first.get("encode")),
      )
  if first.get("metric") == "cosine":
    raise ValueError(
      f"{paths[0]} was trained for the cosine, which parts of vectors do not "
      "have; make the vectors of length 1 yourself, before they are cut, and "
      "train with --config.data.metric=l2 or ip."
    )
  seconds = [part.info.get("training", {}).get("seconds", 0) for part in parts]
  info = {name: first[name] for name in ("metric", "scale") if name in first}
  info |= {"encode": first.get("encode", {})}
  info |= {"training": {"seconds": round(sum(seconds), 1)}}
  data = first.get("data", {}) | dict.fromkeys(("name", *datasets.SPLITS))
  num = data.get("num_train") or len(vectors)
  data |= {"train": os.path.abspath(source), "num_train": num}
  return info | {"data": data}


def _held_out_mse(params, info: dict, vectors) -> float:
  """Squared error per vector, of the held-out rows."""
  data = info["data"]
  rest = [data["validation_size"]] if "validation_size" in data else []
  _, held_out = batches.split(min(data["num_train"], len(vectors)), *rest)
  num = held_out.stop - held_out.start
  with cli.progress(num, "held-out vectors") as done:
    codec = Codec("pq_qinco", params, info)
    return fitting.held_out_mse(codec, vectors, held_out, done)


def _log_recombined(folder, parts, info: dict) -> None:
  """Says what was written, how good it is and what to do next."""
  scale, output = info.get("scale", 1), shlex.quote(str(folder))
  quality = cli.number(info["training"]["validation_mse"] * scale)
  of_parts = [p.info.get("training", {}).get("validation_mse") for p in parts]
  if None not in of_parts:
    total = cli.number(sum(of_parts) * scale)
    quality += f"; the parts' add up to {total}"
  logging.info(
    "One codec of %d parts in %s: %s, %s. Its validation MSE: %s.\nNext:\n"
    "  vqjax evaluate --codec=%s --split=validation\n"
    "  vqjax encode --codec=%s --data=FILE --output=codes.npy",
    *(len(parts), folder, codec_file.TENSORS_NAME),
    *(codec_file.HEADER_NAME, quality, output, output),
  )


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED)
