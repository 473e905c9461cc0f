#!/usr/bin/env bash
# Stage ops of tests/gpu.sh: each kernel against its CPU twin, then against float64.
# shellcheck disable=SC2015,SC2317  # functions are called through check
. tests/gpu/common.sh
: >"$part"
need_gpu
need_built "${plugin##*/}"
export QSHARD_TWIN=$mode

# A test that finds no GPU passes on nothing: that counts as a failure here.
twin() { # PROGRAM
    "$1" --ascii || return 1
    ! grep -h 'not here' "$report/$stage.${1##*/}.log"
}
shopt -s nullglob
tests=("$build"/tests/twins/test_{twin,core}_*)
if [ "${#tests[@]}" = 0 ]; then
    cannot "the twin tests" "not built: see the build stage"
fi
for test in ${tests[@]+"${tests[@]}"}; do
    [ -x "$test" ] && [ -f "$test" ] || continue
    check "${test##*/}" twin "$test" || true
done
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
