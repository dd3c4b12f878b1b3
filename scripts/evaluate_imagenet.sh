#!/usr/bin/env bash
# Evaluate a checkpoint on the ImageNet-1K validation set, counting each image once on any number of GPUs.
set -euo pipefail

if [[ $# -lt 3 || $1 == -h || $1 == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/evaluate_imagenet.sh CONFIG DATA_DIR CHECKPOINT [OPTIONS...]

  CONFIG      its training config, e.g. configs/classification/cswin_tiny_elfatt_224.yaml
  DATA_DIR    ImageNet, see docs/data.md
  CHECKPOINT  e.g. runs/classification/cswin_tiny_elfatt_224/model_best.pth.tar
  OPTIONS     options of classification.validate, e.g. --no-ema, --results-file results.csv

NGPUS, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see scripts/torchrun.sh
USAGE
    [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi

config=$1 data=$2 checkpoint=$3
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" classification.validate \
    --config "$config" --data-dir "$data" --checkpoint "$checkpoint" "$@"
