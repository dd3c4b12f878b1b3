#!/usr/bin/env bash
# Fine-tune a base model at 384 × 384 from the EMA weights of its 224 × 224 run.
set -euo pipefail

if [[ $# -lt 3 || $1 == -h || $1 == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/finetune_imagenet_384.sh CONFIG DATA_DIR CHECKPOINT [OPTIONS...]

  CONFIG      e.g. configs/classification/cswin_base_elfatt_384.yaml; its batch size is for 8 GPUs
  DATA_DIR    ImageNet, see docs/data.md
  CHECKPOINT  checkpoint of the 224 run, e.g. runs/classification/cswin_base_elfatt_224/model_best.pth.tar
  OPTIONS     options of classification.train, e.g. --resume auto, --grad-checkpointing

NGPUS, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see scripts/torchrun.sh
USAGE
    [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi

config=$1 data=$2 checkpoint=$3
shift 3
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" classification.train \
    --config "$config" --data-dir "$data" --initial-checkpoint "$checkpoint" "$@"
