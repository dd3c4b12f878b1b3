#!/usr/bin/env bash
# Train a model on ADE20K.
set -euo pipefail

if [[ $# -lt 2 || $1 == -h || $1 == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/train_ade20k.sh CONFIG DATA_DIR [OPTIONS...]

  CONFIG    e.g. configs/segmentation/upernet_swin_tiny_elfatt.py, for 8 GPUs
  DATA_DIR  ADEChallengeData2016, see docs/segmentation_detection.md
  OPTIONS   options of segmentation.train, e.g. --pretrained CHECKPOINT, --resume auto

NGPUS, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see scripts/torchrun.sh
USAGE
    [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi

config=$1 data=$2
shift 2
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" segmentation.train \
    "$config" --data-dir "$data" "$@"
