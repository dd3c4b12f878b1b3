#!/usr/bin/env bash
# Reproduce every table of the paper on this machine and write docs/results.md.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/reproduce_tables.sh [OPTIONS...]

Measure parameters, multiply-adds, speed and memory of Tables I to VII, speed of VIII and IX at the current power mode,
and the scaling curves; write figures next to the results file, and docs/results.md.

  OPTIONS  speed options, e.g. --batch-size 64, --repeats 20, --compile, --threads 4; see
           `python -m elfatt.analysis edge --help`

environment:
  TABLES       tables (default: 1 2 3 4 5 6 7 8 9)
  PRECISION    precision of Tables I to VII and the curves (default: amp; VIII and IX use float32 and amp)
  SIZES        image sizes of the curves (default: 224 384 512 768 1024 1536 2048)
  CHECKPOINTS  folder of checkpoints named after their configs, to evaluate accuracy
  IMAGENET, ADE20K, COCO  dataset folders, to evaluate accuracy
USAGE
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python
[[ -x .venv/bin/python ]] && python=.venv/bin/python
analyse() { "$python" -m elfatt.analysis "$@"; }

measures=(counts speed memory)
precision=(--precision "${PRECISION:-amp}")
folders=()
if [[ -n ${CHECKPOINTS:-} ]]; then
    measures+=(accuracy)
    folders=(--checkpoints "$CHECKPOINTS")
    for name in IMAGENET ADE20K COCO; do
        [[ -n ${!name:-} ]] && folders+=("--${name,,}" "${!name}")
    done
fi

read -ra tables <<<"${TABLES:-1 2 3 4 5 6 7 8 9}"
for table in "${tables[@]}"; do
    if [[ $table -lt 8 ]]; then
        analyse tables "$table" --measure "${measures[@]}" "${folders[@]}" "${precision[@]}" "$@"
    else
        analyse edge "$table" "$@"
    fi
done
read -ra sizes <<<"${SIZES:-224 384 512 768 1024 1536 2048}"
analyse scaling --memory --sizes "${sizes[@]}" "${precision[@]}" "$@"
analyse plot
analyse report
