#!/usr/bin/env bash
# Measures on an accelerator, into a new folder, what a processor cannot tell:
#
#   bash experiments/gpu_report.sh VECTORS FOLDER
#
# bench.jsonl  encode, decode and training step of QINCo2-S, M and L at the
#              published sizes, in float32 and bfloat16, by each rule of the
#              encoder, beside the machine's matrix-product peak and, where it
#              is installed, PyTorch
# s_float32/, s_bfloat16/   a whole training of S on VECTORS each
# report.md    a table of all that
#
# From the root of the clone. PYTHON names the interpreter; TRY=1 does the same
# for S alone at tiny sizes, to see that it works.
set -euo pipefail
if [ $# != 2 ]; then
  echo "Usage: bash experiments/gpu_report.sh VECTORS FOLDER" >&2
  exit 2
fi
data="$1" out="$2" python="${PYTHON:-python}"
[ -e "$data" ] || { echo "$data is not there." >&2; exit 1; }
[ ! -e "$out" ] || { echo "$out exists already; name a new folder." >&2; exit 1; }
names=(s m l) sizes=bigann1M bench=(--num_joint_candidates=256 --num_ranked=48) train_arg=""
if [ -n "${TRY:-}" ]; then
  names=(s) sizes=smoke bench=(--num_joint_candidates=16 --num_ranked=5 --repeats=1 --dim=16) train_arg=:smoke
fi
mkdir -p "$out"
# PyTorch needs memory on the same card.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
configs=()
for name in "${names[@]}"; do configs+=("configs/qinco2_$name.py:$sizes"); done
"$python" -m experiments.bench --config="$(IFS=,; echo "${configs[*]}")" \
  --tasks=encode,decode,train --dtype=float32,bfloat16 --torch \
  --output="$out/bench.jsonl" "${bench[@]}"
for dtype in float32 bfloat16; do
  "$python" -m experiments.train --config="configs/qinco2_s.py$train_arg" \
    --config.data.train="$data" --config.train.dtype="$dtype" \
    --workdir="$out/s_$dtype"
done
"$python" - "$out" <<'PYTHON'
import json, pathlib, sys

from experiments import bench
from experiments.lib import bench_report

out = pathlib.Path(sys.argv[1])
rows = [json.loads(line) for line in (out / "bench.jsonl").open()]
for dtype in bench.DTYPES:
  summary = json.loads((out / f"s_{dtype}" / "summary.json").read_text())
  rows.append({
    "name": "qinco2_s", "task": "whole training", "dtype": dtype,
    "program": f"vqjax, {summary['seconds']:.0f} s",
    "mse": summary["validation_mse"],
  })  # fmt: skip
header, cells = bench_report.cells(rows)
machine = {key: rows[0][key] for key in bench_report.machine()}
lines = [header, ["---"] + ["--:"] * (len(header) - 1), *cells]
text = "\n".join("| " + " | ".join(line) + " |" for line in lines)
(out / "report.md").write_text(f"{text}\n\n{json.dumps(machine)}\n")
print(text)
PYTHON
echo "Written to $out: bench.jsonl, report.md"
