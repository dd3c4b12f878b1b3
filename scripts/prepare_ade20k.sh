#!/usr/bin/env bash
# Check an ADE20K folder before training.
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/prepare_ade20k.sh DATA_DIR [OPTIONS...]

  DATA_DIR  unpacked http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip:
              images/{training,validation}/*.jpg        20,210 and 2,000 images
              annotations/{training,validation}/*.png   their masks, labels 0 (other) to 150, 255 ignored
  OPTIONS   options of scripts.check_data, e.g. --any-size --classes 10 for your own data, --full
USAGE
    [[ $# -ge 1 ]] && exit 0 || exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python
[[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} exec "$python" -m scripts.check_data ade20k "$@"
