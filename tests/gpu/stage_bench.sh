#!/usr/bin/env bash
# Stage bench of tests/gpu.sh: every operation beside its bound, then whole steps at Llama-3-8B's shape.
# shellcheck disable=SC2015,SC2317  # functions are called through check
. tests/gpu/common.sh
: >"$part"
need_gpu
need_built "${plugin##*/}"
small=() lengths=()
[ "$mode" = cuda ] && [ "$short" = 0 ] || small=(--small)
for tokens in ${QSHARD_GPU_TOKENS:-}; do
    lengths+=(--tokens "$tokens")
done
[ "$mode" = cuda ] || say "Small shapes, emulated: these figures only show that the programs work."

# ---- operations ----
if [ -x "$build/bench_ops" ]; then
    check "bench_ops" "$build/bench_ops" "$plugin" ${small[@]+"${small[@]}"} \
        ${lengths[@]+"${lengths[@]}"} --csv "$report/ops.csv" || true
    say ""
    say "$(sed -n 's/^# //p' "$report/bench.bench_ops.log")"
    say ""
    {
        echo "| operation | shape | ms | figure | share of bound |"
        echo "|---|---|---|---|---|"
        awk -F, 'NR > 1 && $1 !~ /^bound/ && (!/T [0-9]/ || /T 4096[^0-9]/ || /^sum/ || small) {
            figure = $4
            shape = $2; unit = $5; share = $6; bound = $7
            if (NF > 7) { shape = $2 "," $3; $3 = $4; figure = $5; unit = $6; share = $7; bound = $8 }
            printf "| %s | %s | %.3f | %.4g %s | %.1f %% of %s |\n", $1, shape, $3, figure, unit, share, bound }' \
            small="${#small[@]}" "$report/ops.csv"
    } | tee -a "$part"
    say ""
    say "All lengths: ops.csv. The sums leave out gathers, launch gaps and the host."
else
    cannot bench_ops "not built"
fi

# ---- products ----
if [ -x "$build/bench_products" ]; then
    check "bench_products" "$build/bench_products" "$plugin" ${small[@]+"${small[@]}"} \
        ${lengths[@]+"${lengths[@]}"} --csv "$report/products.csv" || true
    say ""
    {
        echo "| product | shape | bound, ms | first algorithm | fastest other | bits of the first |"
        echo "|---|---|---|---|---|---|"
        awk -F, 'NR > 1 {
            best = 0
            for (i = 1; i < 8; i++) if ($(7 + 2 * i) > 0 && (!best || $(7 + 2 * i) < $(7 + 2 * best))) best = i
            other = best ? sprintf("%.4f (%d) | %s", $(7 + 2 * best), best, $(8 + 2 * best) ? "yes" : "no") : "none |"
            printf "| %s, T %s | %s | %.4f, %s | %.4f | %s |\n", $1, $2, $3, $5, $6, $7, other }' "$report/products.csv"
    } | tee -a "$part"
    say ""
    say "$(sed -n 's/^# products/products/p' "$report/bench.bench_products.log")"
else
    cannot bench_products "not built"
fi

# ---- steps ----
if [ ! -x "$qshard" ] || [ ! -x "$build/make_tokens" ]; then
    cannot "steps of qshard train" "the program is not built; the sums above extrapolate one layer and the head instead"
    finish
fi
[ -n "$python" ] || {
    cannot "steps of qshard train" "no python3"
    finish
}
work=$(mktemp -d -p "${TMPDIR:-/tmp}")
trap 'rm -rf "$work"' EXIT
free_gib=$(($(df -Pk "$work" | awk 'NR == 2 {print $4}') / 1048576))
if [ "${#small[@]}" = 0 ] && [ "$free_gib" -lt 16 ]; then
    cannot "steps of qshard train" "$work has $free_gib GiB free, 16 are needed (TMPDIR)"
    finish
fi
say ""
check "made-up weights" "$python" tests/gpu/make_model.py "$work/model" ${small[@]+"${small[@]}"} &&
    check "their base" "$qshard" quantize "$work/model" -o "$work/base.h5" || finish
rm -rf "$work/model"
say ""
checks=$((checks + 1))
"$python" tests/gpu/bench_step.py "$work" --base "$work/base.h5" --build "$build" --csv "$report/step.csv" \
    --ops "$report/ops.csv" --log "$report/bench.step.log" ${small[@]+"${small[@]}"} ${lengths[@]+"${lengths[@]}"} | tee -a "$part"
[ "${PIPESTATUS[0]}" = 0 ] || failures=$((failures + 1))
finish
