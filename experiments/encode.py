r"""Turns a file of vectors into codes.

  vqjax encode --codec=runs/qinco2_s --data=base.bvecs --output=codes.npy
  vqjax encode --codec=runs/qinco2_s --data=base.bvecs --output=codes.bin --raw

Codes are int32 `[N, M]` in a .npy file, or lists in a column of a .parquet; for
an IVF model the list number comes first. --raw packs every code into the bits
it needs, rows padded to whole bytes, without a header: exactly N*M bytes for
8-bit codes. codes.npy.json says what made them. Memory does not grow with the
file. The same command run again says that all is done.

Vectors are encoded by the rule that is stored with the codec. A released codec
has the published one (A candidates of each of B hypotheses); --rule=joint asks
for the C best over all hypotheses instead, which is several times faster at
about the same error. Deep networks (QINCo2-M, L) encode faster by a ranker,
which `vqjax tradeoff --write` fits and stores with the codec.

Large files go into a folder of shards, filled by one process or by many that
run the same command. Shards are counted from 0:

  ... --output=codes --shards=16                         all of them
  ... --output=codes --shard=3/16                        one of them
  ... --output=codes --shard=$SLURM_ARRAY_TASK_ID/16     sbatch --array=0-15
  ... --output=codes --shard=$JOB_COMPLETION_INDEX/16    a Kubernetes Job
  ... --output=codes --multihost [--shards=16]           each process its part

  ... --output=codes --shards=64 --engine=ray --workers=2     by Ray

Ray makes a shard again whose worker or host was lost; the codes are the same as
those of one process.

Run again, the same command keeps the finished shards and makes the others. It
refuses a folder of another codec, data file or other options.

--ids=COLUMN of items.parquet#embedding, or a file, keeps item ids beside the
codes, in codes.npy.ids.txt or codes/ids.txt, or in the column id of a .parquet;
build_index takes them over.

  vqjax encode --verify --output=codes [--codec=... --data=...]

reads all shards, says which are missing or damaged and how to make them, and
then ends with exit code 1. With --codec and --data it also compares those.
"""

import functools
import math
import pathlib
import shlex
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from absl import logging

from experiments.lib import cli, codecs, engine, inputs, plan
from vqjax import index_build
from vqjax.codec import Codec
from vqjax.codecs import packing
from vqjax.data import codes, datasets, files, formats, item_ids, unit
from vqjax.storage import codec_file

REQUIRED = ("codec", "data", "output")
OPTIONS = {
  "codec": cli.CODEC_OPTION,
  "data": cli.DATA_OPTIONS["data"],
  "ids": cli.Option(str, None, item_ids.FLAG_HELP),
  "num_vectors": cli.Option(
    int, None, "Encode only the first vectors, this many."
  ),
  **cli.SEARCH_OPTIONS,
  "assign": cli.ASSIGN_OPTION,
  "output": cli.Option(str, None, "File to write; with shards a folder."),
  "raw": cli.Option(bool, False, "Write packed bytes without a header."),
  **engine.SHARD_OPTIONS,
  **engine.OPTIONS,
  "verify": cli.Option(bool, False, "Check the shards in --output."),
  "overwrite": cli.Option(bool, False, "Replace an existing output file."),
  "plan": plan.OPTION,
}
_WHERE = (
  *("output", "multihost", "overwrite", "plan"),
  *(*engine.SHARD_OPTIONS, *engine.OPTIONS),
)


