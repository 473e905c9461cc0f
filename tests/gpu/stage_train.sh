#!/usr/bin/env bash
# Stage train of tests/gpu.sh: whole runs on the device against whole runs on the CPU.
. tests/gpu/common.sh
: >"$part"
need_runs
"$python" tests/gpu/train_checks.py "$work" --log "$report/train.log" | tee -a "$part"
exit "${PIPESTATUS[0]}"
