#!/usr/bin/env bash
# Stage sanitize of tests/gpu.sh: every operation under each tool of compute-sanitizer, all at once: the twin tests (their
# small cases), the programs that dump and time operations, and a short run of training.
# shellcheck disable=SC2015,SC2317  # functions are called through check
. tests/gpu/common.sh
: >"$part"
[ "$mode" = cuda ] || refuse "compute-sanitizer watches GPUs; the emulator has checks of its own"
need_gpu
need_built "${plugin##*/}"
sanitizer=$(command -v compute-sanitizer || true)
for folder in "$(dirname "$(nvcc_path || echo /none)")" /usr/local/cuda/bin; do
    [ -n "$sanitizer" ] || [ ! -x "$folder/compute-sanitizer" ] || sanitizer=$folder/compute-sanitizer
done
[ -n "$sanitizer" ] || refuse "no compute-sanitizer in PATH or beside nvcc"
export QSHARD_TWIN=cuda QSHARD_TWIN_SHORT=1
limit=${QSHARD_GPU_SANITIZE_S:-200}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# ---- what is watched ----
names=() commands=()
watch() { # NAME COMMAND...
    names+=("$1")
    shift
    commands+=("$*")
}
[ ! -x "$build/op_dump" ] || watch op_dump "$build/op_dump" "$plugin" "$work/dump-@" --small
[ ! -x "$build/bench_ops" ] || watch bench_ops "$build/bench_ops" "$plugin" --small
case=$deps/inputs/tiny2
if [ -x "$qshard" ] && [ -d "$case" ] && "$qshard" quantize "$case/model" -o "$work/base.h5" >/dev/null 2>&1; then
    watch train "$qshard" train "$case/run.yaml" --set base="$work/base.h5" --set data.train="$case/train.h5" \
        --set data.eval="$case/eval.h5" --set lora.init= --set lora.dropout=0.1 --set output="$work/run-@" \
        --set device=cuda --set train.steps=2 --set memory.offload="[activations,weights,embedding]"
else
    cannot "a run of training" "the program or its inputs are not here"
fi
shopt -s nullglob
for test in "$build"/tests/twins/test_twin_*; do
    [ ! -x "$test" ] || [ ! -f "$test" ] || watch "${test##*/}" "$test" -j1 --encoding=C --color=never
done
thin=$build/tests/twins/test_twin_linears # with thin.cu's kernels
[ ! -x "$thin" ] || watch "${thin##*/}_thin" env QSHARD_CUDA_THIN=own "$thin" -j1 --encoding=C --color=never
[ "${#names[@]}" -gt 0 ] || refuse "nothing to watch is built: see the build stage"

# ---- under each tool ----
# What a sanitizer finds is exit 99.
one() { # TOOL NAME COMMAND (one string; @ is the tool)
    local log=$report/sanitize.$1.$2.log more=() code=0 words
    [ "$1" != memcheck ] || more=(--report-api-errors no) # tests ask for what must fail, and check that it did
    read -r -a words <<<"${3//@/$1}"
    mkdir -p "$work/dump-$1"
    timeout -k 5 "$limit" "$sanitizer" --tool "$1" --target-processes all --error-exitcode 99 \
        ${more[@]+"${more[@]}"} "${words[@]}" >"$log" 2>&1 || code=$?
    # Tests run in processes of their own, whose findings need not reach the exit code; one summary each is printed.
    if [ "$code" = 0 ] && grep -qE '(ERROR|RACECHECK) SUMMARY: [1-9]' "$log"; then
        code=99
    elif [ "$code" = 0 ] && ! grep -q ' SUMMARY: ' "$log"; then
        code=98 # it watched nothing
    fi
    # racecheck does not understand the barriers of cuBLASLt's kernels for Hopper (nvjet_...), which are not ours to mend.
    if [ "$1" = racecheck ] && [ "$code" = 99 ] && ! grep 'Race reported' "$log" | grep -qv ' at nvjet_'; then
        code=vendor
    fi
    echo "$code" >"$report/sanitize.$1.$2.code"
}
export -f one
export sanitizer report limit work
rm -f "$report"/sanitize.*.code
tools=(memcheck racecheck synccheck initcheck)
for tool in "${tools[@]}"; do
    for i in "${!names[@]}"; do
        printf '%s\0%s\0%s\0' "$tool" "${names[$i]}" "${commands[$i]}"
    done
done | xargs -0 -n 3 -P "$(nproc)" bash -c 'one "$@"' -

for tool in "${tools[@]}"; do
    clean=0 slow=() vendor=()
    for name in "${names[@]}"; do
        code=$(cat "$report/sanitize.$tool.$name.code" 2>/dev/null || echo 124)
        checks=$((checks + 1))
        if [ "$code" = 0 ]; then
            clean=$((clean + 1))
        elif [ "$code" = vendor ]; then
            clean=$((clean + 1))
            vendor+=("$name")
        elif [ "$code" = 124 ] || [ "$code" = 137 ]; then
            slow+=("$name")
        else
            failures=$((failures + 1))
            reason=$(grep -E '=========.*(ERROR|Error|error|hazard)|Invalid|Race' "$report/sanitize.$tool.$name.log" |
                sed -n '1s/^=* *//p' | cut -c 1-200)
            say "- FAILED: $tool of $name: exit $code: ${reason:-see sanitize.$tool.$name.log}"
        fi
    done
    say "- $tool: $clean of ${#names[@]} programs clean"
    [ "${#vendor[@]}" = 0 ] || say "  (in cuBLASLt's own kernels it reports races: ${vendor[*]})"
    [ "${#slow[@]}" = 0 ] || cannot "$tool of ${slow[*]}" "not finished in $limit s each"
done
finish
