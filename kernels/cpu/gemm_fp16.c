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
    GROUPS = NR / GROUP,
    KC = 4096, /* depth of a decoded sliver, 768 KiB of the L2 cache; part of the definition */
    STRETCHES = KC / STRETCH,
    SLIVER = KC * NR / 2 + STRETCHES * NR, /* floats of a sliver with its scales */
    STEP_PANELS = 16,    /* of a task: fewer are not worth decoding a sliver again */
    SCALED_EXPONENT = 8, /* largest magnitude of a scaled row: below 2^9 */
};

/* Packed A is [panels][k][MR] halves, and behind them [panels][MR] floats, 2^-e of a row. */
typedef struct {
    const qs_half *half;
    const qs_unit_view *unit;
    const qs_weight *w;
    bool transposed;
    const qs_operand *a;
} operands;

static int64_t halves_count(const qs_panels *p)
{
    return qs_panels_count(p) * MR * p->k / 2;
}

static int64_t left_count(const qs_panels *p)
{
    return halves_count(p) + qs_panels_count(p) * MR;
}

static int64_t right_count(const qs_panels *p, int64_t cols)
{
    (void)p;
    (void)cols;
    return SLIVER;
}

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

static void pack_left(const qs_panels *p, int64_t index)
{
    const operands *o = p->ctx;
    uint16_t *halves = (uint16_t *)(void *)p->left;
    float *unscale = p->left + halves_count(p);
    const int64_t row0 = p->i0 + index * MR;
    const int rows = (int)qs_min_i64(MR, p->i0 + p->m - row0);
    float scale[MR] = {0}, space[MR][STRETCH];
    const float *x[MR] = {NULL};
    for (int i = 0; i < rows; i++) {
        const int exponent = exponent_for(largest_of(o->a, row0 + i, p->k), SCALED_EXPONENT + 1);
        scale[i] = ldexpf(1.0F, exponent);
        unscale[index * MR + i] = ldexpf(1.0F, -exponent);
    }
    for (int64_t k = 0; k < p->k; k += STRETCH) {
        const int64_t count = qs_min_i64(STRETCH, p->k - k);
        for (int i = 0; i < rows; i++) {
            x[i] = qs_operand_row(o->a, row0 + i, k, count, space[i]);
        }
        o->half->pack(x, scale, count, halves + (index * p->k + k) * MR);
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
static void pack_right(const qs_panels *p, int64_t j0, int64_t cols, int64_t k0, int64_t depth,
                       float *right)
{
    (void)cols;
    const operands *o = p->ctx;
    float *scale = right;
    uint16_t *out = halves_of(right);
    for (int g = 0; g < GROUPS; g++) {
        const int64_t j = j0 + (int64_t)g * GROUP;
        if (o->transposed) {
            decode_columns(p, j, k0, depth, out + j - j0, scale + (j - j0));
            continue;
        }
        for (int64_t k = 0; k < depth; k += STRETCH) {
            decode_rows(p, j, k0 + k, qs_min_i64(STRETCH, depth - k), out + k * NR + (j - j0),
                        scale + k / STRETCH * NR + (j - j0));
        }
    }
}

/* ---- the product ---- */

/* A tile's sums to C. */
static void store(const qs_panels *p, int64_t i, int64_t j0, const float *y, bool accumulate)
{
    const float *unscales = p->left + halves_count(p);
    const int64_t rows = qs_min_i64(MR, p->m - i), cols = qs_min_i64(NR, p->n - j0);
    for (int64_t r = 0; r < rows; r++, y += NR) {
        float *c = p->c + (i + r) * p->c_stride + j0;
        const float unscale = unscales[i + r];
        if (accumulate) {
            for (int64_t j = 0; j < cols; j++) {
                const float sum = y[j] * unscale; /* two roundings */
                c[j] += sum;
            }
        } else {
            for (int64_t j = 0; j < cols; j++) {
                c[j] = y[j] * unscale;
            }
        }
    }
}

static void multiply(const qs_panels *p, int64_t i0, int64_t rows, int64_t j0, int64_t cols,
                     int64_t k0, int64_t depth, const float *right, bool accumulate)
{
    (void)cols;
    const operands *o = p->ctx;
    const uint16_t *a = (const uint16_t *)(const void *)p->left;
    const uint16_t *b = (const uint16_t *)(const void *)(right + (int64_t)STRETCHES * NR);
    for (int64_t i = i0; i < i0 + rows; i += MR) {
        _Alignas(64) float y[MR * NR] = {0};
        o->half->tile(depth, a + (i / MR * p->k + k0) * MR, b, right, y);
        store(p, i, j0, y, accumulate);
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
    static const qs_panels_kind kind = {.mr = MR,
                                        .nr = NR,
                                        .kc = KC,
                                        .step_panels = STEP_PANELS,
                                        .task_slivers = 1,
                                        .numbers_a_float = 2,
                                        .speed = 64,
                                        .left_count = left_count,
                                        .right_count = right_count,
                                        .left_tasks = qs_panels_count,
                                        .pack_left = pack_left,
                                        .pack_right = pack_right,
                                        .multiply = multiply};
    const operands o = {qs_half_get(), unit, w, transposed, a};
    if (o.half == NULL) {
        return QS_FAIL(QS_ERR_ENVIRONMENT, "cpu.gemm: fp16 needs a CPU with AVX512-FP16");
    }
    return qs_panels_multiply(queue, &kind, &o, m, transposed ? w->out : w->in,
                              transposed ? w->in : w->out, c, c_stride, accumulate);
}

int64_t qs_gemm_fp16_scratch_count(int threads)
{
    return (int64_t)threads * SLIVER;
}