@cli.takes(OPTIONS)
def run(config) -> dict:
  """Writes the codes, or checks them; returns what is there."""
  if config.verify:
    return _verify(config)
  cli.require(config, *REQUIRED)
  engine.check(config)
  num_shards, mine = engine.share(config)
  _check_output(config, num_shards)
  job = _open(config, num_shards)
  meta, ids_N = job.meta, job.ids_N
  if config.plan:
    return _plan(config, meta, mine, job.make_blocks_fn())
  after = _after(config, job.codec, num_shards, meta["shape"][0])
  if num_shards:
    codes.claim(config.output, meta)
    item_ids.save_beside(config.output, ids_N)
    _write_shards(config, job, mine, after)
  elif files.find_made(config.output, meta, config.overwrite):
    logging.info("%s is made already.\nNext:\n  %s", config.output, after)
  else:
    blocks_fn = job.make_blocks_fn()
    item_ids.save_beside(config.output, ids_N, overwrite=config.overwrite)
    _write_file(config, meta, blocks_fn, after, ids_N)
  return {"output": config.output, "shape": tuple(meta["shape"])}


class _Job(NamedTuple):
  """What is to be encoded, and how."""

  codec: Codec
  meta: dict  # Description of the codes.
  ids_N: np.ndarray | None
  dtype: str  # That auto stands for.
  make_blocks_fn: Callable  # Compiles; see `Codec.encode_blocks`.


def _open(config, num_shards: int) -> _Job:
  codec = codecs.open_codec(config.codec)
  dataset = codecs.resolve_data(codec, config, base=config.data)
  x_ND = datasets.open_split(
    dataset, "base", max_vectors=config.num_vectors, role="vectors to encode"
  )
  ids_N = inputs.item_ids_of(config, len(x_ND))
  rule = codecs.search_rule(codec, config)
  meta = codes.describe(
    x_ND,
    codec=codec.name,
    fingerprint=codec.fingerprint,
    codebook_sizes=codec.code_sizes(rule),
    encode=codec.describe_search(rule, config.assign),
    command=_command(config, rule.to_dict(codec.spec.knobs)),
    num_shards=num_shards,
  )
  meta |= item_ids.describe(ids_N)
  make_fn = lambda: codecs.make_encoder(codec, config, x_ND)[0]
  return _Job(codec, meta, ids_N, codecs.product_dtype(config.dtype), make_fn)


def open_parts(config) -> Callable:
  """Returns `make(shard, report)`, which writes a shard of --output."""
  job = _open(config, config.shards)
  return _maker(config, job, codes.claim(config.output, job.meta))


def _maker(config, job: _Job, manifest: dict) -> Callable:
  blocks_fn = job.make_blocks_fn()

  def make(shard: int, report: Callable) -> None:
    rows, count = _rows_of(manifest, shard), lambda num, _: report(num)
    blocks = blocks_fn(rows=rows, progress=count)
    codes.write_shard(config.output, manifest, shard, blocks)

  return make


def _plan(config, meta: dict, mine: list[int], blocks_fn) -> dict:
  """What the codes of this process would take."""
  num, sizes = meta["shape"][0], meta["codebook_sizes"]
  if meta.get("num_shards"):
    num = sum(len(_rows_of(meta, shard)) for shard in mine)
  row_bytes = meta.get("row_bytes", 4 * len(sizes))
  if config.raw:
    row_bytes = packing.pack(np.zeros((1, len(sizes)), int), sizes).shape[1]
  blocks = map(len, blocks_fn(progress=None))
  stages = [plan.measure("encode", blocks, num)]
  return plan.report(stages, rows=num, num_bytes=num * row_bytes)


def _check_output(config, num_shards: int) -> None:
  """Raises before any work if the output cannot be written."""
  output = pathlib.Path(config.output)
  if num_shards:
    if config.raw or config.overwrite or output.suffix == ".npy":
      raise ValueError(
        "Shards go into a folder and are never replaced by others: give "
        "--output=FOLDER, and leave --raw and --overwrite out; got "
        f"--output={output}."
      )
    if output.exists() and not output.is_dir():
      raise ValueError(f"--output={output} must be a folder for the shards.")
    files.check_folder(output)
    return
  if output.is_dir():
    raise ValueError(
      f"--output={output} is a folder: give --shards=n or --shard=i/n to fill "
      "it, or name a file."
    )
  if (output.suffix in (".npy", ".parquet")) == config.raw:
    raise ValueError(
      "--output must end in .npy or .parquet, and in anything else with --raw; "
      f"a folder needs --shards=n; got {output}."
    )
  files.check_output(output, config.overwrite, described=True)


