#!/usr/bin/env bash
# From training to other programs, for every architecture: an adapter trained here is exported and loaded by peft over
# bitsandbytes' model, and merged and loaded by transformers; their logits are compared with ours.
#
#   tests/oracle/interop.sh QSHARD [CASE...]        in the oracle's environment: ORACLE_PYTHON [build/oracle/bin/python]
#
# A table at the end: relative L2 distance of the logits. Limits: peft 1e-3 (bitsandbytes rounds the second level its own
# way), merged in fp32 1e-4, merged in bf16 2e-2. With VLLM_SITE=DIR, made by vllm_env.sh, vLLM's own check of the exported
# adapter as well, and with LLAMA_CPP=DIR (llama_cpp_check.py) llama.cpp's converter; neither has DoRA. Exit 1 if one is missed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# -ge 1 ] || {
    sed -n '5p' "$0" >&2
    exit 2
}
qshard=$(realpath "$1")
shift
python=$(realpath -s "${ORACLE_PYTHON:-$here/../../build/oracle/bin/python}")
cases=("$@")
[ "${#cases[@]}" -gt 0 ] || cases=(tiny2 odd biases mistral qwen2 qwen3 yarn gemma2 gemma3 phi3 olmo2 olmo3 longrope longrope_short \
    dynamic smollm3 smollm3_window granite dora dora_dropout dora_granite)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# distance COMMAND...: the number that the check prints; "FAILED" if it does.
distance() {
    local text
    if text=$("$python" "$here/live.py" "$@" 2>"$work/error"); then
        sed -n 's/^ok .*: \([0-9.e+-]*\) (at most.*/\1/p' <<<"$text" | tail -n 1
    else
        echo "FAILED: $(tail -n 1 <<<"$text$(cat "$work/error")" | cut -c 1-120)"
    fi
}

# taken DIR CASE COMMAND...: what the check of another program says, where DIR tells that it is there. DoRA must be refused.
taken() {
    local text dir=$1 case=$2
    shift 2
    [ -n "$dir" ] || { echo "not installed" && return; }
    text=$("$@" 2>"$work/error") || true
    case "$case:$text" in
        dora*:refused*) echo refused ;;
        dora*) echo "FAILED: not refused: $text" ;;
        *:ok*) echo "${text#ok }" ;;
        *) echo "FAILED: $(tail -n 1 <<<"$text$(cat "$work/error")" | cut -c 1-120)" ;;
    esac
}

vllm=${VLLM_SITE:-} llama_cpp=${LLAMA_CPP:-}
failed=0 rows=()
for case in "${cases[@]}"; do
    folder=$work/$case
    "$python" "$here/make_inputs.py" "$case" "$folder" >/dev/null
    cd "$folder"
    {
        "$qshard" quantize model -o base.h5 --head-chunk-rows 128
        "$qshard" train run.yaml --set base=base.h5 --set train.steps=20 --set output=run
        "$qshard" export run -o exported
        "$qshard" eval run.yaml --set base=base.h5 --adapter run --dump-logits logits.safetensors
        "$qshard" merge run -o merged32 --dtype f32
        "$qshard" merge run -o merged16 --dtype bf16
    } >"$work/log" 2>&1 || {
        tail -n 3 "$work/log" >&2
        exit 1
    }
    numbers=("$(distance peft-load exported model --data eval.h5 --logits logits.safetensors)"
        "$(distance merge-load merged32 --data eval.h5 --logits logits.safetensors)"
        "$(distance merge-load merged16 --data eval.h5 --logits logits.safetensors --tol 2e-2)"
        "$(taken "$vllm" "$case" env PYTHONPATH="$vllm" "$python" "$here/vllm_check.py" exported model)"
        "$(taken "$llama_cpp" "$case" "$python" "$here/llama_cpp_check.py" "$llama_cpp" exported model)")
    case "${numbers[*]}" in *FAILED*) failed=1 ;; esac
    rows+=("| $case | ${numbers[0]} | ${numbers[1]} | ${numbers[2]} | ${numbers[3]} | ${numbers[4]} |")
done
printf '%s\n' '| case | exported, in peft | merged in fp32, in transformers | merged in bf16 | to vLLM | to llama.cpp |' '|---|---|---|---|---|---|' "${rows[@]}"
exit $failed
