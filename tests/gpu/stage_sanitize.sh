#!/usr/bin/env bash
# Stage sanitize of tests/gpu.sh: every operation under compute-sanitizer: the programs that dump and time operations and a
# short run of training under each of its tools; then the twin tests (their small cases), a process each, under memcheck and
# racecheck alone: reads of what nobody wrote, and missing barriers, are what the emulator finds in them.
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
end=$(($(date +%s) + ${QSHARD_GPU_STAGE_S:-480} - 15)) # what has not finished by then is named
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# ---- what is watched ----
names=() commands=() tools_of=()
watch() { # TOOLS NAME COMMAND...
    tools_of+=("$1")
    names+=("$2")
    shift 2
    commands+=("$*")
}
tools=(memcheck racecheck synccheck initcheck)
[ ! -x "$build/op_dump" ] || watch "${tools[*]}" op_dump "$build/op_dump" "$plugin" "$work/dump-@" --small
[ ! -x "$build/bench_ops" ] || watch "${tools[*]}" bench_ops "$build/bench_ops" "$plugin" --small
case=$deps/inputs/tiny2
if [ -x "$qshard" ] && [ -d "$case" ] && "$qshard" quantize "$case/model" -o "$work/base.h5" >/dev/null 2>&1; then
    watch "${tools[*]}" train "$qshard" train "$case/run.yaml" --set base="$work/base.h5" --set data.train="$case/train.h5" \
        --set data.eval="$case/eval.h5" --set lora.init= --set lora.dropout=0.1 --set output="$work/run-@" \
        --set device=cuda --set train.steps=2 --set memory.offload="[activations,weights,embedding]"
else
    cannot "a run of training" "the program or its inputs are not here"
fi
shopt -s nullglob
for test in "$build"/tests/twins/test_twin_*; do
    [ ! -x "$test" ] || [ ! -f "$test" ] ||
        watch 'memcheck racecheck' "${test##*/}" "$test" -j1 --encoding=C --color=never
done
[ "${#names[@]}" -gt 0 ] || refuse "nothing to watch is built: see the build stage"

# ---- under each tool ----
# What a sanitizer finds is exit 99.
one() { # TOOL NAME COMMAND (one string; @ is the tool)
    local log=$report/sanitize.$1.$2.log more=() code=0 words left
    left=$((end - $(date +%s)))
    [ "$left" -gt 5 ] || return 0
    [ "$1" != memcheck ] || more=(--report-api-errors no) # tests ask for what must fail, and check that it did
    read -r -a words <<<"${3//@/$1}"
    mkdir -p "$work/dump-$1"
    timeout -k 5 "$((left < limit ? left : limit))" "$sanitizer" --tool "$1" --target-processes all --error-exitcode 99 \
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
export sanitizer report limit end work
rm -f "$report"/sanitize.*.code
for i in "${!names[@]}"; do
    for tool in ${tools_of[$i]}; do
        printf '%s\0%s\0%s\0' "$tool" "${names[$i]}" "${commands[$i]}"
    done
done | xargs -0 -n 3 -P "$(nproc)" bash -c 'one "$@"' -

for tool in "${tools[@]}"; do
    clean=0 watched=0 slow=() vendor=()
    for i in "${!names[@]}"; do
        name=${names[$i]}
        [[ " ${tools_of[$i]} " = *" $tool "* ]] || continue
        watched=$((watched + 1))
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
    say "- $tool: $clean of $watched programs clean"
    [ "${#vendor[@]}" = 0 ] || say "  (in cuBLASLt's own kernels it reports races: ${vendor[*]})"
    [ "${#slow[@]}" = 0 ] || cannot "$tool of ${slow[*]}" "not finished in $limit s each, or in the stage's time"
done
finish
