#!/usr/bin/env bash
# Set up if needed and run the tests in two single-threaded processes; arguments are passed to pytest.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
.venv/bin/ruff check --quiet .
.venv/bin/ruff format --check --quiet .
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest --numprocesses 2 --dist worksteal "$@"
