#!/usr/bin/env bash
# Stage sanitize of tests/gpu.sh: the twin tests under each tool of compute-sanitizer, all at once.
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
export QSHARD_TWIN=cuda

# What a sanitizer finds is exit 99; what it has not seen by the end of the stage is named.
limit=${QSHARD_GPU_SANITIZE_S:-110}
one() { # TOOL PROGRAM
    local name=$1.${2##*/} more=() code=0
    [ "$1" != memcheck ] || more=(--report-api-errors no) # tests ask for what must fail, and check that it did
    timeout -k 5 "$limit" "$sanitizer" --tool "$1" --target-processes all --error-exitcode 99 ${more[@]+"${more[@]}"} \
        "$2" -j1 --encoding=C --color=never >"$report/sanitize.$name.log" 2>&1 || code=$?
    # Tests run in processes of their own, whose findings need not reach the exit code; one summary each is printed.
    if [ "$code" = 0 ] && grep -qE '(ERROR|RACECHECK) SUMMARY: [1-9]' "$report/sanitize.$name.log"; then
        code=99
    elif [ "$code" = 0 ] && ! grep -q ' SUMMARY: ' "$report/sanitize.$name.log"; then
        code=98 # it watched nothing
    fi
    echo "$code" >"$report/sanitize.$name.code"
}
export -f one
export sanitizer report limit
shopt -s nullglob
tests=()
for test in "$build"/tests/twins/test_twin_*; do
    [ -x "$test" ] && [ -f "$test" ] && tests+=("$test")
done
[ "${#tests[@]}" -gt 0 ] || refuse "the twin tests are not built: see the build stage"
rm -f "$report"/sanitize.*.code
started=$SECONDS
for tool in memcheck racecheck synccheck initcheck; do
    if [ $((SECONDS - started)) -gt $((${QSHARD_GPU_STAGE_S:-480} - limit - 20)) ]; then
        cannot "$tool" "no time left in this stage; tests/gpu.sh sanitize with a larger QSHARD_GPU_STAGE_S runs it"
        continue
    fi
    printf '%s\n' "${tests[@]}" | xargs -P 12 -I{} bash -c 'one "$@"' - "$tool" {}
    clean=0 slow=()
    for test in "${tests[@]}"; do
        name=$tool.${test##*/}
        code=$(cat "$report/sanitize.$name.code" 2>/dev/null || echo 124)
        checks=$((checks + 1))
        if [ "$code" = 0 ]; then
            clean=$((clean + 1))
        elif [ "$code" = 124 ] || [ "$code" = 137 ]; then
            slow+=("${test##*/}")
        else
            failures=$((failures + 1))
            reason=$(grep -E '=========.*(ERROR|Error|error|hazard)|Invalid|Race' "$report/sanitize.$name.log" |
                sed -n '1s/^=* *//p' | cut -c 1-200)
            say "- FAILED: $name: exit $code: ${reason:-it printed no summary, so it watched nothing}"
        fi
    done
    say "- $tool: $clean of ${#tests[@]} programs clean"
    [ "${#slow[@]}" = 0 ] || cannot "$tool of ${slow[*]}" "not finished in $limit s each"
done
finish
