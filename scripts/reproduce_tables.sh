#!/usr/bin/env bash
# Measures every table of the paper on this machine and writes docs/results.md.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/reproduce_tables.sh [OPTIONS...]

Tables I to VII with parameters, multiply-adds, speed and memory; VIII and IX at the power mode that is set; the scaling
curves; figures beside the results file; docs/results.md.

  OPTIONS  how speed is measured, e.g. --batch-size 64, --repeats 20, --compile, --threads 4; see
           `python -m elfatt.analysis edge --help`

environment:
  TABLES       which of them (default: 1 2 3 4 5 6 7 8 9)
  PRECISION    of Tables I to VII and of the curves (default: amp; VIII and IX have float32 and amp)
  SIZES        of the curves (default: 224 384 512 768 1024 1536 2048)
  CHECKPOINTS  folder of checkpoints, each named as its configuration, for the accuracies
  IMAGENET, ADE20K, COCO  folders of the data sets, for the accuracies of the tables that need them
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
