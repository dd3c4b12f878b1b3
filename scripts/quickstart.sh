#!/usr/bin/env bash
# From nothing to a trained and evaluated model: sets up, trains a nano ELFATT on real digits, reports.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/quickstart.sh

Trains cswin_nano_elfatt on scikit-learn's handwritten digits with classification/train.py under torchrun,
evaluates the held-out digits with classification/validate.py, and writes runs/quickstart/report.md with its
pictures. Started again, it continues where it was stopped.

environment:
  NGPUS  processes (default: one for every GPU that PyTorch sees, or else for every CPU core, up to two; the recipe
         is for a global batch of 64 or 128)
USAGE
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
python=.venv/bin/python
config=configs/classification/digits_nano.yaml
runs=runs/quickstart
data=$runs/data/digits

gpus=$("$python" -c 'import torch; print(torch.cuda.device_count())')
cores=$(nproc)
: "${NGPUS:=$(((gpus ? gpus : cores) < 2 ? 1 : 2))}"
export NGPUS OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > NGPUS ? cores / NGPUS : 1))}

"$python" scripts/quickstart/digits.py "$data"
bash scripts/torchrun.sh classification/train.py --config $config --data-dir $data \
    --output $runs --experiment digits --resume auto
bash scripts/torchrun.sh classification/validate.py --config $config --data-dir $data \
    --checkpoint $runs/digits/last.pth.tar --results-file $runs/digits/validate.json
"$python" scripts/quickstart/report.py $runs --data "$data"
