#include "kernels/cpu/gemm_amx.h"

#include <string.h>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/tile.h"

enum {
    SIDE = QS_TILE_SIDE,
    HALF = QS_TILE_HALF,
    STEP = QS_TILE_STEP,
    KC = 1024, /* depth of a decoded sliver; part of the definition */
    NR = 256,  /* columns of a sliver, 512 KiB of the L2 cache: X is read once for all of them */
    SLIVER = KC * NR / 2, /* floats */
    TASKS_PER_THREAD = 4,
    LEAST_PANELS = 8,      /* of a task: fewer are not worth decoding a sliver again */
    PACKED_MAX = 16 << 20, /* floats of packed A, as in gemm.c */
};

/* One block of rows of C. */
typedef struct {
    qs_queue *queue;
    const qs_tile *tile;
    const qs_isa *isa;
    const qs_operand *a, *b;
    int64_t i0, m, n, k, steps;
    int64_t task_panels, row_tasks;
    uint16_t *packed_a; /* [panels][steps][32 * 32] */
    float *slivers;     /* [threads][SLIVER] */
    float *c;           /* row i0 */
    int64_t c_stride;
    bool accumulate;
} product;

static int64_t panels_of(int64_t rows)
{
    return qs_ceil_div(rows, SIDE);
}

/* Elements [first, first + count) of a stored row; `space` holds what is produced on demand. */
static const float *stored(const qs_operand *op, int64_t row, int64_t first, int64_t count,
                           float *space)
{
    if (op->load == NULL) {
        return op->data + row * op->stride + first;
    }
    op->load(op, row, first, count, space);
    return space;
}

/* One panel of A: its rows side by side in each step. */
static void pack_task(void *ctx, int64_t index, int thread)
{
    (void)thread;
    const product *p = ctx;
    uint16_t *out = p->packed_a + index * p->steps * QS_TILE_STEP_ELEMS;
    const int64_t row0 = index * SIDE, rows = qs_min_i64(SIDE, p->m - row0);
    if (rows < SIDE || p->k % STEP != 0) {
        memset(out, 0, (size_t)(p->steps * QS_TILE_STEP_ELEMS) * sizeof *out);
    }
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t k0 = 0; k0 < p->k; k0 += KC) {
            float space[KC];
            const int64_t depth = qs_min_i64(KC, p->k - k0);
            const float *x = stored(p->a, p->i0 + row0 + i, k0, depth, space);
            for (int64_t k = 0; k < depth; k += STEP) {
                p->tile->round(x + k, qs_min_i64(STEP, depth - k),
                               out + (k0 + k) / STEP * QS_TILE_STEP_ELEMS + i * STEP);
            }
        }
    }
}

/* Where columns [j, j + 16) of a sliver start; their pairs of one step are 16 * 16 words. */
static uint32_t *columns_at(uint32_t *sliver, int64_t steps, int64_t j)
{
    return sliver + j / SIDE * steps * (QS_TILE_STEP_ELEMS / 2) + j % SIDE / HALF * HALF * HALF;
}

/* B's columns are stored rows: 16 of them are rounded, and turned as words of two. */
static void pack_columns(const product *p, int64_t j0, int64_t cols, int64_t k0, int64_t depth,
                         uint32_t *out)
{
    const int64_t steps = qs_ceil_div(depth, STEP), pairs = steps * HALF;
    for (int64_t j = 0; j < qs_ceil_div(cols, SIDE) * SIDE; j += HALF) {
        const int rows = (int)(j < cols ? qs_min_i64(HALF, cols - j) : 0);
        float words[HALF * KC / 2]; /* two bf16 each: moved, never computed with */
        for (int r = 0; r < rows; r++) {
            float space[KC];
            uint16_t *row = (uint16_t *)(void *)(words + r * pairs);
            p->tile->round(stored(p->b, j0 + j + r, k0, depth, space), depth, row);
            memset(row + depth, 0, (size_t)(2 * pairs - depth) * sizeof *row);
        }
        uint32_t *to = columns_at(out, steps, j);
        for (int64_t s = 0; s < steps; s++, to += QS_TILE_STEP_ELEMS / 2) {
            p->isa->transpose(words + s * HALF, pairs, rows, HALF, (float *)(void *)to, HALF, HALF);
        }
    }
}

