#!/usr/bin/env bash
# Run all GPU tests and benchmarks: the operation, CSWin-T of Table I, dense maps and training.
set -euo pipefail

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
    cat <<'USAGE'
usage: bash scripts/gpu_suite.sh

Run on one GPU. Needs torch, triton, timm and pytest; also uses mmsegmentation (a dense row of Table VII) and matplotlib
(figures) if installed. Adds to results/GPU.json and writes docs/results.md. Without a GPU, runs tiny sizes on the CPU.

environment:
  BATCH    batch size of the 224² benchmarks (default: 512, halved until it fits in memory)
  REPEATS  timed rounds (default: 30)
USAGE
    exit 0
fi

cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=python
[[ -x .venv/bin/python ]] && python=.venv/bin/python
has() { "$python" -c "import $1" 2>/dev/null; }
analyse() {
    echo "== $* =="
    "$python" -m elfatt.analysis "$@"
}

gpu=$("$python" -c 'import torch; print(int(torch.cuda.is_available()))')
if ((gpu)); then
    batch=${BATCH:-512} repeats=${REPEATS:-30} dense=512x2048 vit=(518 1036) half=float16 graphs=--cuda-graphs
    rivals=(224 512 768 1024) rivals_batch=32
else
    batch=${BATCH:-1} repeats=${REPEATS:-1} dense=64x128 vit=(112) half=float32 graphs=
    rivals=(64) rivals_batch=1
fi
models=(cswin_tiny_elfatt cswin_tiny_global)
speed=(--repeats "$repeats" --batch-size "$batch")
[[ $gpu == 1 ]] || speed+=(--precision float32 --warm-up 0)

tests=()
if has xdist; then tests=(--numprocesses 8 --dist worksteal); fi
"$python" -m pytest -q tests/ops "${tests[@]}"
for direction in "" --backward; do
    analyse op --dtype $half --backends auto sdpa math --batch-size "$batch" --repeats "$repeats" $direction
    if ((gpu)); then
        analyse op --dtype $half --backends auto --batch-size "$batch" --repeats "$repeats" $direction $graphs \
            --shapes "224 level 1" "224 level 2" "224 level 3"
    fi
    analyse op --dtype $half --backends auto sdpa math --repeats "$repeats" $direction $graphs \
        --shapes "dense level 1" "dense level 2" "dense level 3"
done
analyse tables 1 --rows 'CSWin-T*' --measure counts speed memory "${speed[@]}"
analyse scaling --models cswin_tiny_elfatt --sizes 224 --attention fa eager sdpa plain "${speed[@]}" --compile
analyse scaling --models "${models[@]}" --sizes $dense --attention nfa fa sdpa plain "${speed[@]}" --batch-size 1 $graphs
analyse scaling --models "${models[@]}" --sizes 224 --attention fa sdpa plain "${speed[@]}" --backward
analyse scaling --rivals --attention fa --sizes "${rivals[@]}" "${speed[@]}" --batch-size $rivals_batch $graphs
analyse pretrained --models vit_small_patch14_reg4_dinov2 --sizes "${vit[@]}" --precision $half --repeats "$repeats" --batch-size 1
if has mmseg; then
    analyse tables 7 --rows CSWin-T24181-ELFATT CSWin-T24181-GLOBAL --measure speed --repeats "$repeats"
fi
if has matplotlib; then analyse plot; fi
analyse report
