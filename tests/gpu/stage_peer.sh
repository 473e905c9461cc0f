#!/usr/bin/env bash
# Stage peer of tests/gpu.sh: transformers + peft on the same card.
. tests/gpu/common.sh
: >"$part"
need_gpu
[ -n "$python" ] || refuse "no python3"
modules_missing() {
    local module
    for module in torch transformers peft; do
        "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$module') is None)" || echo "$module"
    done
}
missing=$(modules_missing | paste -sd ' ')
[ -z "$missing" ] || refuse "python3 has no $missing"
"$python" -c 'import importlib.util as u, sys; sys.exit(u.find_spec("bitsandbytes") is None)' ||
    cannot "bitsandbytes" "python3 does not have it: the peer's base is bf16, which spares it the decoding"
options=()
[ "$mode" = cuda ] && [ "$short" = 0 ] || options=(--small)
for tokens in ${QSHARD_GPU_TOKENS:-}; do
    options+=(--tokens "$tokens")
done
checks=1
"$python" tests/gpu/peer.py --step "$report/step.csv" ${options[@]+"${options[@]}"} 2>"$report/peer.stderr.log" | tee -a "$part"
code=${PIPESTATUS[0]}
if [ "$code" = 77 ]; then
    exit 77
elif [ "$code" != 0 ]; then
    failures=1
    say "- FAILED: peer.py: $(grep -v '^[[:space:]]*$' "$report/peer.stderr.log" | tail -n 1 | cut -c 1-300)"
fi
finish
