#!/usr/bin/env bash
# From nothing to three trained and evaluated models: sets up, trains a nano ELFATT on real digits, then UperNet and
# Mask R-CNN from its weights on scenes of digits, reports.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/quickstart.sh

Trains cswin_nano_elfatt on scikit-learn's handwritten digits with classification.train under torchrun,
and evaluates the held-out digits with classification.validate. From its weights, trains UperNet with
segmentation.train and Mask R-CNN with detection.train on scenes of several digits, evaluates held-out scenes, and
writes runs/quickstart/report.md with its pictures. Started again, it continues where it was stopped.

environment:
  NGPUS  processes of the classification (default: one for every GPU that PyTorch sees, or else for every CPU core, up
         to two; the recipe is for a global batch of 64 or 128); the other two are trained by one
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
run_alone() { NGPUS=1 OMP_NUM_THREADS=$cores bash scripts/torchrun.sh "$@"; }

"$python" -m scripts.quickstart.digits "$data"
bash scripts/torchrun.sh classification.train --config $config --data-dir $data \
    --output $runs --experiment digits --resume auto
bash scripts/torchrun.sh classification.validate --config $config --data-dir $data \
    --checkpoint $runs/digits/last.pth.tar --results-file $runs/digits/validate.json

scenes=$runs/data/scenes
"$python" -m scripts.quickstart.scenes $scenes
for task in segmentation detection; do
    run_alone $task.train configs/$task/scenes_nano.py --data-dir $scenes \
        --work-dir $runs/$task --pretrained $runs/digits/last.pth.tar --resume auto
done
run_alone scripts.quickstart.report $runs --digits $data --scenes $scenes
