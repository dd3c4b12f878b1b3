#!/usr/bin/env bash
# Set up if needed and run the tests in two single-threaded processes; arguments are passed to pytest.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet .
export OMP_NUM_THREADS=1
run=(.venv/bin/python -m pytest --numprocesses 2 --dist worksteal)
# native runtimes (ONNX Runtime, OpenVINO) get processes of their own
native=0 others=0
"${run[@]}" -m native "$@" || native=$?
"${run[@]}" -m "not native" "$@" || others=$?
[[ $native == 5 ]] && exit "$others" # 5: no test chosen
[[ $others == 5 ]] && exit "$native"
exit $((native > others ? native : others))
