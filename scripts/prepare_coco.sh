#!/usr/bin/env bash
# Checks a COCO folder before training starts.
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/prepare_coco.sh DATA_DIR [OPTIONS...]

  DATA_DIR  train2017.zip, val2017.zip and annotations_trainval2017.zip of https://cocodataset.org, unpacked:
              train2017/*.jpg, val2017/*.jpg               118,287 and 5,000 images
              annotations/instances_{train,val}2017.json   80 categories
  OPTIONS   any of scripts.check_data, e.g. --any-size for data of your own, --full
USAGE
    [[ $# -ge 1 ]] && exit 0 || exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python
[[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m scripts.check_data coco "$@"
