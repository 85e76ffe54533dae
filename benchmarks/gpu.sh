#!/usr/bin/env bash
# Memory of log-probs, speed and MFU of the trainer on a CUDA machine, into benchmarks/results/gpu.md. About ten minutes
# on one card.
#
#     bash benchmarks/gpu.sh [PRESET] [TOKENS]
#
# PRESET: a Step shape of mispo (default small). TOKENS: of a step, prompts included (default 131072). mispo and a CUDA
# build of torch must be there for the interpreter PYTHON (default python); TRL is compared where it imports, in that
# interpreter or in TRL_PYTHON. A part that fails is named in the page and does not stop the others.
#
# Written on a machine without a GPU: only its refusal and its collecting of pages were tried there.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
preset=${1:-small}
tokens=${2:-131072}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    echo "benchmarks/gpu.sh: no CUDA here (torch.cuda.is_available() is false)" >&2
    exit 1
fi

BENCHMARK_RESULTS=$(mktemp -d)
export BENCHMARK_RESULTS
trap 'rm -rf "$BENCHMARK_RESULTS"' EXIT
page=benchmarks/results/gpu.md
before=$(date +%s)
card=$(nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | head -1)

{
    echo "# On a GPU"
    echo
    echo "\`bash benchmarks/gpu.sh $preset $tokens\` · $card"
} > "$page"

# measure NAME LIMIT_S SCRIPT ARGUMENT…: run a benchmark and add its page, its title one level down.
measure() {
    local name=$1 limit=$2 script=$3
    shift 3
    if timeout "$limit" "$python" "benchmarks/$script" "$@" && [ -f "$BENCHMARK_RESULTS/$name.md" ]; then
        { echo; sed 's/^#/##/' "$BENCHMARK_RESULTS/$name.md"; } >> "$page"
    else
        printf '\n## %s\n\n`%s %s`: failed, or not done within %s s.\n' "$name" "$script" "$*" "$limit" >> "$page"
    fi
}

measure logprob 45 logprob.py --tokens 8192 --hidden 4096
step=(--preset "$preset" --tokens "$tokens" --dtype bf16)
measure lengths 180 trainer.py lengths "${step[@]}" --page lengths
measure layouts_sdpa 80 trainer.py layouts "${step[@]}" --limit 8192 --page layouts_sdpa
measure layouts_flex 90 trainer.py layouts "${step[@]}" --limit 8192 --attention flex_attention --page layouts_flex
if "${TRL_PYTHON:-$python}" -c 'import trl' 2>/dev/null; then
    measure trl 200 trainer.py trl --trl-shape large --repeats 1 --dtype bf16 --trl-python "${TRL_PYTHON:-$python}" \
        --page trl
else
    printf '\nTRL does not import here: not compared.\n' >> "$page"
fi

printf '\n%s s in all.\n' "$(($(date +%s) - before))" >> "$page"
cat "$page"
