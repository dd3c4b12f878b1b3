#!/usr/bin/env bash
# Train a small UNet and DiT on real digits, replace their attention without retraining, and write a report.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/diffusion_digits.sh

Train two small class-conditional diffusion models and a classifier on scikit-learn's handwritten digits at 32×32, sample
from both models with training-free ELFATT, token merging and Agent at several budgets, and write
runs/diffusion_digits/report.md with a table, an image grid and curves of quality over cost. Interrupted runs resume;
trained models are kept.
USAGE
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
export NGPUS=1 OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(nproc)}
exec bash scripts/torchrun.sh scripts.diffusion.compare runs/diffusion_digits
