#!/usr/bin/env bash
# Train a small ViT on real digits, convert its attention at several budgets, distil it, and write a report.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/pretrained_digits.sh

Train a small timm ViT on scikit-learn's handwritten digits at 64×64 with classification.train, create uniform and
calibrated plans with classification.calibrate, evaluate them zero-shot and after a few hundred steps of
classification.distill, and write runs/pretrained_digits/report.md with a table and curves of accuracy over cost, and
speed at 64², 128² and 256². Interrupted runs resume.
USAGE
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
runs=runs/pretrained_digits
export NGPUS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
.venv/bin/python -m scripts.quickstart.digits $runs/data --copies 0
exec bash scripts/torchrun.sh scripts.pretrained.vit_digits $runs
