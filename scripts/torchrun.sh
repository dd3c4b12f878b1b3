#!/usr/bin/env bash
# Run a program of this repository on all GPUs with torchrun.
set -euo pipefail

if [[ $# -lt 1 || $1 == -h || $1 == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/torchrun.sh MODULE [OPTIONS...]

  MODULE  module of the repository, e.g. classification.train

environment:
  NGPUS        processes on this node (default: number of GPUs, or 1)
  NNODES       number of nodes (default: 1)
  NODE_RANK    rank of this node, from 0 (required if NNODES > 1)
  MASTER_ADDR  address of node 0 (required if NNODES > 1)
  MASTER_PORT  free port of node 0 (default: 29500)
  GOMP_SPINCOUNT, OMP_WAIT_POLICY  how CPU threads wait for each other (default: spin 5,000 times, then sleep)
USAGE
    [[ $# -ge 1 ]] && exit 0 || exit 2
fi

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=python
[[ -x $root/.venv/bin/python ]] && python=$root/.venv/bin/python
module=$1
shift
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# OpenMP's default of 300,000 spins outlasts a time slice: on a shared CPU, waiting threads block the working one
[[ ${OMP_WAIT_POLICY:-} ]] || export GOMP_SPINCOUNT="${GOMP_SPINCOUNT:-5000}"

: "${NGPUS:=$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"
: "${NNODES:=1}"
if [[ $NNODES -eq 1 && $NGPUS -eq 1 ]]; then
    exec "$python" -m "$module" "$@"  # without torchrun, errors stay one line
fi
if [[ $NNODES -gt 1 ]]; then
    : "${NODE_RANK:?NNODES=$NNODES needs NODE_RANK}" "${MASTER_ADDR:?NNODES=$NNODES needs MASTER_ADDR}"
    place=(--nnodes "$NNODES" --node-rank "$NODE_RANK"
        --master-addr "$MASTER_ADDR" --master-port "${MASTER_PORT:-29500}")
else
    place=(--standalone)
fi
exec "$python" -m elfatt.launch "${place[@]}" --nproc-per-node "$NGPUS" -m "$module" "$@"
