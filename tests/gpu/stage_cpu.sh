#!/usr/bin/env bash
# Stage cpu of tests/gpu.sh: the CPU of the card's machine, often a Xeon with AVX512-FP16 and AMX, whose products have run
# nowhere else. Needs no card. Speeds are those of two cores, as in docs/performance.md; what matters most comes first.
# shellcheck disable=SC2015,SC2317  # functions are called through check
. tests/gpu/common.sh
: >"$part"
need_built qshard
work=$(mktemp -d -p "${TMPDIR:-/tmp}")
trap 'rm -rf "$work"' EXIT
export CUDA_VISIBLE_DEVICES=''  # the peers compute on the CPU, too
within=${QSHARD_GPU_CPU_S:-300} # seconds of all of it; the peers get what is left

# ---- which CPU ----
flag() { # NAME of /proc/cpuinfo
    grep -m 1 '^flags' /proc/cpuinfo | grep -qw "$1"
}
has=()
for name in avx2 avx512f avx512_bf16 avx512_fp16 amx_tile amx_bf16; do
    ! flag "$name" || has+=("$name")
done
say "$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | sed -n 1p), $(nproc) cores: ${has[*]-}"
say ""
flag avx512_fp16 || flag amx_bf16 ||
    cannot "the products of fp16 and amx" "this CPU has neither avx512_fp16 nor amx_bf16; what it has is measured"
emulated=()
if [ "$mode" = emulated ]; then
    export QSHARD_CPU_FP16=portable QSHARD_CPU_AMX=portable # the same bits, slowly
    ! flag avx2 || export QSHARD_CPU_FP16=avx2 QSHARD_CPU_AMX=avx2
    emulated=(--emulated)
    say "- fp16 and amx by other instructions, small shapes: the figures only show that the programs work"
fi

# ---- right? ----
# A case compares inner loops bit for bit with portable C; where the CPU, its kernel or the build has none it says which and
# leaves with 77.
case_of() { # NAME
    local program=$build/tests/case_$1 said=$work/$1 code=0
    if [ ! -x "$program" ]; then
        cannot "$1" "not built: see the build stage"
        return
    fi
    { timeout -k 5 120 "$program" >"$said" 2>&1 || code=$?; } 2>/dev/null # nothing of the shell's on a signal
    case $code in
    77) cannot "$1" "$(tail -n 1 "$said")" ;;
    *) check "$1" ended "$code" "$said" ;;
    esac
}
ended() { # CODE FILE
    cat "$2"
    [ "$1" = 0 ] || echo "error: exit $1: $(tail -n 1 "$2")"
    return "$1"
}
for name in half tile pairs isa; do
    case_of "$name" || true
done
for name in products linear attention lora bits; do
    if [ "$short" != 0 ]; then
        cannot "test_ops_$name" "a short run"
    elif [ -x "$build/tests/test_ops_$name" ]; then
        check "test_ops_$name" timeout -k 5 120 "$build/tests/test_ops_$name" --encoding=C --color=never || true
    else
        cannot "test_ops_$name" "not built: see the build stage"
    fi
done

# ---- fast? ----
curve() {
    cannot "losses over 200 steps of each kind beside strict's" "they take half an hour; after ./quickstart.sh, for each kind: \
qshard train inputs/smollm2.yaml --set output=quickstart/KIND --set cpu.gemm=KIND --set train.steps=200 \
--set train.global_batch=2 --set train.micro_batch=2"
}

[ -n "$python" ] || {
    cannot "speed" "no python3"
    curve
    finish
}
may_use() { # numbers of the processors that this process may run on
    local range
    for range in $(sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status | tr , ' ' | grep . ||
        echo "0-$(($(nproc) - 1))"); do
        seq "${range%-*}" "${range#*-}"
    done
}
two_cores() { # of different cores, where the system tells
    local cpu siblings seen=' ' found=()
    for cpu in $(may_use); do
        siblings=$(cat "/sys/devices/system/cpu/cpu$cpu/topology/thread_siblings_list" 2>/dev/null || echo "$cpu")
        case $seen in
        *" $siblings "*) ;;
        *) seen+="$siblings " found+=("$cpu") ;;
        esac
        [ "${#found[@]}" -lt 2 ] || break
    done
    (IFS=, && echo "${found[*]}")
}
two=$(two_cores) threads=2
[ "${two/,/}" != "$two" ] || threads=1
if taskset -cp "$two" $$ >/dev/null 2>&1; then
    say "- from here on bound to processors $two"
