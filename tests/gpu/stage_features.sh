#!/usr/bin/env bash
# Stage features of tests/gpu.sh: hosts, evaluation, samples, refusals, profiles.
. tests/gpu/common.sh
: >"$part"
need_runs
if [ "$mode" = cuda ]; then
    toolkit=$(dirname "$(dirname "$(readlink -f "$(nvcc_path || echo /none/bin/nvcc)")")")
    if "${CC:-cc}" -shared -fPIC -isystem "$toolkit/include" tests/gpu/nvtx_log.c -o "$work/nvtx_log.so" \
        >"$report/features.nvtx.log" 2>&1; then
        export QSHARD_NVTX_INJECTION=$work/nvtx_log.so
    fi
fi
"$python" tests/gpu/feature_checks.py "$work" --log "$report/features.log" | tee -a "$part"
exit "${PIPESTATUS[0]}"
