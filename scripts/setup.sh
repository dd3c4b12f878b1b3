#!/usr/bin/env bash
# Create .venv with the pinned requirements and this package; does nothing if up to date.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/setup.sh

environment:
  PYTHON  Python interpreter, 3.11 or newer (default: python3)
USAGE
    exit 0
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
stamp=.venv/.installed
wanted=$(cat requirements.txt pyproject.toml elfatt/__init__.py | cksum)
[[ -f $stamp && $(<"$stamp") == "$wanted" ]] && exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "setup.sh: $("$python" --version) is too old: set PYTHON to an interpreter, 3.11 or newer" >&2
    exit 1
}
echo "setup.sh: installing into $root/.venv (torch with its CUDA libraries takes about 6 GB)"
.venv/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear .venv  # missing or incomplete
.venv/bin/python -m pip install --quiet --requirement requirements.txt
.venv/bin/python -m pip install --quiet --no-deps --editable .
echo "$wanted" >"$stamp"
