#!/usr/bin/env bash
# Check a COCO folder before training.
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/prepare_coco.sh DATA_DIR [OPTIONS...]

  DATA_DIR  unpacked train2017.zip, val2017.zip and annotations_trainval2017.zip from https://cocodataset.org:
              train2017/*.jpg, val2017/*.jpg               118,287 and 5,000 images
              annotations/instances_{train,val}2017.json   80 categories
  OPTIONS   options of scripts.check_data, e.g. --any-size for your own data, --full
USAGE
    [[ $# -ge 1 ]] && exit 0 || exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python
[[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m scripts.check_data coco "$@"