def _command(config, knobs: dict) -> str:
  """What was asked for, but for where the codes go."""
  default = cli.get_config(OPTIONS)
  asked = {
    name: value
    for name, value in config.items()
    if name not in _WHERE and value != default.get(name)
  }
  asked.pop("rule", None)  # The sizes say it.
  # What a later version or another device might choose otherwise.
  is_joint = bool(knobs.get("num_joint_candidates"))
  rule = "num_joint_candidates" if is_joint else "num_candidates"
  chosen = ("beam_size", rule, "num_ranked", "dtype")
  asked.update({name: knobs[name] for name in chosen if name in knobs})
  words = [f"--{name}={value}" for name, value in asked.items()]
  return shlex.join(["vqjax", "encode", *words])


def _write_file(config, meta, blocks_fn, after: str, ids_N) -> None:
  """Writes all codes into one file, and their description next to it."""
  with cli.progress(meta["shape"][0], "encode") as done:
    blocks = blocks_fn(progress=done)
    with files.atomic_output(
      config.output, config.overwrite, description=meta
    ) as temporary:
      if config.raw:
        _write_raw(temporary, meta["codebook_sizes"], blocks)
      else:
        _write_table(temporary, blocks, ids_N)
  logging.info(
    "%d vectors, %d codes each, in %s; what made them in %s.\nNext:\n  %s",
    *meta["shape"],
    config.output,
    files.description_path(config.output),
    after,
  )


def _write_table(path, blocks, ids_N) -> None:
  """Writes a .npy, or columns of a .parquet."""
  if path.suffix == ".parquet":
    path = f"{path}#codes"
  formats.write_vectors(path, blocks, dtype=np.int32, ids_N=ids_N)


def _write_raw(path, sizes, blocks) -> None:
  with open(path, "wb") as file:
    for codes_NM in blocks:
      file.write(packing.pack(codes_NM, sizes).tobytes())


def _write_shards(config, job: _Job, mine: list[int], after) -> None:
  """Makes those shards of this process that are not finished yet."""
  folder = config.output
  manifest = codes.claim(folder, job.meta)
  todo = codes.unfinished(folder, manifest, mine)
  if len(todo) < len(mine):
    skipped, what = len(mine) - len(todo), f"{len(mine)} shards of this process"
    logging.info("%d of the %s are finished already.", skipped, what)
  if todo:
    try:
      _make_shards(config, job, manifest, todo)
    except KeyboardInterrupt:
      logging.warning("The finished shards stay in %s.", folder)
      raise
  if jax.process_count() > 1:
    logging.info(
      "This process is done; others may still be running. When all are done:"
      "\n  vqjax encode --verify --output=%s",
      shlex.quote(folder),
    )
    return
  left = codes.find_problems(folder, is_thorough=False)
  if config.engine:
    engine.check_seen(folder, left)
  logging.info(
    "%s has %d of its %d shards.\nNext:\n  %s",
    folder,
    manifest["num_shards"] - len(left),
    manifest["num_shards"],
    _remedy(folder, manifest, left) if left else after,
  )


def _make_shards(config, job: _Job, manifest, todo: list[int]) -> None:
  """Encodes shards behind one progress line, one by one or by the engine."""
  sizes = {i: len(_rows_of(manifest, i)) for i in todo}
  if config.engine:
    # What auto means here, not on the worker.
    dtype = {"dtype": job.dtype}
    engine.run(
      "encode", {**config, **dtype}, sizes, verb="encode", uses_gpus=True
    )
    return
  engine.make_here(_maker(config, job, manifest), sizes, verb="encode")


