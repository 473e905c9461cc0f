#!/usr/bin/env bash
# Stage features of tests/gpu.sh: hosts, evaluation, samples, refusals, profiles.
. tests/gpu/common.sh
: >"$part"
need_runs
# What stands in for a profiler and for a driver; each check says so where its library is not there.
library() { # SOURCE OUTPUT [OPTION...]
    "${CC:-cc}" -shared -fPIC "$1" -o "$2" "${@:3}" >>"$report/features.libraries.log" 2>&1
}
if [ "$mode" = cuda ]; then
    toolkit=$(dirname "$(dirname "$(readlink -f "$(nvcc_path || echo /none/bin/nvcc)")")")
    mkdir "$work"/{no,old}-driver
    : >"$work/no-driver/libcuda.so.1" # no library at all
    library tests/gpu/old_driver.c "$work/old-driver/libcuda.so.1" -Wl,-soname,libcuda.so.1
    library tests/gpu/nvtx_log.c "$work/nvtx_log.so" -isystem "$toolkit/include"
fi
"$python" tests/gpu/feature_checks.py "$work" --log "$report/features.log" | tee -a "$part"
exit "${PIPESTATUS[0]}"
