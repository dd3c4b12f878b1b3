#!/usr/bin/env bash
# From scratch to three trained and evaluated models: set up, train a nano ELFATT on real digits, then UperNet and
# Mask R-CNN from its weights on scenes of digits, and write a report.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/quickstart.sh

Train cswin_nano_elfatt on scikit-learn's handwritten digits with classification.train under torchrun, and evaluate it
on held-out digits with classification.validate. From its weights, train UperNet with segmentation.train and Mask R-CNN
with detection.train on scenes of several digits, evaluate them on held-out scenes, and write
runs/quickstart/report.md with figures. Interrupted runs resume.

environment:
  NGPUS  classification processes (default: one per GPU, or per CPU core without a GPU, up to two; the recipe is for a
         global batch of 64 or 128); the other two models use one process
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
