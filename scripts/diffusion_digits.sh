#!/usr/bin/env bash
# Trains a small UNet and a small DiT of diffusers on real digits, replaces their attention without training, reports.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/diffusion_digits.sh

Trains two small class-conditional diffusion models on scikit-learn's handwritten digits at 32×32 pixels, and a
classifier; then samples from both with attention replaced by ELFATT, token merging and Agent at several budgets, without
training, and writes runs/diffusion_digits/report.md: a table, a grid of pictures, curves of quality over cost. Started
again, it goes on where it was stopped; trained models are kept.
USAGE
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export NGPUS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
exec bash scripts/torchrun.sh scripts.diffusion.compare runs/diffusion_digits