else
    say "- not bound to processors $two: taskset does not work here"
fi

model=() small=()
[ ! -e "${QSHARD_SMOLLM2:-/none}/config.json" ] || model=(--model "$QSHARD_SMOLLM2")
if [ "$short" != 0 ] || [ "$mode" = emulated ]; then
    small=(--small) model=()
fi
checks=$((checks + 1))
"$python" tests/gpu/cpu_bench.py "$work" --qshard "$qshard" --threads "$threads" --report "$report" --seconds \
    "$((within * 3 / 10))" ${model[@]+"${model[@]}"} ${small[@]+"${small[@]}"} ${emulated[@]+"${emulated[@]}"} \
    2>"$report/cpu.bench.log" | tee -a "$part"
[ "${PIPESTATUS[0]}" = 0 ] || {
    failures=$((failures + 1))
    [ ! -s "$report/cpu.bench.log" ] || say "- FAILED: cpu_bench.py: $(tail -n 1 "$report/cpu.bench.log" | cut -c 1-300)"
}

# ---- beside the peers? ----
peer_python=${QSHARD_ORACLE:-build/oracle}/bin/python
[ -x "$peer_python" ] || peer_python=$(command -v "$python")
lacking() { # PYTHON MODULE...
    "$1" -c 'import importlib.util as u, sys; print(*(name for name in sys.argv[1:] if u.find_spec(name) is None))' "${@:2}"
}
peers() { # NAME SECONDS CASE...
    local name=$1 seconds=$2
    shift 2
    if [ "$seconds" -lt 30 ]; then
        cannot "$name" "of $within s (QSHARD_GPU_CPU_S) $seconds are left"
        return
    fi
    check "$name" timeout -k 5 "$((seconds + 60))" "$python" benchmarks/cpu_peers.py "$@" --seconds "$seconds" \
        --threads "$threads" ${model[@]+"${model[@]}"} --qshard "$qshard" --peer-python "$peer_python" --work "$work" \
        --json "$report/cpu.peers.json" || true
    # its tables, and what it left out
    sed -n 's/^\[[^]]*\] *\(.*: left out\)/- not run: \1/p; /^|/p; /^$/p' "$report/cpu.${name//[^a-zA-Z0-9_.-]/_}.log" |
        cat -s | tee -a "$part"
    say ""
}
if [ "${#small[@]}" != 0 ]; then
    cannot "the peers" "a short run"
else
    step_s=100 reason='' # cpu_peers begins a step with 90
    none=$(lacking "$peer_python" transformers peft accelerate h5py)
    [ -z "$none" ] || reason="$peer_python has no $none"
    none=$("$python" -c 'import sys; sys.path.insert(0, "benchmarks"); from peers import models' 2>&1 | tail -n 1)
    [ -z "$none" ] || reason="$python makes no token file: $none"
    [ "${#model[@]}" != 0 ] || reason="no SmolLM2: QSHARD_SMOLLM2 names its folder"
    [ -z "$reason" ] || step_s=0
    none=$(lacking "$peer_python" numpy torch bitsandbytes)
    if [ -n "$none" ]; then
        cannot "the peers" "$peer_python has no $none"
    else
        peers "decode and products beside the peers" "$((within - SECONDS - step_s))" decode gemm
        if [ -n "$reason" ]; then
            cannot "steps beside the peers" "$reason"
        else
            peers "steps beside the peers" "$((within - SECONDS))" step
        fi
    fi
fi
curve
finish
