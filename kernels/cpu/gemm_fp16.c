#include "kernels/cpu/gemm_fp16.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/cpu/half.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
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
    TASKS_PER_THREAD = 4,
    LEAST_PANELS = 16,     /* of a task: fewer are not worth decoding a sliver again */
    PACKED_MAX = 16 << 20, /* floats of packed A, as in gemm.c */
    SCALED_EXPONENT = 8,   /* largest magnitude of a scaled row: below 2^9 */
};

/* One block of rows of C. */
typedef struct {
    qs_queue *queue;
    const qs_half *half;
    const qs_unit_view *unit;
    const qs_weight *w;
    bool transposed;
    const qs_operand *a;
    int64_t i0, m, n, k;
    int64_t task_panels, row_tasks;
    uint16_t *packed_a; /* [panels][k][MR] */
    float *unscale;     /* [panels][MR] 2^-e */
    float *slivers;     /* [threads][SLIVER] */
    float *c;           /* row i0 */
    int64_t c_stride;
    bool accumulate;
} product;

static int64_t panels_of(int64_t rows)
{
    return qs_ceil_div(rows, MR);
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

/* Elements [first, first + count) of a row; `space` [STRETCH] holds what is produced on demand. */
static const float *left_row(const product *p, int64_t row, int64_t first, int64_t count,
                             float *space)
{
    if (p->a->load == NULL) {
        return p->a->data + row * p->a->stride + first;
    }
    p->a->load(p->a, row, first, count, space);
    return space;
}

static float largest_of(const product *p, int64_t row)
{
    float space[STRETCH], largest = 0.0F;
    for (int64_t k = 0; k < p->k; k += STRETCH) {
        const int64_t count = qs_min_i64(STRETCH, p->k - k);
        const float *x = left_row(p, row, k, count, space);
        for (int64_t i = 0; i < count; i++) {
            const float size = fabsf(x[i]);
            largest = size > largest && size <= FLT_MAX ? size : largest;
        }
    }
    return largest;
}

static void pack_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const product *p = ctx;
    const int64_t row0 = p->i0 + index * MR;
    const int rows = (int)qs_min_i64(MR, p->i0 + p->m - row0);
    float scale[MR] = {0}, space[MR][STRETCH];
    const float *x[MR] = {NULL};
    for (int i = 0; i < rows; i++) {
        const int exponent = exponent_for(largest_of(p, row0 + i), SCALED_EXPONENT + 1);
        scale[i] = ldexpf(1.0F, exponent);
        p->unscale[index * MR + i] = ldexpf(1.0F, -exponent);
    }
    for (int64_t k = 0; k < p->k; k += STRETCH) {
        const int64_t count = qs_min_i64(STRETCH, p->k - k);
        for (int i = 0; i < rows; i++) {
            x[i] = left_row(p, row0 + i, k, count, space[i]);
        }
        p->half->pack(x, scale, count, p->packed_a + (index * p->k + k) * MR);
    }
}

/* ---- the matrix ---- */

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
static nf4_block block_at(const product *p, int64_t at, quantum_cache *cache)
{
    const int64_t number = p->w->quantum + at / QS_NF4_QUANTUM, inside = at % QS_NF4_QUANTUM;
    const int64_t block = inside / QS_NF4_BLOCK;
    if (cache->number != number) {
        cache->number = number;
        cache->quantum = qs_unit_nf4_quantum(p->unit, number);
    }
    const qs_nf4_quantum *q = &cache->quantum;
    return (nf4_block){.packed = q->packed + inside / 2,
                       .absmax = q->absmax8 == NULL ? q->absmax32[block]
                                                    : qs_nf4_absmax(p->w->map, q->absmax8[block],
                                                                    q->absmax32[0], p->w->offset)};
}

/* W^T: columns [j, j + 32) of it are rows of W, each of `depth` elements from `k0` on. */
static void decode_columns(const product *p, int64_t j, int64_t k0, int64_t depth, uint16_t *out,
                           float *scale)
{
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
                block = block_at(p, (j + i) * p->w->in + k0 + k, &cache[i]);
                __builtin_prefetch((const void *)((uintptr_t)block.packed + AHEAD));
            }
            packed[i] = block.packed;
            scale[i] = block.absmax;
        }
        p->half->decode_columns(packed, out);
    }
}

/* W: `rows` <= 64 rows from `k0` on, columns [j, j + 32), which lie in one block of each row. */
static void decode_rows(const product *p, int64_t j, int64_t k0, int64_t rows, uint16_t *out,
                        float *scale)
{
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
        block[k] = block_at(p, (k0 + k) * p->w->in + j, &cache);
        const float size = fabsf(block[k].absmax);
        largest = size > largest && size <= FLT_MAX ? size : largest;
    }
    const int exponent = exponent_for(largest, 0);
    const float factor = ldexpf(1.0F, exponent), back = ldexpf(1.0F, -exponent);
    for (int64_t k = 0; k < rows; k++) {
        p->half->decode_row(block[k].packed, block[k].absmax * factor, out + k * NR);
    }
    for (int i = 0; i < GROUP; i++) {
        scale[i] = back;
    }
}

