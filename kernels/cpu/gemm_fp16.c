#include "kernels/cpu/gemm_fp16.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/half.h"
#include "kernels/cpu/panels.h"
#include "kernels/cpu/parallel.h"
#include "quant/nf4.h"

enum {
    MR = QS_HALF_MR,
    NR = QS_HALF_NR,
    STRETCH = QS_HALF_STRETCH,
    GROUP = QS_HALF_GROUP,
    KC = 4096, /* depth of a decoded sliver, 768 KiB of the L2 cache; part of the definition */
    STRETCHES = KC / STRETCH,
    SLIVER = KC * NR / 2 + STRETCHES * NR, /* floats of a sliver with its scales */
    STEP_PANELS = 16,    /* of a task: fewer are not worth decoding a sliver again */
    SCALED_EXPONENT = 8, /* largest magnitude of a scaled row: below 2^9 */
};

/* A packed panel is MR floats, 2^-e of its rows, and [k][MR] halves. */
typedef struct {
    const qs_half *half;
    const qs_unit_view *unit;
    const qs_weight *w;
    bool transposed;
    const qs_operand *a;
} operands;

/* ---- the left operand ---- */

/* e such that 2^e brings `largest` into [2^top / 2, 2^top), within what both powers can be in fp32.
 */
static int exponent_for(float largest, int top)
{
    int exponent = 0;
    if (largest > 0.0F) {
        (void)frexpf(largest, &exponent); /* [1/2, 1) 2^exponent */
        exponent = top - exponent;
    }
    return exponent > 126 ? 126 : exponent < -126 ? -126 : exponent;
}

static float largest_of(const qs_operand *a, int64_t row, int64_t depth)
{
    float space[STRETCH], largest = 0.0F;
    for (int64_t k = 0; k < depth; k += STRETCH) {
        const int64_t count = qs_min_i64(STRETCH, depth - k);
        const float *x = qs_operand_row(a, row, k, count, space);
        for (int64_t i = 0; i < count; i++) {
            const float size = fabsf(x[i]);
            largest = size > largest && size <= FLT_MAX ? size : largest;
        }
    }
    return largest;
}

static void pack_left(const qs_panels *p, const qs_panels_part *part)
{
    const operands *o = p->ctx;
    float *unscale = qs_panels_left(p, part->i);
    uint16_t *halves = (uint16_t *)(void *)(unscale + MR);
    const int64_t row0 = p->row0 + part->i;
    float scale[MR], space[MR][STRETCH];
    const float *x[MR] = {NULL};
    for (int i = 0; i < MR; i++) {
        const float largest = i < part->rows ? largest_of(o->a, row0 + i, p->k) : 0.0F;
        const int exponent = exponent_for(largest, SCALED_EXPONENT + 1);
        scale[i] = ldexpf(1.0F, exponent);
        unscale[i] = ldexpf(1.0F, -exponent);
    }
    for (int64_t k = 0; k < p->k; k += STRETCH) {
        const int64_t count = qs_min_i64(STRETCH, p->k - k);
        for (int i = 0; i < part->rows; i++) {
            x[i] = qs_operand_row(o->a, row0 + i, k, count, space[i]);
        }
        o->half->pack(x, scale, count, halves + k * MR);
    }
}

/* ---- the matrix ---- */

/* A decoded sliver: its scales, then its weights. */
static uint16_t *halves_of(float *sliver)
{
    return (uint16_t *)(void *)(sliver + (int64_t)STRETCHES * NR);
}

/* A block of the matrix, or half of one. */
typedef struct {
    const uint8_t *packed;
    float absmax;
} nf4_block;

/* The quantum that was looked up last: the next block is mostly in it, too. */
typedef struct {
    int64_t number;
    qs_nf4_quantum quantum;
} quantum_cache;

/* The block of element `at`, from that element on. */
static nf4_block block_at(const operands *o, int64_t at, quantum_cache *cache)
{
    const int64_t number = o->w->quantum + at / QS_NF4_QUANTUM, inside = at % QS_NF4_QUANTUM;
    const int64_t block = inside / QS_NF4_BLOCK;
    if (cache->number != number) {
        cache->number = number;
        cache->quantum = qs_unit_nf4_quantum(o->unit, number);
    }
    const qs_nf4_quantum *q = &cache->quantum;
    return (nf4_block){.packed = q->packed + inside / 2,
                       .absmax = q->absmax8 == NULL ? q->absmax32[block]
                                                    : qs_nf4_absmax(o->w->map, q->absmax8[block],
                                                                    q->absmax32[0], o->w->offset)};
}

