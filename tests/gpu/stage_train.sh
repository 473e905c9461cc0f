#!/usr/bin/env bash
# Stage train of tests/gpu.sh: whole runs on the device against whole runs on the CPU.
. tests/gpu/common.sh
: >"$part"
need_gpu
need_built qshard
need_built "${plugin##*/}"
[ -n "$python" ] || refuse "no python3 to drive the runs"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
inputs=$deps/inputs
if [ ! -d "$inputs/tiny" ]; then
    inputs=$work/inputs
    tests/gpu/make_inputs.sh "$inputs" "$python" >"$report/train.inputs.log" 2>&1 ||
        refuse "${deps##"$PWD"/} (tests/gpu_deps.sh) has no inputs, and here: $(tail -n 1 "$report/train.inputs.log")"
fi
export QSHARD=$qshard QSHARD_INPUTS=$inputs QSHARD_GPU_SHORT=$short
code=0
"$python" tests/gpu/train_checks.py "$work" --log "$report/train.log" | tee -a "$part"
code=${PIPESTATUS[0]}
exit "$code"
