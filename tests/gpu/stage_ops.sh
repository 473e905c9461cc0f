#!/usr/bin/env bash
# Stage ops of tests/gpu.sh: each kernel against its CPU twin, then against float64.
# shellcheck disable=SC2015,SC2317  # functions are called through check
. tests/gpu/common.sh
: >"$part"
need_gpu
need_built "${plugin##*/}"
export QSHARD_TWIN=$mode

# All programs at once; what hangs is ended, so that the others still report.
limit=${QSHARD_GPU_TEST_S:-120}
one() { # PROGRAM
    local started=$SECONDS code=0
    timeout -k 5 "$limit" "$1" --encoding=C --color=never >"$report/ops.${1##*/}.out" 2>&1 || code=$?
    echo "$code $((SECONDS - started))" >"$report/ops.${1##*/}.code"
}
export -f one
export report limit
# What a program did; one that finds no GPU passes on nothing, which counts as a failure here.
did() { # PROGRAM
    local code seconds
    read -r code seconds <"$report/ops.${1##*/}.code"
    cat "$report/ops.${1##*/}.out"
    [ "$code" != 124 ] || echo "error: not finished in $limit s"
    echo "took $seconds s"
    [ "$code" = 0 ] && ! grep -q 'not here' "$report/ops.${1##*/}.out"
}
shopt -s nullglob
tests=()
for test in "$build"/tests/twins/test_{twin,core}_*; do
    [ -x "$test" ] && [ -f "$test" ] && tests+=("$test")
done
rm -f "$report"/ops.*.{code,out}
if [ "${#tests[@]}" = 0 ]; then
    cannot "the twin tests" "not built: see the build stage"
else
    printf '%s\n' "${tests[@]}" | xargs -P "$(($(nproc) / 2 + 1))" -I{} bash -c 'one "$@"' - {}
fi
for test in ${tests[@]+"${tests[@]}"}; do
    check "${test##*/}" did "$test" || true
done
rm -f "$report"/ops.*.{code,out}
say ""
say "$(grep -h '\[====\]' "$report"/ops.test_*.log 2>/dev/null |
    awk '{t += $4; p += $7; f += $10} END {printf "%d tests: %d passed, %d failed", t, p, f}')"

# Errors against float64, beside those of PyTorch's bf16 operations.
if [ ! -x "$build/op_dump" ]; then
    cannot "errors against float64" "op_dump is not built"
elif [ -z "$python" ] || ! "$python" -c 'import numpy' 2>/dev/null; then
    cannot "errors against float64" "python3 has no numpy"
else
    rm -rf "$report/ops"
    mkdir -p "$report/ops"
    small=()
    [ "$short" = 0 ] || small=(--small)
    if check op_dump "$build/op_dump" "$plugin" "$report/ops" ${small[@]+"${small[@]}"}; then
        check "errors against float64" "$python" tests/gpu/op_errors.py "$report/ops" || true
        say ""
        grep '^|' "$report/ops.errors_against_float64.log" | tee -a "$part"
        grep '^not run' "$report/ops.errors_against_float64.log" | sed 's/^/- /' | tee -a "$part"
    fi
    rm -rf "$report/ops"
fi
finish