/* W^T: columns [j, j + 32) of it are rows of W, each of `depth` elements from `k0` on. */
static void decode_columns(const qs_panels *p, int64_t j, int64_t k0, int64_t depth, uint16_t *out,
                           float *scale)
{
    const operands *o = p->ctx;
    enum { AHEAD = 128 }; /* bytes: rows are too many streams for the hardware's prefetcher */
    quantum_cache cache[GROUP];
    for (int i = 0; i < GROUP; i++) {
        cache[i].number = -1;
    }
    for (int64_t k = 0; k < depth; k += STRETCH, out += STRETCH * NR, scale += NR) {
        const uint8_t *packed[GROUP];
        for (int i = 0; i < GROUP; i++) {
            nf4_block block = {NULL, 0.0F};
            if (j + i < p->n) {
                block = block_at(o, (j + i) * o->w->in + k0 + k, &cache[i]);
                __builtin_prefetch((const void *)((uintptr_t)block.packed + AHEAD));
            }
            packed[i] = block.packed;
            scale[i] = block.absmax;
        }
        o->half->decode_columns(packed, out);
    }
}

/* W: `rows` <= 64 rows from `k0` on, columns [j, j + 32), which lie in one block of each row. */
static void decode_rows(const qs_panels *p, int64_t j, int64_t k0, int64_t rows, uint16_t *out,
                        float *scale)
{
    const operands *o = p->ctx;
    nf4_block block[STRETCH];
    quantum_cache cache = {.number = -1};
    float largest = 0.0F;
    if (j >= p->n) {
        for (int64_t k = 0; k < rows; k++) {
            memset(out + k * NR, 0, GROUP * sizeof *out);
        }
        memset(scale, 0, GROUP * sizeof *scale);
        return;
    }
    for (int64_t k = 0; k < rows; k++) {
        block[k] = block_at(o, (k0 + k) * o->w->in + j, &cache);
        const float size = fabsf(block[k].absmax);
        largest = size > largest && size <= FLT_MAX ? size : largest;
    }
    const int exponent = exponent_for(largest, 0);
    const float factor = ldexpf(1.0F, exponent), back = ldexpf(1.0F, -exponent);
    for (int64_t k = 0; k < rows; k++) {
        o->half->decode_row(block[k].packed, block[k].absmax * factor, out + k * NR);
    }
    for (int i = 0; i < GROUP; i++) {
        scale[i] = back;
    }
}

/* NR columns, the last ones filled up. */
static void pack_right(const qs_panels *p, const qs_panels_part *part)
{
    const operands *o = p->ctx;
    for (int64_t at = 0; at < NR; at += GROUP) {
        float *scale = part->right + at;
        uint16_t *out = halves_of(part->right) + at;
        if (o->transposed) {
            decode_columns(p, part->j + at, part->k0, part->depth, out, scale);
            continue;
        }
        for (int64_t k = 0; k < part->depth; k += STRETCH) {
            decode_rows(p, part->j + at, part->k0 + k, qs_min_i64(STRETCH, part->depth - k),
                        out + k * NR, scale + k / STRETCH * NR);
        }
    }
}

static void multiply(const qs_panels *p, const qs_panels_part *part)
{
    const operands *o = p->ctx;
    for (int64_t i = part->i; i < part->i + part->rows; i += MR) {
        _Alignas(64) float y[MR * NR] = {0};
        const float *unscale = qs_panels_left(p, i);
        const uint16_t *a = (const uint16_t *)(const void *)(unscale + MR);
        o->half->tile(part->depth, a + part->k0 * MR, halves_of(part->right), part->right, y);
        qs_panels_store(p, i, part->j, y, NR, unscale, part->accumulate);
    }
}

bool qs_gemm_fp16_takes(const qs_weight *w)
{
    return w->kind == QS_WEIGHT_NF4 && w->in % QS_NF4_BLOCK == 0;
}

qs_status qs_gemm_fp16(qs_queue *queue, const qs_unit_view *unit, const qs_weight *w,
                       bool transposed, int64_t m, const qs_operand *a, float *c, int64_t c_stride,
                       bool accumulate)
{
    const int64_t n = transposed ? w->out : w->in, k = transposed ? w->in : w->out;
    const qs_panels_kind kind = {.mr = MR,
                                 .nr = NR,
                                 .kc = KC,
                                 .left_panels = 1,
                                 .left_depth = k,
                                 .step_panels = STEP_PANELS,
                                 .task_slivers = 1,
                                 .panel_floats = MR + k * MR / 2,
                                 .sliver_floats = SLIVER,
                                 .speed = 64,
                                 .pack_left = pack_left,
                                 .pack_right = pack_right,
                                 .multiply = multiply};
    const operands o = {qs_half_get(), unit, w, transposed, a};
    if (o.half == NULL) {
        return QS_FAIL(QS_ERR_ENVIRONMENT, "cpu.gemm: fp16 needs a CPU with AVX512-FP16");
    }
    return qs_panels_multiply(queue, &kind, &o, m, n, k, c, c_stride, accumulate);
}

int64_t qs_gemm_fp16_scratch_count(int threads)
{
    return (int64_t)threads * SLIVER;
}
