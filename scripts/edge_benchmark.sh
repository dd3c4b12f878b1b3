#!/usr/bin/env bash
# Tables VIII and IX on this device: PyTorch eager and compiled, our kernels, and the models exported to other runtimes.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/edge_benchmark.sh [OPTIONS...]

Exports the models to ONNX Runtime, OpenVINO and TensorRT (trtexec), times them beside PyTorch at batch 128 (Table VIII) and
1 (Table IX), adds to results/MACHINE.json and writes docs/results.md. A runtime that the device lacks is skipped.

  OPTIONS  such as --threads 4, --repeats 20, --modes 0 1 2 on a Jetson; see `python -m elfatt.analysis runtimes --help`

environment:
  TABLES  which of them (default: 8 9)
  ROWS    models (default: all), such as "*-ELFATT *-GLOBAL"
  BATCH   images a pass (default: 128 and 1)
USAGE
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python
[[ -x .venv/bin/python ]] && python=.venv/bin/python

options=(${BATCH:+--batch-size "$BATCH"})
if [[ -n ${ROWS:-} ]]; then
    read -ra rows <<<"$ROWS"
    options+=(--rows "${rows[@]}")
fi
read -ra tables <<<"${TABLES:-8 9}"
for table in "${tables[@]}"; do
    "$python" -m elfatt.analysis runtimes "$table" "${options[@]}" "$@"
done
"$python" -m elfatt.analysis report