/* B is stored by its rows: two of them make a row of pairs. */
static void pack_rows(const product *p, int64_t j0, int64_t cols, int64_t k0, int64_t depth,
                      uint32_t *out)
{
    static const float zeros[NR] = {0};
    const int64_t steps = qs_ceil_div(depth, STEP);
    for (int64_t k = 0; k < steps * STEP; k += 2) {
        float space[2][NR];
        uint32_t pairs[NR] = {0};
        const float *even = k < depth ? stored(p->b, k0 + k, j0, cols, space[0]) : zeros;
        const float *odd = k + 1 < depth ? stored(p->b, k0 + k + 1, j0, cols, space[1]) : zeros;
        p->tile->pair(even, odd, cols, pairs);
        for (int64_t j = 0; j < qs_ceil_div(cols, SIDE) * SIDE; j += HALF) {
            memcpy(columns_at(out, steps, j) + k / STEP * (QS_TILE_STEP_ELEMS / 2) +
                       k % STEP / 2 * HALF,
                   pairs + j, HALF * sizeof *pairs);
        }
    }
}

/* A tile's sums to C. */
static void store(const product *p, int64_t i, int64_t j, const float *y, bool accumulate)
{
    const int64_t rows = qs_min_i64(SIDE, p->m - i), cols = qs_min_i64(SIDE, p->n - j);
    for (int64_t r = 0; r < rows; r++, y += SIDE) {
        float *c = p->c + (i + r) * p->c_stride + j;
        if (!accumulate) {
            memcpy(c, y, (size_t)cols * sizeof *c);
            continue;
        }
        for (int64_t col = 0; col < cols; col++) {
            c[col] += y[col];
        }
    }
}

static void multiply_task(void *ctx, int64_t index, int thread)
{
    const product *p = ctx;
    const int64_t first = index % p->row_tasks * p->task_panels;
    const int64_t last = qs_min_i64(first + p->task_panels, panels_of(p->m));
    const int64_t j0 = index / p->row_tasks * NR, cols = qs_min_i64(NR, p->n - j0);
    uint32_t *b = (uint32_t *)(void *)(p->slivers + (int64_t)thread * SLIVER);
    for (int64_t k0 = 0; k0 < p->k; k0 += KC) {
        const int64_t depth = qs_min_i64(KC, p->k - k0), steps = qs_ceil_div(depth, STEP);
        (p->b->transposed ? pack_columns : pack_rows)(p, j0, cols, k0, depth, b);
        p->tile->begin();
        for (int64_t panel = first; panel < last; panel++) {
            const uint16_t *a = p->packed_a + (panel * p->steps + k0 / STEP) * QS_TILE_STEP_ELEMS;
            for (int64_t j = 0; j < cols; j += SIDE) {
                _Alignas(64) float y[SIDE * SIDE];
                p->tile->tile(steps, a, (const uint16_t *)(const void *)columns_at(b, steps, j), y);
                store(p, panel * SIDE, j0 + j, y, p->accumulate || k0 > 0);
            }
            if (thread == 0) {
                qs_queue_idle(p->queue);
            }
        }
        p->tile->end();
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
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_A, panels * p->steps * QS_TILE_STEP_ELEMS / 2, &packed));
    QS_TRY(qs_scratch(QS_SCRATCH_PACK_B, (int64_t)threads * SLIVER, &p->slivers));
    p->packed_a = (uint16_t *)(void *)packed;
    qs_parallel_for(p->queue, panels, p->m * p->k, pack_task, p);
    qs_parallel_for(p->queue, slivers * p->row_tasks, p->m * p->n * p->k / 128 + p->n * p->k,
                    multiply_task, p);
    return QS_OK;
}

/* Rows that are packed at once. */
static int64_t rows_at_once(int64_t k)
{
    const int64_t step = (int64_t)LEAST_PANELS * SIDE, rows = 2 * (int64_t)PACKED_MAX / k;
    return rows < step ? step : rows / step * step;
}

qs_status qs_gemm_amx(qs_queue *queue, int64_t m, int64_t n, int64_t k, const qs_operand *a,
                      const qs_operand *b, float *c, int64_t c_stride, bool accumulate)
{
    product p = {.queue = queue,
                 .tile = qs_tile_get(),
                 .isa = qs_isa_get(),
                 .a = a,
                 .b = b,
                 .n = n,
                 .k = k,
                 .steps = qs_ceil_div(k, STEP),
                 .c_stride = c_stride,
                 .accumulate = accumulate};
    if (p.tile == NULL) {
        return QS_FAIL(QS_ERR_ENVIRONMENT, "cpu.gemm: amx needs a CPU with AMX-BF16");
    }
    const int64_t block = rows_at_once(k);
    for (p.i0 = 0; p.i0 < m; p.i0 += block) {
        p.m = qs_min_i64(block, m - p.i0);
        p.c = c + p.i0 * c_stride;
        QS_TRY(multiply_rows(&p));
    }
    return QS_OK;
}

int64_t qs_gemm_amx_scratch_count(int threads, int64_t longest)
{
    return (int64_t)threads * SLIVER + (int64_t)SIDE * (longest + STEP);
}
