#!/usr/bin/env bash
# Train a model of Table I on ImageNet-1K.
set -euo pipefail

if [[ $# -lt 2 || $1 == -h || $1 == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/train_imagenet.sh CONFIG DATA_DIR [OPTIONS...]

  CONFIG    e.g. configs/classification/cswin_tiny_elfatt_224.yaml; its batch size is for 8 GPUs
  DATA_DIR  ImageNet, see docs/data.md
  OPTIONS   options of classification.train, e.g. --resume auto, --grad-accum-steps 2 on 4 GPUs

NGPUS, NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT: see scripts/torchrun.sh
USAGE
    [[ ${1:-} == -h || ${1:-} == --help ]] && exit 0 || exit 2
fi

config=$1 data=$2
shift 2
exec bash "$(dirname "${BASH_SOURCE[0]}")/torchrun.sh" classification.train \
    --config "$config" --data-dir "$data" "$@"
