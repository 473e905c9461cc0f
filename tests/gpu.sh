#!/usr/bin/env bash
# Proves the CUDA backend on a machine with a GPU, from a clean checkout and without a network.
#
#   tests/gpu.sh [--emulated] [stage...]
#
#   build      configure and compile, for this machine's card alone
#   ops        every kernel against its CPU twin, and against float64 beside PyTorch's bf16
#   sanitize   the same under compute-sanitizer: memcheck, racecheck, synccheck, initcheck
#   train      whole runs: losses of the CPU, equal bits, memory beside its plan, offload, ranks, resume
#   features   two hosts out of one, evaluation, samples, what is refused, profiles
#   bench      speed of every kernel beside its bound; a step of Llama-3-8B's shape with made-up weights
#   peer       transformers + peft at the same shape on the same card
#   cpu        the machine's CPU, no card: products that only some have (AVX512-FP16, AMX), right and fast; beside the peers
#
# All stages by default, in this order, each at most 8 minutes (QSHARD_GPU_STAGE_S). Each adds its part to
# build/gpu-report/report.md before the next one starts; raw output lies beside it. Stages may also be run one by one: the
# report keeps what ran since the last build. What cannot run is named there with the reason. Status: 0 all that could run
# passed, 1 something failed, 77 nothing could run, 2 usage.
#
#   QSHARD_GPU_DEPS     what the machine lacks (Open MPI, HDF5, Criterion...), made by tests/gpu_deps.sh [build/gpu-deps]
#   QSHARD_GPU_BUILD    where to build [build/gpu, build/gpu-emulated]
#   QSHARD_GPU_REPORT   where the report goes [build/gpu-report]
#   QSHARD_SMOLLM2      Hugging Face directory of SmolLM2-135M-Instruct, if there is one, for stages train and cpu
#   QSHARD_GPU_TOKENS   lengths T of stages bench and peer, in words [512 4096 16384]
#   QSHARD_GPU_CPU_S    seconds of stage cpu; the peers get what its own figures leave [300]
#   QSHARD_PYTHON       Python 3 [python3]; QSHARD_ORACLE: an environment whose Python has the peers of stage cpu [build/oracle]
#   QSHARD_COMMIT       what the report says was tested [what git says]
#   QSHARD_GPU_SHORT=1  fewer and smaller cases: to try the script itself
#
# --emulated runs the same stages without a GPU: the kernels are compiled for the CPU (tests/emulator). It proves that the
# script and the kernels' logic work, never speed, and the report says so.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

stages=()
mode=cuda
for word in "$@"; do
    case $word in
    --emulated) mode=emulated ;;
    build | ops | sanitize | train | features | bench | peer | cpu) stages+=("$word") ;;
    -h | --help)
        sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"
        exit 0
        ;;
    *)
        echo "gpu.sh: no stage \"$word\"; there are build ops sanitize train features bench peer cpu, and --emulated" >&2
        exit 2
        ;;
    esac
done
[ "${#stages[@]}" -gt 0 ] || stages=(build ops sanitize train features bench peer cpu)
export QSHARD_GPU_MODE=$mode
. tests/gpu/common.sh

assemble() { # the report of all stages that ran since the last build
    write_title
    local name
    for name in build ops sanitize train features bench peer cpu; do
        if [ -e "$report/$name.verdict" ]; then
            printf '\n## %s: %s\n\n' "$name" "$(cat "$report/$name.verdict")"
            cat "$report/$name.part"
        fi
    done
}

mkdir -p "$report"
case " ${stages[*]} " in
*' build '*) rm -f "$report"/*.{part,verdict,log,csv,json} ;; # what was measured belongs to what was built
esac
write_title

ran=0 failed=0
for stage in "${stages[@]}"; do
    echo "== $stage"
    started=$SECONDS
    rm -f "$report/$stage.verdict" "$report/$stage.part" "$report/$stage".*.{log,json}
    timeout -k 15 "${QSHARD_GPU_STAGE_S:-480}" bash "tests/gpu/stage_$stage.sh"
    code=$?
    case $code in
    0) verdict=passed ran=1 ;;
    77) verdict='could not run' ;;
    124 | 137) verdict='FAILED: over its time limit' ran=1 failed=1 ;;
    *) verdict=FAILED ran=1 failed=1 ;;
    esac
    [ -e "$report/$stage.part" ] || echo "- FAILED before its first line" >"$report/$stage.part"
    echo "$verdict ($((SECONDS - started)) s)" | tee "$report/$stage.verdict"
    assemble >"$report/report.md"
done
(shopt -s nullglob && cd "$report" && tar -czf raw.tar.gz -- *.log *.csv *.json) 2>/dev/null || true
echo "report: $report/report.md, raw output: $report/raw.tar.gz"
[ "$failed" = 0 ] || exit 1
[ "$ran" = 1 ] || exit 77