def _rows_of(manifest, shard: int) -> range:
  return codes.shard_rows(manifest["shape"][0], manifest["num_shards"], shard)


def _after(config, codec, num_shards: int, num_vectors: int) -> str:
  """Commands for codes that are complete."""
  flag = lambda name: f"--{name}={shlex.quote(config[name])}"
  data, output = flag("data"), shlex.quote(config.output)
  given = f"{flag('codec')} --codes={output}"
  commands = [f"decode {given} --output=x.npy"]
  if codec.is_ivf and not config.raw and config.num_steps is None:
    if config.num_vectors:
      data += f" --num_vectors={config.num_vectors}"
    commands = [
      f"pairwise_decoder {given} {data} --output=decoders.safetensors",
      f"build_index {given} --decoders=decoders.safetensors "
      "--output=index.faiss",
    ]
  elif not codec.is_ivf:
    num_lists = _num_lists(num_vectors)
    data += f" {flag('ids')}" if config.ids else ""
    commands.append(
      f"build_index {flag('codec')} {data} --num_lists={num_lists} "
      "--output=my_index"
    )
  if num_shards:
    commands.insert(0, f"encode --verify --output={output}")
  return "\n  ".join(f"vqjax {c}" for c in commands)


def _num_lists(num_vectors: int) -> int:
  """The power of two nearest to twice the square root; one of few vectors."""
  power = round(math.log2(2 * math.sqrt(num_vectors)))
  return min(1 << power, index_build.default_lists(num_vectors))


def _remedy(folder, manifest, shards) -> str:
  """The command that makes these shards."""
  num = manifest["num_shards"]
  command = f"{manifest['command']} --output={shlex.quote(str(folder))}"
  if len(shards) == 1:
    return f"{command} --shard={min(shards)}/{num}"
  array = ",".join(map(str, sorted(shards)))
  return (
    f"{command} --shards={num}\n"
    f"or, each in a process of its own, --shard=i/{num} for i in {array}"
  )


def _verify(config) -> dict:
  """Checks a folder of shards; raises ValueError if it is not whole."""
  cli.require(config, "output")
  folder = config.output
  manifest = codes.load_manifest(folder)
  wanted = {"num_shards": config.shards} if config.shards else {}
  if config.codec:
    fingerprint = codec_file.load_codec(config.codec).fingerprint
    wanted["codec_fingerprint"] = fingerprint
  if config.data:
    num = config.num_vectors or manifest["shape"][0]
    x_ND = formats.open_vectors(config.data, max_vectors=num)
    if manifest["data"].get("is_unit"):
      x_ND = unit.UnitVectors(x_ND)
    wanted["data"] = files.identify(x_ND)
    wanted["shape"] = [len(x_ND), manifest["shape"][1]]
  files.check_same(folder, {k: manifest[k] for k in wanted}, wanted)
  with cli.progress(manifest["num_shards"], "verify", unit="shard") as done:
    problems = codes.find_problems(folder, progress=done)
  item_ids.load_beside(folder, manifest, manifest["shape"][0])
  if problems:
    path_fn = functools.partial(codes.shard_path, "", manifest["num_shards"])
    lines = [f"  {path_fn(i)} {what}" for i, what in problems.items()]
    raise ValueError(
      f"{len(problems)} of the {manifest['num_shards']} shards in {folder} "
      "are not as they should be:\n" + "\n".join(lines) + "\nTo make them:\n"
      f"  {_remedy(folder, manifest, problems)}"
    )
  num, num_codes = manifest["shape"]
  logging.info(
    "All %d shards in %s are whole: %d x %d codes of the %s codec %s.",
    *(manifest["num_shards"], folder, num, num_codes),
    *(manifest["codec"], manifest["codec_fingerprint"]),
  )
  return {"output": folder, "shape": (num, num_codes)}


if __name__ == "__main__":
  cli.main(run, OPTIONS, __doc__, required=REQUIRED, multihost=True)