/* Columns [j0, j0 + NR) of B, `depth` of its rows from `k0` on. */
static void decode_sliver(const product *p, int64_t j0, int64_t k0, int64_t depth, uint16_t *out,
                          float *scale)
{
    for (int g = 0; g < GROUPS; g++) {
        const int64_t j = j0 + (int64_t)g * GROUP;
        if (p->transposed) {
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
static void store(const product *p, int64_t i, int64_t j0, const float *y, bool accumulate)
{
    const int64_t rows = qs_min_i64(MR, p->m - i), cols = qs_min_i64(NR, p->n - j0);
    for (int64_t r = 0; r < rows; r++, y += NR) {
        float *c = p->c + (i + r) * p->c_stride + j0;
        const float unscale = p->unscale[i + r];
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

static void multiply_task(void *ctx, int64_t index, int thread)
{
    const product *p = ctx;
    const int64_t first = index % p->row_tasks * p->task_panels;
    const int64_t last = qs_min_i64(first + p->task_panels, panels_of(p->m));
    const int64_t j0 = index / p->row_tasks * NR;
    float *scale = p->slivers + (int64_t)thread * SLIVER;
    uint16_t *b = (uint16_t *)(void *)(scale + (int64_t)STRETCHES * NR);
    for (int64_t k0 = 0; k0 < p->k; k0 += KC) {
        const int64_t depth = qs_min_i64(KC, p->k - k0);
        decode_sliver(p, j0, k0, depth, b, scale);
        for (int64_t panel = first; panel < last; panel++) {
            _Alignas(64) float y[MR * NR] = {0};
            p->half->tile(depth, p->packed_a + (panel * p->k + k0) * MR, b, scale, y);
            store(p, panel * MR, j0, y, p->accumulate || k0 > 0);
            if (thread == 0) {
                qs_queue_idle(p->queue);
            }
        }
    }
}

static qs_status multiply_rows(product *p)
{
    const int threads = qs_queue_threads(p->queue);
    const int64_t panels = panels_of(p->m), slivers = qs_ceil_div(p->n, NR);
    const int64_t wanted = threads == 1 ? 1 : (int64_t)threads * TASKS_PER_THREAD;
    const int64_t parts =
        qs_min_i64(qs_ceil_div(wanted, slivers), qs_ceil_div(panels, LEAST_PANELS));
    p->task_panels = qs_ceil_div(panels, parts);
    p->row_tasks = qs_ceil_div(panels, p->task_panels);
    float *packed;
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_A, panels * MR * p->k / 2 + panels * MR, &packed));
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_B, (int64_t)threads * SLIVER, &p->slivers));
    p->packed_a = (uint16_t *)(void *)packed;
    p->unscale = packed + panels * MR * p->k / 2;
    qs_parallel_for(p->queue, panels, p->m * p->k, pack_task, p);
    qs_parallel_for(p->queue, slivers * p->row_tasks, p->m * p->n * p->k / 64 + p->n * p->k,
                    multiply_task, p);
    return QS_OK;
}

/* Rows that are packed at once. */
static int64_t rows_at_once(int64_t k)
{
    const int64_t step = (int64_t)LEAST_PANELS * MR, rows = 2 * (int64_t)PACKED_MAX / k;
    return rows < step ? step : rows / step * step;
}

bool qs_gemm_fp16_takes(const qs_weight *w)
{
    return w->kind == QS_WEIGHT_NF4 && w->in % QS_NF4_BLOCK == 0;
}

qs_status qs_gemm_fp16(qs_queue *queue, const qs_unit_view *unit, const qs_weight *w,
                       bool transposed, int64_t m, const qs_operand *a, float *c, int64_t c_stride,
                       bool accumulate)
{
    product p = {.queue = queue,
                 .half = qs_half_get(),
                 .unit = unit,
                 .w = w,
                 .transposed = transposed,
                 .a = a,
                 .n = transposed ? w->out : w->in,
                 .k = transposed ? w->in : w->out,
                 .c_stride = c_stride,
                 .accumulate = accumulate};
    if (p.half == NULL) {
        return QS_FAIL(QS_ERR_ENVIRONMENT, "cpu.gemm: fp16 needs a CPU with AVX512-FP16");
    }
    const int64_t block = rows_at_once(p.k);
    for (p.i0 = 0; p.i0 < m; p.i0 += block) {
        p.m = qs_min_i64(block, m - p.i0);
        p.c = c + p.i0 * c_stride;
        QS_TRY(multiply_rows(&p));
    }
    return QS_OK;
}

int64_t qs_gemm_fp16_scratch_count(int threads)
{
    return (int64_t)threads * SLIVER;
}
