#!/usr/bin/env bash
# Evaluate a checkpoint on the ADE20K validation set.
set -euo pipefail

if [[ $# -lt 3 || $1 == -h || $1 == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/evaluate_ade20k.sh CONFIG DATA_DIR CHECKPOINT [OPTIONS...]

  CONFIG      its training config, e.g. configs/segmentation/upernet_swin_tiny_elfatt.py
  DATA_DIR    ADEChallengeData2016, see docs/segmentation_detection.md
  CHECKPOINT  e.g. runs/segmentation/upernet_swin_tiny_elfatt/best_mIoU_iter_160000.pth
  OPTIONS     options of segmentation.test, e.g. --show-dir pictures, --tta

NGPUS, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see scripts/torchrun.sh
USAGE
    [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi

config=$1 data=$2 checkpoint=$3
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" segmentation.test \
    "$config" "$checkpoint" --data-dir "$data" "$@"
