#!/usr/bin/env bash
# Benchmark Tables VIII and IX on this device: eager and compiled PyTorch, this package's kernels, other runtimes.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/edge_benchmark.sh [OPTIONS...]

Export the models to ONNX Runtime, OpenVINO and TensorRT (trtexec), benchmark them against PyTorch at batch 128 (Table
VIII) and 1 (Table IX), add to results/MACHINE.json and write docs/results.md. Missing runtimes are skipped. ONNX Runtime
and OpenVINO run on the CPU, TensorRT on the GPU: a Jetson needs one run with --device cpu and one with --device cuda.

  OPTIONS  e.g. --threads 4, --repeats 20, --modes 0 1 2 on a Jetson; see `python -m elfatt.analysis runtimes --help`

environment:
  TABLES  tables (default: 8 9)
  ROWS    models, e.g. "*-ELFATT *-GLOBAL" (default: all)
  BATCH   batch size (default: 128 and 1)
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
