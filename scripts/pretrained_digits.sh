#!/usr/bin/env bash
# Trains a small ViT on real digits, converts its attention at several budgets, aligns it with what it was, reports.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/pretrained_digits.sh

Trains a small ViT of timm on scikit-learn's handwritten digits at 64×64 pixels with classification.train, makes a
uniform and calibrated plans with classification.calibrate, evaluates them without training and after some hundred steps
of classification.distill, and writes runs/pretrained_digits/report.md: a table and curves of accuracy over cost, and
speed at 64², 128² and 256². Started again, it goes on where it was stopped.
USAGE
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
runs=runs/pretrained_digits
export NGPUS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
.venv/bin/python -m scripts.quickstart.digits $runs/data --copies 0
exec bash scripts/torchrun.sh scripts.pretrained.vit_digits $runs
