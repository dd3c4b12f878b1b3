#!/usr/bin/env bash
# Evaluate a checkpoint on the COCO validation set.
set -euo pipefail

if [[ $# -lt 3 || $1 == -h || $1 == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/evaluate_coco.sh CONFIG DATA_DIR CHECKPOINT [OPTIONS...]

  CONFIG      its training config, e.g. configs/detection/mask_rcnn_swin_tiny_elfatt_1x.py
  DATA_DIR    COCO 2017, see docs/segmentation_detection.md
  CHECKPOINT  e.g. runs/detection/mask_rcnn_swin_tiny_elfatt_1x/epoch_12.pth
  OPTIONS     options of detection.test, e.g. --show-dir pictures

NGPUS, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see scripts/torchrun.sh
USAGE
    [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi

config=$1 data=$2 checkpoint=$3
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" detection.test \
    "$config" "$checkpoint" --data-dir "$data" "$@"
