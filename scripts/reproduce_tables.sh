#!/usr/bin/env bash
# Measures every table of the paper on this machine and writes docs/results.md.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/reproduce_tables.sh [OPTIONS...]

Tables I to VII with parameters, multiply-adds, speed and memory; VIII and IX at the power mode that is set; the scaling
curves; figures beside the results file; docs/results.md.

  OPTIONS  any of `python -m elfatt.analysis tables`, e.g. --batch-size 64, --repeats 20, --compile

environment:
  TABLES       which of I to VII (default: 1 2 3 4 5 6 7)
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
folders=()
if [[ -n ${CHECKPOINTS:-} ]]; then
    measures+=(accuracy)
    folders=(--checkpoints "$CHECKPOINTS")
    for name in IMAGENET ADE20K COCO; do
        [[ -n ${!name:-} ]] && folders+=("--${name,,}" "${!name}")
    done
fi

read -ra tables <<<"${TABLES:-1 2 3 4 5 6 7}"
for table in "${tables[@]}"; do
    analyse tables "$table" --measure "${measures[@]}" "${folders[@]}" "$@"
done
