# shellcheck shell=bash disable=SC2034
# What the stages of tests/gpu.sh share: sourced, from the top folder. Sets mode, build, report, deps, and the
# environment; each stage writes its part of the report through say, check and cannot.
mode=${QSHARD_GPU_MODE:-cuda}
report=${QSHARD_GPU_REPORT:-$PWD/build/gpu-report}
deps=${QSHARD_GPU_DEPS:-$PWD/build/gpu-deps}
if [ "$mode" = emulated ]; then
    build=${QSHARD_GPU_BUILD:-$PWD/build/gpu-emulated}
    plugin=$build/libqshard_emulated.so
else
    build=${QSHARD_GPU_BUILD:-$PWD/build/gpu}
    plugin=$build/libqshard_cuda.so
fi
short=${QSHARD_GPU_SHORT:-0}
qshard=$build/qshard
stage=$(basename "$0" .sh)
stage=${stage#stage_}
part=$report/$stage.part
prefix=$deps/prefix

# ---- what the machine is ----
card() { # FIELD of nvidia-smi, of the first card; empty without one
    command -v nvidia-smi >/dev/null &&
        nvidia-smi --query-gpu="$1" --format=csv,noheader,nounits 2>/dev/null | sed -n 1p
}

have_gpu() {
    [ "$mode" = emulated ] || [ -n "$(card name)" ]
}

nvcc_path() {
    local path
    for path in "${CUDACXX:-}" "$(command -v nvcc)" /usr/local/cuda/bin/nvcc; do
        if [ -n "$path" ] && [ -x "$path" ]; then
            echo "$path"
            return
        fi
    done
    return 1
}

# The architecture of this card as CMake calls it; Hopper's own instructions need the "a".
card_architecture() {
    local capability
    capability=$(card compute_cap)
    case $capability in
    9.0 | '') echo 90a-real ;;
    *) echo "${capability/./}-real" ;;
    esac
}

commit() {
    if [ -n "${QSHARD_COMMIT:-}" ]; then
        echo "$QSHARD_COMMIT"
    elif git rev-parse --short HEAD 2>/dev/null; then
        git diff --quiet HEAD 2>/dev/null || echo "with changes"
    else
        echo "unknown commit"
    fi
}

write_title() {
    if [ "$mode" = emulated ]; then
        echo "# qshard under emulation on a CPU: this proves no GPU and no speed"
    else
        echo "# qshard on a GPU"
    fi
    cat <<TITLE

| | |
|---|---|
| card | $(if [ "$mode" = emulated ]; then echo "none: emulated"; else card name,memory.total,driver_version | grep . || echo "none is here"; fi) |
| toolkit | $("$(nvcc_path)" --version 2>/dev/null | sed -n 's/.*release //p' | grep . || echo "no nvcc") |
| commit | $(commit | paste -sd ' ') |
| date | $(date -u +%Y-%m-%dT%H:%MZ) |
| host | $(uname -m), $(nproc) cores, $(. /etc/os-release 2>/dev/null && echo "$PRETTY_NAME"), C library $(ldd --version 2>/dev/null | sed -n '1s/.* //p') |
TITLE
}

# ---- the report ----
failures=0 checks=0

say() { # a line of the report, and of the terminal
    echo "$*" | tee -a "$part"
}

cannot() { # NAME REASON: named, so that nobody takes it for done
    say "- not run: $1: $2"
}

why_in() { # LOG: the line that most likely says why
    grep -A 2 -m 1 -E '^CMake Error' "$1" | paste -sd ' ' | grep . ||
        grep -m 1 -E '(error: |error\[|undefined reference|\[FAIL\])' "$1" ||
        grep -m 1 -iE '(error|fail)' "$1" ||
        grep -v '^[[:space:]]*$' "$1" | tail -n 1
}

check() { # NAME COMMAND...: passes if the command does; its output is kept and its last line shown on failure
    local name=$1 started=$SECONDS log
    shift
    log=$report/$stage.${name//[^a-zA-Z0-9_.-]/_}.log
    checks=$((checks + 1))
    if "$@" >"$log" 2>&1; then
        say "- ok: $name ($((SECONDS - started)) s)"
    else
        failures=$((failures + 1))
        say "- FAILED: $name: $(why_in "$log" | cut -c 1-300) (${log##*/})"
        return 1
    fi
}

finish() { # status of the stage
    [ "$failures" = 0 ] || exit 1
    [ "$checks" -gt 0 ] || exit 77
    exit 0
}

refuse() { # REASON: nothing of this stage can run
    cannot "$stage" "$1"
    exit 77
}

need_gpu() {
    have_gpu || refuse "nvidia-smi names no GPU on this machine (--emulated runs the kernels on the CPU)"
}

need_built() { # FILE
    [ -e "$build/$1" ] || refuse "$build/$1 is not built: run the build stage first, or see what it says"
}

# Runs of the program for runs.py: a folder for them, and what they read.
need_runs() {
    need_gpu
    need_built qshard
    need_built "${plugin##*/}"
    [ -n "$python" ] || refuse "no python3 to drive the runs"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    inputs=$deps/inputs
    if [ ! -d "$inputs/tiny" ]; then
        inputs=$work/inputs
        tests/gpu/make_inputs.sh "$inputs" "$python" >"$report/$stage.inputs.log" 2>&1 ||
            refuse "${deps##"$PWD"/} (tests/gpu_deps.sh) has no inputs, and here: $(tail -n 1 "$report/$stage.inputs.log")"
    fi
    export QSHARD=$qshard QSHARD_INPUTS=$inputs QSHARD_GPU_SHORT=$short
}

# ---- what the machine lacks ----
system_has_library() { # SONAME
    /sbin/ldconfig -p 2>/dev/null | grep -q "^[[:space:]]*$1 "
}

header_found() {
    printf '#include <%s>\n' "$1" | "${CC:-cc}" -E -x c - >/dev/null 2>&1
}

# Only what is missing is taken from the prefix, so that no library of the system is replaced by an older one. Programs
# of another stage may be using the links at the same time, or another stage making them: a link that is right stays,
# and any other is replaced at once, by renaming.
use_prefix() {
    local links=$report/libraries library name
    [ -d "$prefix" ] || return 0
    mkdir -p "$links"
    for library in "$prefix"/lib/*.so.*; do
        name=${library##*/}
        if system_has_library "$name"; then
            rm -f "$links/$name"
        elif [ "$(readlink "$links/$name")" != "$library" ]; then
            ln -s "$library" "$links/$name.$BASHPID" && mv -fT "$links/$name.$BASHPID" "$links/$name"
        fi
    done
    case :${LD_LIBRARY_PATH-}: in
    *":$links:"*) ;; # a stage inherits it
    *) export LD_LIBRARY_PATH=$links${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} ;;
    esac
    if ! command -v mpirun >/dev/null; then
        export PATH=$PATH:$prefix/bin OPAL_PREFIX=$prefix PMIX_INSTALL_PREFIX=$prefix
        OMPI_MCA_mca_base_component_path=$(echo "$prefix"/lib/*/openmpi/lib/openmpi3)
        export OMPI_MCA_mca_base_component_path OMPI_MCA_mca_base_component_show_load_errors=0
    fi
}

use_prefix
. cmake/deps.sh
mpi_environment
export QSHARD_SOURCE_DIR=$PWD QSHARD_BINARY_DIR=$build PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
if [ "$mode" = emulated ]; then
    export QSHARD_PLUGIN=$plugin
fi
python=${QSHARD_PYTHON:-$(command -v python3 || true)}
