#!/usr/bin/env bash
# Stage cpu of tests/gpu.sh: the CPU of the card's machine, often a Xeon with AVX512-FP16 and AMX, whose products have run
# nowhere else. Needs no card. Two cores, as in docs/performance.md.
# shellcheck disable=SC2015,SC2317  # functions are called through check
. tests/gpu/common.sh
: >"$part"
need_built qshard

# ---- which CPU ----
flag() { # NAME of /proc/cpuinfo
    grep -m 1 '^flags' /proc/cpuinfo | grep -qw "$1"
}
has=()
for name in avx2 avx512f avx512_bf16 avx512_fp16 amx_bf16; do
    ! flag $name || has+=("$name")
done
say "$(sed -n 's/^model name[[:space:]]*: //p' /proc/cpuinfo | head -n 1), $(nproc) cores: ${has[*]-}"
say ""

# Two processors that are no siblings of one core.
two=$(lscpu -p=CPU,CORE 2>/dev/null | awk -F, '!/^#/ && !seen[$2]++ {cpu[n++] = $1} END {if (n > 1) print cpu[0] "," cpu[1]}')
pinned=()
if [ -n "$two" ] && command -v taskset >/dev/null && taskset -c "$two" true 2>/dev/null; then
    pinned=(taskset -c "$two")
else
    say "- not pinned to two cores: $([ -n "$two" ] && echo "taskset does not work here" || echo "lscpu names no two")"
fi

# ---- right? ----
# What a case compares with portable C it says; without the instructions it leaves with 77.
case_of() { # NAME PROGRAM FLAG
    local log=$report/cpu.$1.log code=0
    if [ ! -x "$2" ]; then
        cannot "$1" "not built: see the build stage"
        return
    fi
    checks=$((checks + 1))
    timeout -k 5 120 "$2" >"$log" 2>&1 || code=$?
    case $code in
    0) say "- ok: $1" ;;
    77) cannot "$1" "$(tail -n 1 "$log")$(! flag "$3" || echo "; but the CPU has $3: the system may refuse it, or the compiler is too old")" ;;
    *)
        failures=$((failures + 1))
        say "- FAILED: $1: $(why_in "$log" | cut -c 1-300) ($(basename "$log"))"
        ;;
    esac
}
case_of half "$build/tests/case_half" avx512_fp16
case_of tile "$build/tests/case_tile" amx_bf16
case_of pairs "$build/tests/case_pairs" avx2
for name in linear lora products attention; do
    if [ "$short" != 0 ]; then
        cannot "test_ops_$name" "a short run"
    elif [ -x "$build/tests/test_ops_$name" ]; then
        check "test_ops_$name" timeout -k 5 120 "$build/tests/test_ops_$name" --encoding=C --color=never || true
    else
        cannot "test_ops_$name" "not built: see the build stage"
    fi
done

# ---- fast? ----
# table NAME COLUMNS: rows of a benchmark's JSON
table() {
    "$python" - "$report/cpu.$1.json" "$2" <<'P' | tee -a "$part"
import json, sys
with open(sys.argv[1]) as file:
    bench = json.load(file)
columns = sys.argv[2].split(",")
for table in bench["tables"].values():
    if columns[0] in table["units"]:
        print("\n|", " | ".join(f"{c} ({table['units'][c]})" if table["units"][c] else c for c in columns), "|")
        print("|" + "---|" * len(columns))
        for row in table["rows"]:
            print("|", " | ".join(f"{row[c]:.4g}" if isinstance(row[c], float) else str(row[c]) for c in columns), "|")
print()
P
}
measure() { # NAME COLUMNS ARGUMENT...: of qshard bench
    local name=$1 columns=$2
    shift 2
    if check "bench $name" ${pinned[@]+"${pinned[@]}"} "$qshard" bench "$@" --threads=2 --device=cpu --json "$report/cpu.$name.json"; then
        [ -z "$python" ] || table "$name" "$columns"
    fi
}
shapes=(2048x2048 5632x2048 4096x14336) rows=(128 512 2048) attention=(--tokens=2048)
[ "$short" = 0 ] || shapes=(512x512) rows=(128) attention=(--tokens=128 --heads=4)
for shape in "${shapes[@]}"; do
    for tokens in "${rows[@]}"; do
        measure "gemm-$shape-$tokens" operation,shape,rate,unit,bound,share,error gemm --shape="$shape" --tokens="$tokens"
    done
done
measure attention operation,shape,rate,unit,bound,share,error attention "${attention[@]}"
measure decode operation,shape,rate,unit,bound,share,error decode --shape=1024x1024

model=${QSHARD_SMOLLM2:-}
if [ "$short" != 0 ]; then
    cannot "steps" "a short run"
elif [ -e "$model/config.json" ]; then
    work=$(mktemp -d -p "${TMPDIR:-/tmp}")
    trap 'rm -rf "$work"' EXIT
    if check "a base for steps" "$qshard" quantize "$model" -o "$work/base.h5"; then
        kinds=(strict bf16)
        ! flag avx512_fp16 || kinds+=(fp16)
        ! flag amx_bf16 || kinds+=(amx)
        for kind in "${kinds[@]}"; do
            check "step $kind" ${pinned[@]+"${pinned[@]}"} "$qshard" bench step --base="$work/base.h5" --set=train.seq_len=512 \
                --set=train.micro_batch=1 --set=train.global_batch=1 --set=train.recompute=none --set=cpu.gemm="$kind" \
                --set=device=cpu --threads=2 && say "  $(sed -n 's/^# speed: //p' "$report/cpu.step_$kind.log")"
        done
    fi
else
    cannot "steps" "QSHARD_SMOLLM2 names no model"
fi

# ---- beside the peers? ----
lacking=$([ -z "$python" ] && echo python3 || "$python" -c '
import importlib.util as u
print(*(name for name in ("numpy", "torch", "bitsandbytes", "h5py", "xxhash") if u.find_spec(name) is None))')
if [ "$short" != 0 ]; then
    cannot "the peers" "a short run"
elif [ -n "$lacking" ]; then
    cannot "the peers" "there is no $lacking"
else
    check "cpu_peers" timeout -k 10 "${QSHARD_GPU_PEERS_S:-240}" ${pinned[@]+"${pinned[@]}"} "$python" benchmarks/cpu_peers.py \
        gemm decode --turns 1 --threads 2 --model "$model" --qshard "$qshard" --peer-python "$(command -v "$python")" --json "$report/cpu.peers.json" \
        --work "$report/cpu.peers" && sed -n '/^|/p' "$report/cpu.cpu_peers.log" | tee -a "$part"
    rm -rf "$report/cpu.peers"
fi
say ""
cannot "losses over 200 steps of a fast kind beside strict" "it takes half an hour: docs/decisions.md has the command"
finish
